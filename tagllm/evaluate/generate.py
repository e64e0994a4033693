"""Text after a prompt with tags: greedy, batched, up to the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tagllm.config import Split
from tagllm.data.encode import Example
from tagllm.model.attention import plain_attention
from tagllm.model.tagged import TaggedModel
from tagllm.template import OUTPUT
from tagllm.train.build import Built

MAX_NEW_TOKENS = 64
METRIC_ROWS = 200
"""Generating is slow: text metrics look at so many held-out rows."""


@torch.no_grad()
def generate(model: TaggedModel, tokenizer: object, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
    """The text that follows each prompt (ids, tag rows included), in order; stops at end of sequence."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device = model.tags.learned_TD.device
    ids, mask = ids.to(device), mask.to(device)
    with plain_attention(model.backbone):
        made = model.backbone.generate(
            inputs_embeds=model.tags(model.backbone.get_input_embeddings(), ids),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]  # transformers' tokenizers are untyped
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
        )
    texts: list[str] = tokenizer.batch_decode(made, skip_special_tokens=True)  # type: ignore[attr-defined]
    return [text.strip() for text in texts]


def text_metrics(built: Built, split: Split) -> dict[str, float]:
    """BLEU and chrF++ (sacrebleu) and the share of exact matches, on the first held-out rows with {output}."""
    import sacrebleu

    rows = [examples[i] for examples in built.examples(split) for i in range(len(examples))]
    rows = [row for row in rows if (row.marks == OUTPUT).any()][:METRIC_ROWS]
    tokenizer = built.backbone.tokenizer
    made: list[str] = []
    size = built.config.evaluation.rows_per_batch
    for at in range(0, len(rows), size):
        prompts = [row.ids[: _output_at(row)] for row in rows[at : at + size]]
        made += generate(built.model, tokenizer, prompts, MAX_NEW_TOKENS)
    wanted = [tokenizer.decode(row.ids[row.marks == OUTPUT], skip_special_tokens=True).strip() for row in rows]
    return {
        "bleu": sacrebleu.corpus_bleu(made, [wanted]).score,
        "chrf++": sacrebleu.corpus_chrf(made, [wanted], word_order=2).score,
        "exact": float(np.mean([a == b for a, b in zip(made, wanted, strict=True)])),
        "generated_rows": len(rows),
    }


def _output_at(row: Example) -> int:
    return int(np.flatnonzero(row.marks == OUTPUT)[0])

"""Text after a prompt with tags: greedy or beams, batched, up to the end of the line or of the sequence.

D hidden size, p tokens that all prompts of a batch begin with, R rows, L tokens before the answer, S new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from tagllm.model.attention import plain_attention
from tagllm.model.backbone import longest_prompt
from tagllm.model.tagged import TaggedModel

STEP = 16
"""Tokens after which answers that have ended leave the batch."""


def generate(
    model: TaggedModel, tokenizer: Any, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, beams: int = 1,
    rows_per_batch: int = 32,
) -> list[str]:  # fmt: skip
    """The text that follows each prompt (ids, tag rows included), in the order of the prompts, one line each; shorter
    where the backbone takes no more positions."""
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    for start in range(0, len(prompts), rows_per_batch):
        chosen = by_length[start : start + rows_per_batch]
        for at, text in zip(
            chosen, _batch(model, tokenizer, [prompts[at] for at in chosen], max_new_tokens, beams), strict=True
        ):
            texts[at] = text
    return texts


@torch.no_grad()
def _batch(
    model: TaggedModel, tokenizer: Any, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, beams: int
) -> list[str]:
    width = max(map(len, prompts))
    most = max(1, min(max_new_tokens, longest_prompt(model.backbone.config) - width))
    common = _common(prompts) if _all_see(model, width + most) else 0
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = np.r_[:common, width - len(prompt) + common : width]
        ids[row, at] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, at] = 1
    device = model.tags.learned_TD.device
    with plain_attention(model.backbone):
        made = _followed(model, tokenizer, ids.to(device), mask.to(device), common, most, beams)
    texts: list[str] = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.lstrip().split("\n")[0].strip() for text in texts]


def _followed(
    model: TaggedModel, tokenizer: Any, ids_RL: Tensor, mask_RL: Tensor, common: int, most: int, beams: int
) -> list[list[int]]:
    """The tokens behind each of R prompts. Rows that have ended leave the batch every STEP tokens, so that one answer
    without an end does not cost as many as there are rows; beams stay together."""
    embed, ends = model.backbone.get_input_embeddings(), [tokenizer.eos_token_id, *line_ends(tokenizer)]
    embeds_RLD = model.tags(embed, ids_RL)
    cache = _seen(model, embeds_RLD[:1, :common], len(ids_RL) * beams)
    made: list[list[int]] = [[] for _ in ids_RL]
    going, step = torch.arange(len(ids_RL), device=ids_RL.device), most if beams > 1 else STEP
    for done in range(0, most, step):
        new_RS = model.backbone.generate(
            inputs_embeds=embeds_RLD,
            past_key_values=cache,
            attention_mask=mask_RL,
            position_ids=(mask_RL.cumsum(dim=1) - 1).clamp(min=0),
            max_new_tokens=min(step, most - done),
            do_sample=False,
            num_beams=beams,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, tokens in zip(going.tolist(), new_RS.tolist(), strict=True):
            made[row] += tokens
        left = (~torch.isin(new_RS, torch.tensor(ends, device=new_RS.device)).any(dim=1)).nonzero()[:, 0]
        if done + step >= most or not len(left):
            break
        going, new_RS = going[left], new_RS[left]
        if len(left) < len(embeds_RLD):
            cache.batch_select_indices(left)
        embeds_RLD = torch.cat([embeds_RLD[left], model.tags(embed, new_RS)], dim=1)
        mask_RL = torch.cat([mask_RL[left], torch.ones_like(new_RS)], dim=1)
    return made


def _common(prompts: Sequence[NDArray[np.int32]]) -> int:
    """How many tokens all begin with; one at least is left of each."""
    most = min(map(len, prompts)) - 1
    same = np.all([prompt[:most] == prompts[0][:most] for prompt in prompts], axis=0)
    return int(np.argmin(np.append(same, False)))


def _all_see(model: TaggedModel, tokens: int) -> bool:
    """Whether no layer has a window shorter than this: windows count padding, which stands behind what is common."""
    layers: list[Any] = DynamicCache(config=model.backbone.config).layers
    return all(layer.sliding_window >= tokens for layer in layers if layer.is_sliding)


def _seen(model: TaggedModel, embeds_1pD: Tensor, rows: int) -> DynamicCache:
    """Worked examples, as a rule: computed once, and then before each row."""
    cache = DynamicCache(config=model.backbone.config)
    if embeds_1pD.shape[1]:
        model.backbone.base_model(inputs_embeds=embeds_1pD, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(rows)
    return cache


@lru_cache(maxsize=4)
def line_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that end a line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if "\n" in text and i != tokenizer.eos_token_id)

"""Text after a prompt with tags: greedy or beams, batched, up to the end of the line or of the sequence.

D hidden size, p tokens that all prompts begin with, R rows, L tokens before the answer, S new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from tagllm.evaluate.dealt import dealt
from tagllm.model.attention import plain_attention
from tagllm.model.backbone import longest_prompt
from tagllm.model.loading import is_sharded
from tagllm.model.tagged import TaggedModel
from tagllm.ranks import Ranks

STEP = 16
"""Tokens after which answers that have ended leave the batch."""


def generate(
    model: TaggedModel, tokenizer: Any, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, beams: int = 1,
    rows_per_batch: int = 32, ranks: Ranks | None = None,
) -> list[str]:  # fmt: skip
    """The text that follows each prompt (ids, tag rows included), in the order of the prompts, one line each; shorter
    where the backbone takes no more positions.

    Args:
        ranks: all write a share, and have all texts at the end; they ask for the same ones.
    """
    ranks, lengths = ranks or Ranks(0, 1, model.tags.learned_TD.device), [len(prompt) for prompt in prompts]
    widest = max(lengths, default=0)
    common = _common(prompts) if lengths and _all_see(model, widest + max_new_tokens) else 0
    in_step = ranks if is_sharded(model) else None
    writer = _Writer(model, tokenizer, max_new_tokens, beams, common, in_step, widest if in_step else 0)
    return dealt(lengths, rows_per_batch, lambda batch: writer.texts([prompts[row] for row in batch]), ranks)


class _Writer(NamedTuple):
    model: TaggedModel
    tokenizer: Any
    max_new_tokens: int
    beams: int
    common: int
    in_step: Ranks | None
    """Ranks that share the backbone, so that all take a pass wherever one does."""
    widest: int
    """Of the prompts of ranks in step: all texts end where it leaves no more positions, and none passes its last."""

    @torch.no_grad()
    def texts(self, prompts: Sequence[NDArray[np.int32]]) -> list[str]:
        """Of one batch."""
        width, common = max(map(len, prompts)), self.common
        room = longest_prompt(self.model.backbone.config) - max(width, self.widest)
        most = max(1, min(self.max_new_tokens, room))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            at = np.r_[:common, width - len(prompt) + common : width]
            ids[row, at] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, at] = 1
        device = self.model.tags.learned_TD.device
        with plain_attention(self.model.backbone):
            made = self._followed(ids.to(device), mask.to(device), most)
        texts: list[str] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.lstrip().split("\n")[0].strip() for text in texts]

    def _followed(self, ids_RL: Tensor, mask_RL: Tensor, most: int) -> list[list[int]]:
        """The tokens behind each of R prompts. Rows that have ended leave the batch every STEP tokens, so that one
        answer without an end does not cost as many as there are rows; beams stay together."""
        embed, done = self.model.backbone.get_input_embeddings(), 0
        cache: DynamicCache | None = self._seen(embed, ids_RL)
        made: list[list[int]] = [[] for _ in ids_RL]
        going, step = torch.arange(len(ids_RL), device=ids_RL.device), most if self.beams > 1 else STEP
        while self._any(len(going) > 0):
            new_RS = self._next(self.model.tags(embed, ids_RL), mask_RL, max(1, min(step, most - done)), cache)
            done += step
            for row, tokens in zip(going.tolist(), new_RS.tolist(), strict=False):
                made[row] += tokens
            ended_R = torch.isin(new_RS, torch.tensor(self._ends, device=new_RS.device)).any(dim=1)
            left = (~ended_R).nonzero()[:, 0] if len(going) and done < most else going[:0]
            if cache is not None and 0 < len(left) < len(going):
                cache.batch_select_indices(left)
            going = going[left]
            ids_RL = torch.cat([ids_RL[left], new_RS[left]], dim=1)
            mask_RL = torch.cat([mask_RL[left], torch.ones_like(new_RS[left])], dim=1)
            if not len(going):  # all have ended here: a token alone keeps step with ranks where some have not
                ids_RL, cache = new_RS[:1, -1:], None
                mask_RL = torch.ones_like(ids_RL)
        return made

    def _seen(self, embed: Any, ids_RL: Tensor) -> DynamicCache:
        """Worked examples, as a rule: computed once, and then before each row."""
        cache = DynamicCache(config=self.model.backbone.config)
        if self.common:
            embeds_1pD = self.model.tags(embed, ids_RL[:1, : self.common])
            self.model.backbone.base_model(inputs_embeds=embeds_1pD, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(ids_RL) * self.beams)
        return cache

    def _next(self, embeds_RLD: Tensor, mask_RL: Tensor, most: int, cache: DynamicCache | None) -> Tensor:
        """At most so many tokens more (R, S), behind all rows, of which a cache may have seen a beginning."""
        new_RS: Tensor = self.model.backbone.generate(
            inputs_embeds=embeds_RLD,
            past_key_values=cache,
            attention_mask=mask_RL,
            position_ids=(mask_RL.cumsum(dim=1) - 1).clamp(min=0),
            max_new_tokens=most,
            do_sample=False,
            num_beams=self.beams,
            eos_token_id=self._ends,
            pad_token_id=self.tokenizer.pad_token_id,
            synced_gpus=self.in_step is not None,
        )
        return new_RS

    @property
    def _ends(self) -> list[int]:
        return [self.tokenizer.eos_token_id, *line_ends(self.tokenizer)]

    def _any(self, mine: bool) -> bool:
        """Whether it is so on any of the ranks in step."""
        return mine if self.in_step is None else bool(self.in_step.sum([mine])[0])


def _common(prompts: Sequence[NDArray[np.int32]]) -> int:
    """How many tokens all begin with; one at least is left of each."""
    most = min(map(len, prompts)) - 1
    same = np.all([prompt[:most] == prompts[0][:most] for prompt in prompts], axis=0)
    return int(np.argmin(np.append(same, False)))


def _all_see(model: TaggedModel, tokens: int) -> bool:
    """Whether no layer has a window shorter than this: windows count padding, which stands behind what is common."""
    layers: list[Any] = DynamicCache(config=model.backbone.config).layers
    return all(layer.sliding_window >= tokens for layer in layers if layer.is_sliding)


@lru_cache(maxsize=4)
def line_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that end a line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if "\n" in text and i != tokenizer.eos_token_id)

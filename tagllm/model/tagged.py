"""The frozen backbone with tags and heads: one forward from a batch to summed losses, values and features.

B rows, P prefix and L live positions, D hidden size, N labelled positions, K head outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tagllm.data.batch import Batch
from tagllm.data.encode import TagLayout
from tagllm.model.attention import FrozenCache, use_two_part_attention
from tagllm.model.embedding import TagEmbedding
from tagllm.model.loss import Sums, token_losses, value_losses
from tagllm.model.prefix import Prefix, PrefixMemory, positions_of
from tagllm.tags import Head, Tag
from tagllm.template import OUTPUT, SPAN


class Output(NamedTuple):
    """`token_loss_N` per labelled position; `values_BK` in units of the data (regression) or logits; features for
    closed-form fits: the state at the head's position, the mean over the fields, and the last state of the prefix."""

    sums: Sums
    token_loss_N: Tensor
    values_BK: Tensor
    last_BD: Tensor
    mean_BD: Tensor
    prefix_last_BD: Tensor


class HeadModule(nn.Module):
    """The trained form of a `Head`: learns standardised targets, answers in units of the data."""

    mean_K: Tensor
    std_K: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.spec = head.spec
        self.weight_KF = nn.Parameter(head.weight_KF.clone())
        self.bias_K = nn.Parameter(head.bias_K.clone())
        self.register_buffer("mean_K", head.mean_K.clone())
        self.register_buffer("std_K", head.std_K.clone())

    def forward(self, last_BD: Tensor, mean_BD: Tensor) -> Tensor:
        features_BF = {"last": last_BD, "mean": mean_BD, "both": torch.cat([last_BD, mean_BD], dim=1)}[self.spec.reads]
        return features_BF @ self.weight_KF.T + self.bias_K

    def standardise(self, target_BK: Tensor) -> Tensor:
        return target_BK if self.spec.classes else (target_BK - self.mean_K) / self.std_K

    def unstandardise(self, values_BK: Tensor) -> Tensor:
        return values_BK if self.spec.classes else values_BK * self.std_K + self.mean_K


class TaggedModel(nn.Module):
    """Backbone (frozen), tag rows and heads (learned).

    Args:
        backbone: a transformers causal LM, frozen and in eval mode.
        tags: every tag of the layout; learned ones become rows of one parameter.
        remember_bytes: budget of the prefix memory; 0 remembers nothing (a must under ZeRO-3).
        reads_tokens: whether any token is supervised; decided by the config, so that all ranks call the LM head alike.
    """

    def __init__(
        self, backbone: Any, tags: dict[str, Tag], layout: TagLayout, remember_bytes: int, reads_tokens: bool
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.reads_tokens = backbone, layout, reads_tokens
        rows = {name: tags[name].rows_PD for name in layout.lengths}
        hidden_size = backbone.config.get_text_config().hidden_size
        empty = [torch.zeros(0, hidden_size)]
        self.tags = TagEmbedding(
            torch.cat([*empty, *(rows[name] for name in rows if name not in layout.learned)]),
            torch.cat([*empty, *(rows[name] for name in layout.learned)]),
            layout.vocabulary_size,
        )
        heads = {name: tags[name].head for name in layout.heads}
        self.heads = nn.ModuleDict({name: HeadModule(head) for name, head in heads.items() if head is not None})
        for name, head in self.heads.items():
            head.requires_grad_(name in layout.learned)
        self.memory = PrefixMemory(remember_bytes) if remember_bytes else None
        self.two_part = use_two_part_attention(backbone)

    def forward(self, batch: Batch) -> Output:
        """Prefix without a graph, live part on top of it, then losses at the supervised positions only."""
        prefix = self.encode_prefix(batch) if batch.prefix_ids_BP.shape[1] else None
        live_BLD = self._decode(
            batch.live_ids_BL,
            torch.cat([batch.prefix_mask_BP, batch.live_mask_BL], dim=1),
            self._cache_of(prefix) if prefix else None,
        ).last_hidden_state
        last_BD = live_BLD[torch.arange(len(live_BLD), device=live_BLD.device), batch.read_at_B].float()
        pooled_BD = (live_BLD * batch.live_pool_BL[..., None]).sum(dim=1).float()
        num_pooled_B = batch.prefix_pool_BP.sum(dim=1) + batch.live_pool_BL.sum(dim=1)
        if prefix:
            pooled_BD = pooled_BD + prefix.pooled_BD.float()
        mean_BD = pooled_BD / num_pooled_B.clamp(min=1)[:, None]
        token_loss_N = self._token_losses(live_BLD, batch)
        value_sum, values_BK = self._values(last_BD, mean_BD, batch)
        sums = Sums(
            token_loss_N[batch.label_term_N == SPAN].sum(),
            token_loss_N[batch.label_term_N == OUTPUT].sum(),
            value_sum,
        )
        prefix_last_BD = prefix.last_BD.float() if prefix else torch.zeros_like(last_BD)
        return Output(sums, token_loss_N, values_BK, last_BD, mean_BD, prefix_last_BD)

    def _cache_of(self, prefix: Prefix) -> DynamicCache:
        """A fresh cache for one live pass; without two-part attention transformers appends to it out of place."""
        if self.two_part:
            return FrozenCache(prefix.keys, prefix.values)
        return DynamicCache(zip(prefix.keys, prefix.values, strict=True))

    def encode_prefix(self, batch: Batch) -> Prefix:
        """Keys, values and hidden sums of the prefix; from memory where it is there."""
        ids_BP, mask_BP, pool_BP = batch.prefix_ids_BP, batch.prefix_mask_BP, batch.prefix_pool_BP
        if self.memory is None:
            return self._compute_prefix(ids_BP, mask_BP, pool_BP)
        return self.memory.prefix(batch.row_B.tolist(), ids_BP, mask_BP, pool_BP, self._compute_prefix)

    @torch.no_grad()
    def _compute_prefix(self, ids_BP: Tensor, mask_BP: Tensor, pool_BP: Tensor) -> Prefix:
        out = self._decode(ids_BP, mask_BP, DynamicCache())  # without a config: sliding layers keep all keys too
        layers = out.past_key_values.layers
        hidden_BPD = out.last_hidden_state
        return Prefix(
            tuple(layer.keys for layer in layers),
            tuple(layer.values for layer in layers),
            hidden_BPD[:, -1],
            torch.where(pool_BP[..., None] > 0, hidden_BPD, 0).sum(dim=1),
        )

    def _decode(self, ids_BS: Tensor, mask: Tensor, cache: DynamicCache | None) -> Any:
        """`mask` covers the cached positions too; position ids follow from it."""
        return self.backbone.base_model(
            inputs_embeds=self.tags(self.backbone.get_input_embeddings(), ids_BS),
            attention_mask=mask,
            position_ids=positions_of(mask)[:, mask.shape[1] - ids_BS.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        )

    def _token_losses(self, live_BLD: Tensor, batch: Batch) -> Tensor:
        if not self.reads_tokens:
            return live_BLD.flatten(0, 1)[batch.label_at_N].float().sum(dim=1) * 0.0
        hidden_ND = live_BLD.flatten(0, 1)[batch.label_at_N]
        return token_losses(self._logits(hidden_ND), batch.label_N)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        config = self.backbone.config.get_text_config()
        logits_NV: Tensor = self.backbone.get_output_embeddings()(hidden_ND)
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits_NV / cap) * cap if cap else logits_NV

    def _values(self, last_BD: Tensor, mean_BD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every head sees every row and each row keeps its own head's answer: the same modules on all ranks."""
        value_sum = last_BD.sum() * 0.0
        values_BK = torch.full_like(batch.target_BK, torch.nan)
        for index, head in enumerate(self.heads.values()):
            assert isinstance(head, HeadModule)
            answer_BK = head(last_BD, mean_BD)
            mine_B = batch.head_B == index
            width = answer_BK.shape[1]
            spec = head.spec
            target_BK = head.standardise(batch.target_BK[:, : 1 if spec.classes else width])
            losses_BK = value_losses(answer_BK, target_BK, len(spec.classes or []))
            value_sum = value_sum + (losses_BK * mine_B[:, None]).sum()
            answer_BK = nn.functional.pad(head.unstandardise(answer_BK), (0, values_BK.shape[1] - width))
            values_BK = torch.where(mine_B[:, None], answer_BK.detach(), values_BK)
        return value_sum, values_BK

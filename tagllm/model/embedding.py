"""The token embedding with tag rows behind the vocabulary.

V vocabulary, T tag rows (frozen ones first), D hidden size, B rows, S positions, N = B S.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tagllm.model.gather import gather_rows


class TagEmbedding(nn.Module):
    """Looks ids up in the backbone's embedding (ids < V) or in the tag rows (ids >= V).

    A plain `nn.Embedding` is read directly, in one kernel with the tag rows. Any other module is called, so whatever it
    does to its rows (Gemma scales them) stays as it is. Only `learned_TD` has a gradient.
    """

    frozen_TD: Tensor
    learned_TD: Tensor

    def __init__(self, frozen_TD: Tensor, learned_TD: Tensor, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.register_buffer("frozen_TD", frozen_TD)
        if len(learned_TD):
            self.learned_TD = nn.Parameter(learned_TD.clone())
        else:  # neither an optimizer nor ZeRO-3 takes an empty parameter
            self.register_buffer("learned_TD", learned_TD)

    def forward(self, token_embedding: nn.Module, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings in `dtype` (None: the backbone's); the learned rows stay fp32 behind the cast."""
        if type(token_embedding) is nn.Embedding and not hasattr(token_embedding.weight, "ds_id"):
            table_VD, size = token_embedding.weight, self.vocabulary_size
        else:
            table_VD, ids_BS = self._looked_up(token_embedding, ids_BS)
            size = len(table_VD)
        return gather_rows(table_VD, self.frozen_TD, self.learned_TD, ids_BS, size, dtype or table_VD.dtype)

    def _looked_up(self, token_embedding: nn.Module, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """A table (N, D) of each position's token row, and the ids that fit it: token n of the batch, then the tags.

        ZeRO-3 needs the call too (it marks parameters with `ds_id`): hooks around the module gather its weight. Costs
        one more read and write of all rows than the direct way."""
        tokens_ND: Tensor = token_embedding(ids_BS.clamp(0, self.vocabulary_size - 1)).flatten(0, 1)
        at_BS = torch.arange(len(tokens_ND), device=ids_BS.device).view_as(ids_BS)
        tag_BS = ids_BS - self.vocabulary_size
        return tokens_ND, torch.where(tag_BS < 0, at_BS, tag_BS + len(tokens_ND))

"""The token embedding with tag rows behind the vocabulary.

V vocabulary, T tag rows (frozen ones first), D hidden size, B rows, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TagEmbedding(nn.Module):
    """Looks ids up in the backbone's embedding (ids < V) or in the tag rows (ids >= V).

    The backbone's own embedding module is called, so whatever it does to its rows (Gemma scales them) stays as it is.
    Only `learned_TD` has a gradient.
    """

    frozen_TD: Tensor

    def __init__(self, frozen_TD: Tensor, learned_TD: Tensor, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.learned_TD = nn.Parameter(learned_TD.clone())
        self.register_buffer("frozen_TD", frozen_TD)

    def forward(self, token_embedding: nn.Module, ids_BS: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings in `dtype` (None: the backbone's); the learned rows stay fp32 behind the cast."""
        is_tag_BS = ids_BS >= self.vocabulary_size
        tokens_BSD: Tensor = token_embedding(ids_BS.masked_fill(is_tag_BS, 0)).to(dtype)
        rows_TD = torch.cat([self.frozen_TD, self.learned_TD]).to(tokens_BSD.dtype)
        if not len(rows_TD):  # the control without a tag
            return tokens_BSD
        tags_BSD = nn.functional.embedding((ids_BS - self.vocabulary_size).clamp(min=0), rows_TD)
        return torch.where(is_tag_BS[..., None], tags_BSD, tokens_BSD)

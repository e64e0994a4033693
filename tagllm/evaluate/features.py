"""What heads and probes read of some rows.

n rows, D hidden size (the means of several layers and pools are side by side), K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tagllm.arrays import Floats
from tagllm.config import Reads
from tagllm.evaluate.choosing import Rows
from tagllm.files import load_tensors, tensor_bytes, write_whole
from tagllm.head import states_read


class Features(NamedTuple):
    last_nD: Floats
    mean_nD: Floats
    targets_nK: Floats
    """In units of the data."""

    def rows(self, reads: Reads) -> Rows:
        """What a head with `reads` is fitted on."""
        return Rows(np.concatenate(states_read(reads, self.last_nD, self.mean_nD), axis=1), self.targets_nK)

    @classmethod
    def together(cls, parts: Sequence[Features]) -> Features:
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def none(self) -> Features:
        """The same of no row."""
        return Features(*(column[:0] for column in self))

    def save(self, path: Path) -> None:
        write_whole(path, tensor_bytes({name: torch.from_numpy(value) for name, value in self._asdict().items()}))

    @classmethod
    def load(cls, path: Path) -> Features:
        return cls(**{name: tensor.numpy() for name, tensor in load_tensors(path).items()})

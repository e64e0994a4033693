"""What a run answers on held-out rows, for people and for figures: held_out.csv and held_out.safetensors.

n rows, K head outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tagllm.arrays import Floats
from tagllm.build import Built
from tagllm.config import Split
from tagllm.data.writers import numbered, open_writer
from tagllm.evaluate.passes import Pass
from tagllm.evaluate.scoring import by_head
from tagllm.files import tensor_bytes, write_whole, writing

NAME = "held_out"


def write_held_out(built: Built, split: Split, held_out: Pass, folder: Path) -> None:
    """As tensors `values_nK` and `targets_nK`, with the head's name in front where there are several; and as a table
    of the rows with a target: where each stands in the data, its target and the answer (of classes the likeliest)."""
    with writing(folder):
        write_whole(folder / f"{NAME}.safetensors", tensor_bytes(by_head(built, split, held_out, _pairs)))
        with open_writer(folder / f"{NAME}.csv", ["row"]) as table:
            for row in _rows(built, split, held_out):
                table.write(row)


def _pairs(values_nK: Floats, targets_nK: Floats, *_: Any) -> dict[str, torch.Tensor]:
    return {"values_nK": torch.tensor(values_nK), "targets_nK": torch.tensor(targets_nK)}


def _rows(built: Built, split: Split, held_out: Pass) -> Iterator[dict[str, Any]]:
    origins = np.array([origin for rows in built.examples(split) for origin in rows.origins()], object)
    for name, spec in built.layout.heads.items():
        mine_n = built.rows_with(split, name)
        of_head = (part[mine_n, : spec.outputs] for part in (held_out.targets_nK, held_out.values_nK))
        for origin, target_K, value_K in zip(origins[mine_n], *of_head, strict=True):
            if not np.isfinite(target_K).any():
                continue
            found: dict[str, Any]
            if spec.classes:
                found = {"target": spec.classes[int(target_K[0])], "predicted": spec.classes[int(value_K.argmax())]}
            else:
                of = {"target": target_K.tolist(), "predicted": value_K.tolist()}
                found = {n: v for kind in of for n, v in zip(numbered(kind, spec.outputs), of[kind], strict=True)}
            yield {"row": origin, **({"head": name} if len(built.layout.heads) > 1 else {}), **found}

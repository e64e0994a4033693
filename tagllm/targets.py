"""What heads are to learn, looked at before anything is trained: is there something to learn, and of every class?

n rows, K head outputs.
"""

from __future__ import annotations

import numpy as np

from tagllm.arrays import Floats
from tagllm.data.dataset import Data
from tagllm.errors import SharedError, UserError
from tagllm.stage import Stage


def check_targets(stage: Stage, data: Data) -> list[str]:
    """A line for each new head some of whose classes no training row has; loaded ones know what they were trained on.

    Raises:
        UserError: its target is always the same, or cannot be computed with.
    """
    notes, problems = list[str](), list[str]()
    for name, spec in stage.heads.items():
        if name in stage.loaded:
            continue
        targets_nK, where = targets_of(stage, name, data), f"tags.{name}.head"
        if not spec.classes:
            try:
                mean_and_spread(targets_nK, where)
            except UserError as error:
                problems += error.problems
            continue
        found = np.bincount(targets_nK[:, 0].astype(int), minlength=len(spec.classes))
        never = [label for label, number in zip(spec.classes, found, strict=True) if not number]
        if len(never) == len(spec.classes) - 1:
            (only,) = {*spec.classes} - {*never}
            problems.append(f"{where}: all training rows are of the class {only}; there is nothing to learn.")
        elif never:
            notes.append(f"{where}.classes: no training row is of {', '.join(never)}, so that is never learned.")
    if problems:
        raise UserError(*problems)
    return notes


def targets_of(stage: Stage, name: str, data: Data) -> Floats:
    """Those of all training rows whose prompt has this tag; of classes their numbers."""
    width = stage.heads[name].num_targets
    mine = [rows for rows, template in zip(data.splits["train"], stage.templates, strict=True) if name in template.tags]
    return np.concatenate([np.zeros((0, width), np.float32), *(rows.targets().reshape(-1, width) for rows in mine)])


def mean_and_spread(targets_nK: Floats, where: str) -> tuple[Floats, Floats]:
    """Of each target (K), in fp32.

    Raises:
        UserError: a target that is always the same, or whose squares fp32 cannot hold.
    """
    if not (targets_nK.max(axis=0, initial=-np.inf) > targets_nK.min(axis=0, initial=np.inf)).all():
        raise SharedError(f"{where}: the target is the same in all training rows; there is nothing to learn.")
    target_Kn = np.ascontiguousarray(targets_nK.T)  # along columns numpy does not add up in pairs, and loses digits
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        mean_K, std_K = target_Kn.mean(axis=1), target_Kn.std(axis=1)
    if not (np.isfinite(std_K) & (std_K > 0)).all():
        spread = ", ".join(f"{std:.3g}" for std in targets_nK.std(axis=0, dtype=np.float64))
        raise SharedError(
            f"{where}: the standard deviation of the target in training rows is {spread}, whose square fp32 cannot "
            "hold. Give the target in other units."
        )
    return mean_K, std_K

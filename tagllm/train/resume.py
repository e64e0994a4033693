"""Where training goes on: the newest checkpoint that is whole, of this very run, and holds numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tagllm.errors import UserError
from tagllm.train import checkpoint


def newest_sound(folder: Path, identity: Mapping[str, str]) -> checkpoint.TrainState | None:
    """None where nothing was saved yet. Says which damaged ones it passes over.

    Raises:
        UserError: none is sound, or the newest that is was made otherwise or holds numbers that are not finite.
    """
    state, skipped = checkpoint.load_newest(folder)
    for line in skipped:
        print(f"warning: {line}", flush=True)
    if state is None and skipped:
        raise UserError(
            f"{folder}: no checkpoint is sound (see the warnings above); starting over would overwrite them. Restore "
            "one, or give another output=FOLDER."
        )
    if state is not None:
        checkpoint.check_identity(state, identity)
        _refuse_unsound(folder, state)
    return state


def _refuse_unsound(folder: Path, state: checkpoint.TrainState) -> None:
    """A whole file can hold numbers that are not; going on from them would ruin every step."""
    bad = [name for name, tensor in state.tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{folder / f'step-{state.step:08d}'}: holds numbers that are not finite ({', '.join(bad)}). Remove that "
            "folder; training then goes on from the checkpoint before it."
        )

"""The DeepSpeed settings of a run: ours, and on top of them the user's JSON as far as it does not contradict."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tagllm.config import EngineConfig, OptimConfig
from tagllm.errors import UserError
from tagllm.ranks import Ranks

BUCKET_ELEMENTS = 1_000_000  # DeepSpeed's default reserves 1 GB for gradients of a few kilobytes
PERSIST_ELEMENTS = 100_000  # tags, heads, norms and scales stay resident; "auto" is exactly one ten-row tag of 7B


def settings(optim: OptimConfig, engine: EngineConfig, ranks: Ranks) -> dict[str, Any]:
    """
    Raises:
        UserError: the user's JSON cannot be read, contradicts the config, has a key or value of ZeRO that DeepSpeed
            does not know, or a key that is nearly one of ours (DeepSpeed passes by what it does not know).
    """
    # of more ranks than rows no step is taken, but they may score
    num_micro_batches = max(math.ceil(optim.rows_per_step // ranks.size / optim.rows_per_micro_batch), 1)
    own = {
        "train_batch_size": num_micro_batches * ranks.size,
        "train_micro_batch_size_per_gpu": 1,  # a micro-batch is one item to DeepSpeed; rows are our business
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": engine.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSIST_ELEMENTS,
            "memory_efficient_linear": False,  # would replace torch's linear map everywhere; frozen maps have their own
            "overlap_comm": False,
        },
    }
    if engine.deepspeed is None:
        return own
    theirs = read_deepspeed(engine.deepspeed)
    _refuse_misspelt(theirs, {*own, *_OURS}, engine.deepspeed)
    found = _merged(own, theirs, engine.deepspeed)
    _require_known(found["zero_optimization"], engine.deepspeed)
    return found


def _refuse_misspelt(theirs: dict[str, Any], known: set[str], where: str) -> None:
    meant = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.85) for key in theirs if key not in known}
    if any(meant.values()):
        raise UserError(
            *(
                f"engine.deepspeed: {where} sets {key}, which DeepSpeed passes by; it reads {close[0]}. Mend it, or "
                "leave it out."
                for key, close in meant.items()
                if close
            )
        )


def _require_known(zero: dict[str, Any], where: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise UserError(
            *(
                f"engine.deepspeed: {where} sets zero_optimization.{'.'.join(map(str, one['loc']))} to "
                f"{one['input']!r}; DeepSpeed says: {one['msg']}. Mend it, or leave it out."
                for one in error.errors()
            )
        ) from None


def read_deepspeed(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"engine.deepspeed: {path} cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"engine.deepspeed: {path} holds a {type(settings).__name__}; it must be a JSON object.")
    return settings


def _merged(own: dict[str, Any], theirs: dict[str, Any], where: str, at: str = "") -> dict[str, Any]:
    """Their settings on top of ours. Batch sizes, clipping, precision and optimizer belong to our config."""
    clashes = []
    merged = dict(own)
    for key, value in theirs.items():
        place = f"{at}{key}"
        if place in _OURS and value not in (own.get(key), "auto"):
            clashes.append(
                f"engine.deepspeed: {where} sets {place} to {value!r}; set {_OURS[place]} in the config instead."
            )
        elif isinstance(value, dict) and isinstance(own.get(key), dict):
            merged[key] = _merged(own[key], value, where, f"{place}.")
        elif isinstance(own.get(key), dict) and value != "auto":
            clashes.append(f"engine.deepspeed: {where} sets {place} to {value!r}; it must be a JSON object.")
        elif value != "auto":
            merged[key] = value
    if clashes:
        raise UserError(*clashes)
    return merged


_OURS = {
    "train_batch_size": "optim.rows_per_step",
    "train_micro_batch_size_per_gpu": "optim.rows_per_micro_batch",
    "gradient_accumulation_steps": "optim.rows_per_step",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.tag_lr and optim.head_lr",
    "scheduler": "optim.schedule",
    "zero_optimization.stage": "engine.zero_stage",
    "bf16": "backbone.dtype",
    "bfloat16": "backbone.dtype",
    "fp16": "backbone.dtype",
    "amp": "backbone.dtype",
    "torch_autocast": "backbone.dtype",
}

"""One rank that loads SmolLM2 into shards and prints what it took: DTYPE QUANTIZE -> a line of JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from tagllm.config import EngineConfig, OptimConfig
from tagllm.model.backbone import DTYPES, resolve
from tagllm.model.loading import load_model
from tagllm.ranks import Ranks
from tagllm.train.engine import sharding
from tests import tiny


def memory(name: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resident(parameter: nn.Parameter) -> int:
    """Bytes that stay on this rank between steps."""
    whole = parameter.ds_numel * parameter.element_size() if parameter.ds_persist else 0
    return parameter.ds_tensor.nbytes + whole


def main() -> None:
    dtype, quantize, folder = sys.argv[1:]
    ranks = Ranks.start(120)
    optim = OptimConfig(steps=1, rows_per_step=ranks.size, rows_per_micro_batch=1)
    place = sharding(optim, EngineConfig(zero_stage=3), ranks)
    if ranks.rank == 0:
        tiny.save_backbone(Path(folder))
    ranks.gather(None)
    load_model(folder, DTYPES[dtype], ranks.device, quantize, place)  # libraries, threads and pools are there now
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model, *_ = load_model(resolve("smollm2"), DTYPES[dtype], ranks.device, quantize, place)
    peak = memory("VmHWM") - before
    parameters = list(model.parameters())
    # what a rank must hold for a moment is the tensor as it is read, before it is quantised
    config = model.config
    tensors = (config.vocab_size * config.hidden_size, config.intermediate_size * config.hidden_size)
    result = {
        "peak": peak, "shard": sum(p.ds_tensor.nbytes for p in parameters), "resident": sum(map(resident, parameters)),
        "whole": sum(p.ds_numel * p.element_size() for p in parameters),
        "largest": sum(tensors) * torch.empty(0, dtype=DTYPES[dtype]).element_size(),
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    ranks.gather(None)
    os._exit(0)  # gloo's threads sometimes abort the interpreter's own end


if __name__ == "__main__":
    main()

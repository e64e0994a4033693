"""The door to DeepSpeed: `deepspeed_settings.py` says what it is told, nothing but these two imports it.

DeepSpeed runs in its fp32 mode at every ZeRO stage and never casts: frozen weights keep their own dtype, learned rows,
heads and moments are fp32.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tagllm.config import EngineConfig, OptimConfig
from tagllm.data.batch import Batch
from tagllm.model.loading import Place
from tagllm.model.tagged import Output, TaggedModel
from tagllm.ranks import Ranks
from tagllm.rendezvous import limit_all_groups
from tagllm.train.deepspeed_settings import settings

MOMENTS = ("exp_avg", "exp_avg_sq")


def sharding(optim: OptimConfig, config: EngineConfig, ranks: Ranks) -> Place | None:
    """What leaves of a module's parameters only this rank's part; None below stage 3. Collective."""
    if config.stage < 3:
        return None
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    how = settings(optim, config, ranks)
    group = ranks.of_my_node() if config.shard_over == "node" else None

    def place(module: nn.Module) -> None:
        if module._parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=how, data_parallel_group=group)

    return place


def gather_on_use(model: nn.Module, optim: OptimConfig, config: EngineConfig, ranks: Ranks) -> None:
    """Makes each module of a sharded model gather what it needs in forward passes; no step is taken. Collective. Of a
    model that every rank holds whole (below stage 3): nothing."""
    if config.stage < 3:
        return
    _deepspeed().initialize(model=model, config=settings(optim, config, ranks), dist_init_required=False)
    limit_all_groups(config.timeout_s)


class Engine:
    """Forward, backward and step over all ranks, and the learned state as plain tensors."""

    def __init__(self, model: TaggedModel, optim: OptimConfig, config: EngineConfig, ranks: Ranks) -> None:
        deepspeed = _deepspeed()
        self.config, self.ranks, self.model = config, ranks, model
        if config.shard_over == "node":
            for parameter in (p for p in model.parameters() if not hasattr(p, "ds_id")):
                # or DeepSpeed would shard, and sum the gradients of, what is learned over the backbone's group
                parameter.ds_zero_partition_process_group = deepspeed.comm.get_world_group()  # type: ignore[attr-defined]
        groups = [
            {"params": _learned(model.tags), "lr": optim.tag_lr, "base_lr": optim.tag_lr},
            {"params": _learned(model.heads), "lr": optim.head_lr, "base_lr": optim.head_lr},
        ]
        groups = [group for group in groups if group["params"]]  # an empty group crashes ZeRO
        optimizer = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, foreach=False)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(optim, config, ranks), dist_init_required=False
        )
        limit_all_groups(config.timeout_s)
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._make_moments()

    def __call__(self, batch: Batch) -> Output:
        output: Output = self._engine(batch.to(self.ranks.device))
        return output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes without a graph, outside the accounting of training."""
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()
        self.model.backbone.eval()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient. `loss` is over global counts, so DeepSpeed's mean over ranks is undone here."""
        self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient before clipping, the same on all ranks. Collective."""
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(parameter) for name, parameter in self._parameters()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def step(self, lr_factor: float) -> None:
        """One optimizer step at `lr_factor` times each base rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self._engine.step()

    def skip(self) -> None:
        """Drops the gradient: learned state, moments and their step stay bit for bit. Collective."""
        state, step = self.state(), int(next(iter(self._inner.state.values()))["step"])
        self._engine.step()  # DeepSpeed must see the end of the accumulation
        self.restore(state, step)

    def learned(self) -> dict[str, Tensor]:
        """Learned rows and heads, whole, fp32, on the CPU. Collective."""
        return {name: self._whole(parameter).cpu() for name, parameter in self._parameters()}

    def state(self) -> dict[str, Tensor]:
        """`learned` and both moments of each. Collective."""
        moments = {
            f"{name}.{key}": self._moment(parameter, key).cpu()
            for name, parameter in self._parameters()
            for key in MOMENTS
        }
        return {**self.learned(), **moments}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Takes back what `state` gave, on any number of ranks and at any ZeRO stage; `step` counts optimizer steps.
        Collective."""
        self.overwrite(state)
        for inner in self._inner.state.values():
            inner["step"].fill_(step)
        for name, parameter in self._parameters():
            for key in MOMENTS:
                self._set_moment(parameter, key, state[f"{name}.{key}"].to(self.ranks.device))

    def overwrite(self, values: dict[str, Tensor]) -> None:
        """Sets learned parameters (a head fitted in closed form) and leaves the moments. Collective."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        stage = self.config.stage
        for name, parameter in self._parameters():
            if name not in values:
                continue
            value = values[name].to(self.ranks.device)
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3):
                parameter.data.copy_(value)
            # ZeRO's optimizer keeps a copy of its own
            if stage == 3:
                safe_set_local_fp32_param(parameter, self._shard(parameter, value))
            elif stage:
                safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.config.stage == 0:
            self._inner.state[parameter][key].copy_(value)
        elif self.config.stage == 3:
            safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _shard(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part at stage 3, padded; DeepSpeed's `safe_set_full_*` fail where a size does not divide."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.ranks.size - value.numel()))
        return padded.narrow(0, size * self.ranks.rank, size)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW below ZeRO's wrapper, whose parameters are flat shards."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        return inner

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = [(self._names.get(id(p)), p) for p in self.model.parameters()]
        return [(name, parameter) for name, parameter in named if name is not None]

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self.config.stage == 0:
            return parameter.detach().float().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        return _shaped(safe_get_full_fp32_param(parameter), parameter)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.config.stage == 0:
            moment: Tensor = self._inner.state[parameter][key].clone()
            return moment
        from deepspeed.utils import safe_get_full_optimizer_state

        return _shaped(safe_get_full_optimizer_state(parameter, key), parameter)

    def _make_moments(self) -> None:
        """torch makes moments at the first step; a resumed run needs them before."""
        stage, zero = self.config.stage, self._engine.optimizer
        shards = [shard for group in self._inner.param_groups for shard in group["params"]]
        for shard in zero.fp32_partitioned_groups_flat if stage == 3 else shards:  # stage 3 leaves its groups empty
            self._inner.state[shard] = {"step": torch.tensor(0.0)} | {k: torch.zeros_like(shard) for k in MOMENTS}
        if stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Compiled at every first start (two minutes, and a crash without a compiler) for a call we never make.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _learned(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _shaped(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return value.detach().float().view(getattr(parameter, "ds_shape", parameter.shape)).clone()

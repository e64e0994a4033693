"""What answers with numbers or classes: a linear map on hidden states and, where a closed-form fit found that better, a
kernel on them.

K outputs, S states that a head reads side by side (of its tag, and means over fields: of each layer, and there of each
pool; then the length of each pool, if asked), each of D features, the hidden size; F = S D, B rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tagllm.config import HeadConfig, Reads
from tagllm.errors import UserError
from tagllm.kernel import BOUNDLESS, Kernel

T = TypeVar("T")


def states_read(reads: Reads, last: T, mean: T) -> tuple[T, ...]:
    """What a head with `reads` sees side by side, of the state at its position and the mean over the fields."""
    return {"last": (last,), "mean": (mean,), "both": (last, mean)}[reads]


def measured(values_BK: Tensor, noise_K: Tensor, spec: HeadConfig, mean_K: Tensor, std_K: Tensor) -> Tensor:
    """What is expected to be measured where values lie so with normal noise and what is beyond a limit reads as the
    limit: low + noise g((value - low) / noise) with g(x) = x Phi(x) + phi(x), and likewise above. All standardised."""
    found_BK, exact_BK, noise_K = values_BK.double(), values_BK.double(), noise_K.double()
    if spec.censored_below is not None:
        low_K = (spec.censored_below - mean_K.double()) / std_K
        found_BK = low_K + noise_K * _mean_above_0((exact_BK - low_K) / noise_K)
    if spec.censored_above is not None:
        high_K = (spec.censored_above - mean_K.double()) / std_K
        found_BK = found_BK - noise_K * _mean_above_0((exact_BK - high_K) / noise_K)
    return found_BK.to(values_BK.dtype)


def _mean_above_0(x: Tensor) -> Tensor:
    """Of max(0, x + noise) where the noise is standard normal."""
    mean: Tensor = x * torch.special.ndtr(x) + torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    return mean.clamp(min=0)


@dataclass(frozen=True)
class Head:
    """A map from hidden states to standardised targets, linear plus that of a kernel if there is one; `mean` and `std`
    undo the standardisation."""

    spec: HeadConfig
    weight_KF: Tensor
    bias_K: Tensor
    mean_K: Tensor
    std_K: Tensor
    kernel: Kernel | None = None
    pools: tuple[int, ...] = (0,)
    """The means over fields that are read side by side of each layer: each the number of the domain tag it is of."""
    noise_K: Tensor | None = None
    """Of targets around values, standardised, where the head was fitted to censored ones: it answers with what would be
    measured."""

    @classmethod
    def new(cls, spec: HeadConfig, hidden_size: int, pools: tuple[int, ...] = (0,)) -> Head:
        features, outputs = hidden_size * len(States.of(spec, pools).kinds), spec.outputs
        zeros = torch.zeros(outputs)
        return cls(spec, torch.zeros(outputs, features), zeros, zeros.clone(), torch.ones(outputs), pools=pools)

    def blank(self) -> Head:
        """The same before it learned anything but the mean and spread of its targets."""
        return replace(
            self,
            weight_KF=torch.zeros_like(self.weight_KF),
            bias_K=torch.zeros_like(self.bias_K),
            kernel=None,
            noise_K=None,
        )

    def values(self, features_BF: Tensor) -> Tensor:
        """(B, K), standardised."""
        values_BK = features_BF @ self.weight_KF.T + self.bias_K
        return values_BK if self.kernel is None else values_BK + self.kernel(features_BF)

    def answer(self, features_BF: Tensor) -> Tensor:
        """(B, K) in units of the data, of a regression."""
        values_BK = self.values(features_BF)
        if self.noise_K is not None:
            values_BK = measured(values_BK, self.noise_K, self.spec, self.mean_K, self.std_K)
        return values_BK * self.std_K + self.mean_K

    @property
    def reads_tag(self) -> bool:
        """Whether answers depend on the state of the tag: a fit leaves it out where the fields alone answer better."""
        alone = self.kernel is not None and bool((self.kernel.width_SD[0] >= BOUNDLESS).all())
        return self.spec.reads != "mean" and not alone

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a library."""
        found = {"weight": self.weight_KF, "bias": self.bias_K, "mean": self.mean_K, "std": self.std_K}
        if self.kernel is not None:
            state_TD, at_SM, width_SD, weight_KM = self.kernel
            found |= {"states": state_TD, "landmarks": at_SM, "width": width_SD, "kernel_weight": weight_KM}
        if self.noise_K is not None:
            found["noise"] = self.noise_K
        return found


def fields_alone(heads: Mapping[str, Head | None]) -> str:
    """Says, by the tags' names, which heads could read their tag and answer without it; empty where none does."""
    without = [name for name, head in heads.items() if head and head.spec.reads == "both" and not head.reads_tag]
    why = "on validation rows that was clearly better than with the state of the tag"
    return " ".join(f"<{name}>: its head answers from the fields alone: {why}." for name in without)


def pools_known(heads: Iterable[Head | None]) -> list[tuple[int, ...]]:
    """The means that trained heads read, of those that take fields apart; a prompt may have fewer fields than the ones
    they were trained in."""
    return [head.pools for head in heads if head and head.spec.pool != "together"]


def num_states(spec: HeadConfig, num_pools: int) -> int:
    return sum(states_read(spec.reads, 1, num_means(num_pools, spec.layers) + num_pools * spec.lengths))


class States(NamedTuple):
    """The blocks of D features that a head reads side by side."""

    kinds: tuple[int, ...]
    """Blocks of the same number share a width of the kernel."""
    orders: tuple[tuple[int, ...], ...]
    """Permutations of the blocks that the kernel is averaged over, the identity first; only `symmetric` heads have
    more than that."""

    @classmethod
    def of(cls, spec: HeadConfig, pools: Sequence[int]) -> States:
        """
        Raises:
            UserError: more orders than a kernel can be computed for.
        """
        total, per_block = num_states(spec, len(pools)), len(pools)
        own = range(0 if spec.reads == "mean" else 1)
        if not spec.symmetric:
            return cls(tuple(range(total)), (tuple(range(total)),))
        starts = range(len(own), total, per_block)
        kinds = (*own, *(start + pool for start in starts for pool in pools))
        orders = [(*own, *(start + at for start in starts for at in trade)) for trade in _trades(pools)]
        return cls(kinds, tuple(dict.fromkeys(orders)))


MOST_ORDERS = 24
"""A kernel is computed for each of them; four fields have so many."""


def _trades(pools: Sequence[int]) -> list[tuple[int, ...]]:
    """What stands at each place where those of one number trade theirs, in all ways."""
    members = [[at for at, other in enumerate(pools) if other == pool] for pool in dict.fromkeys(pools)]
    if (ways := math.prod(math.factorial(len(some)) for some in members)) > MOST_ORDERS:
        raise UserError(
            f"head.symmetric is true, but {max(map(len, members))} fields stand behind one domain tag, which is {ways} "
            f"orders; {MOST_ORDERS} can be computed. Leave symmetric out, or use pool: apart."
        )
    trades = []
    for ordered in itertools.product(*map(itertools.permutations, members)):
        place = dict(zip(itertools.chain(*members), itertools.chain(*ordered), strict=True))
        trades.append(tuple(place[at] for at in range(len(pools))))
    return trades


def num_means(num_pools: int, layers: Sequence[int]) -> int:
    """Over fields: of each pool behind each layer, or behind the last one."""
    return num_pools * max(len(layers), 1)


def fields_read(sum_BGD: Tensor, num_BP: Tensor, lengths: bool) -> Tensor:
    """What heads read of fields, side by side (B, features): of sums over the positions of each pool behind each layer
    (G: P pools of each layer), the means; and, if asked, log(1 + positions) of each pool, the first feature of a state
    that is 0 otherwise."""
    length_BP1 = num_BP.to(sum_BGD.dtype)[:, :, None]
    mean_BGD = sum_BGD / length_BP1.clamp(min=1).repeat(1, sum_BGD.shape[1] // num_BP.shape[1], 1)
    if lengths:
        length_BPD = nn.functional.pad(length_BP1.log1p(), (0, sum_BGD.shape[2] - 1))
        mean_BGD = torch.cat([mean_BGD, length_BPD], dim=1)
    return mean_BGD.flatten(1)


def reads_of_fields(heads: Mapping[str, HeadConfig]) -> tuple[tuple[int, ...], bool]:
    """Behind which layers of the backbone means over fields are taken (of none: behind the last), and whether lengths
    stand beside them.

    Raises:
        UserError: heads that read means differ in this.
    """
    of = {name: head for name, head in heads.items() if head.reads != "last"}
    if not of:
        return (), False
    first, head = next(iter(of.items()))
    for name, other in of.items():
        for key in ("layers", "lengths"):
            mine, its = getattr(other, key), getattr(head, key)
            if mine != its:
                raise UserError(
                    f"tags.{name}.head.{key} is {mine}, that of <{first}> is {its}; heads that answer together read "
                    f"the same {key}. Train one of them anew, or use them apart."
                )
    return tuple(head.layers), head.lengths

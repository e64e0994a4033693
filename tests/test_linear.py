"""Frozen-aware modules give what transformers' own give, keep less, and take an fp32 residual stream."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.measure import peak_tensor_bytes
from benchmarks.saved_bytes import KINDS, SHAPES, per_token_and_layer
from tagllm.model import linear
from tagllm.model.frozen import FrozenGatedMLP, FrozenLayerNorm, FrozenRMSNorm, make_frozen_aware
from tagllm.model.linear import FrozenLinear, halves
from tagllm.model.lm_head import FrozenHead, _Nats
from tests import tiny


def saved_bytes(module: nn.Module, input: Tensor) -> int:
    """Of distinct storages kept for backward, parameters and the module's input left out."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()} | {input.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}
    pack = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(input)
    return sum(size for at, size in kept.items() if at not in known)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {"linear": nn.Linear(6, 5), "no bias": nn.Linear(6, 5, bias=False), "conv1d": Conv1D(5, 6)}
    return {name: module.requires_grad_(False) for name, module in made.items()}


@pytest.mark.parametrize("name", ["linear", "no bias", "conv1d"])
def test_a_frozen_linear_shares_its_parameters_and_saves_nothing(name: str) -> None:
    layer = layers()[name]
    frozen = FrozenLinear.of(layer)
    assert {n: id(p) for n, p in frozen.named_parameters()} == {n: id(p) for n, p in layer.named_parameters()}
    input = torch.randn(2, 3, 6, requires_grad=True)
    expected, found = layer(input), frozen(input)
    torch.testing.assert_close(found, expected)
    up = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, input, up)[0] for y in (found, expected)))
    assert saved_bytes(frozen, input) == 0


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("name", ["linear", "no bias", "conv1d"])
def test_bf16_is_rounded_once_whether_or_not_the_cpu_has_it(
    name: str, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "cpu_multiplies_bf16", lambda: has_bf16)
    exact = layers()[name].bfloat16()
    frozen = FrozenLinear.of(exact)
    input = torch.randn(2, 3, 6).bfloat16().requires_grad_()
    up = torch.randn(2, 3, 5).bfloat16()
    found = frozen(input)
    assert found.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(found, input, up)
    exact.float()
    wide = input.detach().float().requires_grad_()
    expected = exact(wide)
    (expected_grad,) = torch.autograd.grad(expected, wide, up.float())
    for ours, theirs in ((found, expected), (grad, expected_grad)):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "no bias", "conv1d"])
def test_the_weight_may_be_away_between_forward_and_backward(name: str) -> None:
    """As ZeRO-3 has it: partitioned after the forward, gathered into other memory for the backward."""
    frozen = FrozenLinear.of(layers()[name])
    input = torch.randn(3, 6, requires_grad=True)
    result = frozen(input)
    whole = frozen.weight.data
    frozen.weight.data = torch.empty(0)
    frozen.weight.data = whole.clone()
    whole.fill_(math.nan)
    result.sum().backward()
    assert input.grad is not None
    torch.testing.assert_close(input.grad, frozen.matrix().sum(dim=0).expand(3, -1))


@pytest.mark.parametrize("exact", ["never", "live", "always"])
def test_dtypes_and_precision_of_bf16_weights(exact: Literal["never", "live", "always"]) -> None:
    """fp32 inputs give fp32 results to fp32 precision where `exact` says so, else rounded ones."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).to(torch.bfloat16).requires_grad_(False)
    frozen, reference = FrozenLinear.of(layer, exact), copy.deepcopy(layer).float()
    input = torch.randn(7, 64)
    for live in (False, True):
        input.requires_grad_(live)
        precise = exact == "always" or (exact == "live" and live)
        assert frozen(input).dtype == (torch.float32 if precise else torch.bfloat16)
        assert tiny.relative_error(frozen(input), reference(input)) < (1e-6 if precise else 0.005)
        assert frozen(input.bfloat16()).dtype == torch.bfloat16
    gradients = [torch.autograd.grad(m(input).float().square().sum(), input)[0] for m in (frozen, reference)]
    assert gradients[0].dtype == torch.float32
    assert tiny.relative_error(*gradients) < 0.01


def test_two_halves_hold_an_fp32_number() -> None:
    """What CUDA multiplies instead of casting the weight."""
    input = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    high, low = halves(input, torch.bfloat16)
    assert high.dtype == low.dtype == torch.bfloat16
    assert float(((high.float() + low.float() - input) / input).abs().max()) < 2**-16


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_frozen_decoder_equals_the_plain_one(family: str) -> None:
    """Values, input gradients, weights and the tie, in fp32."""
    plain, frozen = tiny.plain_backbone(family), tiny.backbone(family)
    assert tiny.weights_digest(plain) == tiny.weights_digest(frozen)
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (plain, frozen)]
    assert tied[0] == tied[1]
    embedded = torch.randn(2, 9, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for model in (frozen, plain):
        logits = model(inputs_embeds=embedded).logits
        found.append((logits, torch.autograd.grad(logits.square().mean(), embedded)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_embeddings_choose_the_residual_stream(family: str, dtype: torch.dtype) -> None:
    """With bf16 weights the stream has the embeddings' dtype; what is live is exact in attention and in the up map
    of gated MLPs, the rest of the MLPs is bf16."""
    model = tiny.backbone(family, dtype=torch.bfloat16)
    kinds = {type(m) for m in model.modules()}
    assert nn.Linear not in kinds and Conv1D not in kinds and nn.LayerNorm not in kinds
    assert (FrozenLayerNorm in kinds) == (family == "gpt2")
    assert {FrozenRMSNorm, FrozenGatedMLP} <= kinds or family == "gpt2"
    products: dict[str, set[torch.dtype]] = {"exact": set(), "rounded": set()}
    for name, module in model.base_model.named_modules():
        if isinstance(module, FrozenLinear):
            kind = "rounded" if "mlp" in name and "up_proj" not in name else "exact"
            module.register_forward_hook(lambda _m, _i, out, kind=kind: products[kind].add(out.dtype))
    embedded = torch.randn(2, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded).last_hidden_state
    assert hidden.dtype == dtype
    assert products == {"exact": {dtype}, "rounded": {torch.bfloat16}}
    exact = tiny.backbone(family, dtype=torch.bfloat16).float()
    expected = exact.base_model(inputs_embeds=embedded.float()).last_hidden_state
    assert tiny.relative_error(hidden.float(), expected) < (0.02 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_what_a_norm_and_a_gated_mlp_keep(dtype: torch.dtype) -> None:
    layer = tiny.backbone(dtype=dtype).base_model.layers[0]
    hidden = torch.randn(2, 5, tiny.HIDDEN, dtype=dtype, requires_grad=True)
    assert saved_bytes(layer.input_layernorm, hidden) == 10 * 4
    assert saved_bytes(layer.mlp, hidden) == 10 * 2 * 64 * dtype.itemsize  # gate and up


def test_a_frozen_layer_keeps_less_than_a_plain_one() -> None:
    """Without the fp32 copies of norms and the products of the gated MLP."""
    plain, frozen = (
        per_token_and_layer(SHAPES["SmolLM2-135M"], KINDS[kind], 8)
        for kind in ("nn.Linear, bf16 stream", "FrozenLinear, bf16 stream")
    )
    hidden_size, intermediate_size = 576, 1536
    assert plain - frozen == pytest.approx(2 * 2 * hidden_size + 2 * intermediate_size)  # 2 B


class _OtherMLP(nn.Module):
    """The children of a gated MLP, but another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(input)) + self.up_proj(input))


class _ClampedMLP(_OtherMLP):
    """A gated MLP, of which what is large is cut off."""

    def forward(self, input: Tensor) -> Tensor:
        gate, up = self.act_fn(self.gate_proj(input)).clamp(max=16), self.up_proj(input).clamp(-16, 16)
        return self.down_proj(gate * up)


class _OtherRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight


def test_modules_that_compute_something_else_stay() -> None:
    model: Any = tiny.plain_backbone()
    model.base_model.layers[0].mlp, model.base_model.norm = _OtherMLP(), _OtherRMSNorm()
    make_frozen_aware(model)
    assert type(model.base_model.layers[0].mlp) is _OtherMLP
    assert type(model.base_model.layers[0].mlp.up_proj) is FrozenLinear
    assert type(model.base_model.layers[1].mlp) is FrozenGatedMLP
    assert type(model.base_model.norm) is _OtherRMSNorm


def test_a_gated_mlp_that_clamps_stays() -> None:
    model: Any = tiny.plain_backbone()
    model.base_model.layers[0].mlp = _ClampedMLP()
    make_frozen_aware(model)
    assert type(model.base_model.layers[0].mlp) is _ClampedMLP


def plain_nats(logits_NV: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
    logits_NV = logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap
    return nn.functional.cross_entropy(logits_NV, label_N, reduction="none")


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(0, 9), vocabulary=st.integers(1, 40), chunk=st.integers(1, 10),
    softcap=st.none() | st.floats(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_chunked_cross_entropy_equals_the_plain_one(
    num: int, vocabulary: int, chunk: int, softcap: float | None, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(vocabulary, 6, generator=random), requires_grad=False)
    head = FrozenHead(weight, None, False)
    hidden_ND = torch.randn(num, 6, generator=random).requires_grad_()
    label_N = torch.randint(vocabulary, (num,), generator=random)
    found: Tensor = _Nats.apply(hidden_ND, head, label_N, softcap, chunk)
    expected = plain_nats(hidden_ND @ weight.T, label_N, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    up_N = torch.randn(num, generator=random)
    gradients = [torch.autograd.grad(nats, hidden_ND, up_N)[0] for nats in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert head(hidden_ND, label_N, softcap).equal(head(hidden_ND.detach(), label_N, softcap))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_losses_of_a_bf16_head_are_fp32_and_close(softcap: float | None) -> None:
    torch.manual_seed(0)
    head = FrozenHead(nn.Parameter(torch.randn(300, 32).bfloat16(), requires_grad=False), None, False)
    hidden_ND, label_N = torch.randn(8, 32, requires_grad=True), torch.randint(300, (8,))
    found = head(hidden_ND, label_N, softcap)
    expected = plain_nats(hidden_ND @ head.weight.float().T, label_N, softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)
    gradients = [torch.autograd.grad(nats.sum(), hidden_ND)[0] for nats in (found, expected)]
    assert gradients[0].dtype == torch.float32
    assert tiny.relative_error(*gradients) < 0.02


def test_tokens_times_vocabulary_is_never_held() -> None:
    """4,096 positions by 49,152 words are 805 MB in fp32."""
    head = FrozenHead(nn.Parameter(torch.randn(49152, 64), requires_grad=False), None, False)
    hidden_ND, label_N = torch.randn(4096, 64, requires_grad=True), torch.randint(49152, (4096,))
    peak_mb = peak_tensor_bytes(lambda: head(hidden_ND, label_N, 30.0).sum().backward()) / 1e6
    print(f"at most {peak_mb:.0f} MB of tensors")
    assert peak_mb < 200

"""Tag rows behind the vocabulary: both paths of the gather give what `where` of two plain lookups gives.

Everything here runs on PyTorch's operations; a child process runs it once more on the kernels, in Triton's interpreter
(a process decides that when it first imports triton). Where there is CUDA, the kernels run there too.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tagllm.model import gather
from tagllm.model.embedding import TagEmbedding
from tagllm.model.gather import gather_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
V, D = 11, 20  # D: no power of two
FP32, BF16 = torch.float32, torch.bfloat16
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
needs_triton = pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="triton is not installed, or this is not Linux on x86-64, or this is the child already",
)


@pytest.fixture(autouse=True, scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        from tagllm.model import gather_triton

        assert isinstance(gather_triton._gather_kernel, InterpretedFunction)
        gather._has_kernel = lambda ids_BS: True
    with torch.device(request.param):
        yield request.param


def parts(
    frozen: int = 3, learned: int = 4, table: torch.dtype = FP32, width: int = D
) -> tuple[Tensor, Tensor, nn.Parameter]:
    """Table with two rows behind the vocabulary that no id reaches, frozen rows, learned rows."""
    torch.manual_seed(0)
    return torch.randn(V + 2, width).to(table), torch.randn(frozen, width), nn.Parameter(torch.randn(learned, width))


def naive(table_VD: Tensor, frozen_FD: Tensor, learned_LD: Tensor, ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    rows_TD = torch.cat([frozen_FD, learned_LD, torch.zeros(1, table_VD.shape[1])])
    tokens_BSD = nn.functional.embedding(ids_BS.clamp(max=V - 1), table_VD)
    tags_BSD = nn.functional.embedding(torch.where(ids_BS < V, len(rows_TD) - 1, ids_BS - V), rows_TD)
    return torch.where((ids_BS < V)[..., None], tokens_BSD.to(dtype), tags_BSD.to(dtype))


def ids_for(num_tags: int, shape: tuple[int, int] = (3, 9)) -> Tensor:
    """Every id of vocabulary and tags, in any order, some of them several times."""
    size = shape[0] * shape[1]
    return (torch.randperm(size) % (V + num_tags)).view(shape)


def gradient(out: Tensor, learned_LD: Tensor, incoming: Tensor) -> Tensor:
    return torch.autograd.grad(out, learned_LD, incoming)[0]


def check(table: Tensor, frozen: Tensor, learned: nn.Parameter, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal forward, and the backward of a random gradient, which is returned."""
    out, expected = gather_rows(table, frozen, learned, ids, V, dtype), naive(table, frozen, learned, ids, dtype)
    assert out.dtype == dtype and out.shape == (*ids.shape, table.shape[1])
    if INTERPRETED and dtype == BF16:  # the interpreter cuts fp32 off where a device rounds it
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    else:
        assert out.equal(expected)
    incoming = torch.randn(out.shape).to(dtype)
    found, wanted = gradient(out, learned, incoming), gradient(expected, learned, incoming)
    assert found.dtype == FP32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("table", [FP32, BF16, torch.float16])
def test_rows_and_gradients_are_those_of_two_lookups(table: torch.dtype, dtype: torch.dtype) -> None:
    check(*parts(table=table), ids_for(7), dtype)


@pytest.mark.parametrize(("frozen", "learned"), [(0, 4), (3, 0), (0, 0), (0, 1), (1, 1)])
def test_kinds_of_rows_may_be_missing(frozen: int, learned: int) -> None:
    check(*parts(frozen, learned), ids_for(frozen + learned), FP32)


def test_a_batch_without_a_tag_has_a_zero_gradient() -> None:
    assert check(*parts(), ids_for(0), BF16).equal(torch.zeros(4, D))


def test_a_row_that_stands_often_sums_its_gradients() -> None:
    ids = ids_for(7, (4, 30))
    ids[1:] = V + 4
    found = check(*parts(table=BF16), ids, BF16)
    assert found[1].abs().max() > 10  # of the order of the square root of 90


def test_several_blocks_of_a_wide_row() -> None:
    check(*parts(width=2100), ids_for(7, (2, 9)), FP32)


def test_bits_of_the_gradient_repeat() -> None:
    table, frozen, learned = parts()
    ids = ids_for(7, (2, 40))
    incoming = torch.randn(2, 40, D)
    first, second = (
        gradient(gather_rows(table, frozen, learned, ids, V, FP32), learned, incoming) for _ in range(2)
    )  # fmt: skip
    assert first.equal(second)


def test_only_the_learned_rows_have_a_gradient() -> None:
    table, frozen, learned = parts()
    for constant in (table, frozen):
        constant.requires_grad_()
    ids = ids_for(7)
    incoming = torch.full((3, 9, D), torch.nan)
    incoming[ids >= V + 3] = 1
    gather_rows(table, frozen, learned, ids, V, FP32).backward(incoming)
    assert table.grad is None and frozen.grad is None
    assert learned.grad is not None and learned.grad.isfinite().all()


@pytest.mark.parametrize(
    "incoming",
    [
        lambda: torch.randn(D, 9, 3).permute(2, 1, 0),
        lambda: torch.randn(6, 18, 2 * D)[::2, ::2, ::2],
        lambda: torch.randn(D).expand(3, 9, D),
        lambda: torch.ones(()).expand(3, 9, D),  # what `out.sum()` hands back
    ],
)
def test_incoming_gradients_of_any_stride(incoming: Callable[[], Tensor]) -> None:
    table, frozen, learned = parts()
    grad, ids = incoming(), ids_for(7)
    out = gather_rows(table, frozen, learned, ids, V, FP32)
    again = gather_rows(table, frozen, learned, ids, V, FP32)
    assert gradient(out, learned, grad).equal(gradient(again, learned, grad.contiguous()))


@pytest.mark.parametrize("learned", [4, 0])
def test_ids_outside_are_the_nearest_inside(learned: int) -> None:
    table, frozen, rows = parts(learned=learned)
    last = V + 3 + learned - 1
    outside, inside = torch.tensor([[-1, -(2**40), last + 1, 2**40]]), torch.tensor([[0, 0, last, last]])
    found, wanted = (gather_rows(table, frozen, rows, ids, V, FP32) for ids in (outside, inside))
    assert found.equal(wanted)
    incoming = torch.randn(found.shape)
    assert gradient(found, rows, incoming).equal(gradient(wanted, rows, incoming))


@settings(max_examples=8 if INTERPRETED else 80, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 5), st.integers(1, 70), st.lists(st.integers(0, 30), min_size=1, max_size=24),
    st.sampled_from([1, 2, 3]), st.sampled_from([FP32, BF16]), st.sampled_from([FP32, BF16]),
)  # fmt: skip
def test_any_shape_and_ids(
    frozen: int, learned: int, width: int, flat: list[int], rows: int, table: torch.dtype, dtype: torch.dtype
) -> None:
    ids = (torch.tensor([flat] * rows) + torch.arange(rows)[:, None]) % (V + frozen + learned)
    check(*parts(frozen, learned, table, width), ids, dtype)


def test_nothing_waits_for_the_device(device: str) -> None:
    """Tensors on `meta` have no values to wait for; CUDA complains by itself."""
    where, before = ("meta", 0) if device == "cpu" else (device, torch.cuda.get_sync_debug_mode())
    if INTERPRETED:
        pytest.skip("the interpreter reads every value")
    table, frozen, learned, ids = (tensor.to(where) for tensor in (*parts(), ids_for(7)))
    learned = learned.detach().requires_grad_()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        gather_rows(table, frozen, learned, ids, V, BF16).sum().backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    assert learned.grad is not None and learned.grad.shape == learned.shape


class Scaled(nn.Embedding):
    """As Gemma's: multiplies its rows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(4.5).to(self.weight.dtype)


def embeddings(kind: type[nn.Embedding], dtype: torch.dtype) -> tuple[nn.Embedding, TagEmbedding, list[object]]:
    """A frozen token embedding that notes its calls, and tags behind it."""
    table, frozen, learned = parts(table=dtype)
    tokens = kind(len(table), D, _weight=table, _freeze=True)
    calls: list[object] = []
    tokens.register_forward_hook(lambda *_: calls.append(None))
    return tokens, TagEmbedding(frozen, learned.detach(), V), calls


@pytest.mark.parametrize("dtype", [None, FP32])
def test_a_plain_table_is_read_without_calling_its_module(dtype: torch.dtype | None) -> None:
    tokens, tags, calls = embeddings(nn.Embedding, BF16)
    ids = ids_for(7)
    out = tags(tokens, ids, dtype)
    wanted = gather_rows(tokens.weight, tags.frozen_TD, tags.learned_TD, ids, V, dtype or BF16)
    assert out.equal(wanted) and out.dtype == (dtype or BF16) and not calls


@pytest.mark.parametrize("dtype", [None, FP32])
@pytest.mark.parametrize("kind", [Scaled, "partitioned"])
def test_other_tables_are_called_once_and_tags_put_over_them(kind: type[Scaled] | str, dtype: torch.dtype) -> None:
    tokens, tags, calls = embeddings(nn.Embedding if isinstance(kind, str) else kind, BF16)
    ids = ids_for(7)
    scaled = tokens.weight if isinstance(kind, str) else tokens.weight * torch.tensor(4.5).to(BF16)
    wanted = gather_rows(scaled, tags.frozen_TD, tags.learned_TD, ids, V, dtype or BF16)
    if kind == "partitioned":
        tokens.weight.ds_id = 0  # as DeepSpeed marks what ZeRO-3 partitions
    out = tags(tokens, ids, dtype)
    assert len(calls) == 1 and out.equal(wanted)
    incoming = torch.randn(out.shape).to(out.dtype)
    assert gradient(out, tags.learned_TD, incoming).equal(gradient(wanted, tags.learned_TD, incoming))


def test_names_of_the_state_stay() -> None:
    assert set(embeddings(nn.Embedding, FP32)[1].state_dict()) == {"learned_TD", "frozen_TD"}


@needs_triton
def test_the_kernels_pass_these_tests_in_the_interpreter(device: str) -> None:
    if device != "cpu":
        pytest.skip("once is enough")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_where_triton_cannot_run_rows_are_gathered_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU it has nothing to run on, but for its interpreter; that is said once."""
    gather.kernels_run.cache_clear()
    found = {gather.kernels_run(torch.device("cpu")) for _ in range(2)}
    assert found == {INTERPRETED}
    assert capsys.readouterr().out.count("warning: triton cannot run here") == (not INTERPRETED)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_cuda(
    capability: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, without a device: the compiler refuses Python that the interpreter takes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tagllm.model import gather_triton

    ints, blocks = dict.fromkeys("VFL", "i32"), {"D": 576, "BLOCK": 1024}
    rows = {"out_ND": "*bf16", "table_VD": "*bf16", "frozen_FD": "*fp32", "learned_LD": "*fp32", "ids_N": "*i64"}
    strides, sums = (
        dict.fromkeys(("S", "stride_B", "stride_S", "stride_D"), "i32"),
        {"D": 576, "BLOCK_N": 16, "BLOCK_D": 256},
    )
    tensors = {"sum_LD": "*fp32", "grad_BSD": "*bf16", "order_N": "*i64", "start_L": "*i32"}
    for kernel, types, constants in (
        (gather_triton._gather_kernel, rows | ints, blocks),
        (gather_triton._sum_kernel, tensors | strides, sums),
    ):
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

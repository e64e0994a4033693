"""Time and bytes of looking up tokens and tags, forward and backward: `python -m benchmarks.gather --json FILE`.

bf16 table, fp32 tags, and an output in fp32 as the live part wants it (or in bf16); every row of the batch has a frozen
and a learned tag. On CUDA at the shapes of a 7B backbone, else at those of SmolLM2-135M. Times are medians of repeats
that alternate between the approaches.

V vocabulary, F frozen and L learned tag rows, D hidden size, B rows, S positions.
"""

from __future__ import annotations

import json as json_format
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tagllm.model import gather

TABLE_DTYPE = torch.bfloat16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TAG_LENGTH = 10
TRITON = "ours, Triton"


class Shape(NamedTuple):
    name: str
    vocabulary_size: int
    hidden_size: int
    rows: int
    positions: int


SHAPES = {"cpu": Shape("SmolLM2-135M", 49152, 576, 16, 106), "cuda": Shape("LLaMA-7B", 32000, 4096, 8, 2048)}


class Case(NamedTuple):
    """What every approach looks up, and the gradient it gets back, which has the dtype of the output."""

    table_VD: Tensor
    frozen_FD: Tensor
    learned_LD: nn.Parameter
    ids_BS: Tensor
    grad_BSD: Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: str) -> Case:
        V, D, B, S = shape[1:]
        with torch.device(device):
            torch.manual_seed(0)
            ids_BS = torch.randint(V, (B, S))
            ids_BS[:, : 2 * TAG_LENGTH] = V + torch.arange(2 * TAG_LENGTH)
            frozen_FD, learned_LD = torch.randn(2, TAG_LENGTH, D)
            table_VD, grad_BSD = torch.randn(V, D).to(TABLE_DTYPE), torch.randn(B, S, D).to(dtype)
            return cls(table_VD, frozen_FD, nn.Parameter(learned_LD), ids_BS, grad_BSD)


class Approach(NamedTuple):
    forward: Callable[[], Tensor]
    learned_LD: nn.Parameter

    def step(self, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and the gradient of the learned rows."""
        out_BSD = self.forward()
        return out_BSD, torch.autograd.grad(out_BSD, self.learned_LD, grad_BSD)[0]


def gather_rows(case: Case) -> Approach:
    table_VD, frozen_FD, learned_LD, ids_BS, grad_BSD = case
    V, dtype = len(table_VD), grad_BSD.dtype
    return Approach(lambda: gather.gather_rows(table_VD, frozen_FD, learned_LD, ids_BS, V, dtype), learned_LD)


def where_of_two_lookups(case: Case) -> Approach:
    table_VD, frozen_FD, learned_LD, ids_BS, grad_BSD = case
    V, dtype = len(table_VD), grad_BSD.dtype

    def forward() -> Tensor:
        is_tag_BS = ids_BS >= V
        tokens_BSD = embedding(ids_BS.masked_fill(is_tag_BS, 0), table_VD).to(dtype)
        tags_BSD = embedding((ids_BS - V).clamp(min=0), torch.cat([frozen_FD, learned_LD]).to(dtype))
        return torch.where(is_tag_BS[..., None], tags_BSD, tokens_BSD)

    return Approach(forward, learned_LD)


def concatenated_table(case: Case) -> Approach:
    table_VD, frozen_FD, learned_LD, ids_BS, grad_BSD = case

    def forward() -> Tensor:
        rows_VD = torch.cat([table_VD, frozen_FD.to(TABLE_DTYPE), learned_LD.to(TABLE_DTYPE)])
        return embedding(ids_BS, rows_VD).to(grad_BSD.dtype)

    return Approach(forward, learned_LD)


def trainable_tokens(case: Case) -> Approach:
    """The tags are the last rows of the vocabulary here, since PEFT trains rows that the table has."""
    from peft import TrainableTokensConfig, get_peft_model

    tags_TD = torch.cat([case.frozen_FD, case.learned_LD.detach()])
    rows_VD = torch.cat([case.table_VD, tags_TD.to(TABLE_DTYPE)])
    learned = list(range(len(rows_VD) - len(case.learned_LD), len(rows_VD)))
    tokens: Any = nn.Sequential(nn.Embedding.from_pretrained(rows_VD))
    model: Any = get_peft_model(tokens, TrainableTokensConfig(target_modules=["0"], token_indices=learned))
    (rows_LD,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return Approach(lambda: model(case.ids_BS).to(case.grad_BSD.dtype), rows_LD)


APPROACHES: dict[str, Callable[[Case], Approach]] = {
    TRITON: gather_rows,
    "ours, PyTorch": gather_rows,
    "where of two lookups": where_of_two_lookups,
    "concatenated table": concatenated_table,
    "PEFT TrainableTokens": trainable_tokens,
}


def why_not(name: str, device: str) -> str | None:
    """The reason why an approach cannot run here."""
    needs = {TRITON: "triton", "PEFT TrainableTokens": "peft"}.get(name)
    if needs and find_spec(needs) is None:
        return "not installed"
    return "no GPU" if name == TRITON and device != "cuda" else None


def bytes_moved(name: str, case: Case) -> tuple[float, float]:
    """Bytes of rows read and written by forward and backward, counted on paper; caches are left out of account, and so
    is what has no D in it (ids, masks) or only F + L rows.

        n positions, of which t are tags and l learned; a row in the table's dtype, out in the output's, tag in fp32

        ours, Triton           forward  a row or tag is read, an out is written
                               backward l outs read, L tags written, and 100 n for the sort of the ids
        ours, PyTorch          forward  two lookups (each reads and writes n), one cast, where (reads 2 n, writes n)
                               backward n outs cast to fp32, l of them read (all n on CUDA)
        where of two lookups   forward  as above
                               backward where (reads n, writes n), then the lookup's (reads n)
        concatenated table,    forward  the table read and written, then one lookup and a cast
        PEFT TrainableTokens   backward a cast; a gradient for the whole table set to zero, n rows read and added to it
                               (read, written)

    A cast reads and writes n where the dtypes differ."""
    table_VD, frozen_FD, learned_LD, ids_BS, grad_BSD = case
    V, D = table_VD.shape
    n, t, learned = (int((ids_BS >= first).sum()) for first in (0, V, V + len(frozen_FD)))
    row, out, tag = D * TABLE_DTYPE.itemsize, D * grad_BSD.itemsize, D * 4
    cast = n * (row + out) if row != out else 0
    tables = V + len(frozen_FD) + len(learned_LD)
    if name == TRITON:
        return (n - t) * row + t * tag + n * out, learned * out + len(learned_LD) * tag + 100 * n
    two_lookups = 2 * n * row + cast + 5 * n * out
    if name == "ours, PyTorch":
        to_fp32 = n * (out + tag) if out != tag else 0
        return two_lookups, to_fp32 + (n if ids_BS.is_cuda else learned) * tag
    if name == "where of two lookups":
        return two_lookups, 3 * n * out
    return (V + tables + 2 * n) * row + cast, cast + (tables + 3 * n) * row


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations return and that are no views of what they were given."""

    num_bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)}
        self.num_bytes += sum(storage.nbytes() for key, storage in made.items() if key not in given)
        return result


def seconds(work: Callable[[], object], device: str, steps: int) -> float:
    """Of one call, from `steps` calls between two synchronisations."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def copy_bytes_per_second(device: str, repeats: int) -> float:
    """Bytes read and written by copying a large tensor, per second."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source), device, 3) for _ in range(repeats + 1)][1:]
    return 2 * source.nbytes / statistics.median(taken)


def assert_same(results: dict[str, tuple[Tensor, Tensor]]) -> None:
    """All approaches compute the same thing, but for what bf16 rounds."""
    for name, result in results.items():
        for found, wanted in zip(result, results["where of two lookups"], strict=True):
            error = float(((found - wanted).norm() / wanted.norm()).detach())
            assert error < 1e-2, f"{name}: relative difference {error}"


def using(name: str) -> AbstractContextManager[object]:
    """Our two paths differ in one decision."""
    return patch.object(gather, "_has_kernel", lambda ids_BS: name == TRITON)


def measure(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    case, steps = Case.of(shape, dtype, device), 20 if device == "cuda" else 5
    approaches = {name: build(case) for name, build in APPROACHES.items() if why_not(name, device) is None}
    results, allocated = {}, {}
    for name, approach in approaches.items():
        with using(name), _Allocations() as counted:  # type: ignore[no-untyped-call]
            results[name] = approach.step(case.grad_BSD)
        allocated[name] = counted.num_bytes
    assert_same(results)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in approaches}
    for _ in range(repeats):
        for name, approach in approaches.items():
            with using(name):
                step = partial(approach.step, case.grad_BSD)
                step()  # what the last approach left in caches and allocators is not this one's
                times[name].append((seconds(approach.forward, device, steps), seconds(step, device, steps)))
    bandwidth = copy_bytes_per_second(device, repeats)
    rows = {}
    for name in approaches:
        forward, both = (statistics.median(column) for column in zip(*times[name], strict=True))
        moved = bytes_moved(name, case)
        rows[name] = {
            "forward_s": forward,
            "forward_and_backward_s": both,
            "forward_bytes": moved[0],
            "backward_bytes": moved[1],
            "allocated_bytes": allocated[name],
            "share_of_copy_bandwidth": sum(moved) / both / bandwidth if device == "cuda" else None,
        }
    return {
        "shape": shape._asdict(),
        "output_dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "copy_bytes_per_s": bandwidth,
        "approaches": rows,
    }


def show(results: dict[str, Any], device: str) -> Table:
    shape = Shape(**results["shape"])
    title = (
        f"{shape.name}, {results['output_dtype']}: {shape.rows} x {shape.positions} positions, V = "
        f"{shape.vocabulary_size}, D = {shape.hidden_size}; copying moves {results['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "forward", "+ backward", "moved forward", "backward", "allocated", "of copy bandwidth"):
        table.add_column(name, justify="right" if name else "left")
    for name in APPROACHES:
        row = results["approaches"].get(name)
        if row is None:
            table.add_row(name, why_not(name, device) or "")
            continue
        share = row["share_of_copy_bandwidth"]
        times = [f"{row[key] * 1e3:.3f} ms" for key in ("forward_s", "forward_and_backward_s")]
        sizes = [f"{row[key] / 1e6:.2f} MB" for key in ("forward_bytes", "backward_bytes", "allocated_bytes")]
        table.add_row(name, *times, *sizes, "" if share is None else f"{share:.0%}")
    return table


def main(
    json: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the default is cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the output: fp32 or bf16.")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all approaches; the table shows medians.")] = 15,
) -> None:
    """Prints time and bytes of our gather, of `where` of two lookups, a concatenated table and PEFT."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = measure(SHAPES[device], DTYPES[dtype], device, repeats)
    Console(width=140).print(show(results, device))
    if json:
        json.write_text(json_format.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""What was measured, as plain values for JSON and as tables, and how it compares with the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.measure import Spread

PEERS, NAIVE = ("a", "b", "c"), "d"


class Figures(NamedTuple):
    """One contestant on one workload; one value of `seconds` per repeat, over all steps of it."""

    letter: str
    label: str
    rows_per_micro_batch: int
    tuning_rows_per_second: dict[int, float]
    seconds: list[float]
    num_rows: int
    num_tokens: int
    kept_bytes_per_row: float
    peak_process_bytes: int | None
    peak_steps_bytes: int | None
    ideal_speedup: float | None
    """Decoder FLOPs of the plain full backward over those this method needs; None for the peers."""

    @property
    def rows_per_second(self) -> Spread:
        return Spread.of([self.num_rows / s for s in self.seconds])

    @property
    def tokens_per_second(self) -> Spread:
        return Spread.of([self.num_tokens / s for s in self.seconds])


class Encoding(NamedTuple):
    """Computing the frozen prefixes of a full batch, nothing remembered."""

    rows: int
    tokens: int
    seconds: float
    flops: float
    utilisation: float
    """Of the measured matmul rate."""


class Result(NamedTuple):
    """One workload."""

    name: str
    description: str
    figures: dict[str, Figures]
    encoding: Encoding | None

    @property
    def tuned(self) -> dict[str, dict[int, float]]:
        return {letter: f.tuning_rows_per_second for letter, f in self.figures.items()}

    def speedup(self, ours: str, other: str) -> Spread:
        """In rows per second, repeat by repeat."""
        pairs = zip(self.figures[other].seconds, self.figures[ours].seconds, strict=True)
        return Spread.of([theirs / mine for theirs, mine in pairs])

    @property
    def best_peer(self) -> str | None:
        """The fastest of (a) to (c) by its median; None unless all three ran."""
        if not all(letter in self.figures for letter in PEERS):
            return None
        return min(PEERS, key=lambda letter: Spread.of(self.figures[letter].seconds).median)


class Target(NamedTuple):
    """`ours` is to be so many times faster than the best peer and than (d), and keep at most that part of its bytes."""

    workload: str
    title: str
    ours: str
    over_peer: float
    over_naive: float
    kept: float


TARGETS = (
    Target("qed", "stage 2 QED, first epoch", "i1", 4, 3.3, 1 / 5),
    Target("qed", "stage 2 QED, later epochs", "i", 9, 7, 1 / 5),
    Target("affinity", "stage 3 affinity, first epoch", "i1", 8, 6, 1 / 8),
    Target("affinity", "stage 3 affinity, later epochs", "i", 20, 15, 1 / 8),
    Target("davis", "stage 3 Davis, first epoch", "i1", 8, 6, 1 / 8),
    Target("davis", "stage 3 Davis, later epochs", "i", 20, 15, 1 / 8),
    Target("translation", "text output, first epoch", "i1", 2, 1.7, 1 / 2),
    Target("translation", "text output, later epochs", "i", 2, 1.7, 1 / 2),
    Target("smiles", "stage 1", "i1", 1.5, 1.2, 1),
)
"""First epochs are those of the default configuration, which pays for remembering what it computes."""


class Verdict(NamedTuple):
    title: str
    ours: str
    ideal_speedup: float | None
    best_peer: str
    over_peer: Spread
    over_peer_target: float
    over_naive: Spread
    over_naive_target: float
    kept: float
    kept_target: float

    @property
    def met(self) -> tuple[bool, bool, bool]:
        """Medians against targets: over the best peer, over (d), bytes kept."""
        return (
            self.over_peer.median >= self.over_peer_target,
            self.over_naive.median >= self.over_naive_target,
            self.kept <= self.kept_target,
        )


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """One for each target whose contestants all ran."""
    found = []
    for target in TARGETS:
        for result in results:
            peer, figures = result.best_peer, result.figures
            if result.name == target.workload and peer and NAIVE in figures and target.ours in figures:
                kept = figures[target.ours].kept_bytes_per_row / figures[NAIVE].kept_bytes_per_row
                ideal = figures[target.ours].ideal_speedup
                over_peer, over_naive = (result.speedup(target.ours, other) for other in (peer, NAIVE))
                found.append(
                    Verdict(
                        target.title, target.ours, ideal, peer, over_peer, target.over_peer, over_naive,
                        target.over_naive, kept, target.kept,
                    )
                )  # fmt: skip
    return found


def result_table(result: Result) -> Table:
    table = Table(title=f"{result.name}: {result.description}", title_justify="left", caption=_encoding(result))
    for name in (
        "",
        "method",
        "rows per micro-batch",
        "rows/s",
        "real tokens/s",
        "kept MiB/row",
        "peak GiB",
        "of steps",
    ):
        table.add_column(name, justify="left" if name in ("", "method") else "right")
    for f in result.figures.values():
        peak = [_gib(f.peak_process_bytes), _gib(f.peak_steps_bytes)]
        table.add_row(
            f.letter, f.label, str(f.rows_per_micro_batch), str(f.rows_per_second), str(f.tokens_per_second),
            f"{f.kept_bytes_per_row / 2**20:.2f}", *peak,
        )  # fmt: skip
    return table


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _encoding(result: Result) -> str | None:
    e = result.encoding
    if e is None:
        return None
    return (
        f"prefix encoding, {e.rows} rows, {e.tokens} frozen tokens: {e.seconds:.2f} s for {e.flops / 1e12:.3f} TFLOP, "
        f"{e.utilisation:.0%} of the measured matmul rate"
    )


def target_table(found: Sequence[Verdict]) -> Table:
    table = Table(title="targets: median (min-max over the repeats)", title_justify="left")
    for name in ("workload", "ours", "ideal", "best peer", "over it", "", "over (d)", "", "kept, of (d)", ""):
        table.add_column(name, justify="left" if name in ("workload", "ours", "best peer", "") else "right")
    for v in found:
        says = ["met" if met else "[bold]missed[/bold]" for met in v.met]
        ideal = "" if v.ideal_speedup is None else f"{v.ideal_speedup:.1f}x"
        table.add_row(
            v.title, v.ours, ideal, v.best_peer, f"{v.over_peer}", f">= {v.over_peer_target:g}: {says[0]}",
            f"{v.over_naive}", f">= {v.over_naive_target:g}: {says[1]}", f"{v.kept:.3f}",
            f"<= {v.kept_target:.3g}: {says[2]}",
        )  # fmt: skip
    return table


def as_json(value: Any) -> Any:
    """Named tuples as objects, with the figures they compute."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        extra = {"rows_per_second": value.rows_per_second, "tokens_per_second": value.tokens_per_second} if isinstance(
            value, Figures
        ) else {"met": list(value.met)} if isinstance(value, Verdict) else {}  # fmt: skip
        return {key: as_json(item) for key, item in {**value._asdict(), **extra}.items()}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value

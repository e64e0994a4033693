"""`python -m benchmarks.results_page`: writes the tables of results/README.md from the JSON files beside it.

Everything above the line of dashes stays as people wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LINE = "\n---\n"


def spread(values: dict[str, float]) -> str:
    digits = 2 if values["median"] < 10 else 1 if values["median"] < 100 else 0
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f}-{values['high']:.{digits}f})"


def tables(run: dict[str, Any]) -> Iterator[str]:
    for work in run["workloads"]:
        yield f"## {work['name']}, {run['hardware']}, {run['date'][:10]}\n"
        command, rate = run["command"].replace("/tmp/", ""), run["matmul_flops_per_second"] / 1e12
        yield f"`{command}`, commit {run['commit']}, {run['model']} in {run['dtype']}.\n"
        yield (
            f"{work['description']}. Matmul rate {rate:.2f} TFLOP/s. Medians (min-max) of {run['repeats']} alternating "
            "repeats, each method at its best micro-batch.\n"
        )
        yield "| | method | rows/s | real tokens/s | kept for backward, MiB per row | peak of the process, GiB |"
        yield "|---|---|---|---|---|---|"
        for f in work["figures"].values():
            peak = f"{f['peak_process_bytes'] / 2**30:.2f}" if f["peak_process_bytes"] else ""
            kept = f["kept_bytes_per_row"] / 2**20
            yield (
                f"| {f['letter']} | {f['label']} | {spread(f['rows_per_second'])} | {spread(f['tokens_per_second'])} | "
                f"{kept:.2f} | {peak} |"
            )
        yield ""
        encoding = work.get("encoding")
        if encoding:
            yield (
                f"Encoding the prefixes of {encoding['rows']} rows ({encoding['tokens']} distinct tokens) runs at "
                f"{encoding['utilisation']:.0%} of the matmul rate.\n"
            )
    if run["targets"]:
        yield "| | over the best of a-c | target | over (d) | target | FLOP bound over (d) | kept, of (d) | target |"
        yield "|---|---|---|---|---|---|---|---|"
        for t in run["targets"]:
            marks = ["met" if met else "**missed**" for met in t["met"]]
            ideal = f"{t['ideal_speedup']:.1f}" if t["ideal_speedup"] else ""
            yield (
                f"| {t['title']} ({t['ours']}) | {spread(t['over_peer'])} | {t['over_peer_target']}: {marks[0]} | "
                f"{spread(t['over_naive'])} | {t['over_naive_target']}: {marks[1]} | {ideal} | {t['kept']:.3f} | "
                f"{t['kept_target']:.3f}: {marks[2]} |"
            )
        yield ""


def faults(report: dict[str, Any]) -> Iterator[str]:
    """What `python -m tests.faults --json` found."""
    titles, *rows = report["table"]
    yield f"## faults, {report['hardware']}, {report['date'][:10]}\n"
    command = f"`python -m tests.faults --seed {report['seed']}`"
    yield f"{command}, commit {report['commit']}: runs of 40 steps, a checkpoint every 5.\n"
    for cells in (titles, ["---"] * len(titles), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""


def main() -> None:
    page = RESULTS / "README.md"
    written = page.read_text(encoding="utf-8").partition(LINE)[0]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*cpu.json"))]
    lines = [line for run in runs for line in tables(run)]
    for path in sorted(RESULTS.glob("*faults.json")):
        lines += faults(json.loads(path.read_text(encoding="utf-8")))
    page.write_text(written.rstrip() + "\n" + LINE + "\n" + "\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

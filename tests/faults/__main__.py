"""`python -m tests.faults [--only 1,14] [--json FILE]`: faults 1 and 4 to 14 in full, and the report.

2, 3 and 5 (each call of the save protocol, dead saves, bit rot) need no ranks: `pytest tests/test_checkpoint.py`.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tagllm.origin import commit, hardware
from tests.faults.lab import Lab
from tests.faults.record import TITLES, Record, table
from tests.faults.suite import suite


def main(
    only: Annotated[str, typer.Option(help="Numbers of faults, as in 1,14.")] = "",
    seed: int = 0,
    share: Annotated[float, typer.Option(help="Of the many kills, requeues and files.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    wanted = {int(number) for number in only.split(",") if number}
    records: dict[str, Record] = {}
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        lab, began = Lab(Path(folder)), time.monotonic()
        for number, name, work in suite(share, seed):
            if wanted and number not in wanted:
                continue
            record = work(lab)
            console.print(f"{time.monotonic() - began:6.0f} s  {name}: {'; '.join(record.corruptions) or 'sound'}")
            records[record.fault] = records[record.fault].plus(record) if record.fault in records else record
    if json_file is not None and json_file.is_file():  # what was not run again stays
        before = [Record(**record) for record in json.loads(json_file.read_text())["faults"]]
        records = {record.fault: record for record in before} | records
    found = sorted(records.values(), key=lambda record: int(record.fault.split()[0]))
    console.print(table(found))
    if json_file is not None:
        about = {"date": datetime.now(UTC).isoformat("T", "seconds"), "commit": commit(), "hardware": hardware()}
        report = {**about, "seed": seed, "table": [list(TITLES), *(record.cells() for record in found)]}
        report |= {"faults": [record._asdict() for record in found]}
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    broken = any(record.corruptions or record.hangs or not record.injected for record in found)
    raise typer.Exit(int(broken))


if __name__ == "__main__":
    typer.run(main)

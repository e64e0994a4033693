"""What happened to a run over all its starts, and whether that is what we promise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]


class History(NamedTuple):
    """Events of all ranks by start; of rank 0 in the order in which they happened."""

    starts: list[dict[int, list[Event]]]

    @classmethod
    def read(cls, lab: Path) -> History:
        starts: dict[int, dict[int, list[Event]]] = {}
        for path in sorted(lab.glob("history-*.jsonl")):
            for event in map(json.loads, path.read_text().splitlines()):
                starts.setdefault(event["start"], {}).setdefault(event["rank"], []).append(event)
        return cls([starts[at] for at in sorted(starts)])

    def of_rank_0(self, kind: str = "") -> Iterator[Event]:
        for start in self.starts:
            yield from (event for event in start.get(0, []) if kind in ("", event["event"]))

    @property
    def faults(self) -> list[Event]:
        events = [event for start in self.starts for rank in start.values() for event in rank]
        return sorted((event for event in events if event["event"] == "fault"), key=lambda event: event["time"])

    def rows(self) -> Iterator[tuple[int, Counter[str]]]:
        """(step, rows that all ranks saw in it) for each time that all of them did it."""
        for start in self.starts:
            by_step: dict[int, list[list[str]]] = {}
            for rank in start.values():
                for event in rank:
                    if event["event"] == "step":
                        by_step.setdefault(event["step"], []).append(event["rows"])
            for step, rows in by_step.items():
                if len(rows) == len(start):
                    yield step, Counter(row for one in rows for row in one)

    def lost_steps(self) -> list[int]:
        """Per load: steps that had been done and must be done again."""
        lost, done = [], 0
        for event in self.of_rank_0():
            if event["event"] == "loaded" and event["start"]:
                lost.append(max(done - event["step"], 0))
                done = event["step"]
            elif event["event"] == "step":
                done = event["step"]
        return lost

    def restart_seconds(self) -> list[float]:
        """From each fault to the next step that was done, where a start lies between."""
        steps = list(self.of_rank_0("step"))
        found = []
        for fault in self.faults:
            after = [
                s["time"] - fault["time"] for s in steps if s["start"] > fault["start"] and s["time"] > fault["time"]
            ]
            found += after[:1]
        return found


def problems(found: History, undisturbed: History, every: int, exact: bool = True) -> list[str]:
    """Broken promises. `every` steps lie between checkpoints; the undisturbed run has the same rows, and where `exact`
    the same numbers, bit for bit."""
    expected_rows, expected = dict(undisturbed.rows()), {e["step"]: e for e in undisturbed.of_rank_0("step")}
    told = [f"undisturbed: {text}" for text in _epochs(expected_rows)]
    told += [f"step {step} saw other rows" for step, rows in found.rows() if rows != expected_rows[step]]
    told += [
        f"start {event['start']}: {key} of step {event['step']} differs"
        for event in found.of_rank_0("step")
        for key in ("tags", "gradient", "loss")
        if exact and event[key] != expected[event["step"]][key]
    ]
    done = {event["step"] for event in found.of_rank_0("step")}
    told += [f"step {step} was never done" for step in expected if step not in done]
    told += [f"{lost} steps lost, checkpoints are {every} apart" for lost in found.lost_steps() if lost > every]
    return [*told, *_loads(found)]


def _epochs(rows: dict[int, Counter[str]]) -> Iterator[str]:
    """After any step, no row has been seen twice more often than another: each once per epoch."""
    every_row = {row for of_step in rows.values() for row in of_step}
    seen: Counter[str] = Counter(dict.fromkeys(every_row, 0))
    for step in sorted(rows):
        seen.update(rows[step])
        if max(seen.values()) - min(seen.values()) > 1:
            yield f"after step {step} one row was seen {max(seen.values())} times, another {min(seen.values())}"


def _loads(found: History) -> Iterator[str]:
    """Each loaded state is one that was saved, and not older than the newest that was committed."""
    begun, committed = {0: {""}}, 0
    for event in found.of_rank_0():
        if event["event"] == "save":
            begun.setdefault(event["step"], set()).add(event["state"])
        elif event["event"] == "saved":
            committed = event["step"]
        elif event["event"] == "loaded":
            if event["state"] not in begun.get(event["step"], set()):
                yield f"start {event['start']}: what was loaded for step {event['step']} was never saved"
            if event["step"] < committed:
                yield f"start {event['start']}: loaded step {event['step']}, but {committed} was committed"
            committed = event["step"]

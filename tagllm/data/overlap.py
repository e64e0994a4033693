"""That no row is trained on which something holds out: by sources of one run, and by tags that were trained before."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tagllm.config import SPLITS, RowsConfig, SourceConfig, Split
from tagllm.data.splits import split_by
from tagllm.errors import UserError
from tagllm.template import Template


def check_keys(
    sources: Sequence[SourceConfig], templates: Sequence[Template], given: Sequence[Collection[Split]]
) -> None:
    """Two sources that draw held-out rows from the same data must draw the same ones: what one holds out the other
    would train on. Two keys are taken where both sources were told theirs. Nor may one train on a file that the other
    is given as rows to hold out.

    Args:
        given: the splits that the data of each source has itself; the others are drawn.

    Raises:
        UserError: a line for each two that do not.
    """
    about = [
        _Division(at, source, split_by(source, template), _drawn(source, splits))
        for at, (source, template, splits) in enumerate(zip(sources, templates, given, strict=True))
    ]
    problems = []
    for one, two in itertools.combinations(about, 2):
        problems += [*_held_out_by(one, two), *_held_out_by(two, one)]
        problems += _same_rows(one, two) if one.data == two.data else _same_file(one, two)
    if problems:
        raise UserError(*problems)


class _Division(NamedTuple):
    """How the rows of a source are divided."""

    at: int
    source: SourceConfig
    by: list[str]
    drawn: dict[str, float]

    @property
    def data(self) -> Any:
        source = self.source
        return _files(source, [None, *SPLITS]) if source.paths else (source.recipe, source.hub)

    @property
    def unbroken(self) -> list[str]:
        """Columns of the key in which white space counts for nothing."""
        fields = self.source.fields
        return [name for name in self.by if name in fields and fields[name].characters == "spaced"]

    @property
    def told(self) -> bool:
        """Its own key."""
        return bool(self.source.split.by)

    @property
    def shares(self) -> dict[str, float]:
        """Of the splits that have rows."""
        return {key: value for key, value in self.drawn.items() if value or key == "seed"}

    @property
    def text(self) -> str:
        """For people."""
        drawn = ", ".join(f"split.{key} {value:g}" for key, value in self.shares.items())
        by = ", ".join(f"{name} without white space" if name in self.unbroken else name for name in self.by)
        return f"{drawn} by {by}" if drawn else "nothing"


def _files(source: RowsConfig, of: Collection[Split | None]) -> dict[Split | None, Path]:
    return {split: Path(path).resolve() for split, path in source.paths.items() if split in of}


def _held_out_by(one: _Division, two: _Division) -> list[str]:
    """Files that the first is given as rows to hold out and the second trains on."""
    trained_on = _files(two.source, [None, "train"]).values()
    return [
        f"data.sources.{two.at}: trains on rows of {file.name}, and data.sources.{one.at} holds them out as {split}. "
        "Take one of the two out, or give rows that are in neither."
        for split, file in _files(one.source, ["valid", "test"]).items()
        if file in trained_on
    ]


def _same_file(one: _Division, two: _Division) -> list[str]:
    """A file to train on that two have, with other files beside it: the splits that only one is given the other draws
    from it."""
    shared = {*_files(one.source, [None, "train"]).values()} & {*_files(two.source, [None, "train"]).values()}
    same_key = one.by == two.by and one.unbroken == two.unbroken
    alike = one.shares == two.shares and (same_key or (one.told and two.told) or not one.drawn)
    if not shared or alike:
        return []
    return [
        f"data.sources.{two.at}: trains on {min(shared).name}, from which it draws {two.text}, and "
        f"data.sources.{one.at} {one.text}; what one holds out the other would train on. Give the same path and "
        "the same split in both."
    ]


def _same_rows(one: _Division, two: _Division) -> list[str]:
    if not one.drawn or not two.drawn:
        return []
    if one.by != two.by:
        if one.told and two.told:
            return []
        return [
            f"data.sources.{two.at}: is split by {', '.join(two.by)}, and data.sources.{one.at}, which has the same "
            f"rows, by {', '.join(one.by)}; what one holds out the other would train on. Set split.by in "
            "both, to the same columns."
        ]
    if one.unbroken != two.unbroken:
        name = min({*one.unbroken} ^ {*two.unbroken})
        return [
            f"data.sources.{two.at}: has fields.{name}.characters otherwise than data.sources.{one.at}, which has the "
            f"same rows: where it is spaced, white space in {name} is no part of the key, and what one holds out the "
            "other may train on. Set it alike in both."
        ]
    if one.drawn == two.drawn:
        return []
    draws = [", ".join(f"split.{key} {value:g}" for key, value in each.drawn.items()) for each in (two, one)]
    return [
        f"data.sources.{two.at}: has {draws[0]}, and data.sources.{one.at}, which has the same rows, has "
        f"{draws[1]}; what one holds out the other would train on. Set the same in both."
    ]


def drawn_from(source: RowsConfig, by: Sequence[str], given: Collection[Split]) -> dict[str, Any]:
    """How rows are held out from `data`: whoever asks a tag of the same must draw the same."""
    data = source.recipe or source.hub or sorted(Path(path).name for path in source.paths.values())
    return {"data": data, "by": list(by), "drawn": _drawn(source, given)}


def with_files(drawn: dict[str, Any], source: RowsConfig) -> dict[str, Any]:
    """What a tag keeps of how rows were held out from it: `drawn_from`, and which file is which split. Checkpoints do
    not look at that, since it decides no row."""
    return drawn | {"given": {split: Path(path).name for split, path in source.paths.items() if split}}


def refuse_seen(tag: str, held_out: Sequence[dict[str, Any]], mine: dict[str, Any], split: Split, where: str) -> None:
    """Raises UserError where rows of a split may be some that the tag was trained on, or chosen on. Files are known by
    their names.

    Args:
        held_out: what the tag keeps of the rows it was trained on (`with_files`).
        mine: the same of the rows it is to be asked.
    """
    if split == "train":  # asked for what it is
        return
    asked, share = mine["given"].get(split), mine["drawn"].get(split)
    beside = {name for given, name in mine["given"].items() if given != "train"}
    for held in held_out:
        if asked is not None:
            if asked in _names(held) and asked not in (held["given"].get(split), held["given"].get("test")):
                raise UserError(
                    f"{where}: its {split} rows are all of {asked}, which <{tag}> was trained with, and not as its "
                    f"{split} rows, so it may have seen them. Set source.path and source.split as they were in "
                    "training, or rename the file if it is another one."
                )
        elif share is not None and not _names(held).isdisjoint(_names(mine) - beside):
            same = (held["by"], held["drawn"].get("seed")) == (mine["by"], mine["drawn"].get("seed"))
            if not (same and share <= held["drawn"].get(split, 0)):
                raise UserError(
                    f"{where}: its {split} rows are drawn by {', '.join(mine['by'])} ({mine['drawn']}), those that "
                    f"<{tag}> was trained on by {', '.join(held['by'])} ({held['drawn']}), so some of them may be the "
                    "same. Set source.path and source.split as they were in training, or rename the file if it is "
                    "another one."
                )


def _names(about: dict[str, Any]) -> set[str]:
    """Of the files, or the recipe or hub data set."""
    return {about["data"]} if isinstance(about["data"], str) else {*about["data"]}


def _drawn(source: RowsConfig, given: Collection[Split]) -> dict[str, float]:
    """The shares that are drawn and the seed they are drawn with; nothing where none is."""
    shares = {"valid": source.split.valid, "test": source.split.test}
    drawn = {split: share for split, share in shares.items() if split not in given}
    return {"seed": source.split.seed, **drawn} if any(drawn.values()) else {}

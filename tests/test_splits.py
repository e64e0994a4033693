"""Splits: pure in (seed, key), never two of them for one key, and an error where they cannot be honoured."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm.config import FieldConfig, SourceConfig, Split
from tagllm.data.overlap import check_keys, drawn_from, refuse_seen, with_files
from tagllm.data.splits import keys_of, refuse_keyless, split_by, split_record, split_rows
from tagllm.errors import UserError
from tagllm.template import Template, parse_template


def split_of(key: str, seed: int, valid: float, test: float) -> Split:
    """What never changes, from hashlib alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    at = int.from_bytes(digest[:8], "little") / 2**64
    return "test" if at < test else "train" if at < 1 - valid else "valid"


KEYS = st.lists(st.text(max_size=8), min_size=1, max_size=60)
ROOMY = [f"key {number}" for number in range(400)]


def table_of(num_rows: int, splits: Sequence[str] | None = None, bad: dict[int, str] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "_file": [f"{split or 'all'}.csv" for split in splits or [""] * num_rows],
            "_line": list(range(2, num_rows + 2)),
            "_split": splits or [""] * num_rows,
            "_bad": [(bad or {}).get(row, "") for row in range(num_rows)],
        }
    )


def source_of(valid: float = 0.1, test: float = 0.1, seed: int = 0, rows: dict[str, int] | None = None) -> SourceConfig:
    split = {"valid": valid, "test": test, "seed": seed}
    return SourceConfig.model_validate({"path": "x.csv", "template": "{a}", "split": split, "rows": rows or {}})


def members(keys: list[str], splits: dict[Any, Any]) -> dict[str, set[str]]:
    return {split: {keys[row] for row in rows} for split, rows in splits.items()}


@settings(max_examples=30, deadline=None)
@given(keys=KEYS, seed=st.integers(), valid=st.floats(0, 0.45), test=st.floats(0, 0.45))
def test_a_hash_of_seed_and_key_says_which_split(keys: list[str], seed: int, valid: float, test: float) -> None:
    padded = [*keys, *ROOMY]
    config = source_of(valid if valid > 0.1 else 0, test if test > 0.1 else 0, seed)
    splits = split_rows(table_of(len(padded)), padded, config, "here")
    for split, rows in splits.items():
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert {split_of(padded[row], seed, config.split.valid, config.split.test) for row in rows} <= {split}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(padded)))
    found = members(padded, splits)
    assert not (found["train"] & found["valid"] or found["train"] & found["test"] or found["valid"] & found["test"])


@settings(max_examples=20, deadline=None)
@given(keys=KEYS, shuffle=st.randoms(use_true_random=False))
def test_order_and_added_rows_move_no_key(keys: list[str], shuffle: Any) -> None:
    few = [*keys, *ROOMY]
    more = [*few, *(f"added {number}" for number in range(50))]
    shuffle.shuffle(more)
    before = members(few, split_rows(table_of(len(few)), few, source_of(), "here"))
    after = members(more, split_rows(table_of(len(more)), more, source_of(), "here"))
    assert all(before[split] <= after[split] for split in before)


@settings(max_examples=20, deadline=None)
@given(shuffle=st.randoms(use_true_random=False), count=st.integers(1, 200))
def test_a_limit_takes_the_same_keys_in_any_order(shuffle: Any, count: int) -> None:
    keys = list(ROOMY)
    shuffle.shuffle(keys)
    source = source_of(rows={"train": count, "valid": 5})
    taken = members(keys, split_rows(table_of(400), keys, source, "here"))
    assert taken == members(ROOMY, split_rows(table_of(400), ROOMY, source, "here"))
    assert (len(taken["train"]), len(taken["valid"])) == (count, 5)


def test_smaller_limits_are_within_larger_ones_and_not_the_first_rows() -> None:
    few, many = (split_rows(table_of(400), ROOMY, source_of(rows={"train": n}), "here")["train"] for n in (20, 100))
    assert set(few) < set(many)
    assert few.tolist() != split_rows(table_of(400), ROOMY, source_of(), "here")["train"][:20].tolist()


def test_a_limit_spreads_over_keys_with_many_rows() -> None:
    keys = [f"protein {row // 68}" for row in range(68 * 100)]
    taken = split_rows(table_of(len(keys)), keys, source_of(rows={"train": 60}), "here")["train"]
    assert len({keys[row] for row in taken}) > 30


def test_shares_are_met_and_one_share_moves_no_key_of_the_other() -> None:
    keys = [str(number) for number in range(20_000)]
    table = table_of(len(keys))
    small, large = (split_rows(table, keys, source_of(valid, 0.1), "here") for valid in (0.1, 0.3))
    assert len(small["valid"]) == pytest.approx(2000, rel=0.1)
    assert len(small["test"]) == pytest.approx(2000, rel=0.1)
    assert small["test"].tolist() == large["test"].tolist()
    assert set(small["valid"]) < set(large["valid"])
    assert split_rows(table, keys, source_of(seed=1), "here")["test"].tolist() != small["test"].tolist()


def test_bad_rows_are_in_no_split() -> None:
    splits = split_rows(table_of(400, bad={3: "no JSON", 5: "NUL"}), ROOMY, source_of(), "here")
    assert sorted(np.concatenate(list(splits.values()))) == [row for row in range(400) if row not in (3, 5)]


def test_given_splits_are_kept() -> None:
    given_splits = ["train"] * 300 + ["valid"] * 60 + ["test"] * 40
    splits = split_rows(table_of(400, given_splits), ROOMY, source_of(0.4, 0.4), "here")
    assert {split: (rows[0], rows[-1], len(rows)) for split, rows in splits.items()} == {
        "train": (0, 299, 300), "valid": (300, 359, 60), "test": (360, 399, 40),
    }  # fmt: skip


@pytest.mark.parametrize("absent", [["valid"], ["test"], ["valid", "test"]])
def test_splits_not_given_are_carved_out_of_train_by_key(absent: list[Split]) -> None:
    present: Split = "train" if len(absent) == 2 else "valid" if "test" in absent else "test"
    train: Split = "train"
    given_splits = [train] * 300 + [present] * 100
    splits = split_rows(table_of(400, given_splits), ROOMY, source_of(0.2, 0.2), "here")
    for row, was in enumerate(given_splits):
        hashed = split_of(ROOMY[row], 0, 0.2, 0.2)
        expected = hashed if was == "train" and hashed in absent else was
        assert row in splits[expected]
    assert all(len(splits[split]) for split in absent)


def test_no_share_carves_nothing() -> None:
    splits = split_rows(table_of(3, ["train"] * 3), ["a", "b", "c"], source_of(0, 0), "here")
    assert {split: rows.tolist() for split, rows in splits.items()} == {"train": [0, 1, 2], "valid": [], "test": []}


def test_a_key_in_two_given_splits_is_refused() -> None:
    keys = ["a", "C" * 100, "b", "C" * 100, "a", "d"]
    table = table_of(6, ["train", "train", "train", "test", "valid", "valid"])
    with pytest.raises(UserError) as caught:
        split_rows(table, keys, source_of(), "data.sources[0]")
    [line] = caught.value.problems
    assert line.startswith(f"data.sources[0]: key '{'C' * 57}...' is in two splits, train (train.csv, line 3)")
    assert "test (test.csv, line 5); 2 keys are in more than one" in line
    assert "split.by" in line


def test_a_bad_row_is_no_overlap() -> None:
    table = table_of(3, ["train", "test", "test"], bad={1: "broken"})
    assert split_rows(table, ["a", "a", "b"], source_of(valid=0), "here")["train"].tolist() == [0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (source_of(), "no rows for valid and test: train 1, valid 0, test 0, unreadable 1"),
        (source_of(valid=0), "no rows for test"),
        (source_of(0, 0, rows={"valid": 3}), "no rows for valid"),
    ],
)
def test_empty_splits_are_refused(config: SourceConfig, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        split_rows(table_of(2, bad={1: "broken"}), ["k0", "k1"], config, "here")


def test_an_empty_train_split_is_refused() -> None:
    with pytest.raises(UserError, match="no rows for train: train 0, valid 0, test 2"):
        split_rows(table_of(2, ["test", "test"]), ["a", "b"], source_of(0, 0), "here")


def test_the_record_is_json_and_knows_changes_but_not_order() -> None:
    splits = split_rows(table_of(400), ROOMY, source_of(), "here")
    answers = [f"{row}" for row in range(400)]
    record = json.loads(json.dumps(split_record(splits, ROOMY, answers)))
    assert [record[split]["n"] for split in splits] == [len(rows) for rows in splits.values()]
    backwards = split_rows(table_of(400), ROOMY[::-1], source_of(), "here")
    assert split_record(backwards, ROOMY[::-1], answers[::-1]) == record

    first = splits["test"][0]
    other_key = split_record(splits, ["other" if row == first else key for row, key in enumerate(ROOMY)], answers)
    other_answer = split_record(splits, ROOMY, ["other" if row == first else a for row, a in enumerate(answers)])
    for changed, kept in ((other_key, set[str]()), (other_answer, {"sha256"})):
        assert changed["train"] == record["train"] and changed["valid"] == record["valid"]
        assert {key for key, value in changed["test"].items() if value == record["test"][key]} == {"n"} | kept


def test_digests_tell_joined_keys_apart() -> None:
    rows = {"train": np.arange(2)}
    answers = ["1", "2"]
    assert split_record(rows, ["ab", "c"], answers) != split_record(rows, ["a", "bc"], answers)  # type: ignore[arg-type]


def test_many_keys_are_fast() -> None:
    keys = [f"{number}" for number in range(200_000)]
    table = table_of(len(keys))
    start = time.perf_counter()
    split_rows(table, keys, source_of(rows={"train": 1000}), "here")
    assert time.perf_counter() - start < 5


DE, FR = "<DE> {de}", "<FR> {fr}"
KINDS = {"DE": "domain", "FR": "domain", "Pair": "function"}


def sources(*about: dict[str, Any]) -> tuple[list[SourceConfig], list[Template]]:
    found = [SourceConfig.model_validate({"path": "rows.csv", **source}) for source in about]
    return found, [parse_template(source.template, KINDS) for source in found]


def test_the_default_key_does_not_depend_on_the_order_of_the_prompt() -> None:
    found, templates = sources({"template": "{fr} {de} {output} <Pair>"}, {"template": "{de} {fr} <Pair>"})
    assert split_by(found[0], templates[0]) == split_by(found[1], templates[1]) == ["de", "fr"]
    (chosen,), (template,) = sources({"template": "{de}", "split": {"by": ["fr", "de"]}})
    assert split_by(chosen, template) == ["fr", "de"]
    table = datasets.Dataset.from_dict({"de": ["a", None], "fr": ["b", "c"]})
    assert keys_of(table, ["de", "fr"]) == ["a\0b", "\0c"] and keys_of(table, ["de"]) == ["a", ""]
    table = datasets.Dataset.from_dict({"de": ["CCO", "CCO "], "fr": [" b", "b"]})
    assert len({*keys_of(table, ["de", "fr"])}) == 1, "what a spreadsheet leaves behind a value is no other molecule"


def test_white_space_that_no_prompt_shows_makes_no_other_key() -> None:
    """A sequence that is spaced may be broken into lines, in training and not in the test rows."""
    table = datasets.Dataset.from_dict({"a": ["MKVLL", "MKV LL", "MKV\n LL "], "b": ["x y"] * 3})
    assert {*keys_of(table, ["a", "b"], {"a": FieldConfig(characters="spaced")})} == {"MKVLL\0x y"}
    assert keys_of(table, ["a"], {"b": FieldConfig(characters="spaced")}) == ["MKVLL", "MKV LL", "MKV\n LL"]


def test_rows_without_a_key_of_their_own_are_refused() -> None:
    """All of them would be in one split; a row that was not read has nothing, one without a field is told as such."""
    columns = {"a": ["a", None, " ", None, ""], "n": [1.0, math.nan, None, None, 2.0], "de": ["x", "", "", "", ""]}
    table = datasets.concatenate_datasets([table_of(5, bad={3: "broken"}), datasets.Dataset.from_dict(columns)], axis=1)
    found, templates = sources(*({"template": DE, "split": {"by": by}} for by in ("a", ["a", "n"], [], ["de", "a"])))
    with pytest.raises(
        UserError, match=r"^here: 3 of 5 rows have no a to be .*the first all.csv, line 3; .*Fill it in"
    ):
        refuse_keyless(table, found[0], templates[0], "here")
    with pytest.raises(UserError, match="2 of 5 rows have no a and no n to be split by, .*line 3;"):
        refuse_keyless(table, found[1], templates[1], "here")
    for at in (2, 3):
        refuse_keyless(table, found[at], templates[at], "here")


@pytest.mark.parametrize(
    ("one", "two", "given_splits"),
    [
        ({"template": DE}, {"template": FR}, ()),
        ({"template": DE, "path": "./rows.csv"}, {"template": FR}, ()),
        ({"template": DE, "split": {"by": "id"}}, {"template": DE}, ()),
        ({"template": DE}, {"template": FR}, ("train", "test")),
        ({"template": DE, "path": None, "hub": "x"}, {"template": FR, "path": None, "hub": "x"}, ("train",)),
        ({"template": DE, "path": {"train": "a.csv"}}, {"template": FR, "path": {"train": "a.csv"}}, ("train",)),
    ],
)
def test_two_keys_of_the_same_rows_are_refused(one: Any, two: Any, given_splits: tuple[Split, ...]) -> None:
    """A sentence that one holds out stands in a row that the other trains on."""
    found, templates = sources(one, {"template": DE, "path": "other.csv"}, two)
    told = "data.sources.2: is split by .*, and data.sources.0, .* same rows, by .*. Set split.by in both, to the same"
    with pytest.raises(UserError, match=told) as caught:
        check_keys(found, templates, [given_splits] * 3)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("one", "two", "given_splits"),
    [
        ({"template": DE, "split": {"by": "id"}}, {"template": FR, "split": {"by": "id"}}, ()),
        ({"template": DE, "split": {"by": "de"}}, {"template": FR, "split": {"by": "id"}}, ()),
        ({"template": DE}, {"template": FR, "split": {"by": "de"}}, ()),
        ({"template": DE}, {"template": FR, "path": "other.csv"}, ()),
        ({"template": DE}, {"template": FR}, ("train", "valid", "test")),
        ({"template": DE}, {"template": FR, "split": {"valid": 0, "test": 0}}, ()),
        ({"template": DE, "path": None, "recipe": "flores"}, {"template": FR, "path": None, "recipe": "flores"}, ()),
    ],
)
def test_keys_that_hold_out_the_same_or_were_chosen(one: Any, two: Any, given_splits: tuple[Split, ...]) -> None:
    check_keys(*sources(one, two), [given_splits] * 2)


@pytest.mark.parametrize(
    ("one", "two", "given_splits", "told"),
    [
        ({"seed": 1}, {}, (), "has split.seed 0, split.valid 0.1, split.test 0.1, .* has split.seed 1, split.valid"),
        ({"test": 0.2}, {}, (), "split.test 0.1, .* split.test 0.2; what one holds out the other would train on. Set"),
        ({"by": "id", "seed": 1}, {"by": "id"}, ("test",), "has split.seed 0, split.valid 0.1, and data.sources.0"),
    ],
)
def test_other_draws_of_the_same_rows_are_refused(
    one: Any, two: Any, given_splits: tuple[Split, ...], told: str
) -> None:
    found, templates = sources({"template": DE, "split": one}, {"template": DE, "split": two})
    with pytest.raises(UserError, match=f"data.sources.1: .*{told}"):
        check_keys(found, templates, [given_splits] * 2)


def test_keys_in_which_white_space_counts_once_are_refused() -> None:
    """`MKV AY` is another key than `MKVAY`, but not where residues are spaced."""
    spaced = {"template": DE, "fields": {"de": {"characters": "spaced"}}}
    with pytest.raises(UserError, match=r"data.sources.1: has fields.de.characters otherwise than data.sources.0"):
        check_keys(*sources(spaced, {"template": DE}), [()] * 2)
    check_keys(*sources(spaced, spaced), [()] * 2)
    files = [{"path": {"train": "a.csv", "test": f"{name}.csv"}} for name in "bc"]
    with pytest.raises(UserError, match="by de, and data.sources.0 .* by de without white space"):
        check_keys(*sources(spaced | files[0], {"template": DE} | files[1]), [("train", "test")] * 2)
    check_keys(*sources(spaced, {"template": DE}), [("train", "valid", "test")] * 2)


def test_shares_of_splits_that_are_given_are_never_drawn() -> None:
    check_keys(*sources({"template": DE, "split": {"test": 0.3}}, {"template": DE}), [("test",)] * 2)


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (
            {},
            {"path": {"train": "./rows.csv", "test": "t.csv"}},
            "rows.csv, from which it draws split.seed 0, split.valid",
        ),
        ({"path": {"train": "rows.csv", "valid": "v.csv", "test": "t.csv"}}, {}, "test 0.1 by de, .*0 nothing;"),
        ({}, {"path": {"train": "rows.csv"}, "split": {"by": "id"}}, "by id, and data.sources.0 .* by de;"),
        (
            {"path": {"train": "a.csv", "test": "rows.csv"}},
            {},
            "1: trains on rows of rows.csv, and data.sources.0 holds",
        ),
        ({}, {"path": {"train": "a.csv", "valid": "rows.csv"}}, "0: trains on rows of rows.csv, and data.sources.1"),
    ],
)
def test_a_file_that_is_held_out_in_another_way_is_refused(one: Any, two: Any, told: str) -> None:
    """Whatever other files are beside it."""
    found, templates = sources({"template": DE, **one}, {"template": DE, **two})
    with pytest.raises(UserError, match=f"data.sources.*{told}") as caught:
        check_keys(found, templates, [[split for split in source.paths if split] for source in found])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({}, {"path": {"train": "rows.csv"}}),
        ({"path": {"train": "rows.csv", "test": "t.csv"}}, {"path": {"train": "rows.csv", "test": "u.csv"}}),
        ({"split": {"valid": 0}}, {"path": {"train": "rows.csv", "valid": "v.csv"}}),
        ({"path": {"train": "a.csv", "test": "t.csv"}}, {"path": {"train": "b.csv", "test": "t.csv"}}),
    ],
)
def test_a_file_that_is_held_out_alike_may_have_others_beside_it(one: Any, two: Any) -> None:
    found, templates = sources({"template": DE, **one}, {"template": DE, **two})
    check_keys(found, templates, [[split for split in source.paths if split] for source in found])


def asked(source: dict[str, Any]) -> dict[str, Any]:
    (found,), (template,) = sources({"template": DE, **source})
    given_splits = [split for split in found.paths if split]
    return json.loads(json.dumps(with_files(drawn_from(found, split_by(found, template), given_splits), found)))


TRAIN_TEST = {"path": {"train": "rows.csv", "test": "other.csv"}}


@pytest.mark.parametrize(
    ("trained", "mine"),
    [
        ({}, {"path": {"test": "rows.csv"}}),
        ({}, {"path": {"train": "other.csv", "test": "else/rows.csv"}}),
        (TRAIN_TEST, {"path": {"test": "rows.csv"}}),
        ({"path": {"train": "rows.csv", "valid": "other.csv"}}, {"path": {"test": "other.csv"}}),
        (TRAIN_TEST, {}),
        (TRAIN_TEST, {"path": {"train": "rows.csv", "valid": "more.csv"}}),
        ({}, {"split": {"seed": 1}}),
    ],
)
def test_rows_that_a_tag_may_have_seen_are_refused(trained: Any, mine: Any) -> None:
    """By the names of files, since a library is asked elsewhere."""
    with pytest.raises(UserError, match="cases.c: its test rows are .*<W>.*Set source.path and source.split as"):
        refuse_seen("W", [asked({"path": "unrelated.csv"}), asked(trained)], asked(mine), "test", "cases.c")


@pytest.mark.parametrize(
    ("trained", "mine"),
    [
        ({}, {}),
        ({}, {"path": {"test": "other.csv"}}),
        (TRAIN_TEST, TRAIN_TEST),
        (TRAIN_TEST, {"path": {"test": "other.csv"}}),
        ({}, {"path": {"train": "rows.csv", "valid": "other.csv"}}),
        ({"path": None, "recipe": "flores"}, {"path": None, "recipe": "flores"}),
    ],
)
def test_rows_that_a_tag_has_not_seen_are_asked(trained: Any, mine: Any) -> None:
    refuse_seen("W", [asked(trained)], asked(mine), "test", "here")
    refuse_seen("W", [asked(trained)], asked(mine | {"path": {"train": "rows.csv"}, "recipe": None}), "train", "here")

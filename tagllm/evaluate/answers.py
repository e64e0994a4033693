"""What a run with {output} answers on held-out rows, and how good that is: for each source, and over all of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.build import Built
from tagllm.config import Split
from tagllm.data.encode import Example
from tagllm.data.examples import Examples
from tagllm.errors import SharedError
from tagllm.evaluate.kept import Ask, generate_of
from tagllm.evaluate.text import (
    Scores,
    all_numbers,
    known_languages,
    language_scores,
    no_spbleu,
    number_scores,
    problems_of,
    text_scores,
)
from tagllm.files import write_whole, writing
from tagllm.ranks import Ranks
from tagllm.template import FIELD, OUTPUT, SPAN, Template

ROWS_OF_MEAN = 1000


class Answer(NamedTuple):
    source: str
    """The template it was asked with."""
    prompt: str
    """Without tags."""
    given: str
    """The fields alone: what is to be translated, say."""
    reference: str
    generated: str


def text_results(built: Built, split: Split, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """`metrics` and `intervals` over all sources with {output} together, `sources` (the same by template), and
    FOLDER/generated.jsonl with every answer. The rows are drawn evenly, as many of each source.

    Raises:
        UserError: a model for spBLEU or COMET that is not there.
    """
    settings, templates = built.config.evaluation, built.stage.templates
    if problems := problems_of(settings, "evaluation"):
        raise SharedError(*problems)
    held_out = built.examples(split)
    asked = [at for at, template in enumerate(templates) if template.has_output and len(held_out[at])]
    share = max(1, settings.generated_rows // len(asked))
    ask = partial(generate_of, ranks=ranks)
    answers = {
        at: answers_of(built, templates[at], [held_out[at][row] for row in chosen(held_out[at], share)], ask)
        for at in asked
    }
    everything = [answer for mine in answers.values() for answer in mine]
    ranks.on_rank_zero(lambda: write_answers(everything, folder))
    sources, source_of = dict[str, Any](), [at for at in asked for _ in answers[at]]

    def scored(mine: list[Answer], source_of: list[int], language: str) -> Scores:
        means = partial(training_means, built, source_of)
        return ranks.on_rank_zero(lambda: scores_of(built, mine, language, built.tags, means))

    for at in asked:
        mine, name = answers[at], templates[at].text
        of_source = scored(mine, [at] * len(mine), language_of(templates[at], built.layout.kinds))
        sources[f"{name} (data.sources.{at})" if name in sources else name] = {"rows": len(mine), **of_source._asdict()}
    scores = of_source if len(asked) == 1 else scored(everything, source_of, "")
    total, notes = sum(len(held_out[at]) for at in asked), [no_spbleu(scores, settings)]
    if len(everything) < total:
        notes.append(f"answers in text: {len(everything):,} of {total:,} rows (evaluation.generated_rows)")
    about = {"note": "; ".join(filter(None, notes))} if any(notes) else {}
    metrics = {**scores.metrics, "generated_rows": len(everything)}
    return {"metrics": metrics, "intervals": scores.intervals, "sources": sources, **about}


def write_answers(answers: Sequence[Answer], folder: Path) -> None:
    lines = "".join(json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in answers)
    with writing(folder):
        write_whole(folder / "generated.jsonl", lines.encode())


def answers_of(built: Built, template: Template, rows: Sequence[Example], ask: Ask) -> list[Answer]:
    made = ask(built, [row.ids[: _output_at(row)] for row in rows])
    return [_answer(built, template, row, text) for row, text in zip(rows, made, strict=True)]


def copied_answers(built: Built, template: Template, rows: Sequence[Example]) -> list[Answer]:
    """Each row answered with its own fields."""
    return [_answer(built, template, row, _given(built, row)) for row in rows]


def scores_of(
    built: Built, answers: Sequence[Answer], language: str, tags: Collection[str], means: Callable[[], Sequence[float]]
) -> Scores:
    """Of numbers, or of text; with a language also how many answers are in it, rather than in another that a tag is
    named after.

    Args:
        means: what each answer counts as if it is no number: the mean of its training rows.
    """
    made, wanted = [answer.generated for answer in answers], [answer.reference for answer in answers]
    if all_numbers(wanted):
        return number_scores(made, [float(text) for text in wanted], means())
    scores = text_scores(made, wanted, [answer.given for answer in answers], built.config.evaluation)
    if language:
        among = {name.lower() for name in tags} & set(known_languages())
        scores = scores.with_(language_scores(made, language, among))
    return scores


def language_of(template: Template, kinds: dict[str, str]) -> str:
    """The language that {output} is to be in: the domain tag before it, with at most function tags in between, if its
    name is a language's code."""
    at = next(i for i, part in enumerate(template.parts) if part.is_output)
    tags = itertools.takewhile(lambda part: part.kind == "tag", reversed(template.parts[:at]))
    name = next((part.value.lower() for part in tags if kinds[part.value] == "domain"), "")
    return name if name in known_languages() else ""


def training_means(built: Built, sources: Sequence[int]) -> list[float]:
    """Of the numbers to be written, of some training rows of each source; 0 where it has none."""

    def mean(source: int) -> float:
        examples = built.examples("train")[source]
        texts = [_reference(built, examples[at]) for at in chosen(examples, ROWS_OF_MEAN)]
        return float(np.mean([float(text) for text in texts if all_numbers([text])] or [0.0]))

    means = {source: mean(source) for source in set(sources)}
    return [means[source] for source in sources]


def _answer(built: Built, template: Template, row: Example, generated: str) -> Answer:
    prompt = _plain(built, row.ids[: _output_at(row)])
    return Answer(template.text, prompt, _given(built, row), _reference(built, row), generated)


def _given(built: Built, row: Example) -> str:
    return _plain(built, row.ids[np.isin(row.marks, (SPAN, FIELD))])


def _reference(built: Built, row: Example) -> str:
    text: str = built.backbone.tokenizer.decode(row.ids[row.marks == OUTPUT], skip_special_tokens=True)
    return text.strip()


def chosen(examples: Examples, number: int) -> list[int]:
    """So many, evenly; of as many rows always the same."""
    return np.sort(np.random.default_rng(0).permutation(len(examples))[:number]).tolist()  # type: ignore[no-any-return]


def _plain(built: Built, ids: NDArray[np.int32]) -> str:
    """What the ids say without tags."""
    text: str = built.backbone.tokenizer.decode(ids[ids < built.layout.vocabulary_size], skip_special_tokens=True)
    return text.strip()


def _output_at(row: Example) -> int:
    return int(np.flatnonzero(row.marks == OUTPUT)[0])

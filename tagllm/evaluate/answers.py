"""What a run with {output} answers on held-out rows, and how good that is: for each source, and over all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.config import Split
from tagllm.data.dataset import Examples
from tagllm.data.encode import Example
from tagllm.errors import UserError
from tagllm.evaluate.generate import generate
from tagllm.evaluate.text import (
    NO_SPBLEU,
    Scores,
    all_numbers,
    known_languages,
    language_scores,
    number_scores,
    problems_of,
    text_scores,
)
from tagllm.files import replace_file, write_durably
from tagllm.template import OUTPUT, Template
from tagllm.train.build import Built

ROWS_OF_MEAN = 1000


class Answer(NamedTuple):
    source: str
    """The template it was asked with."""
    prompt: str
    """Without tags."""
    reference: str
    generated: str


def text_results(built: Built, split: Split, run: Path) -> dict[str, Any]:
    """`metrics` and `intervals` over all sources with {output} together, `sources` (the same by template), and RUN/
    generated.jsonl with every answer. The rows are drawn evenly, as many of each source.

    Raises:
        UserError: a model for spBLEU or COMET that is not there.
    """
    settings = built.config.evaluation
    if problems := problems_of(settings, "evaluation"):
        raise UserError(*problems)
    asked = [
        (template, examples)
        for template, examples in zip(built.stage.templates, built.examples(split), strict=True)
        if template.has_output and len(examples)
    ]
    share = max(1, settings.generated_rows // len(asked))
    answers: dict[str, list[Answer]] = {}
    found: dict[str, Scores] = {}
    for template, examples in asked:
        answers[template.text] = answers_of(built, template, [examples[at] for at in chosen(examples, share)])
        language = language_of(template, built.layout.kinds)
        found[template.text] = scores_of(built, answers[template.text], language, built.tags, lambda: built)
    everything = [answer for some in answers.values() for answer in some]
    overall = (
        found[asked[0][0].text] if len(asked) == 1 else scores_of(built, everything, "", built.tags, lambda: built)
    )
    write_answers(everything, run)
    sources = {name: {"rows": len(answers[name]), **scores._asdict()} for name, scores in found.items()}
    about = {} if settings.spbleu_model else {"note": NO_SPBLEU}
    metrics = {**overall.metrics, "generated_rows": len(everything)}
    return {"metrics": metrics, "intervals": overall.intervals, "sources": sources, **about}


def write_answers(answers: Sequence[Answer], folder: Path) -> None:
    lines = "".join(json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in answers)
    write_durably(folder / ".tmp-generated.jsonl", lines.encode())
    replace_file(folder / ".tmp-generated.jsonl", folder / "generated.jsonl")


def answers_of(built: Built, template: Template, rows: Sequence[Example]) -> list[Answer]:
    tokenizer, settings = built.backbone.tokenizer, built.config.evaluation
    prompts = [row.ids[: _output_at(row)] for row in rows]
    made = generate(built.model, tokenizer, prompts, settings.max_new_tokens, settings.beams, settings.rows_per_batch)
    plain = [_plain(built, ids) for ids in prompts]
    wanted = [_reference(built, row) for row in rows]
    return [Answer(template.text, *texts) for texts in zip(plain, wanted, made, strict=True)]


def copied_answers(built: Built, template: Template, rows: Sequence[Example]) -> list[Answer]:
    """Each row answered with its own prompt."""
    plain = [_plain(built, row.ids[: _output_at(row)]) for row in rows]
    return [Answer(template.text, text, _reference(built, row), text) for text, row in zip(plain, rows, strict=True)]


def scores_of(
    built: Built, answers: Sequence[Answer], language: str, tags: Collection[str], trained_on: Callable[[], Built]
) -> Scores:
    """Of numbers, or of text; with a language also how many answers are in it, rather than in another that a tag is
    named after.

    Args:
        trained_on: has the training rows, by whose mean answers count that are no numbers.
    """
    made, wanted = [answer.generated for answer in answers], [answer.reference for answer in answers]
    if all_numbers(wanted):
        return number_scores(made, [float(text) for text in wanted], _training_mean(trained_on()))
    scores = text_scores(made, wanted, [answer.prompt for answer in answers], built.config.evaluation)
    if language:
        among = {name.lower() for name in tags} & set(known_languages())
        scores = scores.with_(language_scores(made, language, among))
    return scores


def language_of(template: Template, kinds: dict[str, str]) -> str:
    """The language that {output} is to be in: the domain tag right before it, if its name is a language's code."""
    at = next(i for i, part in enumerate(template.parts) if part.kind == "field" and part.value == "output")
    before = template.parts[at - 1] if at else None
    if before is None or before.kind != "tag" or kinds[before.value] != "domain":
        return ""
    return before.value.lower() if before.value.lower() in known_languages() else ""


def _training_mean(built: Built) -> float:
    """Of the numbers to be written, of some rows of each source."""
    rows = [examples[at] for examples in built.examples("train") for at in chosen(examples, ROWS_OF_MEAN)]
    numbers = [text for row in rows if (row.marks == OUTPUT).any() and all_numbers([text := _reference(built, row)])]
    return float(np.mean([float(text) for text in numbers]))


def _reference(built: Built, row: Example) -> str:
    text: str = built.backbone.tokenizer.decode(row.ids[row.marks == OUTPUT], skip_special_tokens=True)
    return text.strip()


def chosen(examples: Examples, number: int) -> list[int]:
    """So many, evenly; of as many rows always the same."""
    return np.sort(np.random.default_rng(0).permutation(len(examples))[:number]).tolist()  # type: ignore[no-any-return]


def _plain(built: Built, ids: NDArray[np.int32]) -> str:
    """What the ids say without tags."""
    text: str = built.backbone.tokenizer.decode(ids[ids < built.layout.vocabulary_size])
    return text.strip()


def _output_at(row: Example) -> int:
    return int(np.flatnonzero(row.marks == OUTPUT)[0])

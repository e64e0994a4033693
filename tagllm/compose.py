"""`tagllm compose`: prompts over libraries of tags, scored on the same held-out rows without training.

Zero-shot composition (section 4.2 of the paper) and what it must beat: a control is another prompt on the same rows,
with the wrong tag, without tags, in words, with worked examples, or the source copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from tagllm.config import (
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    FieldConfig,
    OptimConfig,
    RowsConfig,
    RunConfig,
    Section,
    SourceConfig,
    Split,
    TagConfig,
    digest_of,
)
from tagllm.data.dataset import Prompts
from tagllm.data.sources import load_rows
from tagllm.errors import UserError, did_you_mean
from tagllm.evaluate.answers import Answer, answers_of, chosen, copied_answers, scores_of, training_means, write_answers
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.scoring import score_pass
from tagllm.evaluate.text import Scores, known_languages, problems_of
from tagllm.files import json_bytes, read_json, sha256_file, write_durably, write_whole
from tagllm.model.backbone import Backbone
from tagllm.model.smollm2 import cache_folder
from tagllm.origin import origin
from tagllm.stage import stage_of_run
from tagllm.tags import TagLibrary
from tagllm.template import escaped, field_text, parse_template, written
from tagllm.train.build import Built, assemble, open_backbone, prepare_on_all
from tagllm.train.ranks import Ranks


class PromptConfig(Section):
    """A prompt, or a column whose text is given as the answer; just a string is a prompt."""

    template: str = ""
    shots: Annotated[int, Field(ge=0)] = 0
    """So many training rows stand in front in the same words, an empty line behind each."""
    copies: str | None = None
    """The answer is what stands in this column: an answer that only repeats the question scores this."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.template) == (self.copies is not None):
            raise ValueError("give exactly one of template and copies")
        return self


def _as_prompt(value: Any) -> Any:
    return {"template": value} if isinstance(value, str) else value


class CaseConfig(Section):
    """A table. The first prompt is the one in question, the others are its controls."""

    source: RowsConfig
    split: Split = "test"
    language: str = ""
    """Code (ISO 639-1) of the language the answers are to be in; how many are is then measured apart."""
    prompts: Annotated[dict[str, Annotated[PromptConfig, BeforeValidator(_as_prompt)]], Field(min_length=1)]


class ComposeConfig(Section):
    output: Annotated[str, Field(min_length=1)]
    backbone: BackboneConfig
    libraries: Annotated[list[str], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    cases: Annotated[dict[str, CaseConfig], Field(min_length=1)]


class Asked(NamedTuple):
    """What came of a prompt. `answers`: of one that asks for text; `rows`: numbers of those it was asked of; `cut`: of
    how many rows the prompt leaves no room for all of the fields."""

    scores: Scores
    answers: list[Answer]
    rows: list[int]
    cut: int


class Composer(NamedTuple):
    config: ComposeConfig
    library: TagLibrary
    backbone: Backbone
    ranks: Ranks

    @classmethod
    def open(cls, config: ComposeConfig) -> Composer:
        """
        Raises:
            UserError: several ranks, a library that cannot be read or is of another backbone, a prompt with mistakes.
        """
        if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(
                f"compose: WORLD_SIZE is {size}; prompts are scored in one process. Leave the launcher out."
            )
        library = TagLibrary.load_all([Path(path) for path in config.libraries])
        check(config, library)
        dtypes = {tag.about.get("dtype", "auto") for tag in library.tags.values()}
        if config.backbone.dtype == "auto" and len(dtypes) == 1:  # measured anew it may be another one
            config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"dtype": dtypes.pop()})})
        ranks = Ranks.start(1800)
        backbone = open_backbone(config.backbone, ranks)
        library.backbone.require_same(backbone.identity, config.libraries[0])
        return cls(config, library, backbone, ranks)

    def score(self, name: str) -> dict[str, Any]:
        """Scores a case and writes OUTPUT/CASE/; what was scored with the same settings before is read from there."""
        case, folder = self.config.cases[name], Path(self.config.output) / name
        settings = self.config.model_dump(mode="json", include={"backbone", "libraries", "evaluation"})
        settings["cases"] = {name: case.model_dump(mode="json")}
        libraries = [sha256_file(Path(path) / "library.json") for path in self.config.libraries]
        rows = load_rows(case.source, cache_folder()).file
        file, digest = folder / "results.json", digest_of([settings, libraries, rows])
        if file.is_file() and (found := read_json(file)).get("config_digest") == digest:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        asked = {prompt: self._prompt(name, prompt) for prompt in case.prompts}
        _require_alike(asked, f"cases.{name}", self.config.evaluation.generated_rows)
        first, *others = asked
        results = {
            "run": name, "split": case.split, "rows": len(asked[first].rows), "prompt": first,
            "metrics": asked[first].scores.metrics, "intervals": asked[first].scores.intervals, "baselines": {},
            "controls": {other: asked[other].scores.metrics for other in others},
            "control_intervals": {other: asked[other].scores.intervals for other in others},
            "learned": self._function_tags(case), "backbone": self.backbone.identity._asdict(),
            "config_digest": digest, "seconds": time.monotonic() - began, **origin(),
        }  # fmt: skip
        write_answers([answer for one in asked.values() for answer in one.answers], folder)
        write_durably(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
        write_whole(file, json_bytes(results))
        return results

    def _prompt(self, name: str, prompt: str) -> Asked:
        case, about = self.config.cases[name], self.config.cases[name].prompts[prompt]
        text = about.template if about.copies is None else f"{{{about.copies}}} {{output}}"
        if about.shots:
            text = self._worked(name, text, about.shots) + text
        built = self._built(name, text, case.split)
        (template,), (examples,) = built.stage.templates, built.examples(case.split)
        numbers, cut = examples.row_numbers(), int(built.data.record["0"][case.split]["rows_cut"])
        if not template.has_output:
            found = score_pass(built, self.ranks, case.split, None)
            classes = any(head.classes for head in built.layout.heads.values())
            pairs = found.values_nK, found.targets_nK
            return Asked(Scores(value_metrics(*pairs, classes), intervals(*pairs, classes)), [], numbers, cut)
        rows = chosen(examples, self.config.evaluation.generated_rows)
        give = copied_answers if about.copies is not None else answers_of
        answers = [answer._replace(source=prompt) for answer in give(built, template, [examples[at] for at in rows])]
        scores = scores_of(
            built, answers, case.language, self.library.tags,
            lambda: training_means(self._built(name, text, "train"), [0] * len(answers)),
        )  # fmt: skip
        return Asked(scores, answers, [numbers[at] for at in rows], cut)

    def _worked(self, name: str, text: str, shots: int) -> str:
        """The first training rows as they stand in the prompt, tags and all, as a piece of a template."""
        built = self._built(name, text, "train")
        source, (template,) = built.config.data.sources[0], built.stage.templates
        wanted = dict.fromkeys([*template.fields, source.output])
        (examples,) = built.examples("train")
        if shots > len(examples):
            raise UserError(
                f"cases.{name}: shots is {shots}, but there are {len(examples)} training rows to take worked examples "
                "from. Ask for fewer, or raise source.rows.train."
            )
        rows = examples.columns(list(wanted), shots)
        pieces = []
        for at in range(shots):
            for part in template.parts:
                if part.kind == "tag":
                    pieces.append(f"<{part.value}>")
                elif part.kind == "text":
                    pieces.append(escaped(part.value))
                else:
                    column = source.output if part.value == "output" else part.value
                    about = source.fields.get(part.value, FieldConfig())
                    pieces.append(escaped(field_text(written(rows[column][at], about), part, about)))
            pieces.append("\n\n")
        return "".join(pieces)

    def _built(self, name: str, text: str, split: Split) -> Built:
        """The rows of one split in one prompt, and the model with its tags."""
        case = self.config.cases[name]
        template = parse_template(text, {n: tag.kind for n, tag in self.library.tags.items()})
        used = dict.fromkeys(template.tags)
        heads = [n for n in used if self.library.tags[n].head is not None]
        known = case.source.model_dump() | {"template": text, "target": case.source.target if heads else []}
        known["split"] |= {"by": case.source.split.by or self._key(case)}
        known["fields"] = {n: about for n, about in known["fields"].items() if n in (*template.fields, "output")}
        config = RunConfig.model_construct(
            output=self.config.output, backbone=self.config.backbone, evaluation=self.config.evaluation,
            mask=self.library.tags[heads[0]].about.get("mask", "causal") if heads else "causal",
            tags={n: TagConfig(load=self.config.libraries[0]) for n in used},
            data=DataConfig(sources=[SourceConfig(**known)]), optim=OptimConfig(steps=1),
        )  # fmt: skip
        stage = stage_of_run(config, self.library, f"cases.{name}")
        layout = stage.layout(self.backbone.vocabulary_size)
        prompts = Prompts(layout, self.backbone.tokenizer, self.backbone.max_tokens)
        data = prepare_on_all(config.data, stage.templates, prompts, self.ranks, [split])
        model = assemble(stage, self.backbone, layout, stage.loaded, self.ranks)
        return Built(stage, self.backbone, layout, stage.loaded, data, model)

    def _key(self, case: CaseConfig) -> list[str]:
        """One key for all prompts of a case, so that they are asked of the same rows: a run's in the first one."""
        if case.source.recipe is not None:  # has a key of its own
            return []
        first = next(iter(case.prompts.values()))
        return sorted(parse_template(first.template, {n: tag.kind for n, tag in self.library.tags.items()}).fields)

    def _function_tags(self, case: CaseConfig) -> list[str]:
        kinds = {n: tag.kind for n, tag in self.library.tags.items()}
        used = parse_template(next(iter(case.prompts.values())).template, kinds).tags
        return [n for n in dict.fromkeys(used) if kinds[n] == "function"]


def _require_alike(asked: dict[str, Asked], where: str, generated_rows: int) -> None:
    """Raises UserError unless all prompts were asked of the same rows, with as much of them."""
    out = "Leave long rows out with source.max_characters"
    if len({len(one.rows) for one in asked.values()}) > 1:
        told = ", ".join(f"{prompt} {len(one.rows)}" for prompt, one in asked.items())
        raise UserError(
            f"{where}: its prompts are asked of different numbers of rows ({told}), which cannot be compared. {out}, "
            f"or raise evaluation.generated_rows (it is {generated_rows})."
        )
    first = next(iter(asked))
    for prompt, one in asked.items():
        if one.rows != asked[first].rows:
            raise UserError(
                f"{where}: {prompt} leaves no room for some rows that {first} has, so the two are asked of different "
                f"rows, which cannot be compared. {out}."
            )
        if one.cut != asked[first].cut:
            raise UserError(
                f"{where}: fields do not fit into {prompt} in {one.cut} rows, into {first} in {asked[first].cut}: the "
                f"same question would not be asked. {out}, or ask for fewer shots."
            )


def check(config: ComposeConfig, library: TagLibrary) -> None:
    """Raises UserError with every mistake in the prompts."""
    kinds = {name: tag.kind for name, tag in library.tags.items()}
    problems = problems_of(config.evaluation, "evaluation")
    for name, case in config.cases.items():
        if case.language and case.language not in known_languages():
            problems.append(
                f"cases.{name}.language is {case.language!r}; it must be the code of a language that can be told from "
                f"others. {did_you_mean(case.language.lower(), known_languages())}"
            )
        if next(iter(case.prompts.values())).copies is not None:
            problems.append(
                f"cases.{name}.prompts: the first is what the others are compared with; give it a template."
            )
        for prompt, about in case.prompts.items():
            if about.copies is None:
                problems += _mistakes(about, case.source.target, kinds, library, f"cases.{name}.prompts.{prompt}")
    if problems:
        raise UserError(*problems)


def _mistakes(
    about: PromptConfig, target: Sequence[str], kinds: dict[str, str], library: TagLibrary, where: str
) -> Sequence[str]:
    try:
        template = parse_template(about.template, kinds, f"{where}.template")
    except UserError as error:
        return error.problems
    heads = {name: tag.head for name in template.tags if (tag := library.tags[name]).head is not None}
    if template.has_output + len(heads) != 1:
        return [
            f"{where}.template: {about.template!r} must have either {{output}} or one tag with a head, which answers; "
            f"tags with a head here: {', '.join(n for n, tag in library.tags.items() if tag.head) or 'none'}."
        ]
    if about.shots and heads:
        return [
            f"{where}.shots is {about.shots}; worked examples need {{output}}, a head answers without. Set it to 0."
        ]
    for name, head in heads.items():
        if head and len(target) != (wanted := 1 if head.spec.classes else head.spec.outputs):
            return [
                f"{where}: source.target names {len(target)} columns ({', '.join(target) or 'none'}); the head of "
                f"<{name}> needs {wanted}. Give as many."
            ]
    return []

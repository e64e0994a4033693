"""What `tagllm compose` is asked: cases of rows, each with prompts on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tagllm.config import BackboneConfig, Count, EngineConfig, EvaluationConfig, PathText, RowsConfig, Section, Split
from tagllm.errors import UserError, did_you_mean
from tagllm.evaluate.text import known_languages, problems_of
from tagllm.tags import TagLibrary
from tagllm.template import parse_template


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


class PromptsConfig(Section):
    """What all prompts have in common, by the keys that a run has under `data`."""

    on_bad_row: Literal["error", "skip"] = "error"
    max_tokens: Count | None = None
    """Longest prompt without worked examples. Default: what the function tag of the first prompt was trained with."""


class ComposeConfig(Section):
    output: Annotated[PathText, Field(min_length=1)]
    backbone: BackboneConfig
    libraries: Annotated[list[PathText], Field(min_length=1)]
    data: PromptsConfig = PromptsConfig()
    engine: EngineConfig = EngineConfig()
    """As a run has it."""
    evaluation: EvaluationConfig = EvaluationConfig()
    cases: Annotated[dict[str, CaseConfig], Field(min_length=1)]


def check_compose(config: ComposeConfig, library: TagLibrary) -> None:
    """Raises UserError with every mistake in the prompts."""
    problems = problems_of(config.evaluation, "evaluation")
    for name, case in config.cases.items():
        if "/" in name or name in ("", ".", ".."):
            problems.append(f"cases.{name}: the name is that of a folder in {config.output}; give one without a /.")
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
                problems += _mistakes(about, case.source.target, library, f"cases.{name}.prompts.{prompt}")
    if problems:
        raise UserError(*problems)


def _mistakes(about: PromptConfig, target: Sequence[str], library: TagLibrary, where: str) -> Sequence[str]:
    try:
        template = parse_template(about.template, library.kinds, f"{where}.template")
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
        if head and len(target) != (wanted := head.spec.num_targets):
            return [
                f"{where}: source.target names {len(target)} columns ({', '.join(target) or 'none'}); the head of "
                f"<{name}> needs {wanted}. Give as many."
            ]
    return []

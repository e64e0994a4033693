"""What in a config cannot be honoured together, told before any weight is loaded: a line per problem."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from tagllm.config import FieldConfig, HeadConfig, RunConfig, SourceConfig, Split
from tagllm.errors import UserError, did_you_mean
from tagllm.field_order import order_problems, trained_with
from tagllm.head import States, reads_of_fields
from tagllm.template import Template, marks_of, pool_of

if TYPE_CHECKING:
    from tagllm.stage import Stage


def contradictions(stage: Stage, where: str) -> list[str]:
    """Settings that cannot be honoured together."""
    problems = [*_of_heads(stage, where), *orders(stage, where), *_without_effect(stage.config, where)]
    problems += _of_the_whole(stage, where)
    for at in range(len(stage.templates)):
        problems += _of_source(stage, at, f"{where}: data.sources.{at}")
    return problems


def _of_heads(stage: Stage, where: str) -> list[str]:
    problems = list[str]()
    try:
        reads_of_fields(stage.heads)
    except UserError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
    for name, spec in stage.heads.items():
        try:
            States.of(spec, stage.pools)
        except UserError as error:
            problems += [f"{where}: tags.{name}.{problem}" for problem in error.problems]
        if hasattr(nn.ModuleDict(), name):
            problems.append(
                f"{where}: tags.{name}: a tag with a head cannot be called {name}, which torch has a meaning for. Give "
                f"it another name, such as {name.capitalize()}."
            )
    return problems


def _of_the_whole(stage: Stage, where: str) -> list[str]:
    config, problems = stage.config, list[str]()
    if config.mask == "block" and any(template.has_output for template in stage.templates):
        problems.append(
            f"{where}: mask is block, but a template has {{output}}; text is generated under the causal mask only. Set "
            "mask=causal."
        )
    if not config.remembers and (config.remember_gib or config.remember_device_gib):
        problems.append(_cannot_remember(config, where))
    used = {name for template in stage.templates for name in template.tags}
    for name in config.tags:
        if name not in used:
            problems.append(f"{where}: tags.{name} stands in no template; put <{name}> in one, or drop the tag.")
    if not stage.learned:
        problems.append(f"{where}: tags: none is learned; leave `load` out of one, or set learn: true.")
    return problems


def _of_source(stage: Stage, at: int, place: str) -> list[str]:
    source, template, heads = stage.config.data.sources[at], stage.templates[at], stage.heads
    problems = _of_target(source, template, heads, place)
    if (limit := source.fields.get("output", FieldConfig()).max_tokens) is not None:
        problems.append(
            f"{place}.fields.output.max_tokens is {limit}; the answer is never cut. Drop it, or leave long "
            "rows out with max_characters."
        )
    behind = itertools.dropwhile(lambda part: not part.is_output, template.parts)
    if late := [part.value for part in behind if part.kind == "tag" and part.value in heads]:
        problems.append(
            f"{place}.template: <{late[0]}> stands behind {{output}}, which is not there yet when the head is to "
            "answer. Put the tag before it."
        )
    unknown = [name for name in source.fields if name not in (*template.fields, "output")]
    problems += [
        f"{place}.fields.{name}: the template has no {{{name}}}. {did_you_mean(name, template.fields)}"
        for name in unknown
    ]
    if not set(template.tags) & set(stage.learned):
        problems.append(f"{place}.template has none of the learned tags ({', '.join(stage.learned)}).")
    answers = stage.weights.value and set(template.tags) & set(heads)
    if not answers and not set(marks_of(template, stage.kinds)) & set(stage.terms):
        problems.append(
            f"{place}: nothing in the prompt is supervised; the template needs {{output}}, a tag with a head, or a "
            "field right behind a domain tag with loss.span > 0."
        )
    return problems


def _of_target(source: SourceConfig, template: Template, heads: Mapping[str, HeadConfig], place: str) -> list[str]:
    owners = {name for name in template.tags if name in heads}
    if len(owners) > 1:
        return [f"{place}.template: {', '.join(sorted(owners))} all have heads; one per template can answer."]
    wanted = heads[next(iter(owners))] if owners else None
    width = 0 if wanted is None else wanted.num_targets
    if shown := [name for name in source.target if name in template.fields]:
        return [
            f"{place}.target is {', '.join(shown)}, which the prompt shows as {{{shown[0]}}}: the model would read its "
            "answer. Take it out of the template."
        ]
    if len(source.target) == width:
        return []
    return [
        f"{place}.target names {len(source.target)} columns ({', '.join(source.target) or 'none'}); the head "
        f"of {', '.join(owners) or 'the template (it has none)'} needs {width}."
    ]


def orders(stage: Stage, where: str) -> list[str]:
    """Of prompts with the same head, where it reads means of fields."""
    heads, problems = stage.heads, list[str]()
    kinds = {n: kind for library in stage.libraries.values() for n, kind in library.kinds.items()} | stage.kinds
    for name in (name for name, head in heads.items() if head.reads != "last"):
        prompts = trained_with(stage.loaded[name], kinds) if name in stage.loaded else {}
        for at, template in enumerate(stage.templates):
            if name in template.tags:
                prompts[f"{where}: data.sources.{at}.template"] = template
        problems += order_problems(name, prompts, kinds, pool_of(heads.values()))
    return problems


def _without_effect(config: RunConfig, where: str) -> list[str]:
    """Settings that something else leaves without effect."""
    problems, sources, patience = list[str](), config.data.sources, config.evaluation.patience
    if patience is not None and not any(may_have(source, "valid") for source in sources):
        problems.append(
            f"{where}: evaluation.patience is {patience}, but no source has rows for validation (split.valid is 0 in "
            "all), so nothing would end the run. Set split.valid, or leave patience out."
        )
    for at, source in enumerate(sources):
        if source.rows_per_group != type(source).model_fields["rows_per_group"].default and not source.group_by:
            problems.append(
                f"{where}: data.sources.{at}.rows_per_group is {source.rows_per_group}, but no group_by names the "
                "column that groups have in common. Set group_by, or leave rows_per_group out."
            )
    if config.data.mix != "given":
        problems += [
            f"{where}: data.sources.{at}.weight is {source.weight:g}, but data.mix is {config.data.mix}, which looks "
            "at no weight. Set data.mix=given, or leave weight out."
            for at, source in enumerate(sources)
            if source.weight != 1
        ]
    return problems


def may_have(source: SourceConfig, split: Split) -> bool:
    """Recipes and hub data sets may come with such rows, and files that are given by split too."""
    return source.split.share(split) > 0 or not source.paths or split in source.paths


def _cannot_remember(config: RunConfig, where: str) -> str:
    why = "engine.zero_stage is 3, where ranks must run the same passes whatever each of them remembers"
    if config.prefix == "full":
        why = "prefix is full, which leaves nothing to remember"
    return (
        f"{where}: remember_gib is {config.remember_gib or 0} and remember_device_gib "
        f"{config.remember_device_gib or 0}, but {why}. Set both to 0, or leave them out."
    )


def check_world(config: RunConfig, num_ranks: int, where: str) -> None:
    """Raises UserError unless the rows of a step divide evenly among the ranks."""
    rows = config.optim.rows_per_step
    if rows % num_ranks:
        fewer = max(ranks for ranks in range(1, num_ranks) if rows % ranks == 0)
        near = sorted({max(rows // num_ranks, 1) * num_ranks, (rows // num_ranks + 1) * num_ranks})
        raise UserError(
            f"{where}: optim.rows_per_step is {rows}; it must be a multiple of the number of ranks, {num_ranks}. Start "
            f"{fewer}, or train with {' or '.join(map(str, near))} rows per step."
        )

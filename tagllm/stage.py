"""A stage as data: what a config means before any weight is loaded.

Which tags there are and which are learned, the parsed templates, the loss weights. `check` needs no more than this.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tagllm.config import HeadConfig, RunConfig
from tagllm.contradictions import contradictions, orders
from tagllm.data.collate import Collator
from tagllm.data.layout import TagLayout
from tagllm.errors import UserError
from tagllm.head import pools_known
from tagllm.model.loss import LossWeights
from tagllm.tags import NAME, Tag, TagLibrary
from tagllm.template import OUTPUT, SPAN, Template, all_pools, parse_template, pool_of


class Stage(NamedTuple):
    config: RunConfig
    loaded: dict[str, Tag]
    libraries: dict[str, TagLibrary]
    kinds: dict[str, str]
    templates: list[Template]

    @property
    def learned(self) -> list[str]:
        return [name for name, tag in self.config.tags.items() if tag.learned]

    @property
    def terms(self) -> tuple[int, ...]:
        """Marks whose tokens are supervised."""
        return tuple(m for m, weight in ((SPAN, self.weights.span), (OUTPUT, self.weights.output)) if weight)

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """By tag, a loaded head's as it was trained."""
        found = {}
        for name, tag in self.config.tags.items():
            head = self.loaded[name].head if name in self.loaded else None
            spec = head.spec if head else tag.head
            if spec is not None:
                found[name] = spec
        return found

    def target_names(self, head: str) -> list[str]:
        """Columns that it learns, as the first of its sources calls them."""
        pairs = zip(self.config.data.sources, self.templates, strict=True)
        return next((source.target for source, template in pairs if head in template.tags and source.target), [])

    @property
    def pools(self) -> tuple[int, ...]:
        """The means over fields that heads read side by side."""
        known = pools_known(tag.head for tag in self.loaded.values())
        return all_pools(self.templates, self.kinds, pool_of(self.heads.values()), known)

    @property
    def knowing(self) -> dict[str, Tag]:
        """Loaded tags that were trained on rows with their answers, and take part."""
        there = {name: tag for name, tag in self.loaded.items() if len(tag.rows_PD) or tag.head}
        return {name: tag for name, tag in there.items() if tag.knows_answers}

    @property
    def weights(self) -> LossWeights:
        """Those given, or 1 for the terms a stage calls for: output and value where there are any, else the spans."""
        loss, heads = self.config.loss, self.heads
        has_output = any(template.has_output for template in self.templates)
        has_value = any(name in heads for template in self.templates for name in template.tags)
        defaults = LossWeights(float(not has_output and not has_value), float(has_output), float(has_value))
        given = (loss.span, loss.output, loss.value)
        return LossWeights(*(default if one is None else one for default, one in zip(defaults, given, strict=True)))

    def layout(self, vocabulary_size: int) -> TagLayout:
        tags = self.config.tags
        lengths = {
            n: len(self.loaded[n].rows_PD) if n in self.loaded else 0 if tags[n].absent else tags[n].length
            for n in tags
        }
        return TagLayout.of(vocabulary_size, self.kinds, lengths, self.learned, self.heads, self.pools)

    def collator(self, layout: TagLayout, free_spans: bool) -> Collator:
        """`free_spans`: whether the backbone lets keys be moved to other positions."""
        return Collator(
            layout.first_learned_id,
            self.terms,
            num_outputs=max((head.outputs for head in layout.heads.values()), default=0),
            num_pools=layout.num_pools,
            frozen_prefix=self.config.prefix == "frozen",
            block=self.config.mask == "block",
            free_spans=free_spans,
            sharded=self.config.engine.stage == 3,
            grouped=any(source.group_by for source in self.config.data.sources),
        )


def read_stage(config: RunConfig, where: str) -> Stage:
    """Loads the libraries and checks everything that can be checked without the backbone.

    Raises:
        UserError: every problem found, one per line.
    """
    problems: list[str] = []
    libraries: dict[str, TagLibrary] = {}
    loaded: dict[str, Tag] = {}
    for name, tag in config.tags.items():
        if not NAME.fullmatch(name):
            problems.append(f"{where}: tags.{name}: a tag's name is letters, digits, - and _, a letter first.")
        if tag.load is not None:
            try:
                if tag.load not in libraries:
                    libraries[tag.load] = TagLibrary.load(Path(tag.load))
                found = libraries[tag.load].get(name, f"{where}: tags.{name}.load: {tag.load}")
                loaded[name] = found.with_rows(found.rows_PD[:0]) if tag.absent else found
            except UserError as error:
                problems += error.problems
    kinds = {n: loaded[n].kind if n in loaded else tag.kind for n, tag in config.tags.items()}
    templates = []
    for at, source in enumerate(config.data.sources):
        try:
            templates.append(parse_template(source.template, kinds, f"{where}: data.sources.{at}.template"))
        except UserError as error:
            problems += error.problems
    stage = Stage(config, loaded, libraries, kinds, templates)
    if not problems:
        problems += contradictions(stage, where)
    if problems:
        raise UserError(*problems)
    return stage


def stage_of_run(config: RunConfig, library: TagLibrary, where: str) -> Stage:
    """The stage of a finished run: all its tags come from its own library.

    Raises:
        UserError: a template has an unknown tag, or gives a head fields in another order than it knows.
    """
    loaded = {name: library.get(name, where) for name in config.tags}
    kinds = {name: tag.kind for name, tag in loaded.items()}
    templates = [parse_template(source.template, kinds, where) for source in config.data.sources]
    stage = Stage(config, loaded, {where: library}, kinds, templates)
    if problems := orders(stage, where):
        raise UserError(*problems)
    return stage

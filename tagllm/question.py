"""What `tagllm predict` is asked: a tag, its prompt and the columns it answers in, told before a backbone is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tagllm.config import BackboneConfig, EngineConfig, EvaluationConfig, FieldConfig, HeadConfig
from tagllm.data.writers import numbered
from tagllm.errors import UserError, did_you_mean
from tagllm.field_order import order_problems, trained_with
from tagllm.model.backbone import as_trained
from tagllm.tags import Tag, TagLibrary
from tagllm.template import Template, parse_template, pool_of
from tagllm.unusual import unread_fields


class Request(NamedTuple):
    """What is to be predicted. `tag` may be left out where there is one function tag; the backbone is the library's
    own, `template` and `max_new_tokens` come from the function tag, unless given."""

    libraries: list[Path]
    backbone: BackboneConfig | None = None
    tag: str | None = None
    template: str | None = None
    rows_per_batch: int = 32
    max_new_tokens: int | None = None
    engine: EngineConfig = EngineConfig()


class Question(NamedTuple):
    """A request with what its libraries say of it. `tags` are those of the prompt."""

    library: TagLibrary
    tag: str
    template: Template
    tags: dict[str, Tag]
    fields: dict[str, FieldConfig]
    max_new_tokens: int
    backbone: BackboneConfig

    @classmethod
    def of(cls, request: Request) -> Question:
        """
        Raises:
            UserError: a damaged library, an unknown tag, or a prompt that it cannot answer in.
        """
        library = TagLibrary.load_all(request.libraries)
        name, kinds = _function_tag(library.tags, request), library.kinds
        about = library.tags[name].about
        text = request.template or about.get("template")
        if not text:
            raise UserError(f"tags.{name}: it was saved without a template. Give one with --template.")
        template = parse_template(str(text), kinds, "template")
        tags = {n: tag for n, tag in library.tags.items() if n in template.tags}
        if name not in tags:
            raise UserError(f"template: it has no <{name}>. Add it, or choose another tag with --tag.")
        _refuse_heads(name, template, tags, kinds)
        fields = fields_as_trained([*(tag for tag in tags.values() if tag.name != name), tags[name]], kinds)
        fields = _renamed(fields, about.get("template"), template, kinds)
        # tags made by hand do not say how long their answers were
        most = request.max_new_tokens or about.get("max_new_tokens", EvaluationConfig().max_new_tokens)
        backbone = request.backbone or BackboneConfig(model=library.backbone.name)
        return cls(library, name, template, tags, fields, most, as_trained(backbone, [library.tags[name]]))

    @property
    def about(self) -> dict[str, Any]:
        return self.library.tags[self.tag].about

    @property
    def spec(self) -> HeadConfig | None:
        """Of the head that answers; without one the answer is text."""
        head = self.tags[self.tag].head
        return head.spec if head else None

    @property
    def notes(self) -> list[str]:
        """What in its prompt can be meant so, and seldom is."""
        return unread_fields(self.template, [n for n, tag in self.tags.items() if tag.head])

    @property
    def columns(self) -> list[str]:
        """Names of the new columns."""
        if self.spec is None:
            return [self.tag]
        if self.spec.classes:
            return [self.tag, *(f"{self.tag}_probability_{name}" for name in self.spec.classes)]
        return numbered(self.tag, self.spec.outputs)


def fields_as_trained(tags: Iterable[Tag], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Settings of fields, by name, that these tags were trained with: of several tags the last one counts, also where
    it had the field in its prompt as it stands in the data, without a setting."""
    fields: dict[str, Any] = {}
    for tag in tags:
        own = {name for template in trained_with(tag, kinds).values() for name in template.fields}
        fields = {name: field for name, field in fields.items() if name not in own} | tag.about.get("fields", {})
    return fields


def _refuse_heads(name: str, template: Template, tags: Mapping[str, Tag], kinds: Mapping[str, str]) -> None:
    """Raises UserError where two heads would answer, or one that takes fields apart has them in another order."""
    heads = {n: tag.head.spec for n, tag in tags.items() if tag.head}
    if name in heads and len(heads) > 1:
        raise UserError(
            f"template: {', '.join(f'<{n}>' for n in heads)} all have heads; one per template can answer. Take out all "
            f"but <{name}>."
        )
    if name in heads and heads[name].reads != "last":
        prompts = trained_with(tags[name], kinds) | {"template": template}
        if problems := order_problems(name, prompts, kinds, pool_of(heads.values())):
            raise UserError(*problems)


def _renamed(
    fields: dict[str, Any], trained: str | None, asked: Template, kinds: Mapping[str, str]
) -> dict[str, FieldConfig]:
    """Settings go with the column; where the template names another one, with its place among the fields.

    Raises:
        UserError: a column with settings is not asked for, and other columns are more or fewer.
    """
    before = parse_template(trained, kinds, "template").fields if trained else []
    moved = dict(zip(before, asked.fields, strict=False))
    for name in [name for name in fields if name in before and name not in asked.fields]:
        if len(before) != len(asked.fields) or moved[name] in before:
            raise UserError(
                f"template: it has no {{{name}}}, which the tag was trained with as {fields[name]}, and which of its "
                f"fields {', '.join(asked.fields) or 'none'} is in that place cannot be told. Name the column {name}."
            )
        fields = fields | {moved[name]: fields[name]}
    return fields


def _function_tag(tags: dict[str, Tag], request: Request) -> str:
    functions = [name for name, tag in tags.items() if tag.kind == "function"]
    if request.tag is not None:
        if request.tag not in functions:
            raise UserError(f"--tag: {request.tag!r} is no function tag here. {did_you_mean(request.tag, functions)}")
        return request.tag
    if not functions:
        there = ", ".join(f"<{name}>" for name in tags) or "no tags"
        raise UserError(
            f"{request.libraries[0]}: holds {there} and no function tag, which alone answers. Name a run that trained "
            "one, or its library with --library."
        )
    if len(functions) > 1:
        raise UserError(
            f"{request.libraries[0]}: holds {len(functions)} function tags ({', '.join(functions)}); predict needs "
            "one. Choose it with --tag."
        )
    return functions[0]

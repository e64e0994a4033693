"""A config from a YAML file with `key=value` overrides; what is wrong with it is told in a line per problem."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import MarkedYAMLError, YAMLError

from tagllm.config import RunConfig, Section, TagConfig
from tagllm.errors import UserError, did_you_mean

Config = TypeVar("Config", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] | None = None, resolve: bool = True) -> RunConfig:
    """`load_as` for the config of a run."""
    return load_as(RunConfig, path, overrides, resolve)


def load_as(
    model: type[Config], path: str | Path, overrides: Sequence[str] | None = None, resolve: bool = True
) -> Config:
    """Reads a YAML config, applies `key=value` overrides and checks it.

    Args:
        resolve: what `${...}` stands for is put in its place. A run records it so, and then it is text.

    Raises:
        UserError: the file cannot be read, or any key or value is wrong; one problem per line, all of them.
    """
    path = Path(path)
    try:
        raw = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config. Copy one of configs/quickstart/ to start from.") from None
    except MarkedYAMLError as error:
        raise UserError(_no_yaml(path, error)) from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not a readable YAML file: {error}") from None
    if not OmegaConf.is_dict(raw):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a {type(raw).__name__}.")
    for override in overrides or ():
        for each in _spread(raw, override):
            _apply(raw, each)
    try:
        values = OmegaConf.to_container(raw, resolve=resolve)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from None
    return parse_as(model, values, str(path))


def from_overrides(model: type[Config], overrides: Sequence[str], values: dict[str, Any]) -> Config:
    """`values` with `key=value` overrides, checked.

    Raises:
        UserError: any key or value is wrong.
    """
    raw = OmegaConf.create(values)
    for override in overrides:
        _apply(raw, override)
    return parse_as(model, OmegaConf.to_container(raw), "overrides")


def parse_as(model: type[Config], values: Any, where: str) -> Config:
    """Checks a plain mapping; `where` begins each error line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(*(_explain(model, where, problem) for problem in error.errors())) from None


def _spread(raw: Any, override: str) -> list[str]:
    """`tags.length=5`, a key of all tags and the name of none, stands for that key of every new tag."""
    key, _, text = override.partition("=")
    first, _, name = key.partition(".")
    tags = raw.get("tags")
    if first != "tags" or not name or "." in name or not OmegaConf.is_dict(tags) or name in tags:
        return [override]
    if name not in TagConfig.model_fields:
        if text.lstrip().startswith("{"):  # a whole tag
            return [override]
        raise UserError(
            f"override {override!r}: {name} is no tag of the config, and no key that all its tags have. "
            f"{did_you_mean(name, [*tags, *TagConfig.model_fields])}"
        )
    new = [tag for tag, config in tags.items() if not (OmegaConf.is_dict(config) and config.get("load"))]
    if not new:
        raise UserError(f"override {override!r}: all tags of the config are loaded, and none is new. Leave it out.")
    return [f"tags.{tag}.{name}={text}" for tag in new]


def _apply(raw: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: it must read key=value, as in optim.tag_lr=0.01")
    try:
        value = _value(text)
        OmegaConf.update(raw, key, value, merge=value != {})  # which would change nothing
    except (YAMLError, OmegaConfBaseException, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"override {override!r}: cannot be applied: {error}") from None


_CLOSED = {('"', '"'), ("'", "'"), ("[", "]"), ("{", "}")}


def _value(text: str) -> Any:
    """As YAML reads it, but for comments: a path may hold ` #`, and so may what stands in quotes or brackets."""
    if not text or (" #" in text and (text[0], text[-1]) not in _CLOSED):
        return text
    value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    assert isinstance(value, dict)
    return value["value"]


def _no_yaml(path: Path, error: MarkedYAMLError) -> str:
    told, mark, hint = ", ".join(filter(None, (error.context, error.problem))), error.problem_mark, ""
    if mark is not None:
        told = f"line {mark.line + 1}, column {mark.column + 1}: {told}"
        line = path.read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1]
        if "duplicate key" not in told and ("mapping values" in told or any(sign in "".join(line) for sign in "{}<")):
            hint = '. Text with braces or a colon stands in quotes, as in template: "{smiles} is <QED>"'
    return f"{path}: not a readable YAML file: {told}{hint}"


def _explain(model: type[BaseModel], where: str, problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    kind, value, message = problem["type"], problem["input"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        *parents, key = problem["loc"]
        return f"{where}: {place} is no key of a config. {did_you_mean(str(key), _keys_at(model, parents))}"
    if kind == "missing":
        return f"{where}: {place} is missing; it must be given."
    if kind == "value_error":
        return f"{where}: {place or 'config'}: {message}."
    if kind == "string_type" and isinstance(value, dict) and value and all(one is None for one in value.values()):
        message += '; text that begins with a brace stands in quotes, as in "{smiles} is <QED>"'
    return f"{where}: {place} is {value!r}; {message[0].lower()}{message[1:]}."


def _keys_at(model: Any, parents: list[Any]) -> list[str]:
    """The keys a config section may have, found by walking the models from `model` along `parents`."""
    steps = iter(parents)
    for part in steps:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        model = next(iter(_models_in(annotation)), None)
        if get_origin(annotation) in (dict, list):
            next(steps, None)  # a name or an index, not a key of ours
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]

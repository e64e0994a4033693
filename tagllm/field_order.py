"""A head that takes fields apart knows the means over them by their order in the prompt, so all prompts that it answers
must have it: those of a run, and the one that a loaded head was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from tagllm.config import Pool
from tagllm.errors import UserError
from tagllm.tags import Tag
from tagllm.template import Template, owners_of, parse_template


def order_problems(name: str, prompts: Mapping[str, Template], kinds: Mapping[str, str], pool: Pool) -> list[str]:
    """What is wrong with prompts, by the places where they stand, in which the head of tag `name` answers."""
    owners = {place: owners_of(template, kinds, pool) for place, template in prompts.items()}
    first = max(owners, key=lambda place: len(owners[place]), default="")
    there = first.rpartition(": ")[2]  # the file is named in front
    return [
        f"{place}: its fields are of {', '.join(found)}, those of {there} of {', '.join(owners[first])}; the head of "
        f"<{name}> has pool: {pool}, and knows them by their order. Put them in the same order."
        for place, found in owners.items()
        if trade_places(owners[first], found)
    ]


def trade_places(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether an owner that is in both stands at another position; one with several means is compared mean by mean."""

    def places(owners: Sequence[str], owner: str) -> list[int]:
        return [at for at, each in enumerate(owners) if each == owner]

    common = set(one) & set(other)
    return any(a != b for owner in common for a, b in zip(places(one, owner), places(other, owner), strict=False))


def trained_with(tag: Tag, kinds: Mapping[str, str]) -> dict[str, Template]:
    """The prompt of a tag's training by what it is called in a message; none where its library does not say."""
    with suppress(UserError):  # made by hand, or of tags that are not here
        return {f"the prompt <{tag.name}> was trained with": parse_template(str(tag.about.get("template", "")), kinds)}
    return {}

"""The library a run ends in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tagllm.build import Built
from tagllm.head import Head
from tagllm.model.backbone import DTYPES
from tagllm.model.value_head import HeadModule
from tagllm.tags import Tag, TagLibrary


def library_of(
    built: Built, learned: dict[str, Tensor], heads: Mapping[str, Head], about: dict[str, Any]
) -> TagLibrary:
    """All tags of the run: learned ones with the values of `Engine.learned` or one of the `heads` that were fitted,
    loaded ones bit for bit."""
    library, layout = TagLibrary(built.backbone.identity), built.layout
    rows = layout.by_learned_tag(learned.get("tags.learned_TD"))
    for name, tag in built.tags.items():
        if name in layout.learned:
            now = rows.get(name, tag.rows_PD)
            head = heads.get(name) or _trained_head(built, tag, learned)
            tag = Tag(name, tag.kind, now, head, _history(built, name) | about)  # noqa: PLW2901
        library = library.add(tag)
    return library


def _trained_head(built: Built, tag: Tag, learned: dict[str, Tensor]) -> Head | None:
    if tag.head is None:
        return None
    module = built.model.heads[tag.name]
    assert isinstance(module, HeadModule)
    weight_KF, bias_K = module.folded(*(learned[f"heads.{tag.name}.{part}"] for part in ("weight_KF", "bias_K")))
    return replace(tag.head, weight_KF=weight_KF, bias_K=bias_K)


def _history(built: Built, name: str) -> dict[str, Any]:
    """What predict needs to ask again as in training, and people to know where a tag comes from."""
    sources, templates = built.config.data.sources, built.stage.templates
    mine = [source for source, template in zip(sources, templates, strict=True) if name in template.tags]
    source = mine[0]
    now = [built.held_out(at) for at, template in enumerate(templates) if name in template.tags]
    drawn = [*built.tags[name].about.get("held_out", []), *now]  # of a tag that was loaded: its first training, too
    answered = any(
        source.target or template.has_output
        for source, template in zip(sources, templates, strict=True)
        if name in template.tags
    )
    fields = {field: config.model_dump() for other in reversed(mine) for field, config in other.fields.items()}
    return {
        "template": source.template,
        "target": source.target,
        "output": source.output,
        "fields": fields,
        "max_tokens": built.config.data.max_tokens,
        "knows_answers": answered or built.tags[name].knows_answers,
        "held_out": [one for at, one in enumerate(drawn) if one not in drawn[:at]],
        "mask": built.config.mask,
        "max_new_tokens": built.config.evaluation.max_new_tokens,
        "beams": built.config.evaluation.beams,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == built.backbone.model.dtype),
        "quantize": built.config.backbone.quantize,
        "trained_with": list(built.tags),
        "config_digest": built.config.digest(),
        "created": time.strftime("%Y-%m-%d"),
    }

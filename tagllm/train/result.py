"""The library a run ends in."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from tagllm.tags import Head, Tag, TagLibrary
from tagllm.train.build import Built


def library_of(built: Built, learned: dict[str, Tensor], about: dict[str, Any]) -> TagLibrary:
    """All tags of the run: learned ones with the values of `Engine.learned`, loaded ones bit for bit."""
    library, layout = TagLibrary(built.backbone.identity), built.layout
    lengths = [layout.lengths[name] for name in layout.learned]
    rows = dict(zip(layout.learned, learned["tags.learned_TD"].split(lengths), strict=True))
    for name, tag in built.tags.items():
        if name in rows:
            tag = Tag(name, tag.kind, rows[name], _head(tag, learned), _history(built, name) | about)  # noqa: PLW2901
        library = library.add(tag)
    return library


def _head(tag: Tag, learned: dict[str, Tensor]) -> Head | None:
    if tag.head is None:
        return None
    weight_KF, bias_K = (learned[f"heads.{tag.name}.{part}"] for part in ("weight_KF", "bias_K"))
    return Head(tag.head.spec, weight_KF, bias_K, tag.head.mean_K, tag.head.std_K)


def _history(built: Built, name: str) -> dict[str, Any]:
    """What predict needs to ask again as in training, and people to know where a tag comes from."""
    sources, templates = built.config.data.sources, built.stage.templates
    source = next(source for source, template in zip(sources, templates, strict=True) if name in template.tags)
    return {
        "template": source.template,
        "target": source.target,
        "output": source.output,
        "fields": {field: config.model_dump() for field, config in source.fields.items()},
        "mask": built.config.mask,
        "trained_with": list(built.tags),
        "config_digest": built.config.digest(),
        "created": time.strftime("%Y-%m-%d"),
    }

"""What in a config can be meant so, and seldom is: `check` notes it, and `train` says it before its first step."""

from __future__ import annotations

from collections.abc import Collection

from tagllm.config import OptimConfig
from tagllm.stage import Stage
from tagllm.template import Template, marks_of, spans_of


def unusual(stage: Stage) -> list[str]:
    return [
        *_of_the_warm_up(stage.config.optim),
        *_of_quantisation(stage),
        *_of_unread_fields(stage),
        *_of_block_mask(stage),
    ]


def _of_the_warm_up(optim: OptimConfig) -> list[str]:
    if not optim.steps or optim.warmup_steps < optim.steps:
        return []
    return [
        f"optim.warmup_steps is {optim.warmup_steps} and optim.steps {optim.steps}, so no step has the learning rates "
        "that are set; lower the former unless that is meant."
    ]


def _of_quantisation(stage: Stage) -> list[str]:
    """Tags of another backbone, in effect: its states differ. Tags made by hand do not know theirs."""
    now, notes = stage.config.backbone.quantize, []
    for name, tag in stage.loaded.items():
        then = tag.about.get("quantize", now)
        if then != now:
            notes.append(
                f"<{name}> was trained with backbone.quantize={then}, and this config has {now}, whose hidden states "
                f"differ; set backbone.quantize={then} unless that is meant."
            )
    return notes


def _of_unread_fields(stage: Stage) -> list[str]:
    return list(dict.fromkeys(note for template in stage.templates for note in unread_fields(template, stage.heads)))


def unread_fields(template: Template, heads: Collection[str]) -> list[str]:
    """A line where no field stands before what answers, or some behind all that does: it has seen what stands in front
    alone."""
    answering = [
        at for at, part in enumerate(template.parts) if part.is_output or (part.kind == "tag" and part.value in heads)
    ]
    notes = []
    for at in answering:
        part = template.parts[at]
        name = "{output}" if part.is_output else f"<{part.value}>"
        before, behind = (
            [one.value for one in some if one.kind == "field" and not one.is_output]
            for some in (template.parts[:at], template.parts[at:])
        )
        if template.fields and not before:
            notes.append(
                f"no field stands before {name} in {template.text!r}, so every row has the same answer; put "
                f"{{{template.fields[0]}}} in front of it unless that is meant."
            )
        elif (unread := [field for field in behind if field not in before]) and at == answering[-1]:
            notes.append(
                f"{{{unread[0]}}} stands behind {name} in {template.text!r}, so no answer depends on it; put it in "
                "front unless that is meant."
            )
    return notes


def _of_block_mask(stage: Stage) -> list[str]:
    if stage.config.mask != "block":
        return []
    heads, notes = stage.heads, list[str]()
    for template in stage.templates:
        symmetric = any(head.symmetric for name, head in heads.items() if name in template.tags)
        openings: dict[str, list[str]] = {}
        for begins, field in spans_of(marks_of(template, stage.kinds)):
            name, first = template.parts[field - 1].value, template.parts[begins]
            openings.setdefault(name, []).append(first.value if first.kind == "text" else "")
        for name, texts in openings.items():
            if "" in texts and name in stage.loaded:
                notes.append(
                    f"under mask: block its span begins with <{name}>, which costs accuracy unless it was trained so; "
                    "put the text in front of it that it was trained with."
                )
            if symmetric and len(set(texts)) > 1:
                notes.append(
                    f"head.symmetric takes the fields behind <{name}> for interchangeable, but under mask: block each "
                    f"is read behind its own words, {' and '.join(map(repr, dict.fromkeys(texts)))}; put the same in "
                    "front of each."
                )
    return list(dict.fromkeys(notes))

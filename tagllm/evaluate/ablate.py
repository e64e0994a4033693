"""What a run loses when the rows of one tag are taken out, put in another order, or stand in the place of another's:
nothing is trained anew, and the held-out rows are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tagllm.evaluate.scoring import Evaluation, pass_metrics, score_pass, with_tags
from tagllm.tags import Tag

AS_LEARNED = "as learned"


def ablations(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Metrics by what was done; first AS_LEARNED, to compare with. Collective."""
    built, ranks, split = evaluation
    used = {name for template in built.stage.templates for name in template.tags}
    tags = {name: tag for name, tag in built.tags.items() if name in used}
    found = {AS_LEARNED: pass_metrics(evaluation, score_pass(built, ranks, split))}
    for name, others in changes_of(tags).items():
        found[name] = pass_metrics(evaluation, with_tags(evaluation, others))
    return found


def changes_of(tags: Mapping[str, Tag]) -> dict[str, dict[str, Tag]]:
    """The tags that each ablation changes. Each tag that has rows: without them; with its rows reversed, and shuffled
    where that is another order; domain tags also each with the rows of the next."""
    found: dict[str, dict[str, Tag]] = {}
    there = {name: tag for name, tag in tags.items() if len(tag.rows_PD)}
    for name, tag in there.items():
        found[f"without <{name}>"] = {name: tag.with_rows(tag.rows_PD[:0])}
        if len(tag.rows_PD) > 1:
            found[f"<{name}> reversed"] = {name: tag.with_rows(tag.rows_PD.flip(0))}
        if len(tag.rows_PD) > 2:
            found[f"<{name}> shuffled"] = {name: tag.with_rows(tag.rows_PD[_shuffled(len(tag.rows_PD))])}
    domains = [name for name, tag in there.items() if tag.kind == "domain"]
    for name, other in zip(domains, domains[1:] + domains[:1], strict=True):
        if name != other:
            found[f"<{other}> in the place of <{name}>"] = {name: there[name].with_rows(there[other].rows_PD)}
    return found


def _shuffled(n: int) -> torch.Tensor:
    """An order that is neither the old one nor its reverse."""
    random, old = torch.Generator().manual_seed(0), torch.arange(n)
    while True:
        order = torch.randperm(n, generator=random)
        if not (order.equal(old) or order.equal(old.flip(0))):
            return order

"""`tagllm eval`: a run's result on held-out rows, beside baselines and controls on the same rows -> results.json."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tagllm.config import RunConfig, Split
from tagllm.data.dataset import Prompts
from tagllm.errors import UserError
from tagllm.evaluate.baselines import Probe, value_baselines
from tagllm.evaluate.classical import classical_baselines
from tagllm.evaluate.generate import text_metrics
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.passes import Pass, all_draws, run_over
from tagllm.files import json_bytes, read_json, replace_file, save_tensors, write_durably
from tagllm.stage import stage_of_run
from tagllm.tags import Tag, TagLibrary
from tagllm.train.build import Built, assemble, build, new_tag, prepare_on_all
from tagllm.train.gradient_free import FIT_ROWS
from tagllm.train.monitor import peak_memory_gib
from tagllm.train.ranks import Ranks
from tagllm.train.run_folder import RunFolder, versions


class Evaluation(NamedTuple):
    """What the parts of an evaluation share."""

    built: Built
    ranks: Ranks
    split: Split


def evaluate(run: Path, config: RunConfig, split: Split, controls: Sequence[Path], overridden: bool) -> dict[str, Any]:
    """Scores RUN/library on a split and writes RUN/results.json.

    Args:
        controls: libraries whose domain tags are put in the place of the learned ones, one at a time.
        overridden: the config differs from the run's own; otherwise the recorded splits must be the same.

    Raises:
        UserError: no run, a damaged library, another backbone, or other rows than the run recorded.
    """
    began = time.monotonic()
    ranks = Ranks.start(config.engine.timeout_s)
    folder = RunFolder(run)
    library = TagLibrary.load(folder.library)
    stage = stage_of_run(config, library, str(folder.library))
    built = build(stage, ranks)
    if not overridden:
        _require_same_rows(folder, built, split)
    evaluation = Evaluation(built, ranks, split)
    results: dict[str, Any] = {
        "run": run.name, "split": split, "metrics": {}, "intervals": {}, "baselines": {}, "controls": {},
        "learned": stage.learned, "backbone": built.backbone.identity._asdict(), "config_digest": config.digest(),
        "versions": versions(), "date": time.strftime("%Y-%m-%d"), "ranks": ranks.size,
        "rows": sum(map(len, built.examples(split))),
    }  # fmt: skip
    if built.layout.heads:
        _score_values(evaluation, run, None if overridden else folder.probe, results)
    if stage.terms:
        _score_tokens(evaluation, results, controls)
    if any(template.has_output for template in stage.templates):
        results["metrics"] |= text_metrics(built, split)
    results |= {"seconds": time.monotonic() - began, "peak_gib": ranks.sum([peak_memory_gib()])[0]}

    def write() -> None:
        write_durably(run / ".tmp-results.json", json_bytes(results))
        replace_file(run / ".tmp-results.json", run / "results.json")

    ranks.on_rank_zero(write)
    return results


def _require_same_rows(folder: RunFolder, built: Built, split: Split) -> None:
    recorded = read_json(folder.path / "splits.json")
    for source, now in built.data.record.items():
        for name in ("train", split):
            then = recorded.get(source, {}).get("splits", {}).get(name)
            if then != now["splits"][name]:
                raise UserError(
                    f"{folder.path}/splits.json: the {name} rows of source {source} were {then}, now they are "
                    f"{now['splits'][name]}; the data changed since training. Restore it, or train anew."
                )


def _training_probe(evaluation: Evaluation, kept: Path | None) -> Probe:
    """What training left, or else a pass over the training rows."""
    if kept is not None and kept.is_file():
        return Probe.load(kept)
    return Probe.of(_pass(evaluation.built, evaluation.ranks, "train", FIT_ROWS, probing=True))


def _score_values(evaluation: Evaluation, run: Path, probe: Path | None, results: dict[str, Any]) -> None:
    built, ranks, split = evaluation
    classes = any(head.classes for head in built.layout.heads.values())
    held_out = _pass(built, ranks, split, None, probing=True)
    results["metrics"] |= value_metrics(held_out.values_nK, held_out.targets_nK, classes)
    results["intervals"] = ranks.on_rank_zero(lambda: intervals(held_out.values_nK, held_out.targets_nK, classes))
    pairs = {"values_nK": torch.from_numpy(held_out.values_nK), "targets_nK": torch.from_numpy(held_out.targets_nK)}
    ranks.on_rank_zero(lambda: save_tensors(run / "held_out.safetensors", pairs))
    if not classes:
        train = _training_probe(evaluation, probe)
        results["baselines"] |= value_baselines(train, Probe.of(held_out))
        results["probe_rows"] = len(train.targets_nK)
        results["baselines"] |= ranks.on_rank_zero(lambda: _classical(built, split))


def _classical(built: Built, split: Split) -> dict[str, dict[str, float]]:
    """Of a run whose labelled rows come from one source; others have no fields in common."""
    labelled = [at for at, examples in enumerate(built.examples("train")) if len(examples.targets())]
    if len(labelled) != 1:
        return {}
    train, held_out = built.examples("train")[labelled[0]], built.examples(split)[labelled[0]]
    names = built.stage.templates[labelled[0]].fields
    return classical_baselines(train.fields(names), train.targets(), held_out.fields(names), held_out.targets())


def _score_tokens(evaluation: Evaluation, results: dict[str, Any], controls: Sequence[Path]) -> None:
    built, ranks, split = evaluation
    results["metrics"] |= _nats(_pass(built, ranks, split, None))
    first = built.stage.learned[0]
    others = {"no tag": dict[str, Tag](), "untrained tag": dict[str, Tag]()}
    for name in built.stage.learned:
        tag = built.tags[name]
        others["no tag"][name] = tag.with_rows(tag.rows_PD[:0])
        others["untrained tag"][name] = new_tag(built.stage, name, built.backbone, built.data)
    for path in controls:
        library = TagLibrary.load(path, built.backbone.identity)
        for tag in library.tags.values():
            if tag.kind == built.tags[first].kind and tag.name not in built.tags:
                others[f"<{tag.name}>"] = {first: built.tags[first].with_rows(tag.rows_PD)}
    results["controls"] = {name: _nats(_with_tags(evaluation, tags)) for name, tags in others.items()}


def _with_tags(evaluation: Evaluation, tags: dict[str, Tag]) -> Pass:
    """The same rows and prompts with other rows (perhaps none) in the place of some tags."""
    built, ranks, split = evaluation
    stage = built.stage._replace(loaded=built.tags | tags)
    layout = stage.layout(built.backbone.vocabulary_size)
    limit = built.config.data.max_tokens or built.backbone.max_tokens
    data = prepare_on_all(
        built.config.data, stage.templates, Prompts(layout, built.backbone.tokenizer, limit), ranks, [split]
    )
    model = assemble(stage, built.backbone, layout, stage.loaded, ranks)
    return _pass(Built(stage, built.backbone, layout, stage.loaded, data, model), ranks, split, None)


def _pass(built: Built, ranks: Ranks, split: Split, limit: int | None, probing: bool = False) -> Pass:
    collate = built.collator()
    collate = collate.probing() if probing else collate._replace(frozen_prefix=True)
    sources = built.examples(split)
    size = built.config.evaluation.rows_per_batch
    built.model.memory = None  # every row is seen once
    with torch.no_grad():
        return run_over(
            lambda batch: built.model(batch.to(ranks.device)), sources, all_draws(sources, limit), collate, ranks, size,
            features=probing,
        )  # fmt: skip


def _nats(result: Pass) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, total, n in zip(("span", "output"), result.sums, result.counts, strict=False):
        if n:
            found |= {
                f"{name}_nats": total / n,
                f"{name}_perplexity": math.exp(min(total / n, 50.0)),
                f"{name}_tokens": n,
            }
    return found


def describe(results: dict[str, Any]) -> list[str]:
    """The result in a few lines, for people."""
    rows = [("tag", results["metrics"]), *results["baselines"].items(), *results["controls"].items()]
    lines = [f"{results['run']}: {results['rows']} {results['split']} rows"]
    for name, metrics in rows:
        shown = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float))
        lines.append(f"  {name:<16} {shown}")
    return lines

"""`tagllm eval`: a run's result on held-out rows, beside baselines and controls on the same rows -> results.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tagllm.baselines.record import add_trained
from tagllm.config import RunConfig, Split
from tagllm.data.dataset import Data
from tagllm.errors import UserError
from tagllm.evaluate.ablate import ablations
from tagllm.evaluate.answers import text_results
from tagllm.evaluate.baselines import probe_of, value_baselines
from tagllm.evaluate.class_probes import class_baselines
from tagllm.evaluate.classical import Table, classical_baselines
from tagllm.evaluate.features import Features
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.passes import Floats
from tagllm.evaluate.scoring import Evaluation, by_head, nats, score_pass, with_tags
from tagllm.files import json_bytes, read_json, replace_file, save_tensors, write_durably
from tagllm.head import fields_alone
from tagllm.origin import origin
from tagllm.stage import stage_of_run
from tagllm.tags import Tag, TagLibrary
from tagllm.template import behind_one_tag
from tagllm.train.build import Built, build, new_tag
from tagllm.train.gradient_free import FIT_ROWS
from tagllm.train.monitor import peak_memory_gib
from tagllm.train.ranks import Ranks
from tagllm.train.run_folder import RunFolder


def evaluate(
    run: Path, config: RunConfig, split: Split, controls: Sequence[Path], overridden: bool, ablate: bool = False
) -> dict[str, Any]:
    """Scores RUN/library on a split and writes RUN/results.json.

    Args:
        controls: libraries whose domain tags are put in the place of the learned ones, one at a time.
        overridden: the config differs from the run's own; otherwise the recorded splits must be the same.
        ablate: also with each tag taken out, its rows in other orders, and in the place of another one.

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
        require_same_rows(folder, built.data, ("train", "valid", split))
    if not any(map(len, built.examples(split))):
        raise UserError(f"{run}: its {split} split has no rows; score another one with --split.")
    evaluation = Evaluation(built, ranks, split)
    results: dict[str, Any] = {
        "run": run.name, "split": split, "metrics": {}, "intervals": {}, "baselines": {}, "controls": {},
        "learned": stage.learned, "backbone": built.backbone.identity._asdict(), "config_digest": config.digest(),
        "ranks": ranks.size, "rows": sum(map(len, built.examples(split))), "training": folder.training(), **origin(),
    }  # fmt: skip
    if built.layout.heads:
        _score_values(evaluation, folder, overridden, results)
    if stage.terms:
        _score_tokens(evaluation, results, controls)
    if any(template.has_output for template in stage.templates):
        found = text_results(built, split, run)
        for part in ("metrics", "intervals"):
            results[part] |= found.pop(part)
        results |= found
    notes = [fields_alone({name: tag.head for name, tag in built.tags.items()}), results.get("note", "")]
    if len(built.layout.heads) > 1:
        notes.append("Baselines are those of runs with one head.")
    results |= {"note": " ".join(filter(None, notes))} if any(notes) else {}
    if ablate:
        results["ablations"] = ablations(evaluation)
    add_trained(results, run)
    results |= {"seconds": time.monotonic() - began, "peak_gib": ranks.sum([peak_memory_gib()])[0]}

    def write() -> None:
        write_durably(run / ".tmp-results.json", json_bytes(results))
        replace_file(run / ".tmp-results.json", run / "results.json")

    ranks.on_rank_zero(write)
    return results


def require_same_rows(folder: RunFolder, data: Data, splits: Sequence[Split]) -> None:
    """Raises UserError where these splits are not those that training recorded."""
    recorded = read_json(folder.path / "splits.json")
    for source, now in data.record.items():
        for name in splits:
            then = recorded.get(source, {}).get("splits", {}).get(name)
            if then != now["splits"][name]:
                raise UserError(
                    f"{folder.path}/splits.json: the {name} rows of source {source} were {then}, now they are "
                    f"{now['splits'][name]}; the data changed since training. Restore it, or train anew."
                )


def _probe(evaluation: Evaluation, split: Split, kept: RunFolder | None) -> Features | None:
    """What training left, or else a pass over these rows; None without any."""
    built, ranks, _ = evaluation
    if kept is not None and kept.probe(split).is_file():
        return Features.load(kept.probe(split))
    if not any(map(len, built.examples(split))):
        return None
    limit = FIT_ROWS if split == "train" else None
    return probe_of(score_pass(built, ranks, split, limit, probing=True), built.layout)


def _score_values(evaluation: Evaluation, folder: RunFolder, overridden: bool, results: dict[str, Any]) -> None:
    built, ranks, split = evaluation
    held_out = score_pass(built, ranks, split, None, probing=True)
    results["metrics"] |= by_head(built, split, held_out, value_metrics)
    results["intervals"] = ranks.on_rank_zero(lambda: by_head(built, split, held_out, intervals))
    pairs = {"values_nK": torch.from_numpy(held_out.values_nK), "targets_nK": torch.from_numpy(held_out.targets_nK)}
    ranks.on_rank_zero(lambda: save_tensors(folder.path / "held_out.safetensors", pairs))
    if len(built.layout.heads) > 1:
        return
    (head,) = built.layout.heads.values()
    kept = None if overridden or head.classes else folder
    test, train = probe_of(held_out, built.layout), _probe(evaluation, "train", kept)
    assert train is not None
    results["probe_rows"] = len(train.targets_nK)
    valid = test if split == "valid" else _probe(evaluation, "valid", kept) or train.none()

    def answers() -> dict[str, Floats]:
        if head.classes:
            return class_baselines(train, valid, test, len(head.classes))
        return value_baselines(train, valid, test, built.layout) | _classical(built, split)

    results |= ranks.on_rank_zero(lambda: _baselines(answers(), test.targets_nK, bool(head.classes)))


def _baselines(answers: dict[str, Floats], targets_nK: Floats, classes: bool) -> dict[str, Any]:
    """Metrics and intervals of what needs no training but a fit."""
    return {
        "baselines": {name: value_metrics(values, targets_nK, classes) for name, values in answers.items()},
        "baseline_intervals": {name: intervals(values, targets_nK, classes) for name, values in answers.items()},
    }


def _classical(built: Built, split: Split) -> dict[str, Floats]:
    """Of a run whose labelled rows come from one source; others have no fields in common."""
    labelled = [at for at, examples in enumerate(built.examples("train")) if len(examples.targets())]
    if len(labelled) != 1:
        return {}
    train, valid, held_out = (built.examples(name)[labelled[0]] for name in ("train", "valid", split))
    template = built.stage.templates[labelled[0]]
    names = template.fields
    known = Table(train.fields(names), train.targets()), Table(valid.fields(names), valid.targets())
    symmetric = any(head.symmetric for head in built.layout.heads.values())
    trading = behind_one_tag(template, built.layout.kinds) if symmetric else []
    return classical_baselines(*known, held_out.fields(names), trading)


def _score_tokens(evaluation: Evaluation, results: dict[str, Any], controls: Sequence[Path]) -> None:
    built, ranks, split = evaluation
    results["metrics"] |= nats(score_pass(built, ranks, split, None))
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
    results["controls"] = {name: nats(with_tags(evaluation, tags)) for name, tags in others.items()}


def describe(results: dict[str, Any]) -> list[str]:
    """The result in a few lines, for people."""
    first = results.get("prompt", "tag"), results["metrics"]
    rows = [first]
    for part in ("baselines", "controls", "ablations"):
        rows += results.get(part, {}).items()
    lines = [f"{results['run']}: {results['rows']} {results['split']} rows"]
    for name, metrics in rows:
        shown = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float))
        lines.append(f"  {name:<28} {shown}")
    return [*lines, f"  {results['note']}"] if "note" in results else lines

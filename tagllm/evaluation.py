"""`tagllm eval`: a run's result on held-out rows, beside baselines and controls on the same rows -> results.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tagllm.arrays import Floats
from tagllm.build import Built, build, new_tag, refuse_trained_on
from tagllm.config import RunConfig, Split
from tagllm.digits import digits
from tagllm.errors import SharedError
from tagllm.evaluate.ablate import ablations
from tagllm.evaluate.answers import text_results
from tagllm.evaluate.class_probes import class_baselines
from tagllm.evaluate.classical import Table, classical_baselines
from tagllm.evaluate.closed_form import FIT_ROWS
from tagllm.evaluate.features import Features
from tagllm.evaluate.held_out import write_held_out
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.passes import Pass
from tagllm.evaluate.repeated import note_of, without_repeated
from tagllm.evaluate.results import write_results
from tagllm.evaluate.scoring import Evaluation, by_head, nats, score_pass, with_tags
from tagllm.evaluate.value_probes import probe_of, value_baselines
from tagllm.files import writing
from tagllm.head import fields_alone
from tagllm.model.loading import is_sharded
from tagllm.origin import origin, peak_memory_gib
from tagllm.ranks import Ranks
from tagllm.rendezvous import in_contact
from tagllm.run_folder import RunFolder, differences, read_config
from tagllm.stage import Stage, stage_of_run
from tagllm.tags import Tag, TagLibrary
from tagllm.template import behind_one_tag
from tagllm.train.engine import gather_on_use, sharding

NOT_TEST = {
    "valid": "by the validation rows the best step, heads and penalties were chosen",
    "train": "from the training rows the tags learned",
}


def evaluate(
    run: Path, config: RunConfig, split: Split, controls: Sequence[Path], ablate: bool = False
) -> dict[str, Any]:
    """Scores RUN/library on a split and writes RUN/results.json (of other rows than test in
    RUN/SPLIT/, of other data than the run's in RUN/SPLIT-DIGEST/).

    Args:
        controls: libraries whose tags are put in the place of the learned ones of their kind, one at a time.
        config: with the digest of the run's own the recorded splits must be the same; another one may ask for others.
        ablate: also with each tag taken out, its rows in other orders, and in the place of another one.

    Raises:
        UserError: no run, a damaged library, another backbone, or other rows than the run recorded.
        LostContact: another rank died, hangs or is cut off.
    """
    began = time.monotonic()
    ranks = Ranks.start(config.engine.timeout_s)
    asked = _Asked(RunFolder(run), read_config(run), config.alone() if ranks.size == 1 else config, split)
    with in_contact(ranks.silent, lambda: f"rank {ranks.rank} scoring {run}"):
        results = _results(asked, controls, ablate, ranks)
        results |= {"seconds": time.monotonic() - began, **ranks.sum_each(peak_memory_gib())}
        ranks.on_rank_zero(lambda: write_results(asked.scores, results))
    return results


class _Asked(NamedTuple):
    """What is to be scored: a run with its own config, the config with overrides, and the rows."""

    folder: RunFolder
    own: RunConfig
    config: RunConfig
    split: Split

    @property
    def is_other(self) -> bool:
        """Whether anything but how it is computed differs from the run."""
        return self.config.digest() != self.own.digest()

    @property
    def as_trained(self) -> bool:
        return not self.is_other and self.config.backbone.quantize == self.own.backbone.quantize

    @property
    def asks_other_rows(self) -> bool:
        return self.config.data != self.own.data

    @property
    def scores(self) -> Path:
        """Where results go."""
        return self.folder.scores(self.split, self.config.digest() if self.asks_other_rows else "")

    @property
    def notes(self) -> list[str]:
        notes = [f"Not of rows to test: {NOT_TEST[self.split]}."] if self.split != "test" else []
        if self.asks_other_rows:
            keys = ", ".join(differences(self.own.data, self.config.data))
            notes.append(f"Of other data than the run's (data.{keys}); written to {self.scores}.")
        return notes

    def make_folder(self) -> None:
        with writing(self.scores):
            self.scores.mkdir(exist_ok=True)


def _results(asked: _Asked, controls: Sequence[Path], ablate: bool, ranks: Ranks) -> dict[str, Any]:
    folder, config, split = asked.folder, asked.config, asked.split
    run = folder.path
    library = ranks.on_rank_zero(lambda: TagLibrary.load(folder.library))
    stage = stage_of_run(config, library, str(folder.library))
    if controls and not stage.terms:
        raise SharedError(f"--control: {run} answers with a head and has no loss over tokens to compare. Leave it out.")
    built = _built(stage, ranks)
    if asked.is_other:
        knowing = stage.knowing | {name: built.tags[name] for name in stage.learned}
        ranks.on_rank_zero(lambda: refuse_trained_on(stage, built.data, knowing, [split]))
    else:
        ranks.on_rank_zero(lambda: folder.require_same_rows(built.data, ("train", "valid", split)))
    if not any(map(len, built.examples(split))):
        raise SharedError(f"{run}: its {split} split has no rows; score another one with --split.")
    evaluation = Evaluation(built, ranks, split)
    ranks.on_rank_zero(asked.make_folder)
    results: dict[str, Any] = {
        "run": run.name, "split": split, "metrics": {}, "intervals": {}, "baselines": {}, "controls": {},
        "learned": stage.learned, "backbone": built.backbone.identity._asdict(), "dtype": built.backbone.dtype,
        "config_digest": config.digest(), "scoring": config.scoring(),
        "data": {source: about["splits"] for source, about in built.data.record.items()},
        "ranks": ranks.size, "sharded": is_sharded(built.backbone.model),
        "rows": sum(map(len, built.examples(split))), "training": folder.training(), **origin(),
    }  # fmt: skip
    if built.layout.heads:
        _score_values(evaluation, asked, results)
    if stage.terms:
        _score_tokens(evaluation, results, controls)
    if any(t.has_output and len(rows) for t, rows in zip(stage.templates, built.examples(split), strict=True)):
        found = text_results(built, split, ranks, asked.scores)
        at = "text/" if built.layout.heads else ""  # heads may have metrics of the same name
        for part in ("metrics", "intervals"):
            results[part] |= {f"{at}{name}": value for name, value in found.pop(part).items()}
        results |= found
    notes = [fields_alone({name: tag.head for name, tag in built.tags.items()}), results.get("note", "")]
    notes += [note_of(results.get("without_repeated", {})), *asked.notes]
    results |= {"note": " ".join(filter(None, notes))} if any(notes) else {}
    if ablate:
        results["ablations"] = ablations(evaluation)
    return results


def _built(stage: Stage, ranks: Ranks) -> Built:
    """The backbone is sharded as in training."""
    config = stage.config
    built = build(stage, ranks, sharding(config.optim, config.engine, ranks))
    gather_on_use(built.model, config.optim, config.engine, ranks)
    return built


def _score_values(evaluation: Evaluation, asked: _Asked, results: dict[str, Any]) -> None:
    """Each head on its own rows, beside baselines that were fitted to its own."""
    built, ranks, split = evaluation
    held_out = score_pass(built, ranks, split, probing=True)
    results["metrics"] |= by_head(built, split, held_out, value_metrics)
    results["intervals"] = ranks.on_rank_zero(lambda: by_head(built, split, held_out, intervals))
    ranks.on_rank_zero(lambda: write_held_out(built, split, held_out, asked.scores))
    if asked.as_trained:  # other data has other training rows than the tag had
        results |= ranks.on_rank_zero(lambda: {"without_repeated": without_repeated(built, split, held_out)})
    heads = built.layout.heads
    probes = _Probes(evaluation, asked.folder if asked.as_trained and len(heads) == 1 else None, held_out)
    for name in heads:
        test, train = probes.of(split, name), probes.of("train", name)
        if not len(test.targets_nK):
            continue
        valid = test if split == "valid" else probes.of("valid", name)
        found = ranks.on_rank_zero(partial(_beside, built, name, split, train, valid, test))
        at = f"{name}/" if len(heads) > 1 else ""
        results[f"{at}probe_rows"] = len(train.targets_nK)
        for part, of_methods in found.items():
            for method, values in of_methods.items():
                told = {f"{at}{metric}": value for metric, value in values.items()}
                results.setdefault(part, {}).setdefault(method, {}).update(told)


class _Probes(NamedTuple):
    """What probes of a head see of each split: what training left, or else of a pass over the rows of that head."""

    evaluation: Evaluation
    kept: RunFolder | None
    held_out: Pass

    def of(self, split: Split, name: str) -> Features:
        """Of no row where the split has none."""
        built, ranks, scored = self.evaluation
        if split == scored:
            return probe_of(self.held_out, built.rows_with(split, name), built.layout, name)
        if self.kept and self.kept.probe(split).is_file():
            return Features.load(self.kept.probe(split))
        draws = built.draws(split, FIT_ROWS if split == "train" else None, name)
        if not draws:
            return self.of("train", name).none()
        found = score_pass(built, ranks, split, draws, probing=True)
        return probe_of(found, np.ones(len(draws), bool), built.layout, name)


def _beside(
    built: Built, name: str, split: Split, train: Features, valid: Features, test: Features
) -> dict[str, dict[str, Any]]:
    """Metrics and intervals of what needs no training but a fit, on the rows of one head."""
    head = built.layout.heads[name]
    if head.classes:
        answers = class_baselines(train, valid, test, len(head.classes))
    else:
        answers = value_baselines(train, valid, test, built.layout, head)
    answers |= _classical(built, name, split)
    about = test.targets_nK, bool(head.classes), built.stage.target_names(name)
    return {
        "baselines": {method: value_metrics(values, *about) for method, values in answers.items()},
        "baseline_intervals": {method: intervals(values, *about) for method, values in answers.items()},
    }


def _classical(built: Built, name: str, split: Split) -> dict[str, Floats]:
    """Of a head whose labelled rows have the same fields in all of its sources; others have nothing in common."""
    pairs = zip(built.examples("train"), built.stage.templates, strict=True)
    labelled = [at for at, (rows, prompt) in enumerate(pairs) if name in prompt.tags and len(rows.targets())]
    names = {frozenset(built.stage.templates[at].fields) for at in labelled}
    if len(names) != 1:
        return {}
    template, head = built.stage.templates[labelled[0]], built.layout.heads[name]

    def table(part: Split) -> Table:
        sources = [built.examples(part)[at] for at in labelled]
        fields = [rows.fields(template.fields) for rows in sources]
        targets = [rows.targets().reshape(-1, head.num_targets) for rows in sources]
        return Table({n: [v for rows in fields for v in rows[n]] for n in template.fields}, np.concatenate(targets))

    trading = behind_one_tag(template, built.layout.kinds) if head.symmetric else []
    return classical_baselines(table("train"), table("valid"), table(split).fields, trading, len(head.classes or []))


def _score_tokens(evaluation: Evaluation, results: dict[str, Any], controls: Sequence[Path]) -> None:
    built, ranks, split = evaluation
    results["metrics"] |= nats(score_pass(built, ranks, split))
    others = {"no tag": dict[str, Tag](), "untrained tag": dict[str, Tag]()}
    for name in built.stage.learned:
        tag = built.tags[name]
        others["no tag"][name] = tag.with_rows(tag.rows_PD[:0])
        others["untrained tag"][name] = new_tag(built.stage, name, built.backbone, built.data)
    learned = [built.tags[name] for name in built.stage.learned]
    told = ", ".join(f"<{tag.name}> ({tag.kind})" for tag in learned)
    for path in controls:
        tags = TagLibrary.load(path, built.backbone.identity).tags.values()
        mine = {tag.name: [one for one in learned if one.kind == tag.kind] for tag in tags}
        if not any(mine.values()):
            raise SharedError(f"--control: {path} has no tag of the kind of {told}. Name another library.")
        for tag in tags:
            title = f"<{tag.name}>"
            if tag.name in built.tags or title in others:
                title += f" of {path}"
            if mine[tag.name]:
                others[title] = {one.name: one.with_rows(tag.rows_PD) for one in mine[tag.name]}
    results["controls"] = {name: nats(with_tags(evaluation, tags)) for name, tags in others.items()}


def describe(results: dict[str, Any]) -> list[str]:
    """The result in a few lines, for people."""
    first = results.get("prompt", "tag"), results["metrics"]
    rows = [first]
    for part in ("baselines", "controls", "ablations"):
        rows += results.get(part, {}).items()
    lines = [f"{results['run']}: {results['rows']} {results['split']} rows"]
    for name, metrics in rows:
        shown = "  ".join(f"{key} {digits(value, 4)}" for key, value in metrics.items() if isinstance(value, float))
        lines.append(f"  {name:<28} {shown}")
    return [*lines, f"  {results['note']}"] if "note" in results else lines

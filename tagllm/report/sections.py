"""What the report says about each folder, before it is HTML, Markdown or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tagllm.digits import digits
from tagllm.evaluate.ablate import AS_LEARNED
from tagllm.evaluate.seeds import bounds, over_seeds
from tagllm.origin import ORIGIN
from tagllm.report.collect import (
    ON_VALIDATION,
    Composed,
    Interval,
    Metrics,
    Run,
    Swept,
    curve,
    headline,
)
from tagllm.report.figures import (
    changes,
    dots,
    learning_curves,
    predicted_against_true,
    tag_similarity,
    validation_curves,
)
from tagllm.report.paper import Published, published_of
from tagllm.report.tables import MeansAndSpread, Table, table_of, table_of_prompts, with_paper

TEXTS = 3
"""Generated texts that are shown of a prompt."""
INTERVAL = "95 % interval (Student's t; of what no seed changes, over the rows of the first)"


class Section(NamedTuple):
    title: str
    notes: list[str]
    tables: list[Table]
    figures: list[str]
    """SVG."""
    texts: list[dict[str, str]]
    details: dict[str, str]
    """Long text by headline, folded away."""
    document: dict[str, Any]
    """All numbers, for the JSON."""


def sections_of(found: Run | Composed | Swept) -> list[Section]:
    if isinstance(found, Run):
        return [_of_run(found)]
    if isinstance(found, Composed):
        return [_of_composed(found), *(_of_run(case[0]) for case in found.cases)]
    return [_of_sweep(found), *([_of_run(found.example)] if found.example else [])]


def _of_run(run: Run) -> Section:
    results = run.results
    paper = _paper(run)
    tables = [with_paper(table_of("", "method", run.methods, run.intervals), paper, run.first)]
    if paper:
        tables.append(table_of(f"The paper, on its own rows (LLaMA-7B; {paper.about})", "method", paper.rows, {}))
    if "sources" in results and len(results["sources"]) > 1:
        sources = {name: source["metrics"] for name, source in results["sources"].items()}
        intervals = {name: source["intervals"] for name, source in results["sources"].items()}
        tables.append(table_of("By source", "source", sources, intervals))
    if ablations := results.get("ablations", {}):
        ablations = {AS_LEARNED: ablations[AS_LEARNED], **ablations}  # JSON has sorted them
        tables.append(
            table_of("With other rows in the place of a tag's, nothing trained anew", "change", ablations, {})
        )
    tags = list(run.library.tags.values()) if run.library else []
    figures = [
        learning_curves(run), *predicted_against_true(run), _changes(ablations), tag_similarity(tags),
    ]  # fmt: skip
    details = {"config": run.config, "where it comes from": _origin(results)}
    document = results | {"loss_on_validation": curve(run.log, ON_VALIDATION)}
    shown = [figure for figure in figures if figure]
    return Section(run.name, _notes(run), tables, shown, _texts(run), details, document)


def _paper(run: Run | None) -> Published | None:
    return published_of([*run.results["learned"], run.name], run.recipes) if run else None


def _of_composed(composed: Composed) -> Section:
    """Cases down, prompts across, in the metric that they are known by and in whether the language is right."""
    cases, documents = dict[str, MeansAndSpread](), dict[str, Any]()
    for first, *others in composed.cases:
        of_seeds = {p: over_seeds([run.methods.get(p, {}) for run in (first, *others)]) for p in first.methods}
        means, spread = _means_and_spread(of_seeds)
        cases[first.name] = means, _or_of_rows(spread, first.intervals)
        each = [{"metrics": run.methods, **_where_from(run.results)} for run in (first, *others)]
        documents[first.name] = {"mean": means, "intervals": cases[first.name][1], "each": each}
    seeds = max(map(len, composed.cases))
    name = headline(composed.cases[0][0].methods)
    notes = [f"{name} of every prompt on the same rows; the other metrics are below."]
    if seeds > 1:
        notes.append(f"Mean over {seeds} seeds, {INTERVAL}; what is below is of the first of them.")
        fewer = [f"{first.name} ({1 + len(others)})" for first, *others in composed.cases if 1 + len(others) < seeds]
        notes += [f"Of fewer seeds: {', '.join(fewer)}."] if fewer else []
    told = dict.fromkeys((name, "bleu", "spbleu", "comet", "in_language"))
    tables = [table for metric in told if (table := table_of_prompts(metric, cases)).columns]
    document = {"run": composed.name, "seeds": seeds, "cases": documents}
    return Section(composed.name, notes, tables, [], [], {}, document)


def _where_from(results: Mapping[str, Any]) -> dict[str, Any]:
    return {key: results[key] for key in (*ORIGIN, "config_digest", "libraries")}


def _of_sweep(sweep: Swept) -> Section:
    """Means and intervals over the seeds; what stands beside the first combination too, over the seeds that have it."""
    combinations = sweep.document["combinations"]
    others = {_beside(method, sweep): _beside_seeds(method, sweep) for method in sweep.others}
    means, spread = _means_and_spread({_label(one["shown"]): one["metrics"] for one in combinations if one["runs"]})
    runs = ", ".join(f"{_label(one['shown'])}: {one['runs']}" for one in combinations)
    notes = [f"Mean over the seeds, {INTERVAL}. Runs: {runs}.", _line(sweep.document)]
    if others:
        first = next(_label(one["shown"]) for one in combinations if one["folders"])
        notes.append(f"Baselines and controls are those of {first}, over the seeds that have them.")
    trained = sweep.example.results.get("trained_baselines", {}) if sweep.example else {}
    notes += [f"{name}: {_own_seeds(found)}, beside the first run." for name, found in trained.items()]
    for one in combinations:
        for note, count in Counter(filter(None, one["notes"])).items():
            notes.append(f"{_label(one['shown'])}, {count} of {one['runs']}: {note}")
        if one["tried"]:
            tried = ", ".join(f"{value}: {digits(loss, 4)}" for value, loss in one["tried"].items())
            notes.append(f"{_label(one['shown'])}: loss on validation by {sweep.document['tuned']}: {tried}.")
    labels = [_label(one["shown"]) for one in combinations]
    tables, figures = [], [validation_curves(dict(zip(labels, sweep.logs, strict=True)))]
    if means:
        beside, of_seeds = _means_and_spread(others)
        of_rows = _intervals_of_example(sweep)
        table = table_of("", "run", means | beside, _or_of_rows(spread | of_seeds, of_rows))
        tables = [with_paper(table, _paper(sweep.example))]
        name = headline(means)
        if len(means) > 1 and name:
            figures.append(dots(name, {k: (v[name], spread[k].get(name)) for k, v in means.items() if name in v}))
    details = {"where it comes from": _origin(sweep.document), "where each run comes from": _of_runs(combinations)}
    details |= {f"config of {label}": text for label, text in zip(labels, sweep.configs, strict=True) if text}
    curves = {
        label: [curve(log, ON_VALIDATION) for log in logs] for label, logs in zip(labels, sweep.logs, strict=True)
    }
    document = {**sweep.document, "others": others, "loss_on_validation": curves}
    return Section(sweep.name, notes, tables, [figure for figure in figures if figure], [], details, document)


def _beside_seeds(method: str, sweep: Swept) -> dict[str, tuple[float, float | None]]:
    """As `over_seeds`. Baselines beside runs that learn function tags alone know nothing of them: what their seeds
    differ by is rounding, and there is no interval."""
    found, example = over_seeds(sweep.others[method]), sweep.example
    if example and example.library and method in example.results["baselines"]:
        kinds = example.library.kinds
        if all(kinds.get(tag) == "function" for tag in example.results["learned"]):
            return {name: (mean, None) for name, (mean, _) in found.items()}
    return found


def _means_and_spread(rows: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> MeansAndSpread:
    means = {label: {name: mean for name, (mean, _) in metrics.items()} for label, metrics in rows.items()}
    return means, {label: bounds(metrics) for label, metrics in rows.items()}


def _intervals_of_example(sweep: Swept) -> Mapping[str, Mapping[str, Interval]]:
    """Over rows, by the labels of the table."""
    if sweep.example is None:
        return {}
    label = next(_label(one["shown"]) for one in sweep.document["combinations"] if one["folders"])
    found = sweep.example.intervals
    return {_beside(method, sweep): values for method, values in found.items()} | {label: found[sweep.example.first]}


def _beside(method: str, sweep: Swept) -> str:
    """A baseline or control of the first combination, told from a variant that is called the same."""
    labels = {_label(one["shown"]): one for one in sweep.document["combinations"]}
    first = next((label for label, one in labels.items() if one["folders"]), "")
    return f"{method}, of {first}" if method in labels else method


def _or_of_rows(
    of_seeds: dict[str, dict[str, Interval]], of_rows: Mapping[str, Mapping[str, Interval]]
) -> dict[str, dict[str, Interval]]:
    return {label: {**of_rows.get(label, {}), **intervals} for label, intervals in of_seeds.items()}


def _changes(ablations: Mapping[str, Metrics]) -> str:
    name = headline(ablations)
    return changes(name, {k: metrics[name] for k, metrics in ablations.items() if name in metrics}) if name else ""


def _texts(run: Run) -> list[dict[str, str]]:
    """A few answers of each prompt, the same rows of all of them."""
    shown: dict[str, list[dict[str, str]]] = {}
    for answer in run.answers:
        shown.setdefault(answer["source"], []).append(answer)
    return [answer for answers in shown.values() for answer in answers[:TEXTS]]


def _notes(run: Run) -> list[str]:
    results = run.results
    learned = ", ".join(f"<{tag}>" for tag in results["learned"])
    backbone = f"{results['backbone']['name']} in {results['dtype']}"
    notes = [f"{results['rows']} {results['split']} rows; {backbone}; {learned}. {_line(results)}"]
    if note := results.get("note"):
        notes.append(str(note))
    if training := results.get("training"):  # compose trains nothing
        notes.append(
            f"Trained in {training['seconds']:.0f} s by `{training['command']}` at commit {training['commit']}."
        )
    if points := curve(run.log, ON_VALIDATION):
        notes.append(
            f"Loss on validation by step: {', '.join(f'{at}: {digits(loss, 4)}' for at, loss in points.items())}."
        )
    for name, found in results.get("trained_baselines", {}).items():
        steps = zip(found["steps"], found["seconds"], strict=True)
        each = "".join(f", {count} steps in {seconds:.0f} s" for count, seconds in steps)
        notes.append(f"{name}: {_own_seeds(found)}, {_rate(found)}{each}. {_line(found)}")
    return notes


def _rate(trained: Mapping[str, Any]) -> str:
    """The learning rate, and how it was chosen."""
    if not trained["tried"]:
        return f"lr {trained['lr']:g} as given"
    losses = ", ".join(f"{rate} {digits(loss, 4)}" for rate, loss in trained["tried"].items())
    edge = "; the best is at the edge" if trained["lr_at_edge"] else ""
    return f"lr {trained['lr']:g} (loss on validation: {losses}{edge})"


def _own_seeds(trained: Mapping[str, Any]) -> str:
    seeds = trained["seeds"]
    return "one seed, interval over the rows" if seeds == 1 else f"mean and interval over {seeds} seeds of its own"


def _line(document: Mapping[str, Any]) -> str:
    """The libraries by what is named of them; all versions are under `_origin`."""
    digest = f", config {document['config_digest'][:12]}" if "config_digest" in document else ""
    held = document["versions"]
    versions = ", ".join(f"{name} {held[name]}" for name in ("tagllm", "torch", "transformers") if name in held)
    return (
        f"`{document['command']}`, commit {document['commit']}, {document['hardware']}, {document['date']}, "
        f"{versions}{digest}."
    )


def _origin(document: Mapping[str, Any]) -> str:
    lines = [f"{name}: {document[name]}" for name in ("command", "commit", "hardware", "date")]
    return "\n".join([*lines, *(f"{name} {version}" for name, version in document["versions"].items())])


def _of_runs(combinations: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for one in combinations:
        for folder, held in zip(one["folders"], one["origins"], strict=True):
            trained = held["training"]
            lines.append(f"{folder}: {_line(held)[:-1]}; trained by `{trained['command']}`, commit {trained['commit']}")
    return "\n".join(lines)


def _label(shown: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "variant" else f"{key}={value}" for key, value in shown.items()) or "tag"

"""`tagllm compose`: prompts over libraries of tags, scored on the same held-out rows without training.

Zero-shot composition (section 4.2 of the paper) and what it must beat: a control is another prompt on the same rows,
with the wrong tag, without tags, in words, with worked examples, or the source copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tagllm.build import Built, build_on, open_backbone, require_same_everywhere
from tagllm.compose_config import CaseConfig, ComposeConfig, check_compose
from tagllm.config import (
    DataConfig,
    FieldConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    Split,
    TagConfig,
    digest_of,
)
from tagllm.data.overlap import drawn_from, refuse_seen, with_files
from tagllm.data.sources import SourceRows, load_rows
from tagllm.data.splits import split_by
from tagllm.errors import SharedError, told_as
from tagllm.evaluate.answers import Answer, answers_of, chosen, copied_answers, scores_of, training_means, write_answers
from tagllm.evaluate.kept import generate_once
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.scoring import score_pass
from tagllm.evaluate.text import Scores, all_numbers, no_spbleu
from tagllm.files import cache_folder, json_bytes, read_json, sha256_file, write_durably, write_whole, writing
from tagllm.model.backbone import Backbone, as_trained
from tagllm.model.loading import is_sharded
from tagllm.origin import origin
from tagllm.question import fields_as_trained
from tagllm.ranks import Ranks
from tagllm.rendezvous import in_contact
from tagllm.stage import stage_of_run
from tagllm.tags import TagLibrary
from tagllm.template import escaped, field_text, parse_template, written
from tagllm.train.engine import gather_on_use, sharding
from tagllm.train.placement import placed_to_answer

FORMAT = 3
"""Raise when the same settings would ask or score otherwise."""


class Asked(NamedTuple):
    """What came of a prompt. `answers`: of one that asks for text; `rows`: numbers of those it was asked of; `cut`: of
    how many rows the prompt leaves no room for all of the fields."""

    scores: Scores
    answers: list[Answer]
    rows: list[int]
    cut: int


def compose(config: ComposeConfig) -> Iterator[dict[str, Any]]:
    """The results of each case, one after another; several ranks share the work, and the backbone where it is large.

    Raises:
        UserError: as `Composer.open` and `Composer.score`.
        LostContact: another rank died, hangs or is cut off.
    """
    ranks = Ranks.start(config.engine.timeout_s)
    with in_contact(ranks.silent, lambda: f"rank {ranks.rank} composing {config.output}"):
        composer = Composer.open(config, ranks)
        for name in config.cases:
            yield composer.score(name)


class Composer(NamedTuple):
    config: ComposeConfig
    library: TagLibrary
    backbone: Backbone
    ranks: Ranks

    @classmethod
    def open(cls, config: ComposeConfig, ranks: Ranks) -> Composer:
        """
        Raises:
            UserError: a library that cannot be read or is of another backbone, a prompt with mistakes.
        """

        def checked() -> TagLibrary:
            library = TagLibrary.load_all([Path(path) for path in config.libraries])
            check_compose(config, library)
            return library

        library = ranks.on_rank_zero(checked)
        asked = as_trained(config.backbone, [*library.tags.values()])
        engine = placed_to_answer(asked, config.engine, ranks)
        config = config.model_copy(update={"backbone": asked, "engine": engine})
        how = OptimConfig(steps=1), engine, ranks
        backbone = open_backbone(config.backbone, ranks, sharding(*how))
        ranks.on_rank_zero(lambda: library.backbone.require_same(backbone.identity, config.libraries[0]))
        gather_on_use(backbone.model, *how)
        return cls(config, library, backbone, ranks)

    def score(self, name: str) -> dict[str, Any]:
        """Scores a case and writes OUTPUT/CASE/; what was scored with the same settings before is read from there."""
        case, folder = self.config.cases[name], Path(self.config.output) / name
        settings = self.config.model_dump(mode="json", include={"backbone", "libraries", "data", "evaluation"})
        settings["cases"] = {name: case.model_dump(mode="json")}
        file = folder / "results.json"

        def known() -> tuple[str, dict[str, Any]]:
            rows = load_rows(case.source, cache_folder())
            self._refuse_seen(name, rows)
            libraries = [sha256_file(Path(path) / "library.json") for path in self.config.libraries]
            digest = digest_of([FORMAT, settings, list(case.prompts), libraries, rows.file])
            if file.is_file() and (found := read_json(file)).get("config_digest") == digest:
                return digest, found
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            return digest, {}

        digest, found = self.ranks.on_rank_zero(known, long=True)
        if found:
            return found
        began = time.monotonic()
        asked = {prompt: self._prompt(name, prompt) for prompt in case.prompts}
        _require_alike(asked, f"cases.{name}", self.config.evaluation.generated_rows)
        first, *others = asked
        results = {
            "run": name, "format": FORMAT, "split": case.split, "rows": len(asked[first].rows), "prompt": first,
            "metrics": asked[first].scores.metrics, "intervals": asked[first].scores.intervals, "baselines": {},
            "controls": {other: asked[other].scores.metrics for other in others},
            "control_intervals": {other: asked[other].scores.intervals for other in others},
            "learned": self._first(case, "function"), "backbone": self.backbone.identity._asdict(),
            "dtype": self.backbone.dtype, "config_digest": digest, "seconds": time.monotonic() - began, **origin(),
            "libraries": self.ranks.on_rank_zero(lambda: {path: _trained(path) for path in self.config.libraries}),
            "ranks": self.ranks.size, "sharded": is_sharded(self.backbone.model),
        }  # fmt: skip
        results |= {"note": note} if (note := no_spbleu(asked[first].scores, self.config.evaluation)) else {}

        def write() -> None:
            with writing(folder):
                write_answers([answer for one in asked.values() for answer in one.answers], folder)
                shown = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
                write_durably(folder / "config.yaml", shown.encode())
                write_whole(file, json_bytes(results))

        self.ranks.on_rank_zero(write)
        return results

    def _prompt(self, name: str, prompt: str) -> Asked:
        case, about = self.config.cases[name], self.config.cases[name].prompts[prompt]
        text = about.template if about.copies is None else f"{{{about.copies}}} {{output}}"
        if about.shots:
            text = self._worked(name, text, about.shots) + text
        built = self._built(name, text, case.split, bool(about.shots))
        (template,), (examples,) = built.stage.templates, built.examples(case.split)
        if not len(examples):
            raise SharedError(f"cases.{name}: its {case.split} split has no rows. Ask another split.")
        numbers, cut = examples.row_numbers(), int(built.data.record["0"][case.split]["rows_cut"])
        if not template.has_output:
            found = score_pass(built, self.ranks, case.split)
            classes = any(head.classes for head in built.layout.heads.values())
            (head,) = [tag for tag in template.tags if tag in built.layout.heads]
            pairs = found.values_nK, found.targets_nK, classes, built.stage.target_names(head)
            scores = self.ranks.on_rank_zero(lambda: Scores(value_metrics(*pairs), intervals(*pairs)))
            return Asked(scores, [], numbers, cut)
        rows = chosen(examples, self.config.evaluation.generated_rows)
        ask = partial(generate_once, ranks=self.ranks)
        give = copied_answers if about.copies is not None else partial(answers_of, ask=ask)
        answers = [answer._replace(source=prompt) for answer in give(built, template, [examples[at] for at in rows])]
        numbers_wanted = all_numbers([answer.reference for answer in answers])
        means = self._means(name, text, bool(about.shots), len(answers)) if numbers_wanted else []
        scores = self.ranks.on_rank_zero(
            lambda: scores_of(built, answers, case.language, self.library.tags, lambda: means)
        )
        return Asked(scores, answers, [numbers[at] for at in rows], cut)

    def _means(self, name: str, text: str, has_shots: bool, number: int) -> list[float]:
        """What each of so many answers counts as if it is no number; 0 where the data has no training rows."""
        given = load_rows(self.config.cases[name].source, cache_folder()).given_splits
        if given and "train" not in given:
            return [0.0] * number
        return training_means(self._built(name, text, "train", has_shots), [0] * number)

    def _worked(self, name: str, text: str, shots: int) -> str:
        """Some training rows (of data that has none, as FLORES: validation rows) as they stand in the prompt, tags and
        all, as a piece of a template. Drawn evenly: data is often sorted, so the first ones would be of a kind."""
        case = self.config.cases[name]
        given = load_rows(case.source, cache_folder()).given_splits
        split: Split = "train" if "train" in given or not given else "valid"
        built = self._built(name, text, split)
        source, (template,) = built.config.data.sources[0], built.stage.templates
        wanted = dict.fromkeys([*template.fields, source.output])
        (examples,) = built.examples(split)
        if shots > (there := 0 if split == case.split else len(examples)):
            raise SharedError(
                f"cases.{name}: shots is {shots}, but there are {there} {split} rows to take worked examples from. Ask "
                f"for fewer, or raise source.rows.{split}."
            )
        rows = examples.columns(list(wanted), chosen(examples, shots))
        pieces = []
        for at in range(shots):
            for part in template.parts:
                if part.kind == "tag":
                    pieces.append(f"<{part.value}>")
                elif part.kind == "text":
                    pieces.append(escaped(part.value))
                else:
                    column = source.output if part.is_output else part.value
                    about = source.fields.get(part.value, FieldConfig())
                    pieces.append(escaped(field_text(written(rows[column][at], about), part, about)))
            pieces.append("\n\n")
        return "".join(pieces)

    def _built(self, name: str, text: str, split: Split, has_shots: bool = False) -> Built:
        """The rows of one split in one prompt, and the model with its tags. Fields and length of all prompts of a case
        are as the tags of its first one were trained, since the same is to be asked; worked examples come on top."""
        case = self.config.cases[name]
        template, tags = parse_template(text, self.library.kinds), self.library.tags
        used = dict.fromkeys(template.tags)
        heads = [n for n in used if tags[n].head is not None]
        known = case.source.model_dump() | {"template": text, "target": case.source.target if heads else []}
        known["split"] |= {"by": self._key(case)}
        trained = [tags[n] for kind in ("domain", "function") for n in self._first(case, kind)]
        fields = fields_as_trained(trained, self.library.kinds) | known["fields"]
        known["fields"] = {n: field for n, field in fields.items() if n in (*template.fields, "output")}
        max_tokens = next((limit for tag in trained[::-1] if (limit := tag.about.get("max_tokens"))), None)
        config = RunConfig.model_construct(
            output=self.config.output, backbone=self.config.backbone, evaluation=self.config.evaluation,
            engine=self.config.engine, mask=tags[heads[0]].about.get("mask", "causal") if heads else "causal",
            tags={n: TagConfig(load=self.config.libraries[0]) for n in used},
            data=DataConfig(
                sources=[SourceConfig(**known)], on_bad_row=self.config.data.on_bad_row,
                max_tokens=None if has_shots else self.config.data.max_tokens or max_tokens,
            ), optim=OptimConfig(steps=1),
        )  # fmt: skip
        with told_as(f"cases.{name}.source", ours="data.sources.0"):
            built = build_on(self.backbone, stage_of_run(config, self.library, f"cases.{name}"), self.ranks, [split])
        require_same_everywhere(self.ranks.gather({f"rows of cases.{name}": built.data.digest}))
        return built

    def _key(self, case: CaseConfig) -> list[str]:
        """One key for all prompts of a case, so that they are asked of the same rows: a run's in the first one."""
        first = next(iter(case.prompts.values()))
        source = SourceConfig(**case.source.model_dump(), template=first.template)
        return split_by(source, parse_template(first.template, self.library.kinds))

    def _first(self, case: CaseConfig, kind: str) -> list[str]:
        """Tags of this kind in the first prompt."""
        used = parse_template(next(iter(case.prompts.values())).template, self.library.kinds).tags
        return [n for n in dict.fromkeys(used) if self.library.kinds[n] == kind]

    def _refuse_seen(self, name: str, rows: SourceRows) -> None:
        """Raises UserError where rows of a case may be some that tags of its first prompt know the answers of."""
        case = self.config.cases[name]
        mine = with_files(drawn_from(case.source, self._key(case), rows.given_splits), case.source)
        if {*mine["by"]} <= {*rows.columns}:
            for tag in self._first(case, "function") + self._first(case, "domain"):
                if self.library.tags[tag].knows_answers:
                    held_out = self.library.tags[tag].about.get("held_out", [])
                    refuse_seen(tag, held_out, mine, case.split, f"cases.{name}")


def _trained(library: str) -> dict[str, Any]:
    """Which rows and heads these are, and where they come from if the library still lies in its run."""
    origin_of_run = Path(library).parent / "origin.json"
    trained = read_json(origin_of_run) if origin_of_run.is_file() else {}
    return {"sha256": sha256_file(Path(library) / "library.json"), **trained}


def _require_alike(asked: dict[str, Asked], where: str, generated_rows: int) -> None:
    """Raises UserError unless all prompts were asked of the same rows, with as much of them."""
    out = "Leave long rows out with source.max_characters"
    if len({len(one.rows) for one in asked.values()}) > 1:
        told = ", ".join(f"{prompt} {len(one.rows)}" for prompt, one in asked.items())
        raise SharedError(
            f"{where}: its prompts are asked of different numbers of rows ({told}), which cannot be compared. {out}, "
            f"or raise evaluation.generated_rows (it is {generated_rows})."
        )
    first = next(iter(asked))
    for prompt, one in asked.items():
        if one.rows != asked[first].rows:
            raise SharedError(
                f"{where}: {prompt} leaves no room for some rows that {first} has, so the two are asked of different "
                f"rows, which cannot be compared. {out}."
            )
        if one.cut != asked[first].cut:
            raise SharedError(
                f"{where}: fields do not fit into {prompt} in {one.cut} rows, into {first} in {asked[first].cut}: the "
                f"same question would not be asked. {out}, or ask for fewer shots."
            )

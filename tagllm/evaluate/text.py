"""Metrics of generated text against references: lists of strings in, numbers with 95 % intervals out.

n rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tagllm.config import EvaluationConfig
from tagllm.evaluate.metric_kinds import kind_of
from tagllm.evaluate.metrics import intervals, value_metrics

DRAWS = 200
"""Bootstrap draws of rows for an interval."""
NO_SPBLEU = "no spBLEU: evaluation.spbleu_model names no sentencepiece model; BLEU and chrF++ stand for it"
_COMET_APART = (
    "Its releases want transformers before 5, so it cannot stand beside tagllm: leave the key out, and score "
    "generated.jsonl (prompt, given, reference, generated) in an environment of its own."
)
_NUMBER = re.compile(r"[-+]?(\d*+\.\d++([eE][-+]?\d++)?+|\d++\.?+([eE][-+]?\d++)?+(?![\w.]*\w))(?!,\d)")
"""A unit may stand right behind a decimal point's digits (7.5kcal); behind others it may be a word (7th). A comma and
digits behind it make it another number."""
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?![\d,])")
_LARGEST = float(np.finfo(np.float32).max)


class Scores(NamedTuple):
    """Metrics, and between what values 95 % of draws of other rows would put them."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def with_(self, other: Scores) -> Scores:
        return Scores(self.metrics | other.metrics, self.intervals | other.intervals)


def problems_of(config: EvaluationConfig, where: str) -> list[str]:
    """What is missing for the metrics that a config asks for; told before hours of generating."""
    problems = []
    needed = (("spbleu_model", config.spbleu_model, "sentencepiece"), ("comet_model", config.comet_model, "comet"))
    for key, path, module in needed:
        package = "unbabel-comet" if module == "comet" else module
        if path is not None and not Path(path).is_file():
            problems.append(
                f"{where}.{key} is {path!r}; there is no such file, and nothing is downloaded. Give the path of the "
                "model, or leave the key out."
            )
        elif path is not None and find_spec(module) is not None and not _WELL_FORMED[module](Path(path)):
            problems.append(f"{where}.{key} is {path!r}; that is no model of {package}. Give another file.")
        if path is not None and find_spec(module) is None:
            out = _COMET_APART if module == "comet" else f"Run: pip install {package}, or leave the key out."
            problems.append(f"{where}.{key} is {path!r}; it needs the package {package}, which is not installed. {out}")
    return problems


def _is_sentencepiece(file: Path) -> bool:
    try:
        _processor(str(file))
    except (OSError, RuntimeError):
        return False
    return True


def _is_comet(file: Path) -> bool:
    return (file.parent.parent / "hparams.yaml").is_file()


_WELL_FORMED: dict[str, Callable[[Path], bool]] = {"sentencepiece": _is_sentencepiece, "comet": _is_comet}
"""By package; what is wrong with a file is told before hours of generating."""


def no_spbleu(scores: Scores, config: EvaluationConfig) -> str:
    """What is to be said of a translation that is measured without the metric of the paper."""
    return NO_SPBLEU if "bleu" in scores.metrics and config.spbleu_model is None else ""


def text_scores(made: Sequence[str], wanted: Sequence[str], sources: Sequence[str], config: EvaluationConfig) -> Scores:
    """BLEU, chrF++ and the share of exact matches; spBLEU and COMET where the config names their models.

    Args:
        sources: what was to be translated; only COMET looks at it.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    found = _mean("exact", [a == b for a, b in zip(made, wanted, strict=True)])
    found = (
        _corpus("bleu", BLEU(), made, wanted).with_(_corpus("chrf++", CHRF(word_order=2), made, wanted)).with_(found)
    )
    if config.spbleu_model is not None:
        pieces = [_pieces(texts, config.spbleu_model) for texts in (made, wanted)]
        found = found.with_(_corpus("spbleu", BLEU(tokenize="none", force=True), *pieces))
    if config.comet_model is not None:
        found = found.with_(_mean("comet", _comet(made, wanted, sources, config)))
    return found


def language_scores(made: Sequence[str], language: str, among: Collection[str]) -> Scores:
    """`in_language`: the share of texts that py3langid takes for `language` rather than for another one of `among` (or,
    where that names no other, of all it knows). An empty text is in no language."""
    identifier = _identifier()
    if {*among} - {language}:
        identifier.set_languages({*among, language})
    return _mean("in_language", [bool(text) and identifier.classify(text)[0] == language for text in made])


def known_languages() -> list[str]:
    """Codes that `language_scores` takes."""
    return sorted(_identifier().labels)


def number_scores(made: Sequence[str], targets: Sequence[float], fallbacks: Sequence[float]) -> Scores:
    """Metrics of the numbers that texts begin with.

    Args:
        fallbacks: what each text without a number counts as (the mean of the training rows); the share of such texts
            is `unparsable`.
    """
    parsed = [number_in(text) for text in made]
    pairs = zip(fallbacks, parsed, strict=True)
    values_n1 = np.array([[fallback if number is None else number] for fallback, number in pairs], np.float32)
    targets_n1 = np.array(targets, np.float32)[:, None]
    missing = _mean("unparsable", [number is None for number in parsed])
    metrics = value_metrics(values_n1, targets_n1, classes=False)
    return missing.with_(Scores(metrics, intervals(values_n1, targets_n1, classes=False)))


def number_in(text: str) -> float | None:
    """The number that a text begins with, if it begins with one that fp32 can hold."""
    match = _NUMBER.match(_THOUSANDS.sub(lambda groups: groups[0].replace(",", ""), text.strip(), count=1))
    return float(match[0]) if match and abs(float(match[0])) <= _LARGEST else None


def all_numbers(texts: Sequence[str]) -> bool:
    """Whether every text is a number and nothing else."""
    return bool(texts) and all((m := _NUMBER.fullmatch(text)) and number_in(m[0]) is not None for text in texts)


def _corpus(name: str, metric: Any, made: Sequence[str], wanted: Sequence[str]) -> Scores:
    """A metric of sacrebleu with its own bootstrap interval, as wide below as above but cut off at 0 and 100. The draws
    are the same for the same number of rows, so two systems are compared on the same draws. `corpus_score` has the same
    interval, but cannot add up draws without a match (0.0) and others (float32)."""
    from sacrebleu.significance import _bootstrap_resample, estimate_ci

    score = metric.corpus_score(made, [wanted])
    _, draws = _bootstrap_resample(metric._extract_corpus_statistics(made, [wanted]), metric, DRAWS)
    mean, half = map(float, estimate_ci(np.array([draw.score for draw in draws], np.float64)))
    return Scores({name: float(score.score)}, {name: (max(mean - half, 0.0), min(mean + half, kind_of(name).most))})


def _mean(name: str, values: Sequence[float]) -> Scores:
    values_n = np.array(values, np.float64)
    draws = np.random.default_rng(0).integers(len(values_n), size=(DRAWS, len(values_n)))
    low, high = np.quantile(values_n[draws].mean(axis=1), [0.025, 0.975])
    return Scores({name: float(values_n.mean())}, {name: (float(low), float(high))})


def _pieces(texts: Sequence[str], model: str) -> list[str]:
    """As sacrebleu's own tokenizer flores101 or flores200 cuts them, which would download its model."""
    processor = _processor(model)
    return [" ".join(processor.EncodeAsPieces(text.rstrip())) for text in texts]


def _processor(model: str) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(model)
    return processor


def _comet(made: Sequence[str], wanted: Sequence[str], sources: Sequence[str], config: EvaluationConfig) -> list[float]:
    import comet
    import torch

    model = comet.load_from_checkpoint(config.comet_model, local_files_only=True)
    rows = [{"src": a, "mt": b, "ref": c} for a, b, c in zip(sources, made, wanted, strict=True)]
    gpus = int(torch.cuda.is_available())
    return list(model.predict(rows, batch_size=config.rows_per_batch, gpus=gpus, progress_bar=False).scores)


def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)

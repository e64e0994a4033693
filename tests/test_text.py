"""Metrics of generated text, and the generation itself on a tiny random model."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
import yaml
from transformers import AutoTokenizer

from tagllm.config import BackboneConfig, EvaluationConfig
from tagllm.evaluate import generate as generating
from tagllm.evaluate.answers import _plain, language_of
from tagllm.evaluate.generate import generate, line_ends
from tagllm.evaluate.text import (
    all_numbers,
    known_languages,
    language_scores,
    number_in,
    number_scores,
    problems_of,
    text_scores,
)
from tagllm.model.backbone import load_backbone
from tagllm.model.tagged import TaggedModel
from tagllm.template import parse_template
from tests import tiny
from tests.commands import Run, config, fails

FRENCH = ["Le menu d'aide permet de contrôler le système.", "Ouvrez la fenêtre principale de l'application."]
ENGLISH = ["The help menu lets you control the system.", "Open the main window of the application."]


def test_perfect_and_hopeless_translations() -> None:
    best = text_scores(FRENCH, FRENCH, ENGLISH, EvaluationConfig())
    assert best.metrics == pytest.approx({"bleu": 100, "chrf++": 100, "exact": 1})
    worst = text_scores(["", ""], FRENCH, ENGLISH, EvaluationConfig())
    assert max(worst.metrics.values()) == 0
    for name, (low, high) in best.intervals.items():
        assert low <= best.metrics[name] + 1e-9 and best.metrics[name] <= high + 1e-9


def test_no_interval_goes_below_0() -> None:
    """Where one answer of many is right, that of BLEU is wider than its mean."""
    wrong = [
        "Rien.",
        "Autre chose que tout le reste.",
        "Une autre phrase encore qui ne va pas.",
        "Encore du texte ici.",
    ]
    scores = text_scores([FRENCH[0], *wrong], [*FRENCH, *ENGLISH, "Close the file."], [""] * 5, EvaluationConfig())
    assert all(0 <= low <= high for low, high in scores.intervals.values())
    assert scores.intervals["bleu"][0] == 0


def test_language_is_told_apart_from_quality() -> None:
    """A fluent answer in the wrong language is no answer; nothing is in no language."""
    assert {"en", "fr", "ru", "de", "it", "el", "es", "pt"} <= set(known_languages())
    share = language_scores([*FRENCH, *ENGLISH], "fr", {"en", "fr"}).metrics["in_language"]
    assert share == 0.5
    assert language_scores(["", FRENCH[0]], "fr", set()).metrics["in_language"] == 0.5
    assert language_scores(ENGLISH, "fr", {"fr"}).metrics["in_language"] == 0, "where no other one is named"


def test_the_wanted_language_is_that_of_the_tag_before_the_answer() -> None:
    kinds = {"EN": "domain", "FR": "domain", "SMILES": "domain", "Translate": "function"}
    for text, language in (
        ("<EN> {en} <Translate> <FR> {output}", "fr"),
        ("<EN> {en} <FR> <Translate> {output}", "fr"),
        ("<FR> {fr} <Translate> {output}", ""),
        ("{fr} <Translate> <SMILES> {output}", ""),
    ):
        assert language_of(parse_template(text, kinds), kinds) == language


def test_numbers_in_text() -> None:
    assert [number_in(text) for text in ("0.53", " -1e3 units", "about 2", "", "7th", "1e999")] == [
        0.53, -1000.0, None, None, None, None,
    ]  # fmt: skip
    units = ("7.5kcal", "0.71C", "1.2e", "6nM", "1.5.2", "3.", ".5", "2.5e-3 mol")
    assert [number_in(text) for text in units] == [7.5, 0.71, 1.2, None, 1.5, 3.0, 0.5, 0.0025]
    commas = ("12.34,5", "0.53,0.61", "0,553", "0,5", "1,234.5", "-12,345")
    assert [number_in(text) for text in commas] == [None, None, None, None, 1234.5, -12345.0]
    assert all_numbers(["0.5", "-3"]) and not all_numbers(["0.5", "x"]) and not all_numbers([])
    found = number_scores(["0.5", "no idea", "1.5"], [0.5, 1.0, 1.5], fallbacks=[9.0, 1.0, 9.0])
    assert found.metrics["mse"] == 0 and found.metrics["unparsable"] == pytest.approx(1 / 3)


def test_models_that_are_not_there_are_told_before_anything_is_generated() -> None:
    (problem,) = problems_of(EvaluationConfig(spbleu_model="no.model"), "evaluation")[:1]
    assert "evaluation.spbleu_model is 'no.model'; there is no such file, and nothing is downloaded" in problem
    assert problems_of(EvaluationConfig(), "evaluation") == []


def test_a_file_that_is_no_model_is_told_as_well(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "page.html").write_text("<html>not found</html>")
    (problem,) = problems_of(EvaluationConfig(spbleu_model=str(tmp_path / "page.html")), "evaluation")
    assert "that is no model of sentencepiece" in problem


def test_spbleu_is_bleu_over_the_pieces_of_the_model(tmp_path: Path) -> None:
    """As sacrebleu has it for flores101: pieces instead of words, whatever stands at the end of a line."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["the cat sat on the mat", "a dog ran over the hill", "one bird flew away", "two birds sat on the hill"]
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), vocab_size=28, minloglevel=2)
    model = tmp_path / "m.model"
    config = EvaluationConfig(spbleu_model=str(model))
    assert problems_of(config, "evaluation") == []
    made, wanted = ["the cat sat on a mat ", "two dogs ran over hills"], ["the cat sat on the mat", texts[1]]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [[" ".join(processor.encode(text.rstrip(), out_type=str)) for text in rows] for rows in (made, wanted)]
    expected = sacrebleu.corpus_bleu(pieces[0], [pieces[1]], tokenize="none", force=True).score
    found = text_scores(made, wanted, [], config)
    assert found.metrics["spbleu"] == pytest.approx(expected, abs=1e-9)
    assert found.metrics["bleu"] != pytest.approx(expected, abs=1e-3)
    low, high = found.intervals["spbleu"]
    assert 0 <= low <= expected <= high <= 100


def test_comet_is_asked_of_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the calls of unbabel-comet 2, whose package cannot be installed beside transformers 5."""
    asked: dict[str, Any] = {}

    class Model:
        def predict(self, rows: Any, **how: Any) -> Any:
            asked.update(rows=rows, how=how)
            return SimpleNamespace(scores=[0.25, 0.75])

    def load_from_checkpoint(path: str, local_files_only: bool) -> Model:
        asked.update(path=path, local=local_files_only)
        return Model()

    package = SimpleNamespace(load_from_checkpoint=load_from_checkpoint, __spec__=ModuleSpec("comet", None))
    monkeypatch.setitem(sys.modules, "comet", package)
    model = tmp_path / "checkpoints" / "model.ckpt"
    model.parent.mkdir()
    model.touch()
    config = EvaluationConfig(comet_model=str(model), rows_per_batch=8)
    assert "that is no model of unbabel-comet" in problems_of(config, "evaluation")[0]
    (tmp_path / "hparams.yaml").touch()
    assert problems_of(config, "evaluation") == []
    found = text_scores(["a", "b"], ["c", "d"], ["e", "f"], config)
    assert found.metrics["comet"] == 0.5 and 0.25 <= found.intervals["comet"][0] <= found.intervals["comet"][1] <= 0.75
    assert asked["rows"] == [{"src": "e", "mt": "a", "ref": "c"}, {"src": "f", "mt": "b", "ref": "d"}]
    assert (asked["path"], asked["local"], asked["how"]["batch_size"]) == (str(model), True, 8)


def test_answers_that_have_nothing_in_common_but_one_are_scored() -> None:
    """Of some draws the score is 0.0, of others a float32, which the mean of sacrebleu cannot add up."""
    made, wanted = [*["zzzz"] * 9, "the cat"], ["the cat sat on the mat"] * 10
    found = text_scores(made, wanted, [], EvaluationConfig())
    low, high = found.intervals["chrf++"]
    assert low == 0 < found.metrics["chrf++"] <= high


def test_intervals_end_where_the_metric_does() -> None:
    made, wanted = ["the cat sat on the mat", "a dog"], ["the cat sat on the mat", "one bird flew away"]
    scores = text_scores(made, wanted, [], EvaluationConfig())
    assert all(0 <= low <= high <= 100 for low, high in scores.intervals.values())


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    of = tiny.layout()
    ids = [random.integers(4, tiny.VOCABULARY, size) for size in (3, 9, 5, 9, 1, 14, 2)]
    return [np.concatenate([some, list(of.ids("F"))]).astype(np.int32) for some in ids]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shared", [0, 1, 20])
def test_answers_are_those_of_the_whole_prompt(
    prompts: list[np.ndarray], tmp_path: Path, family: str, beams: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prompts have in common is computed once, before the padding of the shorter ones; where layers have a window,
    which counts padding, for each."""
    model = tiny.model(tiny.layout(), family)
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    examples = np.concatenate([[5], tiny.layout().ids("F"), np.arange(6, 30)])[:shared]
    whole = [np.concatenate([examples, prompt]).astype(np.int32) for prompt in prompts]
    whole.append(whole[0][: max(shared, 1)])  # nothing else follows in this one
    found = generate(model, tokenizer, whole, 12, beams)
    monkeypatch.setattr(generating, "_common", lambda _: 0)
    assert found == [generate(model, tokenizer, [prompt], 12, beams)[0] for prompt in whole]
    assert len(set(found)) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_do_not_depend_on_the_batch(prompts: list[np.ndarray], tmp_path: Path, beams: int) -> None:
    model = tiny.model(tiny.layout())
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    together = generate(model, tokenizer, prompts, 12, beams, rows_per_batch=3)
    assert together == [generate(model, tokenizer, [prompt], 12, beams)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_an_answer_ends_with_its_line(
    prompts: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(tiny.layout())
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    assert [tokenizer.decode([i]) for i in line_ends(tokenizer)] == ["\n"]
    whole = generate(model, tokenizer, prompts, 24)
    letter = max("".join(whole), key="".join(whole).count)
    ends = tokenizer(letter, add_special_tokens=False).input_ids
    monkeypatch.setattr(generating, "line_ends", lambda _: tuple(ends))
    for text, cut in zip(whole, generate(model, tokenizer, prompts, 24), strict=True):
        assert text.startswith(cut.rstrip(letter)) and letter not in cut[:-1]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_answers_that_have_ended_change_no_other(
    prompts: list[np.ndarray], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave the batch, some early and some late; what is remembered of the others stays theirs."""
    model = tiny.model(tiny.layout(), family)
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    monkeypatch.setattr(generating, "STEP", 40)
    whole = generate(model, tokenizer, prompts, 40)
    letter = min((at for at in set("".join(whole)) if 0 < sum(at in text for text in whole) < len(whole)), key=ord)
    ends = tokenizer(letter, add_special_tokens=False).input_ids
    monkeypatch.setattr(generating, "line_ends", lambda _: tuple(ends))
    alone = [generate(model, tokenizer, [prompt], 40)[0] for prompt in prompts]
    assert len({len(text) for text in alone}) > 1
    monkeypatch.setattr(generating, "STEP", 3)
    assert generate(model, tokenizer, prompts, 40) == alone


def test_eval_of_a_run_with_text_keeps_every_answer(run: Run, folder: Path) -> None:
    tags = {"FR": {"length": 2}, "T": {"kind": "function", "length": 2}}
    file = config(folder, "answers", tags=tags, data__template="{smiles} <T> <FR> {output}", data__target=[])
    settings = ["data.sources[0].output=name", "evaluation.generated_rows=3", "evaluation.max_new_tokens=4"]
    assert run("train", file, *settings).exit_code == 0
    assert run("eval", folder / "runs/answers").exit_code == 0
    results = json.loads((folder / "runs/answers/results.json").read_text())
    lines = [json.loads(line) for line in (folder / "runs/answers/generated.jsonl").read_text().splitlines()]
    assert len(lines) == results["metrics"]["generated_rows"] == 3
    assert all(line["reference"].startswith("x") and line["given"] == line["prompt"] != "" for line in lines)
    assert {"bleu", "chrf++", "exact", "in_language"} <= set(
        results["sources"]["{smiles} <T> <FR> {output}"]["metrics"]
    )
    assert "no spBLEU" in results["note"] and "answers in text: 3 of " in results["note"]
    fails(run("eval", folder / "runs/answers", "evaluation.spbleu_model=none.model"), "no such file")


@pytest.mark.parametrize("beams", [1, 2])
def test_the_likeliest_token_whatever_the_backbone_was_published_with(tmp_path: Path, beams: int) -> None:
    """As instruct models come with a penalty on what was said before, digits among it."""
    made, of = [], tiny.layout()
    prompts = [np.array([5 + at, 9, *of.ids("F")], np.int32) for at in range(6)]
    for penalty in (1.0, 5.0):
        folder = tiny.save_backbone(tmp_path / f"{penalty}")
        (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": penalty}))
        backbone = load_backbone(BackboneConfig(model=str(folder), dtype="fp32"), torch.device("cpu"))
        model = TaggedModel(backbone.model, tiny.tags(of), of)
        made.append(generate(model, backbone.tokenizer, prompts, 12, beams))
    assert made[0] == made[1] and any(made[0])


def test_every_source_counts_and_none_hides_a_head(run: Run, folder: Path) -> None:
    """Two with the same words, of other scale, beside one that a head answers."""
    tags = {"T": {"kind": "function", "length": 2}, "W": {"kind": "function", "length": 2, "head": {}}}
    file = config(folder, "mixed", tags=tags, evaluation={"max_new_tokens": 2, "generated_rows": 60})
    for name, add in (("small", 0), ("large", 1000)):
        rows = "".join(f"CN{i}O,{add + i % 7}\n" for i in range(40))
        (folder / f"{name}.csv").write_text(f"smiles,number\n{rows}")
    values = yaml.safe_load(file.read_text())
    values["data"]["sources"] += [
        {"path": str(folder / f"{name}.csv"), "template": "{smiles} <T> {output}", "output": "number"}
        for name in ("small", "large")
    ]
    file.write_text(yaml.safe_dump(values))
    assert run("train", file).exit_code == 0
    told = run("eval", folder / "runs/mixed")
    assert told.exit_code == 0, told.output
    results = json.loads((folder / "runs/mixed/results.json").read_text())
    first, second = results["sources"].values()
    assert list(results["sources"]) == ["{smiles} <T> {output}", "{smiles} <T> {output} (data.sources.2)"]
    assert results["metrics"]["text/generated_rows"] == first["rows"] + second["rows"]
    for source in (first, second):  # of a backbone that was never trained
        if source["metrics"]["unparsable"] == 1:
            assert source["metrics"]["mae"] < 10, "the mean of its own training rows"
    assert first["metrics"]["unparsable"] == second["metrics"]["unparsable"] == 1
    assert results["metrics"]["text/mae"] < 10 and "mse" in results["metrics"] and "text/mse" in results["metrics"]


def test_a_prompt_has_no_special_tokens_for_people(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    ids = np.array([tokenizer.eos_token_id, *tokenizer("CCO", add_special_tokens=False).input_ids], np.int32)
    built: Any = SimpleNamespace(
        backbone=SimpleNamespace(tokenizer=tokenizer), layout=SimpleNamespace(vocabulary_size=tiny.VOCABULARY)
    )
    assert _plain(built, ids) == "CCO"


def test_digits_are_scored_as_numbers(run: Run, folder: Path) -> None:
    file = config(
        folder,
        "digits",
        tags={"T": {"kind": "function", "length": 2}},
        data__template="{smiles} <T> {output}",
        data__target=[],
    )
    settings = [
        "data.sources[0].output=weight",
        "data.sources[0].fields.output.decimals=1",
        "evaluation.max_new_tokens=4",
    ]
    assert run("train", file, *settings).exit_code == 0
    assert run("eval", folder / "runs/digits").exit_code == 0
    metrics = json.loads((folder / "runs/digits/results.json").read_text())["metrics"]
    assert {"mse", "spearman", "unparsable"} <= set(metrics) and "bleu" not in metrics


def test_commas_in_numbers() -> None:
    texts = ("1,234.5", "12,000 g", "0,5", "12,34", "7, 8", "1,234,567", "1.5,2")
    assert [number_in(text) for text in texts] == [1234.5, 12000.0, None, None, 7.0, 1234567.0, None]


def test_an_answer_ends_where_the_backbone_takes_no_more_positions(tmp_path: Path) -> None:
    of, tokenizer = tiny.layout(("Text",)), AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path))
    model = tiny.model(of, "gpt2")
    prompt = np.random.default_rng(0).integers(3, tiny.VOCABULARY, 253).astype(np.int32)
    assert len(generate(model, tokenizer, [prompt, prompt[:20]], 16)) == 2

"""PEFT baselines: on the run's own rows, rates chosen on validation, resumable, beside the run's own results."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch

from tagllm.baselines.adapt import Adapted
from tagllm.baselines.command import Request, _beside, _tuned
from tagllm.baselines.methods import METHODS
from tagllm.baselines.prompts import Row, alike, pad
from tagllm.baselines.record import Record
from tagllm.baselines.task import Task, open_tasks
from tagllm.baselines.train import Clock, Look, Trained, _warming_up, errors, in_room, refit, see, step, train
from tagllm.config import BackboneConfig, OptimConfig
from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.closed_form import FIT_ROWS, fit_head
from tagllm.evaluate.results import write_results
from tagllm.head import Head
from tagllm.origin import ORIGIN
from tagllm.run_lock import RunLock
from tagllm.side_by_side import Script
from tagllm.train.schedule import lr_factor
from tests.commands import Run, config, fails

pytest.importorskip("peft")
DOMAIN = {"SMILES": {"kind": "domain", "length": 3}}
W = {"W": {"kind": "function", "length": 2, "head": {"type": "regression", "reads": "both"}}}
QUICK = ("--lr", "1e-3,1e-2", "--budget-s", "0.5")


@pytest.fixture
def finished(folder: Path, run: Run) -> Path:
    """A run of a domain tag and a function tag with a head."""
    template = "The molecule <SMILES> {smiles} weighs <W>"
    file = config(folder, "for_baselines", tags=DOMAIN | W, data__template=template)
    assert run("train", file).exit_code == 0
    return folder / "runs" / "for_baselines"


def document(finished: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "baselines" / f"{method}.json").read_text())
    return found


def test_every_method_stands_beside_the_tag(finished: Path, run: Run) -> None:
    assert run("eval", finished).exit_code == 0
    told = run("baseline", finished, *QUICK, "--seeds", 2)
    assert told.exit_code == 0, told.output
    results = json.loads((finished / "results.json").read_text())
    for method in METHODS.values():
        found = document(finished, method.key)
        losses = {rate: entry["valid_loss"] for rate, entry in found["tuning"].items()}
        assert set(losses) == {"0.001", "0.01"} and found["lr"] == float(min(losses, key=losses.__getitem__))
        finals = list(found["final"].values())
        assert len(finals) == 2 and all(one["test_rows"] == results["rows"] for one in finals)
        mean = sum(one["metrics"]["mse"] for one in finals) / 2
        assert found["metrics"]["mse"] == pytest.approx(mean)
        if len({one["metrics"]["mse"] for one in finals}) == 2:
            half = 12.7062 * abs(finals[0]["metrics"]["mse"] - mean)  # Student's t, one degree of freedom
            assert found["intervals"]["mse"] == pytest.approx([max(mean - half, 0), mean + half], rel=1e-4)
        assert results["baselines"][method.name] == found["metrics"]
        origin = results["trained_baselines"][method.name]
        assert set(ORIGIN) <= set(origin) and origin["lr"] == found["lr"] and len(origin["steps"]) == 2
    told = run("report", finished, "--out", finished / "report")
    assert told.exit_code == 0, told.output
    lines = (finished / "report" / "report.md").read_text().splitlines()
    for method in METHODS.values():
        (line,) = [line for line in lines if line.startswith(f"{method.name}: ")]
        assert "over 2 seeds of its own" in line and "steps in" in line and "commit" in line


def test_results_have_one_writer(finished: Path) -> None:
    """`eval` waits for a method that is just written, so that neither is lost."""
    done = Event()

    def write() -> None:
        write_results(finished, {"split": "valid"})
        done.set()

    (finished / "baselines").mkdir(exist_ok=True)
    with RunLock(finished / "baselines"):
        Thread(target=write, daemon=True).start()
        assert not done.wait(0.2)
    assert done.wait(60) and json.loads((finished / "results.json").read_text()) == {"split": "valid"}


def test_one_method_alone_has_its_share_too(finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cores, as the run it is compared with had: both count seconds."""
    begun: list[tuple[list[Script], int]] = []
    monkeypatch.setattr("tagllm.baselines.command.run_side_by_side", lambda *asked: begun.append(asked) or [])
    assert run("baseline", finished, "--method", "lora", "--jobs", "2").exit_code == 0
    ((work,), jobs) = begun[0]
    assert jobs == 2 and "--method=lora" in work.commands[0]


@pytest.mark.slow
def test_jobs_train_methods_in_processes_of_their_own(finished: Path, run: Run) -> None:
    for file in (finished / "baselines").glob("*.json"):  # of other tests: they share the folder
        file.unlink()
    assert run("eval", finished).exit_code == 0
    both = [METHODS["lora"], METHODS["prompt_tuning"]]
    options = ["--lr", "1e-3", "--budget-s", "0.5", "--seeds", "2", "--fit-rows", "10", "--virtual", "3"]
    told = run("baseline", finished, *(f"--method={method.key}" for method in both), *options, "--jobs", "2")
    assert told.exit_code == 0, told.output
    results = json.loads((finished / "results.json").read_text())
    for method in both:
        found = document(finished, method.key)
        assert list(found["final"]) == ["lr=0.001,seed=0", "lr=0.001,seed=1"] and not found["tuning"]
        assert found["settings"]["budget_s"] == 0.5 and found["settings"]["fit_rows"] == 10
        assert results["baselines"][method.name] == found["metrics"]
    assert document(finished, "prompt_tuning")["settings"]["virtual"] == 3
    for method in both:
        (finished / "baselines" / f"{method.key}.json").unlink()


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(finished: Path, run: Run) -> None:
    first = run("baseline", finished, *QUICK, "--method", "lora")
    assert first.exit_code == 0, first.output
    then = document(finished, "lora")
    assert run("baseline", finished, *QUICK, "--method", "lora").exit_code == 0
    now = document(finished, "lora")
    assert now["tuning"] == then["tuning"] and now["final"] == then["final"]
    other = run("baseline", finished, "--lr", "1e-3", "--budget-s", "9", "--method", "lora")
    fails(other, "lora.json", "budget_s 0.5 and not 9")


def test_one_rate_is_taken_as_it_is(finished: Path, run: Run) -> None:
    file = finished / "baselines" / "prompt_tuning.json"
    file.unlink(missing_ok=True)  # of other tests: they share the folder
    told = run("baseline", finished, "--lr", "1e-3", "--budget-s", "0.5", "--method", "prompt_tuning")
    assert told.exit_code == 0, told.output
    found = document(finished, "prompt_tuning")
    assert found["lr"] == 1e-3 and not found["tuning"] and list(found["final"]) == ["lr=0.001,seed=0"]
    file.unlink()


def test_methods_train_side_by_side_and_each_has_one_writer(finished: Path, run: Run) -> None:
    with RunLock(finished / "baselines" / "lora"):
        told = run("baseline", finished, *QUICK, "--method", "prompt_tuning")
        assert told.exit_code == 0, told.output
        fails(run("baseline", finished, *QUICK, "--method", "lora"), "baselines/lora", "another process is writing")


def test_fits_see_no_more_rows_than_asked(finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fit(head: Head, train: Rows, valid: Rows) -> Head:
        seen.append(len(train.targets_nK))
        return fit_head(head, train, valid)

    monkeypatch.setattr("tagllm.baselines.train.fit_head", fit)
    (finished / "baselines" / "lora.json").unlink(missing_ok=True)  # of other tests: they share the folder
    told = run("baseline", finished, *QUICK, "--method", "lora", "--fit-rows", 10)
    assert told.exit_code == 0, told.output
    assert seen and set(seen) == {10}
    fails(run("baseline", finished, *QUICK, "--method", "lora"), "lora.json", "fit_rows 10 and not None")


def test_heads_of_classes_stand_beside_trained_baselines_too(run: Run, folder: Path) -> None:
    head = {"type": "classification", "classes": ["a", "b"], "reads": "both"}
    tags = {"K": {"kind": "function", "length": 2, "head": head}}
    file = config(folder, "classes", tags=tags, data__template="{smiles} is <K>", data__target="kind")
    assert run("train", file).exit_code == 0
    path = folder / "runs" / "classes"
    assert run("eval", path).exit_code == 0
    told = run("baseline", path, *QUICK, "--method", "lora", "--method", "prompt_tuning")
    assert told.exit_code == 0, told.output
    results = json.loads((path / "results.json").read_text())
    for method in (METHODS["lora"], METHODS["prompt_tuning"]):
        (final,) = document(path, method.key)["final"].values()
        assert not final["refitted"] and final["test_rows"] == results["rows"]
        assert set(results["baselines"][method.name]) == set(results["metrics"]) >= {"accuracy", "cross_entropy"}

    (task,) = open_tasks(path)
    model = Adapted(task.backbone.model, METHODS["lora"], task.head, 0, seed=0)
    rows = task.rows("train", METHODS["lora"])[:8]
    assert errors(model.head.as_head(), see(model, rows, 8)) == pytest.approx(np.full(8, np.log(2)))
    optimizer = torch.optim.AdamW(model.groups(1e-2, 1e-2))
    for _ in range(20):
        assert step(model, optimizer, [rows[:4], rows[4:]], clip=None)
    assert errors(model.head.as_head(), see(model, rows, 8)).mean() < 0.5 * np.log(2), "it cannot learn eight rows"


def test_mistakes(finished: Path, run: Run, folder: Path) -> None:
    fails(run("baseline", finished, "--method", "lorra"), "--method", "lorra", "Did you mean lora?")
    fails(run("baseline", finished, "--lr", "fast"), "--lr", "fast", "1e-3,3e-3")
    fails(run("baseline", folder / "nowhere"), "nowhere")
    domain = config(folder, "domain_only", tags=DOMAIN, data__template="<SMILES> {smiles}", data__target=[])
    assert run("train", domain).exit_code == 0
    fails(run("baseline", folder / "runs" / "domain_only"), "SMILES", "has a head", "with one")


@pytest.fixture
def task(finished: Path) -> Task:
    return open_tasks(finished)[0]


def test_rows_are_those_of_the_run_without_its_tags(task: Task) -> None:
    row = task.rows("train", METHODS["lora"])[0]
    text = task.backbone.tokenizer.decode(row.ids)
    assert text.startswith("The molecule") and text.rstrip().endswith("weighs") and "SMILES" not in text
    named = task.rows("train", METHODS["lora_text"])[0]
    assert "The molecule SMILES" in task.backbone.tokenizer.decode(named.ids)
    assert row.pools.sum() == named.pools.sum() > 0 and (row.target == named.target).all()


@pytest.mark.parametrize("method", ["prompt_tuning", "lora"])
def test_a_step_learns_the_adapter_and_the_head_and_nothing_else(task: Task, method: str) -> None:
    model = Adapted(task.backbone.model, METHODS[method], task.head, 3, seed=0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = model.learned()
    optimizer = torch.optim.AdamW(model.groups(1e-2, 1e-2))
    rows = task.rows("train", METHODS[method])
    for _ in range(2):  # the head starts at zero, so the first step moves nothing else
        assert step(model, optimizer, [rows[:4], rows[4:8]], clip=None)
    after = model.learned()
    assert all(not torch.equal(before[name], after[name]) for name in before), "something that learns stood still"
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in frozen.items())


def test_padding_changes_no_answer(task: Task) -> None:
    model = Adapted(task.backbone.model, METHODS["prompt_tuning"], task.head, 3, seed=0)
    rows = sorted(task.rows("train", METHODS["prompt_tuning"]), key=lambda row: len(row.ids))
    short, long = rows[0], rows[-1]
    assert len(short.ids) < len(long.ids)
    alone, beside = model(pad([short])), model(pad([short, long]))
    assert torch.allclose(alone.last_BD[0], beside.last_BD[0], atol=1e-5)
    assert torch.allclose(alone.mean_BD[0], beside.mean_BD[0], atol=1e-5)


@pytest.mark.parametrize("method", ["prompt_tuning", "lora"])
def test_what_rows_begin_with_alike_is_computed_once_and_changes_no_answer(
    task: Task, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Adapted(task.backbone.model, METHODS[method], task.head, 3, seed=0)
    model.overwrite({name: value + 0.1 * torch.randn_like(value) for name, value in model.learned().items()})
    beginning, *others = task.rows("train", METHODS[method])[:5]

    def behind_it(row: Row) -> Row:
        ids, pools = ([np.tile(part, 3), own] for part, own in zip(beginning[:2], row[:2], strict=True))
        return Row(np.concatenate(ids), np.concatenate(pools), row.target)

    rows = [behind_it(row) for row in others]
    mixed = [rows[0], others[0], *rows[1:], others[1]]
    asked = list[int]()
    together = Adapted.forward

    def counting(self: Adapted, batch: Any, shared: int = 0) -> Any:
        asked.append(len(batch.ids_BS) * (len(batch.ids_BS[0]) - shared) + shared)
        return together(self, batch, shared)

    monkeypatch.setattr(Adapted, "forward", counting)
    found = see(model, mixed, 8)
    once = sum(asked)
    for at, one in enumerate(mixed):
        alone = see(model, [one], 8)
        for mine, its in zip(found, alone, strict=True):
            np.testing.assert_allclose(mine[at], its[0], rtol=1e-4, atol=1e-5)
    assert once < 0.6 * sum(len(row.ids) for row in mixed)


def test_rows_are_batched_once_each_with_others_that_begin_alike() -> None:
    def of(*ids: int) -> Row:
        return Row(np.array(ids), np.ones(len(ids), np.uint8), np.zeros(1, np.float32))

    rows = [of(1, 2, 3, 4), of(9), of(1, 2, 3, 5, 6), of(7, 8), of(1, 2, 3), of(1, 2, 3, 4)]
    batches = alike(rows, 8, 100)
    assert sorted(i for chosen, _ in batches for i in chosen) == list(range(6))
    assert [(set(chosen), shared) for chosen, shared in batches] == [({0, 4, 5}, 2), ({1, 2, 3}, 0)]
    assert max(len(chosen) for chosen, _ in alike(rows, 2, 100)) == 2
    assert all(shared < min(len(rows[i].ids) for i in chosen) for chosen, shared in batches)
    assert sorted(len(chosen) for chosen, shared in alike(rows, 8, 8) if shared) == [2], "8 tokens are two of four"


def test_the_closed_form_head_is_kept_unless_the_trained_one_is_clearly_better(task: Task) -> None:
    method = METHODS["lora"]
    model = Adapted(task.backbone.model, method, task.head, 0, seed=0)
    valid = see(model, task.rows("valid", method), 8)
    expected = (torch.from_numpy(valid.targets_nK) - task.head.mean_K) / task.head.std_K
    before_n = errors(model.head.as_head(), valid)
    head, kept, loss = refit(model, task, method, valid, FIT_ROWS)
    assert loss == pytest.approx(float(errors(head, valid).mean()))
    assert kept, f"{before_n.mean()} of a head that knows nothing, {loss} of the fit"
    known = torch.cat([torch.from_numpy(valid.rows(head.spec.reads).features_nF), torch.ones(len(expected), 1)], dim=1)
    answer = torch.linalg.lstsq(known, expected, driver="gelsd").solution.T
    weight_KF, bias_K = model.head.unfolded(answer[:, :-1], answer[:, -1])
    model.overwrite(model.learned() | {"head.weight_KF": weight_KF, "head.bias_K": bias_K})
    _, kept, loss = refit(model, task, method, valid, FIT_ROWS)
    assert not kept and loss < 0.01, "it knew every answer of the validation split"


def test_the_best_look_is_what_is_left(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state, the head that was fitted to it, and its loss, where all later ones are worse."""
    looks: list[tuple[dict[str, torch.Tensor], Look]] = []

    def worse_and_worse(model: Adapted, *rest: Any) -> Look:
        looks.append((model.learned(), refit(model, *rest)._replace(loss=float(len(looks)))))
        return looks[-1][1]

    monkeypatch.setattr("tagllm.baselines.train.refit", worse_and_worse)
    model = Adapted(task.backbone.model, METHODS["lora"], task.head, 0, seed=0)
    trained, head = train(model, task, METHODS["lora"], 1e-2, 1e9, 0, FIT_ROWS)
    (state, best), *_, last = looks
    assert trained.best_step == trained.steps // 4 and trained.valid_loss == best.loss == 0
    assert head is best.head is not last[1].head
    assert all(torch.equal(value, state[name]) for name, value in model.learned().items())
    assert any(not torch.equal(value, last[0][name]) for name, value in state.items())


def test_looks_are_compared_by_fits_of_as_many_rows(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of all rows would be the better one whatever the state is; only the best state gets it."""
    looks: list[tuple[int, dict[str, torch.Tensor], Look]] = []

    def better_of_more(model: Adapted, *rest: Any) -> Look:
        limit = rest[-1]
        looks.append((limit, model.learned(), refit(model, *rest)._replace(loss=len(looks) - 100.0 * (limit > 8))))
        return looks[-1][-1]

    monkeypatch.setattr("tagllm.baselines.train.refit", better_of_more)
    monkeypatch.setattr("tagllm.baselines.train.SOME_ROWS", 8)
    model = Adapted(task.backbone.model, METHODS["lora"], task.head, 0, seed=0)
    trained, head = train(model, task, METHODS["lora"], 1e-2, 1e9, 0, 12)
    *compared, (limit, state, best) = looks
    assert [one for one, *_ in compared] == [8] * 4 and limit == 12
    assert trained.best_step == trained.steps // 4 and head is best.head and trained.valid_loss == best.loss
    assert all(torch.equal(value, compared[0][1][name]) for name, value in state.items())


@pytest.mark.parametrize("total", [8, 40, 400])
def test_the_warm_up_is_as_long_a_share_as_in_the_run(total: int) -> None:
    """A short training in which a rate is chosen comes to its peak."""
    optim = OptimConfig(steps=200, warmup_steps=20)
    factors = [lr_factor(_warming_up(optim, total, steps_of_run=200), at, total) for at in range(total)]
    assert int(np.argmax(factors)) == pytest.approx(total / 10, abs=1)
    assert max(factors) == pytest.approx(1)


def test_the_clock_stops_at_the_budget() -> None:
    clock = Clock(10.0, 1000)
    while len(clock.seconds) < clock.total():
        clock.seconds.append(0.5)
    assert sum(clock.seconds) == pytest.approx(10, abs=0.5)
    clock = Clock(1e9, 7)
    while len(clock.seconds) < clock.total():
        clock.seconds.append(0.5)
    assert len(clock.seconds) == 7


def test_the_backbone_is_as_transformers_makes_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tagllm.baselines.plain import load_plain, twin

    plain = load_plain(BackboneConfig(model=str(folder / "backbone"), dtype="fp32"), torch.device("cpu"))
    ids = torch.arange(12).reshape(1, -1)
    other = AutoModelForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        assert torch.equal(plain.model(ids).logits, other.eval()(ids).logits)
    mine = twin(plain.model)
    shared = {p.data_ptr() for p in plain.model.parameters()}
    assert all(p.data_ptr() in shared and not p.requires_grad for p in mine.parameters())


def row(tokens: int) -> Row:
    return Row(np.arange(1, tokens + 1), np.ones(tokens, np.uint8), np.zeros(1, np.float32))


def test_a_micro_batch_is_cut_into_what_there_is_room_for() -> None:
    """With its padding; a row that alone is too long stands alone."""
    rows = [row(tokens) for tokens in (3, 50, 4, 9, 10, 2, 5)]
    pieces = in_room(rows, 20)
    assert sorted(len(one.ids) for piece in pieces for one in piece) == [2, 3, 4, 5, 9, 10, 50]
    assert all(len(piece) == 1 or pad(piece).ids_BS.numel() <= 20 for piece in pieces) and len(pieces) == 3
    assert len(in_room(rows, 10**6)) == 1


def test_while_the_best_rate_is_at_the_edge_further_ones_are_tried(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def rising(*given: Any, **_: Any) -> tuple[None, Trained, None]:
        return None, Trained(given[3], 1, False, 1, 1, 0, 1.0, 1), None

    monkeypatch.setattr("tagllm.baselines.command._train", rising)
    for rates, tried in (([], [3e-5, 1e-5, 1e-4, 3e-4, 1e-3]), ([1e-3, 3e-3], [1e-3, 3e-3])):
        request = Request(["lora"], rates, 1.0, 0.5, 1, None, None)
        record = Record(task.run, METHODS["lora"], f"edge{len(rates)}", {})
        assert sorted(_tuned(task, METHODS["lora"], record, request, 1.0)) == sorted(tried)
    assert _beside(3e-4) == (1e-4, 1e-3) and _beside(1e-3) == (3e-4, 3e-3)


def test_row_padding_is_right_and_zero() -> None:
    short, long = row(2), row(4)
    batch = pad([short, long])
    assert batch.ids_BS.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]] and batch.last_B.tolist() == [1, 3]
    assert batch.pools_BS.sum(1).tolist() == [2, 4]


def test_a_tag_that_is_absent_is_neither_named_nor_counted(folder: Path, run: Run) -> None:
    absent = {"SMILES": DOMAIN["SMILES"] | {"absent": True}, "W": W["W"] | {"absent": True}}
    template = "The molecule <SMILES> {smiles} weighs <W>"
    assert run("train", config(folder, "absent", tags=absent, data__template=template)).exit_code == 0
    (task,) = open_tasks(folder / "runs/absent")
    assert task.untagged(METHODS["lora_text"]).names == {}
    fails(run("baseline", "runs/absent", "--method", "lora_text"), "no domain tag whose name could stand as text")
    fails(run("baseline", "runs/absent", "--method", "prompt_tuning"), "is absent", "Give one with --virtual")

"""The benchmark measures what it says: same work for all, bytes counted right, and every contestant runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

from benchmarks.contestant import LoopContestant
from benchmarks.measure import Spread, kept_bytes
from benchmarks.models import Models, Settings
from benchmarks.ours import ours
from benchmarks.peers import FullBackward, collate
from benchmarks.report import Figures, Result, verdicts
from benchmarks.vs_peers import main
from benchmarks.workloads import IGNORED, Text, Workload, build_workload
from tests import tiny

ROOT = Path(__file__).parents[1]
LETTERS = ["a", "b", "c", "d", "e", "f", "g", "h", "i1", "i"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("benchmarks")
    return Models(Settings(str(tiny.save_backbone(folder / "tiny")), "fp32", True, 24), folder)


def workload(name: str, models: Models) -> Workload:
    return build_workload(name, models.settings, models.plain, models.scratch)


def learned_gradient(contestant: LoopContestant[Any], of: Workload, models: Models) -> Tensor:
    contestant.setup(of, models)
    for name, parameter in contestant.module.named_parameters():
        if "head" in name and parameter.ndim == 2 and "backbone" not in name:
            nn.init.constant_(parameter, 0.1)
        elif "head" in name and "backbone" not in name:
            nn.init.constant_(parameter, 0.2)
    for loss in contestant.losses(contestant.batches(of.steps[0], 4)):
        loss.backward()
    learned = contestant.model.learned_TD if isinstance(contestant, FullBackward) else contestant.model.tags.learned_TD  # type: ignore[attr-defined]
    assert isinstance(learned.grad, Tensor)
    return learned.grad


@pytest.mark.parametrize("name", ["smiles", "qed", "affinity", "translation"])
def test_the_hand_written_baseline_and_ours_do_the_same_work(name: str, models: Models) -> None:
    """The same gradient of the tags from the same rows: what is compared is speed alone."""
    of = workload(name, models)
    wanted = learned_gradient(FullBackward(), of, models)
    assert wanted.norm() > 0
    for contestant in ours():
        assert tiny.relative_error(learned_gradient(contestant, of, models), wanted) < 1e-4, contestant.label


def test_all_see_the_same_rows(models: Models) -> None:
    """Tags stand inline or are left out; the answer is the number as text, and only it is supervised."""
    of = workload("qed", models)
    tokenizer = models.plain.tokenizer
    for row in of.steps[0]:
        ids = row.example.ids.tolist()
        assert row.inline.ids[: len(ids)] == ids
        assert [i for i in row.inline.ids if i < of.layout.vocabulary_size] == row.plain.ids
        answer = [label for label in row.plain.labels if label != IGNORED]
        assert answer == [label for label in row.inline.labels if label != IGNORED]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]).strip() == f"{row.example.target[0]:.2f}"


def test_whole_groups_make_a_step(models: Models) -> None:
    groups = [row.example.group for row in workload("affinity", models).steps[0]]
    assert len(set(groups)) == 2
    assert groups == sorted(groups, key=groups.index)


@pytest.mark.parametrize("num_virtual", [0, 3])
def test_kept_logits_give_the_loss_of_all_logits(num_virtual: int) -> None:
    """What the collator of the peers asks for is what the model's own shifted loss comes to."""
    model = tiny.backbone()
    rows = [Text([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Text([9, 10], [IGNORED, 10])]
    batch = collate(rows, num_virtual)
    pad = torch.zeros(2, num_virtual, dtype=torch.long)
    ids = torch.cat([pad, batch["input_ids"]], dim=1)
    labels = torch.cat([pad + IGNORED, batch["labels"]], dim=1)
    wanted = model(input_ids=ids, labels=labels).loss
    kept = model(
        input_ids=ids, labels=labels, logits_to_keep=batch["logits_to_keep"], shift_labels=batch["shift_labels"]
    )
    assert kept.logits.shape[0] == 3
    torch.testing.assert_close(kept.loss, wanted)


def test_a_twin_leaves_the_weights_of_others_alone(models: Models) -> None:
    first, second = models.twin(), models.twin()
    first.resize_token_embeddings(200, mean_resizing=False)
    assert second.get_input_embeddings().weight.shape == models.plain.model.get_input_embeddings().weight.shape
    assert second.model.norm.weight.data_ptr() == models.plain.model.model.norm.weight.data_ptr()


class _Holds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: tuple[Tensor, ...]) -> Tensor:
        ctx.held = held
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 2, None


class _Toy(LoopContestant[Tensor]):
    """Keeps the cosine's argument (400 bytes) once, a held tensor (40 bytes), and a weight that does not count."""

    letter, label, device = "x", "toy", torch.device("cpu")

    def setup(self, workload: Workload, models: Models) -> None:
        """The constructor makes all that there is."""

    def __init__(self) -> None:
        self.module = nn.Linear(100, 100, bias=False).requires_grad_(False)
        self.learned = nn.Parameter(torch.zeros(1, 100))

    def batches(self, rows: Any, rows_per_micro_batch: int) -> list[Tensor]:
        return [torch.zeros(1, 100)]

    def losses(self, batches: list[Tensor]) -> Any:
        for batch in batches:
            yield _Holds.apply(self.module(self.learned + batch).cos(), (torch.zeros(10),)).sum()  # type: ignore[no-untyped-call]

    def groups(self) -> list[dict[str, object]]:
        return [{"params": [self.learned]}]

    def num_tokens(self, row: Any) -> int:
        return 1


def test_bytes_kept_for_backward() -> None:
    assert kept_bytes(_Toy(), []) == 400 + 40


def test_a_verdict_compares_within_repeats() -> None:
    def figures(letter: str, seconds: list[float], kept: float) -> Figures:
        return Figures(letter, letter, 8, {}, seconds, 32, 320, kept, None, None, 2.0)

    rows = {"a": ([9.0, 12.0], 10.0), "b": ([8.0, 10.0], 10.0), "c": ([20.0, 20.0], 9.0), "d": ([4.0, 9.0], 8.0)}
    rows |= {"i1": ([2.0, 2.0], 2.0)}
    result = Result("qed", "", {letter: figures(letter, *values) for letter, values in rows.items()}, None)
    (found,) = verdicts([result])
    assert found.best_peer == "b"
    assert found.over_peer == Spread(4.5, 4.0, 5.0)
    assert found.over_naive == Spread(3.25, 2.0, 4.5)
    assert found.met == (True, False, False)
    del result.figures["c"]
    assert not verdicts([result])


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("peft") and find_spec("trl")), reason="needs peft and trl: pip install -e .[benchmarks]"
)
def test_every_contestant_has_figures(tmp_path: Path) -> None:
    """The whole command on a tiny model, peak memory of one contestant of each kind included."""
    file = tmp_path / "figures.json"
    done = run("--quick", "--repeats", "2", "--json", str(file), "--workload", "qed", "--workload", "translation")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "targets" in done.stdout
    found = json.loads(file.read_text())
    assert [w["name"] for w in found["workloads"]] == ["qed", "translation"]
    for one in found["workloads"]:
        assert list(one["figures"]) == LETTERS
        for figures in one["figures"].values():
            assert len(figures["seconds"]) == 2
            assert min(figures["seconds"]) > 0
            assert figures["kept_bytes_per_row"] > 0
            assert figures["tokens_per_second"]["median"] > figures["rows_per_second"]["median"]
        assert one["encoding"]["utilisation"] > 0
    assert len(found["targets"]) == 4


@pytest.mark.slow
def test_peak_memory_is_taken_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--repeats", "1", "--json", str(file), "--workload", "smiles", "--only", "d,h", "--memory")
    assert done.returncode == 0, done.stderr[-3000:]
    for figures in json.loads(file.read_text())["workloads"][0]["figures"].values():
        assert figures["peak_process_bytes"] > figures["peak_steps_bytes"] > 0


@pytest.mark.parametrize("wrong", [{"workload": ["sleep"]}, {"only": "a,z"}, {"dtype": "fp8", "only": "d"}])
def test_a_wrong_name_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter, match=r"sleep|z;|fp8"):
        main(**wrong)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.vs_peers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)

"""The planner's choices and sums on backbones that nobody loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tagllm import plan
from tagllm.config import RunConfig
from tagllm.config_file import parse_as
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.lm_head import chunk_bytes
from tagllm.model.prefix import POSITIONS_AT_ONCE
from tagllm.plan import Hardware, Load, Shape, choose, estimate, placements
from tests import tiny
from tests.tiny import OUTPUT

GPUS = Hardware(16, 8, 80, 300, 25, 300)
LOADS = [Load(live=160, computed=4000, longest=300, key_places=4200, labels=0, scores=160 * 300)]
SEVEN = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
SEVENTY = dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)


def shape(size: dict[str, int], quantize: Any = "none") -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **size), dtype=torch.bfloat16)
    make_frozen_aware(model)
    return Shape.of(model, quantize)


def config(**overrides: object) -> RunConfig:
    values = {
        "output": "run", "backbone": {"model": "m"}, "tags": {"S": {}}, "remember_device_gib": 0, "remember_gib": 0,
        "data": {"sources": [{"path": "x.csv", "template": "<S> {s}"}]}, "optim": {"steps": 1}, **overrides,
    }  # fmt: skip
    return parse_as(RunConfig, values, "test")


def chosen(of: Shape, hardware: Hardware) -> tuple[str | None, str]:
    found, why = choose(
        [estimate(of, LOADS, 40960, config(), hardware, p) for p in placements(config(), hardware)], hardware
    )
    return found and found.placement, why


def test_parameters() -> None:
    assert shape(SEVEN).parameters == 6_738_415_616
    assert shape(SEVENTY).parameters == pytest.approx(69e9, rel=0.01)
    assert shape(SEVEN).weight_bytes == 2 * 6_738_415_616
    assert shape(SEVEN, "nf4").weight_bytes + shape(SEVEN, "nf4").scale_bytes == pytest.approx(3.87e9, rel=0.01)


@pytest.mark.parametrize(
    ("gpus", "per_node", "shard_over", "ways"),
    [
        (8, 8, "world", ["replicate", "shard"]),
        (8, 8, "node", ["replicate", "shard"]),
        (16, 8, "world", ["replicate", "shard in a node", "shard"]),
        (16, 8, "node", ["replicate", "shard in a node"]),
        (16, 1, "world", ["replicate", "shard"]),
        (1, 8, "world", ["replicate", "shard"]),
    ],
)
def test_plan_offers_what_train_may_take(gpus: int, per_node: int, shard_over: str, ways: list[str]) -> None:
    """Parts of a node of one GPU would be the whole, and no weight crosses the network that is not asked to."""
    of = config()
    of = of.model_copy(update={"engine": of.engine.model_copy(update={"shard_over": shard_over})})
    assert placements(of, Hardware(gpus, per_node, 80)) == ways


@pytest.mark.parametrize(
    ("size", "quantize", "memory", "expected"),
    [
        (SEVEN, "none", 80, "replicate"), (SEVEN, "nf4", 8, "replicate"), (SEVEN, "none", 12, "shard in a node"),
        (SEVENTY, "none", 80, "shard in a node"), (SEVENTY, "nf4", 80, "replicate"), (SEVENTY, "none", 18, "shard"),
    ],
)  # fmt: skip
def test_the_placement_that_sends_least_and_fits(size: Any, quantize: str, memory: float, expected: str) -> None:
    placement, why = chosen(shape(size, quantize), GPUS._replace(memory_gib=memory))
    assert placement == expected, why
    assert why.startswith(expected) and f"of {memory} GiB" in why


def test_nothing_fits() -> None:
    placement, why = chosen(shape(SEVENTY), GPUS._replace(memory_gib=4))
    assert placement is None
    assert "nothing fits" in why and "nf4" in why


def test_only_gradients_are_sent_where_all_hold_the_backbone() -> None:
    sent = {
        gpus: estimate(shape(SEVEN), LOADS, 40960, config(), GPUS._replace(gpus=gpus), "replicate").sent
        for gpus in (1, 2, 1024)
    }
    assert sent[1] == 0
    assert sent[2] == 4 * 40960
    assert sent[1024] == pytest.approx(2 * 4 * 40960, rel=0.01)


def test_a_cpu_that_cannot_multiply_bf16_holds_the_lm_head_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    of = shape(SEVEN)
    held = {}
    for multiplies, labels in ((True, 9), (False, 9), (False, 0)):
        monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda multiplies=multiplies: multiplies)
        loads = [LOADS[0]._replace(labels=labels)]
        told = estimate(of, loads, 40960, config(), GPUS, "shard", cuda=False)
        held[multiplies, labels] = told.memory["a map in fp32"]
    assert held == {(True, 9): 4 * 4096 * 11008, (False, 9): 4 * 4096 * 32000, (False, 0): 4 * 4096 * 11008}


def test_a_pass_on_a_cpu_is_over_few_stretches_where_ranks_need_not_go_together() -> None:
    of, long = shape(SEVEN), [LOADS[0]._replace(computed=9000, longest=2500)]

    def work(placement: Any, loads: list[Load], cuda: bool = False) -> int:
        return estimate(of, loads, 40960, config(), GPUS, placement, cuda).memory["work of one layer"]

    of_position = 4 * (4 * 4096 + 3 * 11008)
    assert work("shard", LOADS) - work("replicate", LOADS) == (4000 - POSITIONS_AT_ONCE) * of_position
    assert work("shard", long) - work("replicate", long) == (9000 - 2500) * of_position
    assert work("replicate", LOADS, cuda=True) == work("shard", LOADS)


def test_logits_are_those_of_one_chunk() -> None:
    """Of a chunk as the LM head cuts it: on a GPU a product over 1,000 positions of a large vocabulary."""
    of, many = shape(SEVEN)._replace(vocabulary=2**17), [LOADS[0]._replace(labels=9000)]
    for cuda, positions in ((True, 1024), (False, 64)):
        assert chunk_bytes(cuda) // (4 * of.vocabulary) == positions
        found = estimate(of, many, 40960, config(), GPUS, "replicate", cuda).memory["logits"]
        assert found == 3 * 4 * of.vocabulary * positions


def test_rows_without_a_prefix_keep_what_torchs_kernel_keeps() -> None:
    """Nothing that grows with the square of a row."""
    of, alone = shape(SEVENTY), LOADS[0]._replace(computed=0)
    frozen, live = (estimate(of, [x], 40960, config(), GPUS, "replicate").memory for x in (LOADS[0], alone))
    assert live["kept for backward"] - frozen["kept for backward"] == 160 * 80 * 3 * 8192 * 4


def test_scores_over_shared_keys_are_planned_for() -> None:
    """On a GPU a pass has no more of them than it may; sharded, where all ranks go together, a pass has all rows."""
    of, of_row = shape(SEVENTY), 4 * 64 * 1000 * 3000
    load = LOADS[0]._replace(own_rows=8, own_longest=1000, shared_keys=2000)
    for placement, cuda, expected in (("replicate", True, 1 << 30), ("shard", True, 8 * of_row), ("shard", False, 0)):
        before, found = (estimate(of, [x], 40960, config(), GPUS, placement, cuda).memory for x in (LOADS[0], load))
        live = 4 * 64 * load.scores
        assert found["work of one layer"] - before["work of one layer"] == 3 * max(expected - live, 0)


def test_a_load_counts_positions_once() -> None:
    of = tiny.layout()
    batch = tiny.collator(of)(tiny.rows(of))
    load = Load.of(batch)
    assert load.live == sum(batch.live.lengths)
    assert load.computed == len(batch.own.ids_N) + len(batch.pieces.tokens.ids_N) <= sum(batch.prefix_lengths)
    assert load.labels == sum(int((e.marks == OUTPUT).sum()) for e in tiny.rows(of))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tagllm.cli import app

    tiny.save_backbone(tmp_path / "backbone")
    (tmp_path / "rows.csv").write_text("smiles\n" + "".join(f"C{'C' * n}O\n" for n in range(40)))
    (tmp_path / "run.yaml").write_text(
        f"output: {tmp_path / 'run'}\nbackbone: {{model: {tmp_path / 'backbone'}}}\ntags: {{S: {{length: 2}}}}\n"
        f"data: {{sources: [{{path: {tmp_path / 'rows.csv'}, template: '<S> {{smiles}}'}}]}}\n"
        "optim: {steps: 2, rows_per_step: 8, rows_per_micro_batch: 4}\n"
    )
    with pytest.raises(SystemExit) as end:
        app(["plan", str(tmp_path / "run.yaml"), "--gpus", "2"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "placement replicate" in told and "1,024" in told and "kept for backward" in told
    assert not (tmp_path / "run").exists()

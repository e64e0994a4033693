"""Tags on disk are what was learned, bit for bit, and a library that is not right says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tagllm import files
from tagllm.build import initial_rows, new_tag
from tagllm.config import BackboneConfig, HeadConfig, RunConfig
from tagllm.config_file import parse_as
from tagllm.data.dataset import Data
from tagllm.errors import UserError
from tagllm.files import DamagedFile
from tagllm.head import Head
from tagllm.kernel import BOUNDLESS, Kernel
from tagllm.model.backbone import load_backbone
from tagllm.stage import read_stage
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tagllm.targets import mean_and_spread
from tests import tiny

D = 16
BACKBONE = BackboneIdentity("models/one", "llama", D, 96, "a1b2" * 16)


def tag(name: str, kind: str = "domain", rows: int = 3, head: HeadConfig | None = None, **about: Any) -> Tag:
    random = torch.Generator().manual_seed(sum(name.encode()))
    made = None
    if head is not None:
        blank = Head.new(head, D)
        made = Head(
            head, *(torch.randn(part.shape, generator=random) for part in (blank.weight_KF, blank.bias_K)),
            torch.tensor([1e-30] * head.outputs), torch.tensor([1e30] * head.outputs),
        )  # fmt: skip
    return Tag(name, kind, torch.randn(rows, D, generator=random), made, about)


def library() -> TagLibrary:
    return (
        TagLibrary(BACKBONE)
        .add(tag("SMILES", template="a | <SMILES> {s}", stage=1))
        .add(tag("QED", "function", 5, HeadConfig(reads="both", outputs=2), metrics={"mse": 0.1}))
        .add(tag("Toxic-2", "function", 1, HeadConfig(type="classification", classes=["no", "yes"])))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library().save(tmp_path / "library")
    return tmp_path / "library"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def edit(folder: Path, **changes: Any) -> None:
    """Writes library.json anew; `tags__QED__length` reaches inside."""
    document = json.loads((folder / "library.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "library.json").write_text(json.dumps(document))


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors with the right sha256, as a faulty writer would leave them."""
    files.save_tensors(folder / "tags.safetensors", tensors)
    edit(folder, sha256={"tags.safetensors": files.sha256_file(folder / "tags.safetensors")})


def test_saved_is_loaded(folder: Path) -> None:
    saved, loaded = library(), TagLibrary.load(folder, BACKBONE)
    assert loaded.backbone == BACKBONE
    assert set(loaded.tags) == set(saved.tags)
    for name, before in saved.tags.items():
        after = loaded.get(name, "here")
        assert (after.name, after.kind, after.about) == (before.name, before.kind, before.about)
        assert bits(after.rows_PD) == bits(before.rows_PD)
        assert (after.head is None) == (before.head is None)
        if before.head is not None and after.head is not None:
            assert after.head.spec == before.head.spec
            for part in ("weight_KF", "bias_K", "mean_K", "std_K"):
                assert bits(getattr(after.head, part)) == bits(getattr(before.head, part)), part


def test_adding_a_tag_leaves_the_others_bit_identical(folder: Path) -> None:
    before = files.load_tensors(folder / "tags.safetensors")
    TagLibrary.load(folder).add(tag("Protein")).save(folder)
    after = files.load_tensors(folder / "tags.safetensors")
    assert set(after) == {*before, "Protein.rows"}
    assert all(bits(after[name]) == bits(before[name]) for name in before)
    assert [path.name for path in folder.parent.iterdir()] == ["library"], "nothing temporary is left"


def test_adding_changes_neither_the_library_nor_the_tensors() -> None:
    old = library()
    new = old.add(tag("SMILES", rows=9))
    assert len(old.tags["SMILES"].rows_PD) == 3
    assert len(new.tags["SMILES"].rows_PD) == 9
    assert new.tags["QED"] is old.tags["QED"]


def test_a_tag_of_lower_precision_is_kept_as_fp32(tmp_path: Path) -> None:
    rows = torch.randn(2, D).bfloat16()
    TagLibrary(BACKBONE, {"A": Tag("A", "domain", rows)}).save(tmp_path / "library")
    loaded = TagLibrary.load(tmp_path / "library").tags["A"].rows_PD
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, rows.float())


def test_any_flipped_byte_is_found(folder: Path) -> None:
    file = folder / "tags.safetensors"
    good = file.read_bytes()
    for at in (0, 20, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DamagedFile, match=r"tags\.safetensors: cannot be used: sha256 is \w+, library.json says"):
            TagLibrary.load(folder)
    file.write_bytes(good)
    assert TagLibrary.load(folder).tags


def test_a_missing_tensor_file(folder: Path) -> None:
    (folder / "tags.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"tags\.safetensors: cannot be used: No such file"):
        TagLibrary.load(folder)


def test_wrong_shapes_and_types(folder: Path) -> None:
    edit(folder, tags__QED__length=4)
    with pytest.raises(DamagedFile, match=r"QED.rows is \(5, 16\) float32; it must be \(4, 16\) float32"):
        TagLibrary.load(folder)
    edit(folder, tags__QED__length=5)
    good = files.load_tensors(folder / "tags.safetensors")
    put_tensors(folder, good | {"SMILES.rows": good["SMILES.rows"].bfloat16()})
    with pytest.raises(DamagedFile, match=r"SMILES.rows is \(3, 16\) bfloat16; it must be \(3, 16\) float32"):
        TagLibrary.load(folder)
    put_tensors(folder, {name: tensor for name, tensor in good.items() if name != "QED.head.bias"})
    with pytest.raises(DamagedFile, match=r"QED.head.bias is missing; it must be \(2,\) float32"):
        TagLibrary.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["SMILES.rows", "QED.head.weight"])
def test_numbers_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    tensors = files.load_tensors(folder / "tags.safetensors")
    tensors[name].view(-1)[-1] = value
    put_tensors(folder, tensors)
    with pytest.raises(DamagedFile, match=f"{name} holds numbers that are not finite"):
        TagLibrary.load(folder)


def test_another_backbone_names_both(folder: Path) -> None:
    other = BACKBONE._replace(fingerprint="c3d4" * 16)
    with pytest.raises(UserError) as raised:
        TagLibrary.load(folder, other)
    for said in (str(folder), BACKBONE.fingerprint[:12], other.fingerprint[:12], "d 16", "vocabulary 96"):
        assert said in str(raised.value)
    for changed in ({"hidden_size": 8}, {"vocabulary_size": 97}, {"architecture": "gpt2"}):
        with pytest.raises(UserError, match="fit only the backbone"):
            TagLibrary.load(folder, BACKBONE._replace(**changed))


def test_the_same_backbone_under_another_path_will_do(folder: Path) -> None:
    assert TagLibrary.load(folder, BACKBONE._replace(name="/elsewhere/copy")).tags


def test_an_unknown_tag() -> None:
    with pytest.raises(UserError) as raised:
        library().get("SMILE", "tags.X.load: runs/a/library")
    assert str(raised.value) == (
        'tags.X.load: runs/a/library: it holds no tag "SMILE". Known: QED, SMILES, Toxic-2. Did you mean SMILES?'
    )


def test_not_a_library(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a tag library .no library.json.. A run keeps its own in RUN/library"):
        TagLibrary.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"tags": ["QED"]},
        {"tags__QED": None},
        {"tags__QED__kind": "noun"},
        {"backbone__hidden_size": 0},
        {"tags__QED__pools": 10**12},
        {"tags__QED__pools": []},
        {"tags__QED__about": 5},
        {"backbone": {"name": "x"}},
        {"backbone": None},
        {"sha256": {}},
    ],
    ids=str,
)
def test_a_library_json_that_is_none(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    with pytest.raises(DamagedFile, match=r"library\.json: cannot be used: not a tag library"):
        TagLibrary.load(folder)


@pytest.mark.parametrize(("format", "way_out"), [(4, r"Update tagllm\."), (2, "Train the tags anew, or read them")])
def test_another_format(folder: Path, format: int, way_out: str) -> None:
    edit(folder, format=format)
    with pytest.raises(UserError, match=rf"format is {format}; this version reads format 3\. {way_out}"):
        TagLibrary.load(folder)


def test_a_head_of_a_later_version_is_no_damage(folder: Path) -> None:
    edit(folder, tags__QED__head={"outputs": 2, "wavelets": 3})
    with pytest.raises(
        UserError, match=r"the head of <QED> has wavelets, .* a later one wrote it\. Update tagllm"
    ) as told:
        TagLibrary.load(folder)
    assert not isinstance(told.value, DamagedFile)


@pytest.mark.parametrize("part", ["decoder", "tokenizer"])
def test_what_was_looked_at_on_both_sides_must_be_the_same(folder: Path, part: str) -> None:
    """Weights merged with an adapter keep their embedding; another export of a tokenizer may begin texts otherwise."""
    mine, other = (BACKBONE._replace(**{part: value}) for value in ("a" * 64, "b" * 64))
    TagLibrary(mine, library().tags).save(folder)
    assert TagLibrary.load(folder, BACKBONE).backbone == mine, "of a library where nobody looked nothing is known"
    with pytest.raises(UserError, match=f"whose {part} is not the same; tags fit only"):
        TagLibrary.load(folder, other)


def test_the_card_lists_the_tags(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| `<")]
    assert rows == [
        "| `<SMILES>` | domain | 3 |  | `a \\| <SMILES> {s}` |",
        "| `<QED>` | function | 5 | regression, 2 | `` |",
        "| `<Toxic-2>` | function | 1 | classification, 2 | `` |",
    ]
    assert "`models/one` (llama, d 16)" in card


def leaving_the_tag_out(head: HeadConfig, hidden_size: int) -> Head:
    """As a fit does it where validation rows are answered better by the fields alone."""
    width_SD = torch.ones(2, hidden_size)
    width_SD[0] = BOUNDLESS
    kernel = Kernel(torch.ones(1, hidden_size), torch.zeros(2, 1, dtype=torch.int64), width_SD, torch.ones(1, 1))
    return replace(Head.new(head, hidden_size), kernel=kernel)


def test_the_card_says_which_head_leaves_its_tag_out(folder: Path) -> None:
    alone = replace(tag("Alone", "function"), head=leaving_the_tag_out(HeadConfig(reads="both"), D))
    library().add(alone).save(folder)
    card = (folder / "README.md").read_text()
    assert "| `<Alone>` | function | 3 | regression, 1; answers from the fields alone | `` |" in card
    assert card.count("alone") == 1


def embedding(vocabulary: int = 3000, hidden_size: int = 64) -> torch.Tensor:
    """Token embeddings with a mean well off zero, as real ones have."""
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(hidden_size, generator=random)
    return (0.6 * mean + torch.randn(vocabulary, hidden_size, generator=random) * 0.5).bfloat16()


def test_mean_init_has_the_direction_of_the_mean_and_the_norm_of_a_token() -> None:
    embedding_VD = embedding()
    rows_PD = initial_rows("mean", 50, embedding_VD, [], 0)
    assert (rows_PD.dtype, rows_PD.shape) == (torch.float32, (50, 64))
    mean_D = embedding_VD.float().mean(dim=0)
    assert torch.cosine_similarity(rows_PD, mean_D[None]).min() > 0.9
    token_norm = float(embedding_VD.float().norm(dim=1).mean())
    assert mean_D.norm() < 0.9 * token_norm, "so that the two norms can be told apart"
    assert float(rows_PD.norm(dim=1).mean()) == pytest.approx(token_norm, rel=0.05)
    assert len({bits(row) for row in rows_PD}) == 50, "equal rows would learn alike for ever"


def test_vocabulary_rows_are_token_embeddings() -> None:
    embedding_VD = embedding()
    rows_PD = initial_rows("vocabulary", 7, embedding_VD, [], 0)
    known = {bits(row) for row in embedding_VD.float()}
    assert all(bits(row) in known for row in rows_PD)
    assert len({bits(row) for row in rows_PD}) > 1


def test_text_is_repeated_to_the_length() -> None:
    embedding_VD = embedding()
    assert torch.equal(initial_rows("text:a b", 5, embedding_VD, [7, 9], 0), embedding_VD[[7, 9, 7, 9, 7]].float())
    assert torch.equal(initial_rows("text:a b c", 2, embedding_VD, [7, 9, 1], 0), embedding_VD[[7, 9]].float())


def test_normal_rows_have_the_spread_of_the_embedding() -> None:
    rows_PD = initial_rows("normal", 400, embedding(), [], 0)
    assert float(rows_PD.std()) == pytest.approx(0.5, rel=0.05)
    assert rows_PD.mean().abs() < 0.02


def test_rows_begin_as_what_the_embedding_gives(tmp_path: Path) -> None:
    """Gemma's multiplies its table by the root of the width, and tag rows stand beside the product."""
    folder = tiny.save_backbone(tmp_path, "gemma")
    backbone = load_backbone(BackboneConfig(model=str(folder), dtype="fp32"), torch.device("cpu"))
    assert backbone.token_scale == pytest.approx(tiny.HIDDEN**0.5)
    tags = {"S": {"kind": "domain", "length": 2, "init": "text:CN"}}
    source = {"path": "a.csv", "template": "<S> {smiles}"}
    values = {"output": "o", "backbone": {"model": str(folder)}, "tags": tags, "data": {"sources": [source]}}
    config = parse_as(RunConfig, {**values, "optim": {"steps": 1}}, "")
    rows_PD = new_tag(read_stage(config, "here"), "S", backbone, Data({}, {}, [])).rows_PD
    ids = torch.tensor(backbone.tokenizer("CN", add_special_tokens=False).input_ids)
    torch.testing.assert_close(rows_PD, backbone.model.get_input_embeddings()(ids))
    enriched = read_stage(config, "here")._replace(loaded={"S": Tag("S", "domain", torch.ones(5, tiny.HIDDEN))})
    assert len(new_tag(enriched, "S", backbone, Data({}, {}, [])).rows_PD) == 5, "as long as the tag it stands beside"


def test_far_targets_keep_their_mean_and_spread(tmp_path: Path) -> None:
    """In fp32 a sum of 300,000 of them is off by more than what tells them apart."""
    backbone = load_backbone(BackboneConfig(model=str(tiny.save_backbone(tmp_path)), dtype="fp32"), torch.device("cpu"))
    tags = {"W": {"kind": "function", "length": 2, "head": {"outputs": 2}}}
    source = {"path": "a.csv", "template": "{smiles} <W>", "target": ["y", "z"]}
    values = {"output": "o", "backbone": {"model": "smollm2"}, "tags": tags, "data": {"sources": [source]}}
    config = parse_as(RunConfig, {**values, "optim": {"steps": 1}}, "")
    targets_nK = np.random.default_rng(0).normal(5000, 10, size=(300_000, 2)).astype(np.float32)
    rows: Any = SimpleNamespace(targets=lambda: targets_nK)
    head = new_tag(read_stage(config, "here"), "W", backbone, Data({"train": [rows]}, {}, [])).head
    assert head is not None
    assert head.mean_K.tolist() == pytest.approx([5000, 5000], abs=0.1)
    assert head.std_K.tolist() == pytest.approx([10, 10], rel=0.01)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ([0.1] * 100, "the same in all training rows"),
        ([], "the same in all training rows"),
        ([1e-23, 3e-23], "tags.W.head: the standard deviation of the target in training rows is 1e-23, .*other units"),
        ([-1e19, 1e20], "is 5.5e[+]19, whose square fp32 cannot hold"),
    ],
    ids=["constant", "none", "small", "large"],
)
def test_targets_without_a_spread_to_learn(targets: list[float], told: str) -> None:
    """Rounding gives a constant a spread, and small or large units none."""
    with pytest.raises(UserError, match=told):
        mean_and_spread(np.array(targets, np.float32)[:, None], "tags.W.head")


@pytest.mark.parametrize("init", ["mean", "vocabulary", "normal"])
def test_initial_rows_depend_on_the_seed_alone(init: str) -> None:
    first = initial_rows(init, 4, embedding(), [], 3)
    torch.manual_seed(99)
    assert torch.equal(initial_rows(init, 4, embedding(), [], 3), first)
    assert not torch.equal(initial_rows(init, 4, embedding(), [], 4), first)


def test_equal_rows_with_another_head_are_another_tag(tmp_path: Path) -> None:
    """A tag without rows of its own, or one that no gradient reaches, has nothing but its head."""
    ours = library()
    name = next(name for name, tag in ours.tags.items() if tag.head)
    head = ours.tags[name].head
    assert head is not None
    other = replace(ours.tags[name], head=replace(head, bias_K=head.bias_K + 1))
    for place, found in (("a", ours), ("b", ours), ("c", ours.add(other))):
        found.save(tmp_path / place)
    assert TagLibrary.load_all([tmp_path / "a", tmp_path / "b"]).tags.keys() == ours.tags.keys()
    with pytest.raises(UserError, match=f"<{name}> differs from the one of the same name"):
        TagLibrary.load_all([tmp_path / "a", tmp_path / "c"])


def test_a_library_that_cannot_be_written_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tagllm.tags.write_durably", full)
    with pytest.raises(OSError, match="No space left"):
        library().save(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["library"]
    TagLibrary.load(folder)

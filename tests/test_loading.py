"""A backbone that is read tensor by tensor is the one that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, Qwen3MoeConfig

from tagllm.errors import UserError
from tagllm.model.backbone import identify
from tagllm.model.linear import FrozenLinear
from tagllm.model.lm_head import FrozenHead
from tagllm.model.loading import HUB_FILES, NOT_READ, _sample, load_model
from tagllm.model.quantize import Int8Linear, Nf4Linear
from tests import tiny

CPU = torch.device("cpu")
IDS = torch.arange(1, 41)[None]


def saved(folder: Path, family: str = "llama", shard: str = "1GB") -> str:
    tiny.plain_backbone(family).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def test_the_digest_is_of_the_decoder_however_it_is_kept(tmp_path: Path) -> None:
    name = saved(tmp_path / "one")
    tiny.plain_backbone().bfloat16().save_pretrained(tmp_path / "bf16")
    merged = tiny.plain_backbone()
    merged.model.layers[1].self_attn.q_proj.weight.data += 0.05 * torch.randn(tiny.HIDDEN, tiny.HIDDEN)
    merged.save_pretrained(tmp_path / "merged")
    of = load_model(name, torch.float32, CPU).decoder
    assert of == load_model(name, torch.bfloat16, CPU, "int8").decoder
    assert of == load_model(str(tmp_path / "bf16"), torch.float32, CPU).decoder
    assert of != load_model(str(tmp_path / "merged"), torch.float32, CPU).decoder


@pytest.mark.parametrize("size", [1, 63, 28_311_552, 2**31 + 7])
def test_a_map_of_any_size_has_a_sample(size: int) -> None:
    """Beyond 2**24 not every index is a number of 32 bits."""
    stored = torch.zeros(1, dtype=torch.bfloat16).expand(size)
    assert len(_sample(stored)) == 2 * min(64, size)


def test_a_tokenizer_is_what_it_makes_of_text(tmp_path: Path) -> None:
    folder = tiny.save_backbone(tmp_path)
    embedding, tokenizer = torch.zeros(96, 8), AutoTokenizer.from_pretrained(folder)
    before = identify("x", "llama", embedding, tokenizer).tokenizer
    assert before == identify("y", "llama", embedding, AutoTokenizer.from_pretrained(folder)).tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", 5)])
    assert before != identify("x", "llama", embedding, tokenizer).tokenizer


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_it_is_the_model_of_transformers(family: str, shard: str, tmp_path: Path) -> None:
    name = saved(tmp_path, family, shard)
    assert (shard == "10KB") == (tmp_path / "model.safetensors.index.json").exists()
    found, embedding, _ = load_model(name, torch.float32, CPU)
    expected = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    assert not [n for n, tensor in [*found.named_parameters(), *found.named_buffers()] if tensor.is_meta]
    theirs = expected.state_dict()
    assert all(tensor.equal(theirs[n]) for n, tensor in found.state_dict().items())
    assert found.state_dict().keys() == theirs.keys()
    for (n, ours), (m, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert n == m and ours.equal(other)
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (
        expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    )
    torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert embedding().equal(expected.get_input_embeddings().weight)
    assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id
    assert not any(p.requires_grad for p in found.parameters())


def test_weights_come_once_from_the_hub() -> None:
    """Repositories of Mistral and Llama have them in two layouts."""
    read = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    others = ["consolidated.safetensors", "consolidated-00001.safetensors", "original/params.json", "README.md"]
    assert [*filter_repo_objects(read + others, allow_patterns=HUB_FILES, ignore_patterns=NOT_READ)] == read


def test_what_routers_keep_beside_parameters_is_loaded(tmp_path: Path) -> None:
    """Other experts answer without it, and nothing says so."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    config = Glm4MoeConfig(
        vocab_size=96, intermediate_size=64, head_dim=8, topk_group=1, first_k_dense_replace=1, **shape, **experts
    )
    model = AutoModelForCausalLM.from_config(config)
    (name,) = (name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias"))
    model.get_buffer(name).copy_(torch.tensor([9.0, 0.0, 0.0, 5.0]))
    model.save_pretrained(tmp_path)
    found, *_ = load_model(str(tmp_path), torch.float32, CPU)
    assert found.get_buffer(name).tolist() == [9.0, 0.0, 0.0, 5.0]


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    model = tiny.plain_backbone()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found, *_ = load_model(str(tmp_path), torch.float32, CPU)
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantize", "kind"), [("int8", Int8Linear), ("nf4", Nf4Linear)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_maps_of_the_decoder_are_quantised(family: str, quantize: str, kind: type, tmp_path: Path) -> None:
    name = saved(tmp_path, family)
    found, *_ = load_model(name, torch.bfloat16, CPU, quantize)  # type: ignore[arg-type]
    plain, *_ = load_model(name, torch.bfloat16, CPU)
    maps = {n for n, layer in plain.base_model.named_modules() if isinstance(layer, FrozenLinear)}
    assert {n for n, layer in found.base_model.named_modules() if type(layer) is kind} == maps
    assert type(found.get_output_embeddings()) is FrozenHead
    for n, layer in found.base_model.named_modules():
        if n in maps:
            expected = plain.base_model.get_submodule(n).matrix().float()
            assert (layer.matrix().float() - expected).norm() < 0.12 * expected.norm()
    others = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0].partition(".")[2] not in maps}
    assert others and all(found.get_parameter(n).equal(p) for n, p in others.items())


def test_modules_are_placed_one_by_one(tmp_path: Path) -> None:
    """Each has its own weights by then and its children are placed: sharding takes what is below a module too."""
    placed: list[nn.Module] = []

    def place(module: nn.Module) -> None:
        assert not any(p.is_meta for p in module.parameters())
        assert all(child in placed for child in module.children())
        placed.append(module)

    found, embedding, _ = load_model(saved(tmp_path), torch.float32, CPU, "int8", place)
    assert set(found.modules()) == set(placed)
    assert embedding().equal(found.get_input_embeddings().weight)


def fp8(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.float8_e4m3fn)


def int8(weight: torch.Tensor) -> torch.Tensor:
    return (weight / weight.abs().amax() * 127).round().to(torch.int8)


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq"])
def test_a_quantised_checkpoint_is_refused(method: str, tmp_path: Path) -> None:
    name = saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"{name} is already quantised \({method}\).* set backbone\.quantize\."):
        load_model(name, torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "told"),
    [(fp8, r"\(32, 32\) float8_e4m3fn"), (int8, r"\(32, 32\) int8"), (lambda w: w[:, :1], r"\(32, 1\) float32")],
)
def test_a_tensor_that_is_not_what_the_config_says_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], told: str, tmp_path: Path
) -> None:
    name, key = saved(tmp_path), "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, key: change(tensors[key]).contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"its tensor {key} is {told}; by its config it must be \(32, 32\), in floats"):
        load_model(name, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_usual_width_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    name = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    found, *_ = load_model(name, torch.float32, CPU)
    assert all(found.get_parameter(n).equal(t.to(dtype).float()) for n, t in tensors.items())


def test_experts_in_one_tensor_are_not_called_quantised(tmp_path: Path) -> None:
    made = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"^backbone\.quantize is nf4, but only 11% of the decoder .*\(qwen3_moe\).* 90%"
    ):
        load_model(str(tmp_path), torch.float32, CPU, "nf4")
    load_model(str(tmp_path), torch.float32, CPU)


def test_it_is_told_where_sharding_needs_the_whole_model_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.plain_backbone()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for place, told in ((None, False), (lambda _: None, True)):
        load_model(str(tmp_path), torch.float32, CPU, place=place)
        assert ("every rank holds all of it on the host, 0.0 GiB" in capsys.readouterr().out) == told
    load_model(saved(tmp_path / "safe"), torch.float32, CPU, place=lambda _: None)
    assert "warning" not in capsys.readouterr().out

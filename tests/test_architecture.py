"""Architectures: their own logits where they scale them, and one line where a prefix cannot be frozen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tagllm.errors import UserError
from tagllm.model.architecture import require_supported
from tagllm.model.backbone import longest_prompt
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.loss import LossWeights
from tagllm.model.tagged import TaggedModel
from tagllm.template import OUTPUT
from tests import tiny

SHAPE: dict[str, Any] = dict(
    vocab_size=tiny.VOCABULARY, hidden_size=tiny.HIDDEN, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def made(name: str, **settings: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**{**SHAPE, **settings})
    return config


SCALED = [
    made("Granite", logits_scaling=8.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.1),
    made("Cohere", logit_scale=0.0625),
    made("Cohere2", logit_scale=0.0625, head_dim=8, sliding_window=12),
    made("HyperCLOVAX", logits_scaling=0.25),
]


@pytest.mark.parametrize("config", SCALED, ids=lambda config: config.model_type)
def test_logits_are_scaled_as_the_model_scales_its_own(config: PreTrainedConfig) -> None:
    agrees_with_plain(config)


def agrees_with_plain(config: PreTrainedConfig) -> None:
    """In the loss of one row and its gradient."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
    theirs = copy.deepcopy(backbone)
    make_frozen_aware(backbone)
    of = tiny.layout(("Text",))
    row = tiny.example(of, (5, "Frozen", "~20", 2, "Text", ">5"), np.random.default_rng(0))
    tagged = TaggedModel(backbone, tiny.tags(of), of, None)
    loss, _ = tiny.loss_of(tagged, tiny.collator(of)([row]), LossWeights(0.0, 1.0, 0.0))
    loss.backward()
    found = tiny.gradients(tagged)["tags.learned_TD"]
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    labels = ids.where(torch.from_numpy(row.marks == OUTPUT)[None], -100)
    expected = theirs(inputs_embeds=tagged.tags(theirs.get_input_embeddings(), ids), labels=labels).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert tiny.relative_error(found, tiny.gradients(tagged)["tags.learned_TD"]) < 1e-3


FALCON = transformers.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
EXPERTS = [
    made("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    made("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    made("Nemotron"),  # whose norms are a kind of their own
]


@pytest.mark.parametrize("config", EXPERTS, ids=lambda config: config.model_type)
def test_experts_and_norms_take_a_stream_of_another_dtype_than_their_weights(config: PreTrainedConfig) -> None:
    """As the backbone of a run has it in bf16: its residual stream is fp32."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).bfloat16()
    of, losses, gradients = tiny.layout(("Text",)), [], []
    row = tiny.example(of, (5, "Frozen", "~20", 2, "Text", ">5"), np.random.default_rng(0))
    for dtype in (torch.bfloat16, torch.float32):
        backbone = copy.deepcopy(plain).to(dtype)
        make_frozen_aware(backbone)
        tagged = TaggedModel(backbone, tiny.tags(of), of, None)
        loss, _ = tiny.loss_of(tagged, tiny.collator(of)([row]), LossWeights(0.0, 1.0, 0.0))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(tiny.gradients(tagged)["tags.learned_TD"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert tiny.relative_error(*gradients) < 0.05


REFUSED = [
    ("attention sinks", made("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    ("conv", made("Lfm2", layer_types=["conv", "full_attention"])),
    ("linear_attention", transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)),
    ("recurrent", transformers.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
    ("latent", made("DeepseekV3", q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                    moe_intermediate_size=16)),
    ("its decoder from its LM head", made("Llama4Text", head_dim=8, num_local_experts=2, intermediate_size_mlp=64)),
    ("maps between its decoder and its LM head", made("ModernBertDecoder", cls_token_id=1, sep_token_id=2)),
    ("embeddings of the tokens in every layer", made("Gemma3nText", head_dim=8, hidden_size_per_layer_input=4,
                                                     vocab_size_per_layer_input=tiny.VOCABULARY, laurel_rank=4,
                                                     num_kv_shared_layers=0, layer_types=["full_attention"] * 2)),
    ("maps between its decoder", transformers.RobertaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1,
                                                            num_attention_heads=4, intermediate_size=32)),
    ("takes no positions", transformers.BartConfig(vocab_size=96, d_model=32, decoder_layers=1, encoder_layers=1,
                                                        decoder_attention_heads=4, decoder_ffn_dim=32)),
    ("window of 12 positions", made("Qwen2Moe", use_sliding_window=True, sliding_window=12, max_window_layers=1,
                                    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                    shared_expert_intermediate_size=16)),
]  # fmt: skip


@pytest.mark.parametrize(("word", "config"), REFUSED, ids=lambda value: getattr(value, "model_type", None))
def test_what_is_more_than_keys_and_values_is_refused(word: str, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    of = tiny.layout()
    with pytest.raises(UserError, match=rf"backbone\.model: the architecture {config.model_type} .*{word}.* Take one"):
        TaggedModel(backbone, tiny.tags(of), of)


def test_what_a_model_adds_to_its_scores_is_refused() -> None:
    """Doge hands a learned bias on as the mask."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(made("Doge")).float().eval().requires_grad_(False)
    make_frozen_aware(backbone)
    of = tiny.layout()
    tagged = TaggedModel(backbone, tiny.tags(of), of, None)
    rows = tiny.collator(of)(tiny.rows(of)[:2])
    with pytest.raises(UserError, match="DogeAttention adds something of its own to the scores"):
        tagged(rows)


def test_under_longrope_no_pass_crosses_the_switch() -> None:
    """A longer one turns all its keys by other frequencies than a shorter one does."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = made("Phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert longest_prompt(phi) == 64 and longest_prompt(made("Llama")) == 256


def test_attention_that_cannot_be_chosen_is_refused() -> None:
    backbone = AutoModelForCausalLM.from_config(FALCON)
    of = tiny.layout()
    with pytest.raises(UserError, match="falcon does not let its attention be chosen, so prefixes cannot be frozen"):
        TaggedModel(backbone, tiny.tags(of), of)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_others_are_not_refused(family: str) -> None:
    require_supported(tiny.plain_backbone(family))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (made("Gemma3Text", head_dim=8, use_bidirectional_attention=True), "looks at what stands behind, too"),
        (made("DiffLlama"), "changes keys or values behind the cache"),
        (made("JetMoe", num_local_experts=4, num_experts_per_tok=2), "changes keys or values behind the cache"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_what_attention_would_do_otherwise_is_refused(config: PreTrainedConfig, told: str) -> None:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    make_frozen_aware(backbone)
    of = tiny.layout()
    tagged = TaggedModel(backbone, tiny.tags(of), of, None)
    with pytest.raises(UserError, match=f"backbone.model: .*{told}"):
        tagged(tiny.collator(of)(tiny.rows(of)[:2]))


def test_embeddings_may_be_narrower_than_states() -> None:
    """OPT-350m's are half as wide, and maps lead from one to the other."""
    config = transformers.OPTConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, word_embed_proj_dim=tiny.HIDDEN, num_hidden_layers=2, ffn_dim=64,
        num_attention_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    agrees_with_plain(config)


def test_one_row_alone_is_laid_out_as_any() -> None:
    """AFMoE looks at what attention gives as one row of memory."""
    agrees_with_plain(
        made("Afmoe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)
    )

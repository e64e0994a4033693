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
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.loss import Weights
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
    loss, _ = tiny.loss_of(tagged, tiny.collator(of)([row]), Weights(0.0, 1.0, 0.0))
    loss.backward()
    found = tiny.gradients(tagged)["tags.learned_TD"]
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    labels = ids.where(torch.from_numpy(row.marks == OUTPUT)[None], -100)
    expected = theirs(inputs_embeds=tagged.tags(theirs.get_input_embeddings(), ids), labels=labels).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert tiny.relative_error(found, tiny.gradients(tagged)["tags.learned_TD"]) < 1e-3


REFUSED = [
    ("attention sinks", made("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    ("conv", made("Lfm2", layer_types=["conv", "full_attention"])),
    ("linear_attention", transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)),
    ("recurrent", transformers.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
    ("latent", made("DeepseekV3", q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                    moe_intermediate_size=16)),
    ("LM head", made("Llama4Text", head_dim=8, num_local_experts=2, intermediate_size_mlp=64)),
]  # fmt: skip


@pytest.mark.parametrize(("word", "config"), REFUSED, ids=lambda value: getattr(value, "model_type", None))
def test_what_is_more_than_keys_and_values_is_refused(word: str, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    of = tiny.layout()
    with pytest.raises(UserError, match=rf"backbone\.model: the architecture {config.model_type} .*{word}.* Take one"):
        TaggedModel(backbone, tiny.tags(of), of)


def test_attention_that_cannot_be_chosen_is_refused() -> None:
    backbone = AutoModelForCausalLM.from_config(transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1))
    of = tiny.layout()
    with pytest.raises(UserError, match="bloom does not let its attention be chosen, so prefixes cannot be frozen"):
        TaggedModel(backbone, tiny.tags(of), of)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_others_are_not_refused(family: str) -> None:
    require_supported(tiny.plain_backbone(family))

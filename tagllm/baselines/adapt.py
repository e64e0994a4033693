"""A frozen backbone with a PEFT adapter and a linear head, read where the run's own head reads.

B rows, S positions, D hidden size, K head outputs.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tagllm.baselines.methods import Method
from tagllm.baselines.plain import twin
from tagllm.baselines.prompts import Padded
from tagllm.errors import UserError
from tagllm.head import Head, fields_read
from tagllm.model.tagged import states_of
from tagllm.model.value_head import HeadModule

RANK, ALPHA = 8, 16


class Read(NamedTuple):
    """What a head may read, fp32: the state at the last position, and the means over the fields side by side."""

    last_BD: Tensor
    mean_BD: Tensor


class Adapted(nn.Module):
    """Only the adapter (fp32, as PEFT makes it) and the head learn. The backbone's weights are shared, not copied.

    Prompt tuning starts from tokens sampled from the vocabulary: PEFT's default, normal noise, lies far from them. LoRA
    is on the maps that PEFT chooses for the architecture (queries and values of a llama), of rank 8 with alpha 16.
    """

    def __init__(self, backbone: Any, method: Method, head: Head, virtual: int, seed: int) -> None:
        super().__init__()
        import peft

        config: peft.PeftConfig
        if method.virtual:
            config = peft.PromptTuningConfig(
                task_type="FEATURE_EXTRACTION", num_virtual_tokens=virtual, prompt_tuning_init="SAMPLE_VOCAB"
            )
        else:
            config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA)
        self.num_virtual = virtual if method.virtual else 0
        device = backbone.get_input_embeddings().weight.device
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' among themselves
            torch.manual_seed(seed)
            try:
                self.adapted = peft.get_peft_model(twin(backbone).base_model, config)
            except ValueError as error:
                raise UserError(
                    f"--method {method.key}: PEFT cannot adapt a {backbone.config.model_type}: {error}. Leave it out."
                ) from None
        self.head = HeadModule(head)
        self.to(device)

    def forward(self, batch: Padded, shared: int = 0) -> Read:
        """With so many tokens all rows begin alike; these are computed once."""
        layers = self.head.spec.layers
        if shared:
            begin = self.adapted(input_ids=batch.ids_BS[:1, :shared], use_cache=True, output_hidden_states=layers)
            begin.past_key_values.batch_repeat_interleave(len(batch.ids_BS))
            out = self.adapted.get_base_model()(
                input_ids=batch.ids_BS[:, shared:], past_key_values=begin.past_key_values, output_hidden_states=layers
            )
            parts = [(states_of(begin, layers), self.num_virtual, 0, shared), (states_of(out, layers), 0, shared, None)]
        else:
            out = self.adapted(input_ids=batch.ids_BS, use_cache=False, output_hidden_states=layers)
            parts = [(states_of(out, layers), self.num_virtual, 0, None)]
        rows_B = torch.arange(len(batch.last_B), device=batch.last_B.device)
        last_BD = out.last_hidden_state[rows_B, parts[-1][1] + batch.last_B - shared].float()
        if self.head.spec.reads == "last":
            return Read(last_BD, last_BD[:, :0])
        pool_G = torch.arange(1, len(self.head.pools) + 1, device=last_BD.device)
        into_BGS = (batch.pools_BS[:, None] == pool_G[:, None]).float()
        sums = []
        for at in range(len(parts[0][0])):
            of_parts = [
                into_BGS[:, :, start:end] @ states[at][:, behind:].float() for states, behind, start, end in parts
            ]
            sums.append(torch.stack(of_parts).sum(dim=0))
        return Read(last_BD, fields_read(torch.cat(sums, dim=1), into_BGS.sum(dim=2), self.head.spec.lengths))

    def groups(self, adapter_lr: float, head_lr: float) -> list[dict[str, Any]]:
        """Parameter groups for AdamW; `base_lr` is before the schedule."""
        adapter = [p for p in self.adapted.parameters() if p.requires_grad]
        return [
            {"params": adapter, "lr": adapter_lr, "base_lr": adapter_lr},
            {"params": list(self.head.parameters()), "lr": head_lr, "base_lr": head_lr},
        ]

    def learned(self) -> dict[str, Tensor]:
        """Copies of everything that learns, on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def overwrite(self, learned: dict[str, Tensor]) -> None:
        parameters = dict(self.named_parameters())
        for name, value in learned.items():
            parameters[name].copy_(value)


def require_peft() -> None:
    """Raises UserError where it is not installed."""
    if find_spec("peft") is None:
        raise UserError(
            "baseline: the package peft is not installed; prompt tuning and LoRA are PEFT's own. "
            "Install it with: pip install tagllm[baselines]"
        )

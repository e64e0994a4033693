"""What else a user could pick: PEFT with the Trainer, TRL, and a hand-written full backward. None is weakened.

Rows of a step are ordered by length, so that micro-batches are alike in it. Where the library leaves it to the user,
rows are padded on the right and have no mask: causal attention never looks at what stands behind, and SDPA without a
mask is faster. Logits are made at supervised positions only, but for TRL, which has its own LM head.

B rows, S positions, M labelled positions, D hidden size.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.contestant import CLIP, HEAD_LR, TAG_LR, Contestant, LoopContestant, synchronise
from benchmarks.models import Models
from benchmarks.workloads import IGNORED, Row, Step, Text, Workload


class TrainerContestant(Contestant):
    """A PEFT model under transformers' own `Trainer.train()`; step times come from its callbacks.

    Between `on_step_begin` and `on_step_end` lie forward, backward, clipping and the optimizer. Collation comes before
    and is not counted (it is for ours).
    """

    num_virtual = 0

    @abstractmethod
    def adapt(self, model: Any, workload: Workload) -> nn.Module:
        """The plain backbone with what this method learns."""

    def text(self, row: Row) -> Text:
        return row.plain

    def num_tokens(self, row: Row) -> int:
        return self.num_virtual + len(self.text(row).ids)

    def setup(self, workload: Workload, models: Models) -> None:
        self.tokenizer, self.settings = models.plain.tokenizer, models.settings
        self.arguments: dict[str, Any] = dict(
            output_dir=str(models.scratch / "trainer"), train_sampling_strategy="sequential", learning_rate=TAG_LR,
            lr_scheduler_type="constant", max_grad_norm=CLIP, num_train_epochs=1, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, bf16=False,
            use_cpu=models.settings.device.type == "cpu", dataloader_pin_memory=False, weight_decay=0.0,
        )  # fmt: skip
        self.module = self.adapt(models.twin(), workload)

    def run(self, steps: Sequence[Step], rows_per_micro_batch: int) -> list[float]:
        from transformers import PrinterCallback

        texts = [text for step in steps for text in sorted(map(self.text, step), key=lambda text: len(text.ids))]
        sizes = dict(
            per_device_train_batch_size=rows_per_micro_batch,
            gradient_accumulation_steps=max(len(steps[0]) // rows_per_micro_batch, 1),
        )
        watch = _stopwatch(self.settings.device)
        trainer = self.trainer(texts, {**self.arguments, **sizes}, watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert len(watch.seconds) == len(steps)
        return list(watch.seconds)

    def trainer(self, texts: Sequence[Text], arguments: dict[str, Any], watch: Any) -> Any:
        from transformers import Trainer, TrainingArguments

        return Trainer(
            model=self.module, args=TrainingArguments(**arguments, remove_unused_columns=False), callbacks=[watch],
            train_dataset=list(texts), data_collator=lambda rows: collate(rows, self.num_virtual),
        )  # fmt: skip


class PromptTuning(TrainerContestant):
    """(a) As many virtual tokens in front as we learn rows; the answer is text."""

    letter, label = "a", "PEFT PromptTuning, Trainer"

    def adapt(self, model: Any, workload: Workload) -> nn.Module:
        from peft import PromptTuningConfig, get_peft_model

        self.num_virtual = workload.num_learned_rows
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.num_virtual))


class TrlPromptTuning(PromptTuning):
    """(b) The same under TRL, with completion-only loss and TRL's own collator and chunked LM head."""

    letter, label = "b", "PEFT PromptTuning, TRL SFTTrainer"

    def trainer(self, texts: Sequence[Text], arguments: dict[str, Any], watch: Any) -> Any:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        columns = {
            "input_ids": [text.ids for text in texts],
            "completion_mask": [[int(label != IGNORED) for label in text.labels] for text in texts],
        }
        model: Any = self.module
        return SFTTrainer(
            model=model, args=SFTConfig(**arguments, max_length=None, completion_only_loss=True),
            train_dataset=Dataset.from_dict(columns), processing_class=self.tokenizer, callbacks=[watch],
        )  # fmt: skip


class TrainableTokens(TrainerContestant):
    """(c) The tags as new tokens in the same places; only the learned ones are trained.

    Input and output embedding are untied: PEFT then leaves the LM head alone, which spares it a second copy and a dense
    gradient of the whole table (tags are never predicted).
    """

    letter, label = "c", "PEFT TrainableTokens, Trainer"

    def text(self, row: Row) -> Text:
        return row.inline

    def adapt(self, model: Any, workload: Workload) -> nn.Module:
        from peft import TrainableTokensConfig, get_peft_model

        layout = workload.layout
        model.config.tie_word_embeddings = False
        model.resize_token_embeddings(layout.vocabulary_size + sum(layout.lengths.values()), mean_resizing=False)
        embedding = model.get_input_embeddings().weight
        for name in layout.lengths:
            ids = layout.ids(name)
            embedding.data[ids.start : ids.stop] = workload.tags[name].rows_PD.to(embedding)
        learned = [i for name in layout.learned for i in layout.ids(name)]
        config = TrainableTokensConfig(token_indices=learned, target_modules=["embed_tokens"])
        return get_peft_model(model, config)


class Lora(TrainerContestant):
    """(e) PEFT's defaults: rank 8 on the query and value projections. No tags at all."""

    letter, label = "e", "PEFT LoRA r=8, Trainer"

    def adapt(self, model: Any, workload: Workload) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))


class Padded(NamedTuple):
    """Rows padded on the right; flat positions in B x S and what is to be predicted there."""

    ids_BS: Tensor
    at_M: Tensor
    label_M: Tensor
    read_at_B: Tensor
    target_B: Tensor


class InlineTags(nn.Module):
    """Tag rows behind the vocabulary (frozen ones first), a head of one number, and the backbone they belong to."""

    frozen_TD: Tensor

    def __init__(self, backbone: Any, frozen: list[Tensor], learned: list[Tensor], vocabulary_size: int) -> None:
        super().__init__()
        self.backbone, self.vocabulary_size = backbone, vocabulary_size
        self.register_buffer("frozen_TD", torch.cat([*frozen, learned[0][:0]]))
        self.learned_TD = nn.Parameter(torch.cat(learned))
        self.head = nn.Linear(self.learned_TD.shape[1], 1)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """The last hidden states, positions of all rows behind each other (B x S, D)."""
        is_tag_BS = ids_BS >= self.vocabulary_size
        tokens_BSD = self.backbone.model.embed_tokens(ids_BS.masked_fill(is_tag_BS, 0))
        rows_TD = torch.cat([self.frozen_TD, self.learned_TD]).to(tokens_BSD.dtype)
        tags_BSD = functional.embedding((ids_BS - self.vocabulary_size).clamp(min=0), rows_TD)
        embedded_BSD = torch.where(is_tag_BS[..., None], tags_BSD, tokens_BSD)
        hidden_BSD: Tensor = self.backbone.model(inputs_embeds=embedded_BSD, use_cache=False).last_hidden_state
        return hidden_BSD.flatten(0, 1)


class FullBackward(LoopContestant[Padded]):
    """(d) What a good engineer writes in an hour: tags looked up inline, plain forward and backward of everything, a
    linear head on the last tag row (or cross entropy at supervised positions, gathered before the LM head)."""

    letter, label = "d", "hand-written full backward"

    def setup(self, workload: Workload, models: Models) -> None:
        layout, tags, self.device = workload.layout, workload.tags, models.settings.device
        self.terms = workload.stage.terms
        frozen, learned = (
            [tags[name].rows_PD for name in layout.lengths if (name in layout.learned) == wanted]
            for wanted in (False, True)
        )
        self.module = self.model = InlineTags(models.twin(), frozen, learned, layout.vocabulary_size).to(self.device)
        heads = [head for name in layout.heads if (head := tags[name].head) is not None]
        self.regresses = bool(heads)
        self.mean, self.std = (float(heads[0].mean_K), float(heads[0].std_K)) if heads else (0.0, 1.0)

    def groups(self) -> list[dict[str, object]]:
        head = list(self.model.head.parameters()) if self.regresses else []
        return [{"params": [self.model.learned_TD], "lr": TAG_LR}, {"params": head, "lr": HEAD_LR}]

    def num_tokens(self, row: Row) -> int:
        return len(row.example.ids)

    def batches(self, rows: Step, rows_per_micro_batch: int) -> list[Padded]:
        rows = sorted(rows, key=lambda row: len(row.example.ids))
        chunks = [rows[at : at + rows_per_micro_batch] for at in range(0, len(rows), rows_per_micro_batch)]
        return [Padded(*(tensor.to(self.device) for tensor in self._padded(chunk))) for chunk in chunks]

    def _padded(self, rows: Step) -> Padded:
        examples = [row.example for row in rows]
        longest = max(len(example.ids) for example in examples)
        ids_BS = torch.zeros(len(examples), longest, dtype=torch.long)
        mark_BS = torch.full((len(examples), longest), -1)
        for b, example in enumerate(examples):
            ids_BS[b, : len(example.ids)] = torch.from_numpy(example.ids)
            mark_BS[b, : len(example.ids)] = torch.from_numpy(example.marks)
        supervised_BS = torch.isin(mark_BS[:, 1:], torch.tensor(self.terms, dtype=torch.long))
        b_M, s_M = supervised_BS.nonzero(as_tuple=True)
        read_at_B = torch.tensor([b * longest + example.read_at for b, example in enumerate(examples)])
        target_B = torch.tensor([float(example.target[0]) if self.regresses else 0.0 for example in examples])
        return Padded(ids_BS, b_M * longest + s_M, ids_BS[b_M, s_M + 1], read_at_B, (target_B - self.mean) / self.std)

    def losses(self, batches: list[Padded]) -> Iterator[Tensor]:
        num_terms = sum(len(batch.target_B) if self.regresses else len(batch.label_M) for batch in batches)
        for batch in batches:
            hidden_ND = self.model(batch.ids_BS)
            if self.regresses:
                value_B = self.model.head(hidden_ND[batch.read_at_B].float())[:, 0]
                yield ((value_B - batch.target_B) ** 2).sum() / num_terms
            else:
                logits_MV = self.model.backbone.lm_head(hidden_ND[batch.at_M])
                yield functional.cross_entropy(logits_MV.float(), batch.label_M, reduction="sum") / num_terms


def collate(rows: Sequence[Text], num_virtual: int) -> dict[str, Tensor]:
    """Right-padded, without a mask; `logits_to_keep`: positions whose next token is a label, `shift_labels`: these
    labels. `num_virtual` positions come in front of the ids, inside the model."""
    longest = max(len(row.ids) for row in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BS = torch.full((len(rows), longest), IGNORED)
    for b, row in enumerate(rows):
        ids_BS[b, : len(row.ids)] = torch.tensor(row.ids)
        labels_BS[b, : len(row.labels)] = torch.tensor(row.labels)
    next_BS = functional.pad(labels_BS, (num_virtual, 1), value=IGNORED)[:, 1:]
    kept_BS = next_BS != IGNORED
    return {
        "input_ids": ids_BS, "labels": labels_BS, "logits_to_keep": kept_BS, "shift_labels": next_BS[kept_BS],
    }  # fmt: skip


def _stopwatch(device: torch.device) -> Any:
    """A callback of the Trainer; made here, since transformers is imported only when something runs."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronise(device)
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronise(device)
            self.seconds.append(time.perf_counter() - self.start)

    return Stopwatch()


def peers() -> list[Contestant]:
    return [PromptTuning(), TrlPromptTuning(), TrainableTokens(), FullBackward(), Lora()]

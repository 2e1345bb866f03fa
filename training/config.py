"""Settings of training and regeneration: the fields of these dataclasses are the keys of a YAML file and the flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from specdec.training.settings import ConfigError, Opt, Section

Loss = Literal["ce", "forward_kl", "reverse_kl", "jsd", "tv", "hybrid"]
_LOSS = "ce learns from the text, the others from the target's law behind it"


@dataclass(frozen=True, slots=True)
class DataConfig(Section):
    """What to train on, and how rows become token ids."""

    files: Annotated[tuple[str, ...], Opt("files (.json, .jsonl, .gz, .xz, .parquet), folders, or hub names")] = ()
    split: Annotated[str, Opt("split of a dataset with several")] = "train"
    text_field: Annotated[str, Opt("field of plain text")] = "text"
    messages_field: Annotated[str, Opt("field of a conversation")] = "messages"
    max_length: Annotated[int, Opt("tokens of a row, and of the longest document", 2)] = 1024
    too_long: Annotated[Literal["truncate", "drop", "error"], Opt("what becomes of a longer document")] = "truncate"
    loss_on: Annotated[Literal["answers", "all"], Opt("tokens that are trained on: the assistant's, or all")] = "answers"
    tokenizer: Annotated[str | None, Opt("tokenizer's folder; by default the target's")] = None
    chat_template: Annotated[str | None, Opt("file with a Jinja chat template; by default the tokenizer's")] = None
    held_out: Annotated[float, Opt("share of rows kept for evaluation, chosen by their content", 0, 0.5)] = 0.02
    held_out_files: Annotated[tuple[str, ...], Opt("rows for evaluation, in place of a share")] = ()
    pack: Annotated[bool, Opt("put several documents into one row")] = True
    seed: Annotated[int, Opt("of the order of rows", 0)] = 0
    limit: Annotated[int | None, Opt("use at most this many rows, drawn from all", 1)] = None


@dataclass(frozen=True, slots=True)
class OptimConfig(Section):
    """How weights are changed. A step sees batch_rows · accumulate · processes rows of data.max_length tokens."""

    learning_rate: Annotated[float, Opt("at its peak", 0)] = 1e-4
    head_learning_rate_factor: Annotated[float, Opt("learning rate of new heads over that of the rest", 0)] = 4.0
    weight_decay: Annotated[float, Opt("decoupled, of matrices only", 0)] = 0.0
    warmup_steps: Annotated[int, Opt("steps in which the learning rate rises from 0", 0)] = 40
    schedule: Annotated[Literal["cosine", "linear", "constant"], Opt("of the learning rate after the warm-up")] = "cosine"
    min_rate_share: Annotated[float, Opt("learning rate of the last step over the peak", 0, 1)] = 0.0
    batch_rows: Annotated[int, Opt("rows of one forward in one process", 1)] = 8
    accumulate: Annotated[int, Opt("forwards in a step", 1)] = 1
    max_steps: Annotated[int | None, Opt("ends before the epochs do", 1)] = None
    epochs: Annotated[int, Opt("passes through the data", 1)] = 1
    grad_clip: Annotated[float, Opt("largest norm of the gradient; 0 does not clip", 0)] = 1.0
    seed: Annotated[int, Opt("of weights, batches and draws", 0)] = 0
    checkpoint_activations: Annotated[bool, Opt("make activations anew in the backward pass: less memory, more time")] = False
    precision: Annotated[Literal["fp32", "bf16"], Opt("of forward and backward; weights are kept in fp32")] = "fp32"


@dataclass(frozen=True, slots=True)
class RunConfig(Section):
    """Where a run reads and writes."""

    target: Annotated[str, Opt("checkpoint folder or hub name; 'bundled' is the model that ships with specdec")] = "bundled"
    output: Annotated[str, Opt("folder for checkpoints, logs and the result")] = "runs/specdec"
    log_every: Annotated[int, Opt("steps", 1)] = 10
    eval_every: Annotated[int, Opt("steps; 0 evaluates at the end only", 0)] = 500
    save_every: Annotated[int, Opt("steps; 0 saves at the end only", 0)] = 500
    keep: Annotated[int, Opt("newest checkpoints that stay", 1)] = 2
    resume: Annotated[bool, Opt("go on from the newest checkpoint in output, if there is one")] = True
    push_to_hub: Annotated[str | None, Opt("hub repository that the result is uploaded to, as name/repository")] = None
    tracker: Annotated[Literal["none", "tensorboard", "wandb"], Opt("where figures go, beside the log file")] = "none"
    num_workers: Annotated[int, Opt("processes that prepare batches; 0 does it in the training process", 0)] = 0


@dataclass(frozen=True, slots=True)
class MedusaConfig(Section):
    """Heads on the target's last hidden state (arXiv 2401.10774). joint: also trains the target, which changes what it says."""

    num_heads: Annotated[int, Opt("head k predicts k + 1 tokens after the next one", 1, 16)] = 4
    num_layers: Annotated[int, Opt("residual layers of a head", 1)] = 1
    init: Annotated[str | None, Opt("heads to begin with, as `final` holds them; layers beyond theirs begin as nothing")] = None
    shared_head: Annotated[bool, Opt("use the target's output matrix, frozen, in place of one a head")] = False
    loss: Annotated[Loss, Opt(_LOSS)] = "forward_kl"
    temperature: Annotated[float, Opt("of both laws in the loss", 0.01)] = 1.0
    decay: Annotated[float, Opt("weight of head k's loss is head_weight · decay^(k+1)", 0, 1)] = 0.8
    head_weight: Annotated[float, Opt("weight of the heads' loss; 0.2 is usual with joint", 0)] = 1.0
    joint: Annotated[bool, Opt("train LoRA adapters of the target together with the heads (Medusa-2)")] = False
    lora_rank: Annotated[int, Opt("with joint", 1)] = 32
    lora_alpha: Annotated[float, Opt("with joint", 0)] = 16.0
    heads_warmup_steps: Annotated[int, Opt("with joint: steps of the heads alone at the start", 0)] = 0
    self_distill: Annotated[bool, Opt("with joint: hold the adapted target to the law of the original one")] = False

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.self_distill and not self.joint:
            raise ConfigError("medusa.self_distill needs medusa.joint, as without it the target does not change; set both or none")


@dataclass(frozen=True, slots=True)
class PardConfig(Section):
    """A draft model that proposes several tokens in one forward with mask tokens (arXiv 2504.18583)."""

    draft: Annotated[str, Opt("checkpoint to adapt; 'bundled' is the draft that ships with specdec")] = "bundled"
    mask_token_id: Annotated[int | None, Opt("an unused token id; by default the tokenizer's mask token", 0)] = None
    num_tokens: Annotated[int, Opt("K, tokens proposed in a forward: one ordinary and K - 1 masks", 1, 64)] = 8
    loss: Annotated[Loss, Opt(_LOSS)] = "forward_kl"
    temperature: Annotated[float, Opt("of both laws in the loss", 0.01)] = 1.0
    conditional_drop: Annotated[bool, Opt("train on a share of the mask rows only")] = True
    retain: Annotated[float, Opt("share of depth i's rows that stay is retain^i", 0, 1)] = 0.7
    retain_min: Annotated[float, Opt("smallest such share", 0, 1)] = 0.2
    train_mask_only: Annotated[bool, Opt("leave the loss of the ordinary rows out")] = False


@dataclass(frozen=True, slots=True)
class DraftConfig(Section):
    """A small language model that drafts (losses and data of DistillSpec, arXiv 2310.08461)."""

    init: Annotated[str, Opt("a checkpoint, 'bundled', 'cut' (layers of the target) or 'scratch'")] = "bundled"
    keep_layers: Annotated[tuple[int, ...], Opt("with cut: the target's layers that stay, from 0", 0)] = ()
    num_layers: Annotated[int | None, Opt("with cut: how many layers, evenly spaced; with scratch: of the new model", 1)] = None
    hidden_size: Annotated[int | None, Opt("with scratch; by default the target's", 1)] = None
    intermediate_size: Annotated[int | None, Opt("with scratch; by default the target's", 1)] = None
    num_heads: Annotated[int | None, Opt("with scratch: attention heads", 1)] = None
    num_kv_heads: Annotated[int | None, Opt("with scratch: key-value heads", 1)] = None
    loss: Annotated[Loss, Opt(_LOSS)] = "forward_kl"
    jsd_beta: Annotated[float, Opt("with jsd: weight of the target in the mixture", 0, 1)] = 0.5
    data: Annotated[Literal["fixed", "on_policy"], Opt("texts of the files, or also the draft's own continuations")] = "fixed"
    temperature: Annotated[float, Opt("of both laws in the loss, and of the draft's own continuations", 0)] = 1.0
    on_policy_share: Annotated[float, Opt("with on_policy: share of batches that the draft writes itself", 0, 1)] = 0.5

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.init == "cut" and bool(self.keep_layers) == (self.num_layers is not None):
            raise ConfigError("draft.init is cut: say which layers stay, by draft.keep_layers or else draft.num_layers")
        if self.data == "on_policy" and self.loss == "ce":
            raise ConfigError("draft.loss ce on draft.data on_policy would teach the draft its own text; use another loss")


@dataclass(frozen=True, slots=True)
class _Training(Section):
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, slots=True)
class MedusaTraining(_Training):
    """All settings of `specdec train medusa`."""

    medusa: MedusaConfig = field(default_factory=MedusaConfig)


@dataclass(frozen=True, slots=True)
class PardTraining(_Training):
    """All settings of `specdec train pard`."""

    pard: PardConfig = field(default_factory=PardConfig)


@dataclass(frozen=True, slots=True)
class DraftTraining(_Training):
    """All settings of `specdec train draft-model`."""

    draft: DraftConfig = field(default_factory=DraftConfig)


@dataclass(frozen=True, slots=True)
class RegenerateConfig(Section):
    """All settings of regeneration: the target answers the prompts of the data."""

    data: DataConfig = field(default_factory=DataConfig)
    target: Annotated[str, Opt("checkpoint folder or hub name; 'bundled' is the model that ships with specdec")] = "bundled"
    out: Annotated[str, Opt("JSONL file to write or to go on with")] = "regenerated.jsonl"
    drafter: Annotated[str | None, Opt("'prompt-lookup', 'suffix', or a checkpoint; it changes the speed only")] = None
    turns: Annotated[Literal["last", "all"], Opt("assistant turns that are answered anew")] = "last"
    text_prompt: Annotated[int, Opt("tokens of a plain text that are kept and continued", 1)] = 32
    batch: Annotated[int, Opt("rows answered at once", 1)] = 8
    max_new_tokens: Annotated[int, Opt("tokens of an answer", 1)] = 512
    temperature: Annotated[float, Opt("0 decodes greedily", 0)] = 0.0
    seed: Annotated[int, Opt("of sampling", 0)] = 0
    device: Annotated[str, Opt("'auto' is a GPU where there is one")] = "auto"
    limit: Annotated[int | None, Opt("stop when the file has this many rows; may grow when a run goes on", 1)] = None

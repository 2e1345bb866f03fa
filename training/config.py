"""Settings of training and regeneration: the fields of these dataclasses are the keys of a YAML file and the flags."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from specdec import __version__
from specdec.errors import SpecDecError

T = TypeVar("T")
Loss = Literal["ce", "forward_kl", "reverse_kl", "jsd", "tv", "hybrid"]
SAVED_AS = "training.json"
_HUGE = sys.float_info.max


class ConfigError(SpecDecError):
    """A setting that is unknown, of the wrong type or out of range; the message names the key and where it stands."""


@dataclass(frozen=True, slots=True)
class Opt:
    """What a setting is for, and its bounds, both allowed themselves."""

    about: str
    low: float = -_HUGE
    high: float = _HUGE


@dataclass(frozen=True, slots=True)
class Flag:
    """A setting that a user can give. name: dotted, as `optim.learning_rate`.  kind: its type."""

    name: str
    kind: Any
    default: Any
    opt: Opt

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        bounds = [("at least", self.opt.low), ("at most", self.opt.high)]
        return ", ".join([_in_words(self.kind), *(f"{which} {bound:g}" for which, bound in bounds if abs(bound) < _HUGE)])


class _Section:
    """Checks bounds when it is built, by whatever way."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for flag in list_flags(type(self)):
            if "." not in flag.name:
                _check_bounds(flag, getattr(self, flag.name), type(self).__name__)


@dataclass(frozen=True, slots=True)
class DataConfig(_Section):
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
class OptimConfig(_Section):
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
    precision: Annotated[Literal["fp32", "bf16"], Opt("of forward and backward; weights are kept in fp32")] = "fp32"


@dataclass(frozen=True, slots=True)
class RunConfig(_Section):
    """Where a run reads and writes."""

    target: Annotated[str, Opt("checkpoint folder or hub name; 'bundled' is the model that ships with specdec")] = "bundled"
    output: Annotated[str, Opt("folder for checkpoints, logs and the result")] = "runs/specdec"
    log_every: Annotated[int, Opt("steps", 1)] = 10
    eval_every: Annotated[int, Opt("steps; 0 evaluates at the end only", 0)] = 500
    save_every: Annotated[int, Opt("steps; 0 saves at the end only", 0)] = 500
    keep: Annotated[int, Opt("newest checkpoints that stay", 1)] = 2
    resume: Annotated[bool, Opt("go on from the newest checkpoint in output, if there is one")] = True
    tracker: Annotated[Literal["none", "tensorboard", "wandb"], Opt("where figures go, beside the log file")] = "none"
    num_workers: Annotated[int, Opt("processes that prepare batches; 0 does it in the training process", 0)] = 0


@dataclass(frozen=True, slots=True)
class MedusaConfig(_Section):
    """Heads on the target's last hidden state (arXiv 2401.10774). joint: also trains the target, which changes what it says."""

    num_heads: Annotated[int, Opt("head k predicts k + 1 tokens after the next one", 1, 16)] = 4
    num_layers: Annotated[int, Opt("residual layers of a head", 1)] = 1
    shared_head: Annotated[bool, Opt("use the target's output matrix, frozen, in place of one a head")] = False
    decay: Annotated[float, Opt("weight of head k's loss is head_weight · decay^(k+1)", 0, 1)] = 0.8
    head_weight: Annotated[float, Opt("weight of the heads' loss; 0.2 is usual with joint", 0)] = 1.0
    joint: Annotated[bool, Opt("train LoRA adapters of the target together with the heads (Medusa-2)")] = False
    lora_rank: Annotated[int, Opt("with joint", 1)] = 32
    lora_alpha: Annotated[float, Opt("with joint", 0)] = 16.0
    heads_warmup_steps: Annotated[int, Opt("with joint: steps of the heads alone at the start", 0)] = 0
    self_distill: Annotated[bool, Opt("with joint: hold the adapted target to the law of the original one")] = False

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.self_distill and not self.joint:
            raise ConfigError("medusa.self_distill needs medusa.joint, as without it the target does not change; set both or none")


@dataclass(frozen=True, slots=True)
class PardConfig(_Section):
    """A draft model that proposes several tokens in one forward with mask tokens (arXiv 2504.18583)."""

    draft: Annotated[str, Opt("checkpoint to adapt; 'bundled' is the draft that ships with specdec")] = "bundled"
    mask_token_id: Annotated[int | None, Opt("an unused token id; by default the tokenizer's mask token", 0)] = None
    num_tokens: Annotated[int, Opt("K, tokens proposed in a forward: one ordinary and K - 1 masks", 1, 64)] = 8
    conditional_drop: Annotated[bool, Opt("train on a share of the mask rows only")] = True
    retain: Annotated[float, Opt("share of depth i's rows that stay is retain^i", 0, 1)] = 0.7
    retain_min: Annotated[float, Opt("smallest such share", 0, 1)] = 0.2
    train_mask_only: Annotated[bool, Opt("leave the loss of the ordinary rows out")] = False


@dataclass(frozen=True, slots=True)
class DraftConfig(_Section):
    """A small language model that drafts (losses and data of DistillSpec, arXiv 2310.08461)."""

    init: Annotated[str, Opt("a checkpoint, 'bundled', 'cut' (layers of the target) or 'scratch'")] = "bundled"
    keep_layers: Annotated[tuple[int, ...], Opt("with cut: the target's layers that stay, from 0", 0)] = ()
    num_layers: Annotated[int | None, Opt("with cut: how many layers, evenly spaced; with scratch: of the new model", 1)] = None
    hidden_size: Annotated[int | None, Opt("with scratch; by default the target's", 1)] = None
    intermediate_size: Annotated[int | None, Opt("with scratch; by default the target's", 1)] = None
    num_heads: Annotated[int | None, Opt("with scratch: attention heads", 1)] = None
    num_kv_heads: Annotated[int | None, Opt("with scratch: key-value heads", 1)] = None
    loss: Annotated[Loss, Opt("between target and draft")] = "forward_kl"
    jsd_beta: Annotated[float, Opt("with jsd: weight of the target in the mixture", 0, 1)] = 0.5
    data: Annotated[Literal["fixed", "on_policy"], Opt("texts of the files, or also the draft's own continuations")] = "fixed"
    temperature: Annotated[float, Opt("of both laws in the loss, and of the draft's own continuations", 0)] = 1.0
    on_policy_share: Annotated[float, Opt("with on_policy: share of batches that the draft writes itself", 0, 1)] = 0.5

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.init == "cut" and bool(self.keep_layers) == (self.num_layers is not None):
            raise ConfigError("draft.init is cut: say which layers stay, by draft.keep_layers or else draft.num_layers")
        if self.data == "on_policy" and self.loss == "ce":
            raise ConfigError("draft.loss ce on draft.data on_policy would teach the draft its own text; use another loss")


@dataclass(frozen=True, slots=True)
class _Training(_Section):
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
class RegenerateConfig(_Section):
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


def list_flags(kind: Any, prefix: str = "") -> tuple[Flag, ...]:
    """Every setting of a configuration class, in order, those of its sections with dotted names."""
    found: list[Flag] = []
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        hint, name = hints[one.name], prefix + one.name
        if is_dataclass(hint):
            found += list_flags(hint, f"{name}.")
        else:
            found.append(Flag(name, hint.__origin__, one.default, *hint.__metadata__))
    return tuple(found)


def load_config(kind: type[T], *, recipe: str | None = None, file: str | Path | None = None, flags: Sequence[str] = ()) -> T:
    """The configuration from a recipe, then the user's YAML file, then flags; what none of them has is the default.

    recipe: a name of `recipes()`, or a YAML file's path.  flags: as on a command line, `--optim.learning_rate 1e-3`,
    `--medusa.joint`, `--data.files a.jsonl b.jsonl`. Raises ConfigError, which names the key and where it stands.
    """
    known = {flag.name: flag for flag in list_flags(kind)}
    values = _from_yaml(recipe, known) if recipe is not None else {}
    values |= _from_yaml(file, known) if file is not None else {}
    return _build(kind, values | _from_flags(flags, known), "")


def recipes() -> tuple[str, ...]:
    """Names of the recipes that come with specdec."""
    names = [path.name for path in resources.files("specdec.training").iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def resolved(config: Any) -> dict[str, Any]:
    """Every setting, defaults included, as JSON and YAML can hold it."""
    return dict(json.loads(json.dumps(asdict(config))))


def save_resolved(config: Any, command: Sequence[str], folder: str | Path) -> Path:
    """Write training.json: the settings, the command line and the versions. A crash leaves the old file or the new one."""
    versions = {"specdec": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")}
    content = {"kind": type(config).__name__, "config": resolved(config), "command": list(command), "versions": versions}
    path = Path(folder) / SAVED_AS
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)
    return path


def load_saved(kind: type[T], folder: str | Path) -> T:
    """The configuration that `save_resolved` wrote; equal to the one it was given."""
    path = Path(folder) / SAVED_AS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != kind.__name__:
            raise ValueError(f"it is of a {content['kind']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not hold the settings of a {kind.__name__}; give such a run's folder: {error!r}") from error
    return _build(kind, dict(_flat(content["config"], "", str(path), {f.name: f for f in list_flags(kind)})), "")


def _from_yaml(source: str | Path, known: Mapping[str, Flag]) -> dict[str, Any]:
    path = Path(source).expanduser()
    if str(source) in recipes():
        path = Path(str(resources.files("specdec.training").joinpath(f"{source}.yaml")))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path} cannot be read as YAML; give a file, or one of the recipes {', '.join(recipes())}: {error}"
        raise ConfigError(message) from error
    return dict(_flat(content, "", str(path), known))


def _flat(content: Any, prefix: str, origin: str, known: Mapping[str, Flag]) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict | None):
        what = f"section {prefix[:-1]}" if prefix else "the file"
        raise ConfigError(f"{origin}: {what} holds {content!r}; it has to hold settings, each as `name: value`")
    for key, value in (content or {}).items():
        name = f"{prefix}{key}"
        if name in known:
            yield name, _checked(known[name], value, origin, text=False)
        elif any(other.startswith(f"{name}.") for other in known):
            yield from _flat(value, f"{name}.", origin, known)
        else:
            raise _unknown(name, origin, known)


def _from_flags(flags: Sequence[str], known: Mapping[str, Flag]) -> dict[str, Any]:
    origin, given, name = "command line", {}, None
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in known:
                raise _unknown(name, origin, known)
            given[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(f"{origin}: {word!r} belongs to no flag; settings are given as --section.name value")
        else:
            given[name].append(word)
    return {name: _checked(known[name], _words(known[name], words), origin, text=True) for name, words in given.items()}


def _words(flag: Flag, words: list[str]) -> Any:
    """A list's words, or the one value; numbers of a list may stand between commas, a flag alone is true."""
    if get_origin(flag.kind) is tuple:
        return words if get_args(flag.kind)[0] is str else [part for word in words for part in word.split(",") if part]
    words = words or ["true"] * (flag.kind is bool)
    if len(words) != 1:
        raise ConfigError(f"command line: --{flag.name} got {len(words)} values; it takes one, {flag.allowed}")
    return words[0]


def _unknown(name: str, origin: str, known: Mapping[str, Flag]) -> ConfigError:
    ends = {other.rpartition(".")[2]: other for other in known}
    last = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)]
    near = last or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    return ConfigError(f"{origin}: {name} is not a setting; {hint}")


def _checked(flag: Flag, value: Any, origin: str, *, text: bool) -> Any:
    try:
        converted = _convert(flag.kind, value, text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {flag.name} is {value!r}; allowed is {flag.allowed}") from error
    _check_bounds(flag, converted, origin)
    return converted


def _check_bounds(flag: Flag, value: Any, origin: str) -> None:
    numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, int | float)]
    # A NaN is in no range.
    if not all(flag.opt.low <= one <= flag.opt.high for one in numbers):
        raise ConfigError(f"{origin}: {flag.name} is {value!r}; allowed is {flag.allowed}")


def _convert(kind: Any, value: Any, text: bool) -> Any:
    """The value as that type; text: it comes from a command line. Raises TypeError or ValueError."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        nothing = value is None or (text and value.lower() in ("none", "null"))
        return None if nothing else _convert(next(k for k in inner if k is not NoneType), value, text)
    if outer is tuple and isinstance(value, list):
        return tuple(_convert(inner[0], one, text) for one in value)
    if outer is Literal and value in inner:
        return value
    if kind is bool and text and value.lower() in ("true", "false"):
        return value.lower() == "true"
    # YAML reads 1e-3, without a point, as text.
    if (kind is float and type(value) in (int, str)) or (kind is int and text):
        return kind(value)
    if outer is None and type(value) is kind:
        return value
    raise TypeError


def _in_words(kind: Any) -> str:
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        return " or ".join("none" if k is NoneType else _in_words(k) for k in inner)
    if outer is tuple:
        return f"a list, each {_in_words(inner[0])}"
    if outer is Literal:
        return "one of " + ", ".join(inner)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _build(kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            given[name] = _build(hint, values, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif prefix + name in values:
            given[name] = values[prefix + name]
    return kind(**given)

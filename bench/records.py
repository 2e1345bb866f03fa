"""What a benchmark run leaves behind: frozen dataclasses, and one JSON file of them with a schema version.

B requests of a trial, K drafted positions. Seconds are wall-clock, memory is in MiB.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from specdec.errors import SpecDecError

SCHEMA = 2
KIND = "specdec-bench"
# Names of the two bases: every other method is reported against both.
HF, PLAIN = "HF generate", "plain"
# The scope of a row over all prompts; the others are "task", and "length" for within and beyond the trained length.
ALL = "all"

# exact: the same tokens.  within: differs only where rounding explains it.  refused: differs, so there is no speed.
# unavailable: it cannot run here.  unchecked: there is nothing to compare with, as for another sampler.
Status = Literal["exact", "within", "refused", "unavailable", "unchecked"]
# transformers, peer: other runtimes.  synthetic: imitates a drafter at an acceptance rate, so its speed is of no real one.
Family = Literal["transformers", "plain", "drafter", "synthetic", "peer"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and by what a run was measured. commit: as `git describe` says, empty outside a checkout.  created: UTC, ISO 8601."""

    cpu: str
    cores: int
    threads: int
    memory_mib: float
    gpu: str | None
    system: str
    python: str
    torch: str
    transformers: str
    specdec: str
    commit: str
    command: str
    created: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for. trained_length: the tokens that the target was trained on, where known; rows are split there.

    quick: the built-in small set.  seed: of sampling and of the bootstrap.
    """

    target: str
    dtype: str
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    max_new_tokens: int
    repeats: int
    seed: int
    quick: bool = False
    trained_length: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """A task's prompts. source: the file, or "built-in".  prompts: how many ran.  refused: how many did not fit."""

    task: str
    source: str
    licence: str
    prompts: int
    refused: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class RefusedPrompt:
    """A prompt that was left out whole. line: in its file, from 1."""

    task: str
    source: str
    line: int
    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A way to decode. drafter: name or path, None without one.  weights_mib: what it holds beside the target."""

    name: str
    family: Family
    about: str
    drafter: str | None = None
    planner: str | None = None
    weights_mib: float = 0.0


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a method's outputs are right at a batch size and temperature. Counts are of outputs.

    reason: of what is not exact, in plain words, for people.
    """

    method: str
    batch: int
    temperature: float
    status: Status
    checked: int
    exact: int
    within: int
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether the method's times may be reported."""
        return self.status in ("exact", "within", "unchecked")


@dataclass(frozen=True, slots=True)
class Trial:
    """One timed call of one method on one item, B prompts decoded at once.

    item: the same number is the same prompts in every method and repeat.  prompt_tokens: of each request.  num_tokens: new ones
    of all requests.  decode_tokens: those of them that came after `prefill_s`.  forwards: of the target after the prompt.
    request_rounds: rounds summed over requests, 0 for methods that do not tell.  lengths: mean acceptance length of each request,
    empty for those; so are accepted_at and reached_at, rounds that accepted, and had room to draft, a token at each depth.
    draft_s to other_s: the phases of all rounds.  forward_s: the part of them inside the models' forwards.  expected_*: what the
    planner forecast of the rounds that it forecast, realised_* what these gave.  peak_mib: of the device, else of this process,
    None where unknown.  energy_j: joules of the device, or of the whole processor; None where nothing counts them.  stolen: the
    part of the processor time that a virtual machine's host gave to others meanwhile, None where the system does not tell.
    """

    method: str
    task: str
    item: int
    batch: int
    temperature: float
    repeat: int
    prompt_tokens: tuple[int, ...]
    num_tokens: int
    decode_tokens: int
    seconds: float
    prefill_s: float
    forwards: int
    request_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    lengths: tuple[float, ...] = ()
    accepted_at: tuple[int, ...] = ()
    reached_at: tuple[int, ...] = ()
    draft_s: float = 0.0
    target_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    forward_s: float = 0.0
    expected_tokens: float = 0.0
    expected_s: float = 0.0
    realised_tokens: float = 0.0
    realised_s: float = 0.0
    peak_mib: float | None = None
    energy_j: float | None = None
    stolen: float | None = None

    @property
    def decode_s(self) -> float:
        """Seconds after the prompt."""
        return self.seconds - self.prefill_s


@dataclass(frozen=True, slots=True)
class Row:
    """A method over the prompts of a scope, at a batch size and temperature; only methods whose gate let them through have rows.

    scope: "all", "task" or "length".  name: of the task, "within" or "beyond" the trained length, "all".  vs_generate, vs_plain:
    tokens a second over the base's, None where the base did not run.  decode_vs_plain: the same without the prompt.
    acceptance_length: tokens a round over all rounds (token-weighted), acceptance_length_by_request: the mean over requests; None
    for methods that do not tell, as the shares are.  per_position: part of the rounds that accepted, at each depth.
    draft_share, overhead_share: of the rounds' time, drafting, and outside the models' forwards.  *_ms: of a round.
    expected_tokens_per_s, realised_tokens_per_s: the planner's forecasts and what came of them.  joules_per_token: of new tokens.
    """

    scope: str
    name: str
    method: str
    batch: int
    temperature: float
    prompts: int
    tokens_per_s: Interval
    vs_generate: Interval | None
    vs_plain: Interval | None
    decode_vs_plain: Interval | None
    prefill_s: float
    decode_tokens_per_s: float
    tokens_per_forward: float
    acceptance_length: float | None = None
    acceptance_length_by_request: float | None = None
    acceptance_rate: float | None = None
    per_position: tuple[float, ...] = ()
    draft_share: float | None = None
    overhead_share: float | None = None
    draft_ms: float | None = None
    target_ms: float | None = None
    verify_ms: float | None = None
    other_ms: float | None = None
    expected_tokens_per_s: float | None = None
    realised_tokens_per_s: float | None = None
    peak_mib: float | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run. complete: every trial that was asked for is there or was refused."""

    machine: Machine
    settings: Settings
    workloads: tuple[Workload, ...]
    refused_prompts: tuple[RefusedPrompt, ...]
    methods: tuple[MethodInfo, ...]
    gates: tuple[Gate, ...]
    rows: tuple[Row, ...]
    trials: tuple[Trial, ...]
    complete: bool = True

    def row(self, method: str, batch: int, temperature: float, scope: str = ALL, name: str = ALL) -> Row | None:
        """The row of a method, None where it has none."""
        wanted = (method, batch, temperature, scope, name)
        return next((r for r in self.rows if (r.method, r.batch, r.temperature, r.scope, r.name) == wanted), None)

    def is_synthetic(self, method: str) -> bool:
        """Whether a method only imitates an acceptance rate; such numbers stand apart from real ones."""
        return any(info.name == method and info.family == "synthetic" for info in self.methods)

    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(w.task for w in self.workloads)


def write_results(results: Results, path: Path) -> None:
    """Write the JSON whole or not at all."""
    text = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(results)}, indent=1, allow_nan=False)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read_results(path: Path) -> Results:
    """The results that `write_results` wrote. Raises SpecDecError for a file that is none, and for another schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecDecError(f"{path} cannot be read: {error.strerror}; give the results.json of `specdec bench run`") from error
    except ValueError as error:
        raise SpecDecError(f"{path} is not JSON ({error}); give the results.json of `specdec bench run`") from error
    if not isinstance(found, dict) or found.pop("kind", None) != KIND:
        raise SpecDecError(f"{path} is not a benchmark result; give the results.json of `specdec bench run`")
    schema = found.pop("schema", None)
    if schema != SCHEMA:
        raise SpecDecError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; run the benchmark again")
    results: Results = from_json(Results, found, str(path))
    return results


def from_json(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the annotated type: a dataclass, tuple, union with None, literal or plain type.

    Raises SpecDecError that names the place.
    """
    if is_dataclass(kind):
        return _dataclass_of(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else from_json(next(a for a in inner if a is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise SpecDecError(f"{where} is a {type(value).__name__}; a list is needed")
        return tuple(from_json(inner[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is Literal:
        if value not in inner:
            raise SpecDecError(f"{where} is {value!r}; allowed: {', '.join(map(str, inner))}")
        return value
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise SpecDecError(f"{where} is {value!r}; a {kind.__name__} is needed")
    return kind(value)


def _dataclass_of(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise SpecDecError(f"{where} is a {type(value).__name__}; an object is needed")
    hints, names = get_type_hints(kind), {field.name for field in fields(kind)}
    if value.keys() != names:
        missing, unknown = sorted(names - value.keys()), sorted(value.keys() - names)
        raise SpecDecError(f"{where}: missing {missing}, unknown {unknown}; the file is not whole or of another version")
    return kind(**{name: from_json(hints[name], value[name], f"{where}.{name}") for name in names})

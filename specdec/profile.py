"""What was measured for one machine and pair of models: times of rounds and acceptance, kept as JSON from run to run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from specdec.drafters.base import Drafter
from specdec.errors import SpecDecError

VERSION = 1
_FORMAT = "specdec-profile"
# What a configuration holds beside what the model computes.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id"})

# Observations that the level above counts for.
_PRIOR = 4.0

# {batch: {size: value}}
Cells = Mapping[int, Mapping[int, float]]
Counts = Mapping[int, Mapping[int, int]]
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where times were measured. device: its name.  threads: of the CPU, 0 where a GPU does the work.  dtype: of the target."""

    device: str
    threads: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Which model or drafter. name: for people.  fingerprint: of its configuration and number of parameters, not of weights."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Times in seconds, each the median of its rounds, by the number of requests in the round.

    target_s: of a round without its drafting and without what `context` adds, by drafted nodes of all requests, 0 for plain
    decoding.  draft_s: of drafting, by levels, 0 for a round that drafts nothing.  target_rounds, draft_rounds: how many rounds
    each time stands for.  context: what a round takes longer for each committed token of its requests, at least 0.  length:
    committed tokens of a request, the mean while this was measured.
    accuracies: by depth and rank, how often the child of that rank was accepted where its parent was; for a chain there is
    rank 0 alone.  reached: of how many offered children each is the share.
    asked: rounds of a request that were asked for a draft.  proposed: those that got one, fewer for a lookup without a match.
    rounds: measured in all.  created: UTC, ISO 8601.  Raises SpecDecError for values that cannot be.
    """

    machine: Machine
    versions: Mapping[str, str]
    target: Identity
    drafter: Identity
    shape: str
    target_s: Cells
    target_rounds: Counts
    draft_s: Cells
    draft_rounds: Counts
    context: float
    length: float
    accuracies: Rows
    reached: tuple[tuple[int, ...], ...]
    asked: int
    proposed: int
    rounds: int
    created: str

    def __post_init__(self) -> None:
        for name in ("target", "draft"):
            times, rounds = getattr(self, f"{name}_s"), getattr(self, f"{name}_rounds")
            if {b: set(own) for b, own in times.items()} != {b: set(own) for b, own in rounds.items()}:
                raise SpecDecError(f"{name}_rounds: needs one number for each time of {name}_s")
        if any(second <= 0 for own in self.target_s.values() for second in own.values()):
            raise SpecDecError("target_s: a round's time must be above 0")
        if any(value > 1 for row in self.accuracies for value in row):
            raise SpecDecError("accuracies: each must be a probability from 0 to 1")
        if [len(row) for row in self.accuracies] != [len(row) for row in self.reached]:
            raise SpecDecError("reached: needs one number for each of accuracies")
        if self.proposed > self.asked:
            raise SpecDecError(f"proposed: {self.proposed} is more than the {self.asked} asked for")

    @property
    def proposed_share(self) -> float:
        """Of the drafts that were asked for, how many there were; 1 where none was asked for."""
        return self.proposed / self.asked if self.asked else 1.0

    @property
    def expected(self) -> Rows:
        """Accuracies to plan with: one of few observations is drawn to that of the same rank on the level above."""
        found: list[tuple[float, ...]] = []
        for row, counts in zip(self.accuracies, self.reached, strict=True):
            above = (*(found[-1] if found else ()), *row[len(found[-1]) if found else 0 :])
            found.append(
                tuple([(a * n + _PRIOR * before) / (n + _PRIOR) for a, n, before in zip(row, counts, above, strict=False)])
            )
        return tuple(found)

    def seconds(self, batch: int, nodes: int, depth: int, context: float = 0.0) -> float:
        """Of a round with so many drafted nodes in all, the deepest on this level, and so many committed tokens in all.

        Measured, between measured sizes interpolated, beyond them carried on; the measured times are made not to fall with
        size. The nearest batch size stands for another. Raises SpecDecError where nothing is measured.
        """
        target = _at(self.target_s, self.target_rounds, batch, nodes) + self.context * context
        return target + _at(self.draft_s, self.draft_rounds, batch, depth)


def _at(times: Cells, rounds: Counts, batch: int, size: int) -> float:
    measured = [known for known, own in times.items() if own]
    if not measured:
        raise SpecDecError("the profile holds no times; run `specdec tune`")
    nearest = min(measured, key=lambda known: (abs(known - batch), known))
    sizes = sorted(times[nearest])
    fitted = monotone(sizes, [times[nearest][n] for n in sizes], [max(rounds[nearest][n], 1) for n in sizes])
    slope = (fitted[-1] - fitted[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
    return float(np.interp(size, sizes, fitted)) + slope * max(size - sizes[-1], 0)


def monotone(sizes: Sequence[int], seconds: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The least-squares fit that is nowhere negative and does not fall with size, in the order of sizes.

    Pool adjacent violators (Ayer et al., 1955). sizes: rising.  weights: above 0, how much each time counts. Raises SpecDecError
    for sizes that do not rise, and for lists of different lengths.
    """
    if not len(sizes) == len(seconds) == len(weights):
        raise SpecDecError(f"{len(sizes)} sizes, {len(seconds)} times and {len(weights)} weights: give as many of each")
    if any(b <= a for a, b in pairwise(sizes)) or any(not w > 0 for w in weights):
        raise SpecDecError(f"sizes {list(sizes)} must rise and weights {list(weights)} be above 0")
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(seconds, weights, strict=True):
        mean, total, count = float(value), float(weight), 1
        while blocks and blocks[-1][0] >= mean:
            before, more, others = blocks.pop()
            mean, total, count = (before * more + mean * total) / (more + total), more + total, others + count
        blocks.append((mean, total, count))
    return [max(mean, 0.0) for mean, _, count in blocks for _ in range(count)]


def machine_of(target: nn.Module) -> Machine:
    """The machine that runs this model now."""
    first = next(target.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    if first.device.type == "cuda":
        return Machine(torch.cuda.get_device_name(first.device), 0, dtype)
    return Machine(_cpu_name(), torch.get_num_threads(), dtype)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def identity_of(target: nn.Module) -> Identity:
    """Of a model: by its configuration, less what changes no output, and its number of parameters."""
    config: Any = getattr(target, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    name = Path(str(getattr(config, "_name_or_path", "") or "")).name or type(target).__name__
    count = sum(p.numel() for p in target.parameters())
    return Identity(name, _hash([type(target).__name__, _stable(settings), count]))


def drafter_identity(drafter: Drafter) -> Identity:
    """Of a drafter: its kind and shape, and the model or the heads that it runs, where there are any."""
    heads = getattr(drafter, "heads", None)
    model = getattr(getattr(getattr(drafter, "runner", None), "twin", None), "model", None)
    parts: list[Any] = [drafter.name, drafter.shape]
    name = drafter.name
    if isinstance(heads, nn.Module):
        parts.append(sorted([key, *value.shape] for key, value in heads.named_parameters()))
    elif isinstance(model, nn.Module):
        own = identity_of(model)
        parts.append(own.fingerprint)
        name = f"{drafter.name} {own.name}"
    return Identity(name, _hash(parts))


def _stable(settings: Any) -> Any:
    if isinstance(settings, dict):
        kept = {str(k): _stable(v) for k, v in settings.items() if k not in _VOLATILE and "attn_implementation" not in str(k)}
        return dict(sorted(kept.items()))
    return [_stable(v) for v in settings] if isinstance(settings, list | tuple) else settings


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_fits(profile: Profile, target: nn.Module, drafter: Drafter) -> str:
    """What keeps the profile's times from holding here, empty where they do; its acceptance then still holds.

    Raises SpecDecError where it was measured with another target or drafter.
    """
    here = machine_of(target)
    for what, was, now in (
        ("target", profile.target, identity_of(target)),
        ("drafter", profile.drafter, drafter_identity(drafter)),
    ):
        if was.fingerprint != now.fingerprint:
            raise SpecDecError(
                f"the profile is of the {what} {was.name} ({was.fingerprint}), and this is {now.name} ({now.fingerprint}); "
                "run `specdec tune` for this pair"
            )
    there = asdict(profile.machine)
    other = "; ".join(f"{key} {there[key]}, here {value}" for key, value in asdict(here).items() if there[key] != value)
    if not other:
        return ""
    return f"the profile's times are of another machine ({other}) and not used, its acceptance is; run `specdec tune` here"


def default_path(target: nn.Module, drafter: Drafter, folder: Path | None = None) -> Path:
    """Where the profile of this pair on this machine lies. folder: in place of the user's cache folder."""
    parts = [identity_of(target).fingerprint, drafter_identity(drafter).fingerprint, asdict(machine_of(target))]
    return (folder or _cache_folder()) / f"{_hash(parts)}.json"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the XDG base directory specification.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "specdec" / "profiles"


def write_profile(profile: Profile, path: Path) -> None:
    """Write it as JSON: whole or not at all. Raises SpecDecError where that cannot be."""
    text = json.dumps({"format": _FORMAT, "version": VERSION, **asdict(profile)}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise SpecDecError(f"{path}: the profile cannot be written: {error}; name another file") from error


def read_profile(path: Path) -> Profile:
    """The profile of a file. Raises SpecDecError that names the file and the key for what is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecDecError(f"{path}: no profile can be read there: {error}; make one with `specdec tune`") from error
    except ValueError as error:
        raise SpecDecError(f"{path}: not JSON ({error}); make a new profile with `specdec tune`") from error
    try:
        return _profile_of(data)
    except SpecDecError as error:
        raise SpecDecError(f"{path}: {error}") from error


def _profile_of(data: Any) -> Profile:
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise SpecDecError(f'format: not "{_FORMAT}", so this is no profile; give a file that `specdec tune` wrote')
    version = _count("version", data.get("version"))
    if version != VERSION:
        raise SpecDecError(f"version: {version} is not the {VERSION} that this specdec reads; update specdec, or tune again")
    found = _take("", {k: v for k, v in data.items() if k not in ("format", "version")}, _FIELDS)
    return Profile(**found)


_Read = Callable[[str, Any], Any]


def _take(key: str, data: Any, readers: Mapping[str, _Read]) -> dict[str, Any]:
    """The values of an object with these keys and no others."""
    if not isinstance(data, dict):
        raise SpecDecError(f"{key}: an object is needed, not {_short(data)}")
    begin = f"{key}." if key else ""
    for name in data:
        if name not in readers:
            raise SpecDecError(f"{begin}{name}: unknown; there are {', '.join(readers)}")
    for name in readers:
        if name not in data:
            raise SpecDecError(f"{begin}{name}: missing")
    return {name: read(f"{begin}{name}", data[name]) for name, read in readers.items()}


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else type(value).__name__


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SpecDecError(f"{key}: a text is needed, not {_short(value)}")
    return value


def _count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SpecDecError(f"{key}: a whole number of 0 or more is needed, not {_short(value)}")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise SpecDecError(f"{key}: a number of 0 or more is needed, not {_short(value)}")
    return float(value)


def _shape(key: str, value: Any) -> str:
    if value not in ("chain", "tree"):
        raise SpecDecError(f"{key}: 'chain' or 'tree' is needed, not {_short(value)}")
    return str(value)


def _by_size(read: _Read) -> _Read:
    """Of an object whose keys are whole numbers."""

    def by_size(key: str, value: Any) -> dict[int, Any]:
        if not isinstance(value, dict) or not all(name.isdecimal() for name in value):
            raise SpecDecError(f"{key}: an object by whole numbers is needed, not {_short(value)}")
        return {int(name): read(f"{key}.{name}", own) for name, own in value.items()}

    return by_size


def _rows(read: _Read) -> _Read:
    def rows(key: str, value: Any) -> tuple[tuple[Any, ...], ...]:
        if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
            raise SpecDecError(f"{key}: a list of lists is needed, not {_short(value)}")
        return tuple(tuple(read(f"{key}[{d}][{r}]", own) for r, own in enumerate(row)) for d, row in enumerate(value))

    return rows


def _texts(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SpecDecError(f"{key}: an object of texts is needed, not {_short(value)}")
    return {name: _text(f"{key}.{name}", own) for name, own in value.items()}


def _identity(key: str, value: Any) -> Identity:
    return Identity(**_take(key, value, {"name": _text, "fingerprint": _text}))


def _machine(key: str, value: Any) -> Machine:
    return Machine(**_take(key, value, {"device": _text, "threads": _count, "dtype": _text}))


_FIELDS: Mapping[str, _Read] = {
    "machine": _machine,
    "versions": _texts,
    "target": _identity,
    "drafter": _identity,
    "shape": _shape,
    "target_s": _by_size(_by_size(_number)),
    "target_rounds": _by_size(_by_size(_count)),
    "draft_s": _by_size(_by_size(_number)),
    "draft_rounds": _by_size(_by_size(_count)),
    "context": _number,
    "length": _number,
    "accuracies": _rows(_number),
    "reached": _rows(_count),
    "asked": _count,
    "proposed": _count,
    "rounds": _count,
    "created": _text,
}

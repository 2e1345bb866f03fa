"""How settings are read: the fields of a dataclass are the keys of a YAML file and the flags of a command."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from specdec import __version__
from specdec.errors import SpecDecError

T = TypeVar("T")
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


class Section:
    """Checks bounds when it is built, by whatever way."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for flag in list_flags(type(self)):
            if "." not in flag.name:
                _check_bounds(flag, getattr(self, flag.name), type(self).__name__)


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
    origin, name = "command line", None
    given: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in known:
                raise _unknown(name, origin, known)
            # A list that is named again grows, as with other tools; of another setting the last value counts.
            before = given.get(name, []) if get_origin(known[name].kind) is tuple else []
            given[name] = [*before, *([value] if equals else [])]
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

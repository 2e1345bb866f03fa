"""Captures a model's forward for one number of rows as a flat list of tensor operations.

A small model spends most of a forward in Python: modules, decorators, argument handling. The capture records the tensor
operations of one forward and writes them down as one straight function: the same operations in the same order, as a CUDA
graph would replay them. Ids, positions and the attention context are inputs, so one capture per number of rows serves every
tree. Shapes are those of the recording; two recordings tell which of their numbers follow the number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

Outputs = tuple[Tensor, ...]
Forward = Callable[[Tensor, Tensor, Any], Outputs]

_BRANCHING = frozenset({"item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero", "__iter__"})
# These return their input's values unchanged where shape, dtype and device come out the same.
_IDENTITIES = frozenset({"to", "float", "type_as", "view", "reshape", "contiguous", "detach", "expand", "flatten"})

# Between names and numbers.
_WORDS = re.compile(r"(\W+)")


class _CannotCapture(Exception):
    """The forward does something that a flat list of operations cannot repeat; the message says what."""


class _Recorder(TorchFunctionMode):
    """Writes down every tensor operation that runs while it is active, and stands before the attention context."""

    def __init__(self, inputs: Sequence[Tensor], context: Any) -> None:
        super().__init__()
        self._context = context
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self._names: dict[int, str] = {id(t): name for t, name in zip(inputs, ("tokens", "positions"), strict=True)}
        self._alive: list[Any] = list(inputs)
        self._done: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation and note it, unless it gives no tensor or only hands its input back."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _BRANCHING:
            raise _CannotCapture(f"the forward branches on values ({resolve_name(func) or name})")
        out = func(*args, **kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._write(f"{self._constant(func)}({self._call(args, kwargs)})")
        elif isinstance(out, Tensor):
            self._note(name, func, args, kwargs, out)
        elif isinstance(out, tuple | list) and out and all(isinstance(o, Tensor) for o in out):
            whole = self._assign(f"{self._constant(func)}({self._call(args, kwargs)})")
            for i, part in enumerate(out):
                self._name(part, self._assign(f"{whole}[{i}]"))
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Note one layer's attention as one operation; see `AttentionContext.attend`."""
        with torch._C.DisableTorchFunction():
            out: Tensor = self._context.attend(query, key, value, layer, scale, window, softcap, sinks)
        self._name(out, self._assign(f"attend({self._call((query, key, value, layer, scale, window, softcap, sinks), {})})"))
        return out

    def _note(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if out is source:
            return
        if source is not None and name in _IDENTITIES and _alike(source, out) and not out.is_complex():
            self._name(out, self._argument(source))
            return
        call = f"{self._constant(func)}({self._call(args, kwargs)})"
        if call not in self._done:
            self._done[call] = self._assign(call)
        self._name(out, self._done[call])

    def _write(self, line: str) -> None:
        """An operation that changes a tensor: what was computed before must not be merged with what comes after."""
        self.lines.append(line)
        self._done.clear()

    def _assign(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def _name(self, tensor: Tensor, name: str) -> None:
        self._names[id(tensor)] = name
        self._alive.append(tensor)

    def _constant(self, value: Any) -> str:
        """A name under which the written function finds this object."""
        name = f"c{id(value)}"
        self._alive.append(value)
        self.constants[name] = value.detach() if isinstance(value, Tensor) else value
        return name

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        parts = [self._argument(a) for a in args] + [f"{k}={self._argument(v)}" for k, v in kwargs.items()]
        return ", ".join(parts)

    def _argument(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._names.get(id(value)) or self._constant(value)
        if isinstance(value, tuple | list) and type(value) in (tuple, list, torch.Size):
            inner = ", ".join(self._argument(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
        if isinstance(value, slice):
            return f"slice({self._argument(value.start)}, {self._argument(value.stop)}, {self._argument(value.step)})"
        if value is None or value is Ellipsis or type(value) in (bool, int, str):
            return repr(value)
        return self._constant(value)

    def outputs(self, tensors: Sequence[Tensor]) -> str:
        """The names of the forward's results."""
        if any(id(t) not in self._names for t in tensors):
            raise _CannotCapture("a result does not come from tensor operations")
        return ", ".join(self._names[id(t)] for t in tensors)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@dataclass(frozen=True, slots=True)
class Recording:
    """A forward written down. rows: that it was of, 0 for any number R.  lines: its operations, with `constants` by their names.

    results: names of values.
    """

    rows: int
    lines: tuple[str, ...]
    results: str
    constants: dict[str, Any]

    def function(self) -> Forward:
        """It as one straight function: the same arguments and values, bit for bit; the caller checks that once on real inputs."""
        body = ["attend, R = context.attend, tokens.shape[1]", *_forgetting(self.lines, self.results), f"return ({self.results},)"]
        source, namespace = "\n    ".join(body), dict(self.constants)
        exec(compile(f"def run(tokens, positions, context):\n    {source}\n", "<captured forward>", "exec"), namespace)
        # Out of its own globals, so that it goes, and the weights with it, when nobody holds it any more.
        run: Forward = namespace.pop("run")
        return run


def capture(forward: Forward, tokens: Tensor, positions: Tensor, context: Any) -> tuple[Outputs, Recording] | str:
    """Run the forward, and give its results and what it did for this many rows; or why that cannot be written down.

    forward: (tokens [1, R], positions [1, R], context) to a tuple of tensors.
    """
    recorder = _Recorder((tokens, positions), context)
    try:
        with recorder:
            results = forward(tokens, positions, recorder)
        names = recorder.outputs(results)
    except _CannotCapture as reason:
        return str(reason)
    return results, Recording(tokens.shape[1], tuple(recorder.lines), names, recorder.constants)


def for_any_rows(first: Recording, second: Recording) -> Recording | None:
    """What two recordings of other numbers of rows R have in common, with every whole number that is k R in both written as that.

    None where they differ in anything else. That it holds for a third number of rows is likely and has to be checked.
    """
    if len(first.lines) != len(second.lines) or first.results != second.results:
        return None
    lines = []
    for one, other in zip(first.lines, second.lines, strict=True):
        line = _in_common(first, second, one, other)
        if line is None:
            return None
        lines.append(line)
    return Recording(0, tuple(lines), first.results, first.constants)


def _in_common(first: Recording, second: Recording, one: str, other: str) -> str | None:
    """A line for any number of rows."""
    words, others = _WORDS.split(one), _WORDS.split(other)
    if len(words) != len(others):
        return None
    common = [_word(first, second, *pair) for pair in zip(words, others, strict=True)]
    return None if None in common else "".join(filter(None, common))


def _word(first: Recording, second: Recording, one: str, other: str) -> str | None:
    """A name, a number or what stands between them."""
    if one == other:
        return one
    if one in first.constants and other in second.constants:
        return one if _equal(first.constants[one], second.constants[other]) else None
    if not (one.isdigit() and other.isdigit()) or int(one) % first.rows or int(one) * second.rows != int(other) * first.rows:
        return None
    return f"({int(one) // first.rows} * R)"


def _equal(one: Any, other: Any) -> bool:
    """Whether two constants are the same object, or equal ones that are no tensors."""
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))


def _forgetting(lines: Sequence[str], results: str) -> list[str]:
    """The lines without those whose value nobody uses, each value dropped after its last use to free its memory."""
    used = {name.strip() for name in results.split(",")}
    kept: list[str] = []
    for line in reversed(lines):
        name, equals, expression = line.partition(" = ")
        if equals and name not in used:
            continue
        fresh = {word for word in _words(expression if equals else line) if word not in used}
        used |= fresh
        if fresh:
            kept.append(f"del {', '.join(sorted(fresh))}")
        kept.append(line)
    return kept[::-1]


def _words(text: str) -> set[str]:
    """Names of recorded values in an expression."""
    words = text.replace("(", " ").replace(")", " ").replace("[", " ").replace("]", " ").replace(",", " ").replace("=", " ")
    return {word for word in words.split() if word[0] == "v" and word[1:].isdigit()}

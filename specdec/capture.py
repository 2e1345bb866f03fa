"""Captures a model's forward for one number of rows as a flat list of tensor operations.

A small model spends most of a forward in Python: modules, decorators, argument handling. The captured graph is the same
operations in the same order, called one after the other, as a CUDA graph would replay them. Ids, positions and the attention
context are inputs, so one capture per number of rows serves every tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_LIBRARY = "specdec"


def define_attend() -> None:
    """Define the operation that stands for one layer's attention while a forward is traced; done once a process."""
    if hasattr(getattr(torch.ops, _LIBRARY), "attend"):
        return
    schema = "(Tensor q, Tensor k, Tensor v, int layer, float scale, int? window, float? softcap) -> Tensor"
    torch.library.define(f"{_LIBRARY}::attend", schema)
    torch.library.impl(f"{_LIBRARY}::attend", "CompositeExplicitAutograd")(_attend_shape)


def _attend_shape(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """A tensor of the shape that attention returns; tracing needs shapes only."""
    return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


class TraceContext:
    """Takes the place of the attention context while a forward is traced."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Record the call; see `AttentionContext.attend`."""
        out: Tensor = torch.ops.specdec.attend(query, key, value, layer, scale, window, softcap)
        return out


def _call_attend(context: Any, *args: Any) -> Tensor:
    out: Tensor = context.attend(*args)
    return out


def _fast_calls() -> dict[Any, Callable[..., Any]]:
    """The same operations through PyTorch's cheaper Python entry points."""
    functional = torch.nn.functional
    return {
        _aten.add.Tensor: torch.add,
        _aten.sub.Tensor: torch.sub,
        _aten.mul.Tensor: torch.mul,
        _aten.div.Tensor: torch.div,
        _aten.mm.default: torch.mm,
        _aten.addmm.default: torch.addmm,
        _aten.linear.default: functional.linear,
        _aten.neg.default: torch.neg,
        _aten.cat.default: torch.cat,
        _aten.silu.default: torch._C._nn.silu,
        _aten.tanh.default: torch.tanh,
        _aten.pow.Tensor_Scalar: torch.pow,
        _aten.rsqrt.default: torch.rsqrt,
        _aten.mean.dim: torch.mean,
        _aten.cos.default: torch.cos,
        _aten.sin.default: torch.sin,
        _aten.unsqueeze.default: torch.unsqueeze,
        _aten.transpose.int: torch.transpose,
        _aten.embedding.default: torch.embedding,
    }


def _drop_identities(graph: fx.Graph) -> None:
    """Remove nodes that compute nothing: gradient switches, aliases, moves and casts to what the tensor is already."""
    same = (_aten.to.device, _aten.to.dtype, _aten.view.default, _aten.reshape.default, _aten.detach.default, _aten.alias.default)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)
        elif (node.target in same and _alike(node)) or _times_one(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _alike(node: fx.Node) -> bool:
    """The node's value has the shape, dtype and device of its input."""
    source, value = _value(node.args[0]), _value(node)
    if source is None or value is None:
        return False
    return (source.shape, source.dtype, source.device) == (value.shape, value.dtype, value.device)


def _times_one(node: fx.Node) -> bool:
    return node.target is _aten.mul.Tensor and node.args[1] == 1.0 and isinstance(node.args[1], float) and _alike(node)


def _simplify(graph: fx.Graph) -> None:
    """Say the same with cheaper calls: static slices, views of views, squares."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (_aten.view.default, _aten.reshape.default):
            source = node.args[0]
            while source.op == "call_method" and source.target == "view" and node.target is _aten.view.default:
                source = source.args[0]
            kind = "view" if node.target is _aten.view.default else "reshape"
            node.op, node.target, node.args = "call_method", kind, (source, *node.args[1:])
        elif node.target is _aten.to.dtype:
            node.op, node.target = "call_method", "to"
        elif node.target is _aten.slice.Tensor and _value(node.args[0]) is not None:
            node.target, node.args = torch.narrow, _narrow_arguments(node)
        elif node.target is _aten.pow.Tensor_Scalar and node.args[1] == 2:
            node.target, node.args = torch.mul, (node.args[0], node.args[0])


def _narrow_arguments(node: fx.Node) -> tuple[Any, ...]:
    source, dim, start, end = (*node.args, 0, None, None)[:4]
    value = _value(source)
    assert value is not None and len(node.args) < 5, "slices with a step are not expected"
    dim = dim or 0
    first = start or 0
    first = first + value.shape[dim] if first < 0 else first
    last = value.shape[dim] if end is None else min(end, value.shape[dim])
    last = last + value.shape[dim] if last < 0 else last
    return source, dim, first, last - first


def _merge_repeats(graph: fx.Graph) -> None:
    """Compute each pure expression once."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.target is torch.ops.specdec.attend.default:
            continue
        name = (node.op, node.target, str(node.args), str(node.kwargs))
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
        else:
            first[name] = node


def _route(graph: fx.Graph) -> None:
    """Send attention to the context that comes with each call, and the rest to the cheap entry points."""
    fast = _fast_calls()
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        context = graph.placeholder("context")
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.specdec.attend.default:
            node.target = _call_attend
            node.args = (context, *node.args)
        elif not node.kwargs or node.target is _aten.mean.dim:
            node.target = fast.get(node.target, node.target)


def _pure(graph: fx.Graph) -> bool:
    """No operation of the graph writes to a tensor it was given, so that replay leaves the model alone."""
    return not any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes if node.op == "call_function"
    )


Captured = Callable[[Tensor, Tensor, Any], tuple[Tensor, ...]]


def capture(forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, ...]], tokens: Tensor, positions: Tensor) -> Captured | str:
    """The forward for this many rows as a flat graph, or the reason why it cannot be captured.

    forward: (tokens [1, R], positions [1, R], context) to a tuple of tensors.  The result takes the same arguments and gives
    the same values, bit for bit; the caller checks that once on real inputs.
    """
    define_attend()
    try:
        traced = make_fx(lambda t, p: forward(t, p, TraceContext()), pre_dispatch=True)(tokens, positions)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"tracing failed: {str(error).splitlines()[0]}"
    graph = traced.graph
    if not _pure(graph):
        return "the forward writes to its own tensors"
    if any(node.target in (_aten._local_scalar_dense.default, _aten.item.default) for node in graph.nodes):
        return "the forward branches on values"
    _drop_identities(graph)
    _merge_repeats(graph)
    graph.eliminate_dead_code()
    _simplify(graph)
    graph.eliminate_dead_code()
    _route(graph)
    constants = _constants_to_inputs(traced)
    graph.lint()
    traced.recompile()
    run = type(traced).forward
    return lambda tokens, positions, context: run(None, tokens, positions, context, *constants)


def _constants_to_inputs(traced: fx.GraphModule) -> list[Tensor]:
    """Turn weights from attributes, which cost a lookup in each call, into arguments; returns them in order."""
    graph = traced.graph
    place = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: list[Tensor] = []
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        constants.append(getattr(traced, node.target))
        with graph.inserting_after(place):
            place = graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(place)
        graph.erase_node(node)
    return constants


__all__ = ["Captured", "TraceContext", "capture", "define_attend"]

"""Logits processing along each node's own path."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from specdec.drafters.base import Paths
from specdec.errors import InvalidRequestError
from specdec.processing_table import Kind, is_silent, kind_of, state_of

# (request, the tokens after its committed text): what identifies a node's text.
_Path = tuple[int, tuple[int, ...]]


class Processing:
    """Applies HF's logits processors to packed rows, in their order, each row along its own path.

    A processor sees the row that HF would show it: left pads, prompt, committed text and the node's path, in fp32,
    and where the batch index can matter, at the request's own place in a batch of all requests. The other places
    then hold their own request's text, cut or padded to the same length. Neither logits nor text handed in are
    written to. identity: there is nothing to do.  lockstep: a processor keeps state between calls, so rows
    must come one token at a time for all requests together; it is called once a step, on the whole batch.
    undecided: whether one does is seen at the first call, which is to be made in lock step too: a processor of the user's
    own that does not say so by an attribute `stateful` keeps state if the call changes its attributes.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        rows: Sequence[Sequence[int]],
        *,
        pad: int = 0,
        device: torch.device | str = "cpu",
        watch: bool = False,
    ) -> None:
        """rows: HF's input_ids, pads included, one a request.  pad: what a finished row is continued with.

        watch: find out which processors keep state, see `undecided`; without it those that do not say so are taken as pure.
        Raises InvalidRequestError for processors that a causal LM's loop cannot call.
        """
        self._processors = [(processor, kind_of(processor)) for processor in processors]
        self._texts = [_Text(row, torch.device(device)) for row in rows]
        self._pad = pad
        for processor, kind in self._processors:
            _check(processor, kind)
        stateful = [type(p).__name__ for p, kind in self._processors if kind is Kind.STATEFUL]
        self._watched = [(p, state_of(p)) for p, _ in self._processors if watch and is_silent(p)]
        self.identity = not self._processors
        self.lockstep = bool(stateful)
        self.undecided = bool(self._watched) and not stateful
        if stateful:
            _warn(stateful)

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """Append the tokens that were kept to the request's text."""
        self._texts[request].extend(tokens)

    def __call__(self, logits: Tensor, paths: Paths) -> Tensor:
        """Processed logits [R, V] in fp32. logits: [R, V].  paths: asked only when a processor looks at the text."""
        scores = logits.to(torch.float32, copy=True)
        if self.lockstep or self.undecided:
            scores = self._whole_batch(scores, paths())
            self._decide()
            return scores
        scores = self._each(scores, paths)
        self._check_unchanged()
        return scores

    def _decide(self) -> None:
        """After the first call: processors that it changed keep state."""
        if not self.undecided:
            return
        changed = [type(p).__name__ for p, before in self._watched if state_of(p) != before]
        self.undecided, self.lockstep = False, bool(changed)
        if changed:
            _warn(changed)

    def _check_unchanged(self) -> None:
        """Raise when a processor that was taken as pure is seen to keep state: what it has said since may be wrong."""
        for processor, before in self._watched:
            if state_of(processor) != before:
                name = type(processor).__name__
                raise InvalidRequestError(
                    f"{name} changed its own attributes in a later call, so it may keep state: set `stateful = True` on it to "
                    "decode in lock step, or `stateful = False` if its results depend on its arguments alone"
                )

    def _each(self, scores: Tensor, paths: Paths) -> Tensor:
        """Every processor in order, each called as the table says."""
        nodes: list[_Path] | None = None
        for processor, kind in self._processors:
            if kind is Kind.NO_IDS:
                scores = processor(torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device), scores)
                continue
            nodes = paths() if nodes is None else nodes
            if kind is Kind.ROW_WISE:
                scores = self._row_wise(processor, scores, nodes)
            elif kind is Kind.PREFIX:
                scores = self._prefix(processor, scores, nodes)
            else:
                scores = self._indexed(processor, scores, nodes)
        return scores

    def _ids(self, nodes: Sequence[_Path]) -> Tensor:
        """The texts [R, length] of nodes of one length."""
        texts = [self._texts[request].tensor() for request, _ in nodes]
        ends = torch.tensor([path for _, path in nodes], dtype=torch.long, device=texts[0].device)
        if len({len(text) for text in texts}) == 1:
            return torch.cat((torch.stack(texts), ends), 1)
        return torch.stack([torch.cat(pair) for pair in zip(texts, ends, strict=True)])

    def _row_wise(self, processor: LogitsProcessor, scores: Tensor, nodes: list[_Path]) -> Tensor:
        """One call for all nodes whose committed text and path have the same lengths."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (request, path) in enumerate(nodes):
            groups.setdefault((len(self._texts[request]), len(path)), []).append(row)
        if len(groups) == 1:
            one: Tensor = processor(self._ids(nodes), scores)
            return one
        done = torch.empty_like(scores)
        for rows in groups.values():
            where = torch.tensor(rows, device=scores.device)
            done[where] = processor(self._ids([nodes[row] for row in rows]), scores[where])
        return done

    def _prefix(self, processor: LogitsProcessor, scores: Tensor, nodes: list[_Path]) -> Tensor:
        """The constraint of each node's own request, one node at a time: no other batch index is ever asked."""
        allowed: Callable[[int, Tensor], list[int]] = vars(processor)["_prefix_allowed_tokens_fn"]
        done = torch.empty_like(scores)
        for row, node in enumerate(nodes):
            own = PrefixConstrainedLogitsProcessor(_for_request(allowed, node[0]), 1)
            done[row] = own(self._ids([node]), scores[row : row + 1])[0]
        return done

    def _indexed(self, processor: LogitsProcessor, scores: Tensor, nodes: list[_Path]) -> Tensor:
        """Calls on [requests, length] batches; nodes of different requests and equal lengths share a call."""
        first: dict[_Path, int] = {}
        twins = torch.tensor([first.setdefault(node, row) for row, node in enumerate(nodes)], device=scores.device)
        done = torch.empty_like(scores)
        for length, rows in self._batches(nodes, first):
            batch = scores[[rows.get(b, next(iter(rows.values()))) for b in range(len(self._texts))]]
            ids = torch.stack([self._at(b, length, nodes[rows[b]] if b in rows else None) for b in range(len(batch))])
            result = processor(ids, batch)
            for request, row in rows.items():
                done[row] = result[request]
        return done[twins]

    def _batches(self, nodes: list[_Path], first: dict[_Path, int]) -> list[tuple[int, dict[int, int]]]:
        """Batches that cover the distinct nodes: the texts' length, and request -> row."""
        batches: list[tuple[int, dict[int, int]]] = []
        for (request, path), row in first.items():
            length = len(self._texts[request]) + len(path)
            for known, rows in batches:
                if known == length and request not in rows:
                    rows[request] = row
                    break
            else:
                batches.append((length, {request: row}))
        return batches

    def _at(self, request: int, length: int, node: _Path | None) -> Tensor:
        """What place `request` of a batch shows: its node's text, or its own text at that length."""
        if node is not None:
            return self._ids([node])[0]
        text = self._texts[request].tensor()
        return torch.cat((text[:length], text.new_full((max(0, length - len(text)),), self._pad)))

    def _whole_batch(self, scores: Tensor, nodes: list[_Path]) -> Tensor:
        """One call of every processor on all requests, as in HF's loop; finished ones have zeros for logits."""
        requests = torch.tensor([request for request, _ in nodes], device=scores.device)
        length = max(len(self._texts[request]) for request, _ in nodes)
        ids = torch.stack([self._at(b, length, None) for b in range(len(self._texts))])
        batch = scores.new_zeros(len(self._texts), scores.shape[1]).index_copy(0, requests, scores)
        for processor, _ in self._processors:
            batch = processor(ids, batch)
        return batch[requests]


class _Text:
    """A growing text, and its tensor only when asked for."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self._ids = list(ids)
        self._buffer = torch.empty(0, dtype=torch.long, device=device)
        self._filled = 0

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, tokens: Sequence[int]) -> None:
        self._ids.extend(tokens)

    def tensor(self) -> Tensor:
        """A view [length] of the text, for reading."""
        total = len(self._ids)
        if total > len(self._buffer):
            self._buffer = torch.cat((self._buffer[: self._filled], self._buffer.new_empty(2 * total - self._filled)))
        if total > self._filled:
            self._buffer[self._filled : total] = self._buffer.new_tensor(self._ids[self._filled :])
            self._filled = total
        return self._buffer[:total]


def _warn(stateful: Sequence[str]) -> None:
    warnings.warn(
        f"{', '.join(stateful)} keeps state between calls: this call decodes without speculation, in lock step",
        UserWarning,
        stacklevel=2,
    )


def _for_request(allowed: Callable[[int, Tensor], list[int]], request: int) -> Callable[[int, Tensor], list[int]]:
    """The constraint of one request, in a batch of its own."""
    return lambda _, text: allowed(request, text)


def _check(processor: LogitsProcessor, kind: Kind) -> None:
    name = type(processor).__name__
    if kind is Kind.UNSUPPORTED:
        raise InvalidRequestError(f"{name} is not for a causal language model with one token a step; leave it out")
    needed = [
        p.name
        for p in inspect.signature(processor.__call__).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 2:
        raise InvalidRequestError(f"{name} needs {needed}; a processor is called with input_ids and scores only")

"""Runs a causal LM on packed rows with our cache: prefill, tree scoring, commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.cache import KVCache, check_memory
from specdec.chains import CapturedChains
from specdec.examine import examine, most_positions
from specdec.flat import FlatForwards
from specdec.graphs import CapturedForwards, CudaGraphs, Recorder
from specdec.kernels.dispatch import SLOT_TILE, AttentionContext, Backend, choose_backend
from specdec.kernels.rows import Rows, padded_index
from specdec.kernels.transfer import on_device
from specdec.linear import kind_of, pack_linears, packable
from specdec.round_rows import LiveRows, RoundRows, filled_up, prepares_rows, round_number
from specdec.rounds import CapturedRounds, WholeRound
from specdec.rows import chain_rows, doubled_row, tree_rows
from specdec.taps import TapReader
from specdec.twin import Twin
from specdec.types import Scores, TokenTree

logger = logging.getLogger(__name__)

Switch = Literal["auto", "off"]
# See `RunnerOptions.trust_captures`.
_TRUSTED_AFTER = 2


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How a model is run. attention: the backend, see `kernels.dispatch`.  capture, pack: "off" forces the plain way.

    round_rows: likewise, see `specdec.round_rows`.
    compute: run a converted copy of the weights instead of sharing them; for draft models, whose rounding is free.
    row_invariant: on a CPU, a token's logits are the same bits whether 1 or up to 8 rows are scored together.
    capture_after: eager forwards of one size, on a CPU of those that are run alike and not long apart, before the next capture.
    trust_captures: on a CPU, two captures that agreed for two further sizes with the eager forward serve all that are run alike.
    pack_limit_bytes: most memory for packed weights.  cache_limit_bytes: most memory for keys and values; None means what is free
    on a GPU.  prefill_rows: most prompt rows in one forward, so that the mask of a long prompt stays small.  compile: "layers"
    fuses decoder layers through torch.compile, which takes a minute when they first run.  share_from: slots from which equal
    prompts are read once.
    """

    attention: Backend = "auto"
    capture: Switch = "auto"
    pack: Switch = "auto"
    round_rows: Switch = "auto"
    compute: torch.dtype | None = None
    row_invariant: bool = True
    capture_after: int = 4
    trust_captures: bool = False
    max_captures: int = 64
    pack_limit_bytes: int = 2 << 30
    cache_limit_bytes: int | None = None
    prefill_rows: int = 1024
    compile: Literal["off", "layers"] = "off"
    share_from: int = 512


class ModelRunner:
    """A model, its cache for one batch, and forwards over packed rows `[1, R]`.

    The user's model is left as it was found: forwards run on a twin that shares its weights. One batch at a time:
    `begin` starts it, `prefill` fills the cache, `score` and `commit` alternate. forward_s: seconds spent in `forward` so far.
    cold: calls so far that took in a prompt, were the first of their size or came before it is captured: their times say nothing
    of later ones.
    """

    def __init__(self, model: nn.Module, *, taps: Sequence[str] = (), options: RunnerOptions | None = None) -> None:
        """model: a transformers causal LM, refused with the reason when it cannot be run.  taps: see `specdec.taps`."""
        self.options = options or RunnerOptions()
        self.twin = Twin(model, self.options.compute)
        embedding: Any = self.twin.model.get_input_embeddings()  # type: ignore[operator]  # transformers' method
        self.device: torch.device = embedding.weight.device
        self.dtype: torch.dtype = embedding.weight.dtype
        config: Any = self.twin.model.config
        text = config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.max_positions: int | None = most_positions(text)
        self._packed = self._pack()
        self._doubles = bool(self._packed) and self.options.row_invariant
        self._taps = TapReader(self.twin.model, tuple(taps))
        self.specs = examine(self.twin, self.device)
        self._taps.forget()
        if self.options.compile == "layers":
            self.twin.compile_layers()
        self.cache = KVCache(self.specs, 0, 0)
        widths = {(spec.key_width, spec.value_width) for spec in self.specs}
        self.backend = choose_backend(self.options.attention, self.device, widths)
        self._graphs: CapturedForwards | None = None
        self._rounds: CapturedRounds | None = None
        self._chains: CapturedChains | None = None
        if self._can_graph():
            self.use_graphs(CudaGraphs())
        self.flat = self._flat_forwards(self._why_no_capture(text))
        fills_up = self.options.round_rows == "auto" and self.twin.copied and prepares_rows(self.twin.model)
        self._round_rows = RoundRows(self.flat.__contains__) if fills_up else None
        self.forward_s, self._cold = 0.0, 0

    @property
    def cold(self) -> int:
        """See above."""
        replayed = (self._graphs, self._rounds, self._chains)
        return self._cold + self.flat.cold + sum([each.captures.cold for each in replayed if each is not None])

    def _pack(self) -> list[Any]:
        if self.options.pack == "off" or not self.twin.copied:
            return []
        reason = packable(self.twin.model, self.options.pack_limit_bytes)
        if reason is not None:
            logger.debug("linear layers stay as they are: %s", reason)
            return []
        return pack_linears(self.twin.model, grouped=self.options.row_invariant)

    def _can_graph(self) -> bool:
        """CUDA graphs need the attention kernel."""
        return self.options.capture == "auto" and self.device.type == "cuda" and self.twin.copied and self.backend == "triton"

    @property
    def replays(self) -> bool:
        """Whether rounds and chains may be replayed."""
        return self._chains is not None

    def use_graphs(self, record: Recorder) -> None:
        """Capture forwards and rounds by this recorder from now on."""
        after, most = self.options.capture_after, self.options.max_captures
        self._graphs = CapturedForwards(self._eager, after, most, record)
        self._rounds = CapturedRounds(self._eager, after, most, record)
        self._chains = CapturedChains(self._eager, after, most, record)

    def _why_no_capture(self, text: Any) -> str | None:
        """Why forwards are not captured, or None."""
        if self.options.capture == "off":
            return "switched off"
        if self.options.compile != "off":
            return "its layers are compiled"
        if self.device.type != "cpu" or not self.twin.copied:
            return "only CPU twins are captured so far"
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
        if kinds & {"dynamic", "longrope"}:
            return "its rotary embedding branches on the length"
        return None

    def _flat_forwards(self, refused: str | None) -> FlatForwards:
        after, most = self.options.capture_after, self.options.max_captures
        kind = partial(kind_of, grouped=self._doubles)
        trusted, name = _TRUSTED_AFTER if self.options.trust_captures else None, type(self.twin.model).__name__
        return FlatForwards(name, kind, after=after, most=most, trusted_after=trusted, refused=refused)

    def begin(self, num_requests: int, capacity: int) -> None:
        """Start a batch with an empty cache. capacity: slots a request, drafted nodes included."""
        changed = [layer.refresh() for layer in self._packed]
        if any(changed):
            self.flat.clear()
        if self._graphs is not None and self.cache.fits(num_requests, capacity):
            self.cache.reset(num_requests)
            return
        self.cache = KVCache(self.specs, 0, 0)
        check_memory(self.specs, num_requests, capacity, self.device, self.options.cache_limit_bytes)
        self.cache = KVCache(self.specs, num_requests, capacity)

    def prefill(self, texts: Sequence[Sequence[int]], chunk: int | None = None) -> None:
        """Append texts[b] to row b, all rows of all requests packed together; in an empty cache equal texts are run once.

        chunk: most rows in one forward, `RunnerOptions.prefill_rows` by default.  No logits are computed but one row's.
        """
        self._cold += 1
        sources = list(range(len(texts))) if any(self.cache.lengths) else [texts.index(text) for text in texts]
        done = [0 if source == b else len(texts[b]) for b, source in enumerate(sources)]
        while any(d < len(text) for d, text in zip(done, texts, strict=True)):
            room = chunk or self.options.prefill_rows
            taken: list[Sequence[int]] = []
            for b, text in enumerate(texts):
                part = text[done[b] : done[b] + room]
                room -= len(part)
                taken.append(part)
            rows = chain_rows(self.cache, taken)
            live = rows.tokens.shape[1]
            tokens, positions, context = self._inputs(rows, live if self._round_rows is None else round_number(live))
            self._eager(tokens, positions, context(), logits_to_keep=rows.slots.new_zeros(1))
            self._lengthen(rows)
            done = [d + len(part) for d, part in zip(done, taken, strict=True)]
        self.cache.repeat(sources, self.options.share_from)

    def extend(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Append one committed token or more to every row. Returns the logits [B, V] behind the last of each."""
        rows = chain_rows(self.cache, texts)
        logits = self.forward(rows)[0]
        self._lengthen(rows)
        if len(rows.sizes) == 1:
            return logits[-1:]
        return logits.index_select(0, on_device(rows.sizes, self.device).cumsum(0) - 1)

    def _lengthen(self, rows: Rows) -> None:
        self.cache.lengths = [n + size for n, size in zip(rows.base, rows.sizes, strict=True)]

    def score(self, tree: TokenTree) -> Scores:
        """Target logits at every node of every request's tree, in one forward over the live nodes."""
        if self._doubles and tree.num_nodes == (1,):
            logits, *taps = (x[:1] for x in self.forward(doubled_row(self.cache, tree.tokens[:, :1])))
        else:
            logits, *taps = self.forward(tree_rows(self.cache, tree))
        index = None if len(tree.num_nodes) == 1 else padded_index(tree.num_nodes, self.device)
        named = {name: tap[index] for name, tap in zip(self._taps.names, taps, strict=True)} if taps else {}
        return Scores(logits[index], named)

    def whole_round(self, tree: TokenTree) -> WholeRound | None:
        """Score a tree, verify it greedily and keep its path, in one replay; None where there is none for its size (yet).

        The round's one synchronisation is here; `advance` is to follow with what was accepted.
        """
        began = perf_counter()
        found = self._rounds.run(tree, self.cache) if self._rounds is not None else None
        if found is None:
            return None
        verdict, *taps = found
        rows = verdict.tolist()
        self.forward_s += perf_counter() - began
        return WholeRound(rows, dict(zip(self._taps.names, taps, strict=True)))

    def whole_chain(self, pending: TokenTree, depth: int) -> Tensor | None:
        """Append the pending chains and draft [B, depth] greedily behind them, in one replay; None where there is none (yet)."""
        began = perf_counter()
        found = self._chains.run(pending, self.cache, depth) if self._chains is not None else None
        if found is not None:
            self.cache.lengths = [n + size for n, size in zip(self.cache.lengths, pending.num_nodes, strict=True)]
            self.forward_s += perf_counter() - began
        return found

    def advance(self, num_accepted: Sequence[int]) -> None:
        """Lengthen every row by node 0 and what was accepted; their keys and values are in place."""
        self.cache.lengths = [n + 1 + count for n, count in zip(self.cache.lengths, num_accepted, strict=True)]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep node 0 and the accepted path of every row; see `KVCache.commit`."""
        self.cache.commit(paths)

    def forward(self, rows: Rows) -> tuple[Tensor, ...]:
        """Logits [R, V] of the rows in the model's dtype, then each tap [R, H]. K and V are written, lengths stay."""
        began = perf_counter()
        replayed = self._graphs.forward(rows, self.cache) if self._graphs is not None else None
        if replayed is not None:
            self.forward_s += perf_counter() - began
            return replayed
        live = rows.tokens.shape[1]
        size = live if self._round_rows is None else self._round_rows(live)
        out = self.flat(self._eager, *self._inputs(rows, size))
        if size > live:
            out = tuple([each[:live] for each in out])
        self.forward_s += perf_counter() - began
        return out

    def _inputs(self, rows: Rows, size: int) -> tuple[Tensor, Tensor, Callable[[], Any]]:
        """Tokens and positions [1, size], and what makes the context of a forward over these rows, filled up to so many."""
        return filled_up(rows.tokens, size), filled_up(rows.positions, size), partial(self._context, rows, size)

    def _context(self, rows: Rows, size: int) -> Any:
        tile, live = SLOT_TILE if self.options.row_invariant else 1, rows.tokens.shape[1]
        context = AttentionContext(rows, self.cache.layers, self.backend, tile)
        return context if size == live else LiveRows(context, live, size)

    @torch.no_grad()
    def _eager(self, tokens: Tensor, positions: Tensor, context: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        # Our attention ignores the mask; without one, some families look for padding in the ids, which is a synchronisation.
        mask = torch.ones_like(tokens)
        out = self.twin(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False, tree_ctx=context, **kwargs)
        logits = out.logits[0]
        return (logits, *self._taps.read(logits))

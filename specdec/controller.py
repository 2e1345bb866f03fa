"""One round of speculative decoding: plan, propose, select, score, verify, commit, observe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from specdec.drafters.base import Drafter, Paths
from specdec.errors import NonFiniteLogitsError
from specdec.kernels.transfer import on_device
from specdec.noise import Noise, Stream
from specdec.planner import Planner
from specdec.runner import ModelRunner
from specdec.types import Budget, Committed, Draft, Law, Load, RoundStats, Scores, Slot, TokenTree
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import Rule
from specdec.verify.walk import verdict_rows

# (logits [R, V], paths) to processed logits [R, V]; None leaves logits as they are.
Process = Callable[[Tensor, Paths], Tensor]


@dataclass(frozen=True, slots=True)
class Judged:
    """What verification gave, all in place in the target's cache. scored, verified: when each phase ended.

    parents: of each request's nodes, the root left out; None for chains.  scores, raw: processed and raw logits at every node; None
    for a round that was one replay.
    """

    committed: Committed
    scored: float
    verified: float
    parents: tuple[tuple[int, ...], ...] | None = None
    scores: Scores | None = None
    raw: Scores | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a round gave."""

    judged: Judged
    stats: RoundStats


class Timed(Protocol):
    """What runs a model and says how long. forward_s: seconds in its forwards so far.

    cold: calls so far that took in a prompt, were the first of their size or came before it is captured.
    """

    @property
    def forward_s(self) -> float:
        """See above."""

    @property
    def cold(self) -> int:
        """See above."""


@dataclass(frozen=True, slots=True)
class _Counted:
    """What the runners have counted so far, or within a round. See `Timed`."""

    forward_s: float
    target_cold: int
    draft_cold: int

    def since(self, before: _Counted) -> _Counted:
        """What was added."""
        return _Counted(
            self.forward_s - before.forward_s, self.target_cold - before.target_cold, self.draft_cold - before.draft_cold
        )


class Controller:
    """Holds the parts of one call and runs its rounds. Each part sees the values it is handed, never its caller."""

    def __init__(
        self,
        target: ModelRunner,
        drafter: Drafter | None,
        rule: Rule,
        planner: Planner,
        noise: Noise,
        process: Process | None,
        *,
        needs_scores: bool = True,
    ) -> None:
        """rule and drafter are a compatible pair; target and drafter have begun the batch.

        needs_scores: every step is to carry its scores, so that no round is one replay.
        """
        self.target, self.drafter, self.rule, self.planner = target, drafter, rule, planner
        self.noise, self.process = noise, process
        nothing = torch.zeros(0, dtype=torch.long, device=target.device)
        self._runners: list[Timed] = [target, *filter(None, [getattr(drafter, "runner", None)])]
        self._idle = NoiseChooser(noise, nothing, nothing, Stream.ACCEPT)
        self._whole = rule.name == "greedy" and process is None and not needs_scores

    def step(self, load: Load, last_tokens: Sequence[int]) -> Step:
        """One round for load.requests, which are the cache's rows in order; last_tokens[i] is node 0 of row i."""
        began, before = perf_counter(), self._counted()
        budget = self.planner.plan(load)
        draft = self.planner.select(self._propose(budget, last_tokens))
        drafted = perf_counter()
        judged = self._replay(draft, load) or self._judge(draft, load)
        if self.drafter is not None:
            self.drafter.commit(judged.committed)
        slots = _slots(draft)
        counted = self._counted().since(before)
        stats = _round_stats(draft, budget, judged, (began, drafted, perf_counter()), counted, slots)
        self.planner.observe(stats)
        return Step(judged, stats)

    def _replay(self, draft: Draft, load: Load) -> Judged | None:
        """Score, verify and commit in one replay, where rule and sizes allow it."""
        whole = self.target.whole_round(draft.tree) if self._whole else None
        if whole is None:
            return None
        scored = perf_counter()
        committed = committed_of(whole.verdict, load.requests, whole.taps)
        self.target.advance(committed.num_accepted)
        return Judged(committed, scored, perf_counter(), _parents(draft.tree, whole.verdict))

    def _judge(self, draft: Draft, load: Load) -> Judged:
        """Score, verify and commit, one after the other."""
        raw = self.target.score(draft.tree)
        scored = perf_counter()
        scores = self._processed(raw, draft.tree, load.requests)
        verdict = self.rule.verify(draft, scores, self._chooser(load))
        # The round's one synchronisation.
        rows = verdict_rows(verdict, draft.tree.tokens, draft.tree.parents).tolist()
        committed = committed_of(rows, load.requests, raw.taps, is_chain=verdict.path is None)
        verified = perf_counter()
        self.target.commit(committed.paths)
        parents = None if verdict.path is None else _parents(draft.tree, rows)
        return Judged(committed, scored, verified, parents, scores, raw)

    def _propose(self, budget: Budget, last_tokens: Sequence[int]) -> Draft:
        """A round that drafts nothing does not ask the drafter."""
        if self.drafter is None or not any(budget.nodes):
            return Draft(root_tree(last_tokens, self.target.device), Law.DETERMINISTIC)
        return self.drafter.propose(budget)

    def _processed(self, raw: Scores, tree: TokenTree, requests: tuple[int, ...]) -> Scores:
        """The logits that a rule decides on: processed along each node's own path, in fp32 unless only ranks matter."""
        if self.process is None:
            return raw if self.rule.name == "greedy" else Scores(raw.logits.float(), raw.taps)
        batch, nodes, vocabulary = raw.logits.shape
        rows = self.process(raw.logits.reshape(-1, vocabulary), lambda: paths_of(tree, requests))
        return Scores(rows.view(batch, nodes, vocabulary), raw.taps)

    def _chooser(self, load: Load) -> NoiseChooser:
        """Fresh noise for this round; greedy decoding draws nothing, so it gets the idle one."""
        if self.rule.name == "greedy":
            return self._idle
        device = self.target.device
        requests, starts = on_device([load.requests, load.lengths], device)
        return NoiseChooser(self.noise, requests, starts, Stream.ACCEPT)

    def _counted(self) -> _Counted:
        draft = self._runners[1:]
        return _Counted(sum([r.forward_s for r in self._runners]), self.target.cold, sum([r.cold for r in draft]))


def _slots(draft: Draft) -> tuple[tuple[Slot, ...], ...] | None:
    """One more small read, behind the verdict's, and only where a planner asked for the values."""
    if draft.slots is None:
        return None
    rows = torch.stack((draft.slots.largest, draft.slots.entropy, draft.slots.drawn), 2).tolist()
    return tuple([tuple([(a, b, c) for a, b, c in row[: n - 1]]) for row, n in zip(rows, draft.tree.num_nodes, strict=True)])


def _round_stats(
    draft: Draft,
    budget: Budget,
    judged: Judged,
    marks: tuple[float, float, float],
    counted: _Counted,
    slots: tuple[tuple[Slot, ...], ...] | None,
) -> RoundStats:
    """marks: when the round began, when it had drafted, and when it ended."""
    began, drafted, ended = marks
    sizes = draft.tree.num_nodes
    drafted_tokens = tuple([n - 1 for n in sizes])
    return RoundStats(
        requests=judged.committed.requests,
        drafted=drafted_tokens,
        accepted=judged.committed.num_accepted,
        depth=tuple(map(min, drafted_tokens, budget.depth)),
        num_rows=sum(sizes),
        draft_s=drafted - began,
        target_s=judged.scored - drafted,
        verify_s=judged.verified - judged.scored,
        other_s=ended - judged.verified,
        forward_s=counted.forward_s,
        cold_draft=counted.draft_cold > 0,
        cold_target=counted.target_cold > 0,
        drafter=budget.drafter,
        forecast=budget.forecast,
        paths=judged.committed.paths,
        parents=judged.parents,
        slots=slots,
    )


def _parents(tree: TokenTree, rows: list[list[int]]) -> tuple[tuple[int, ...], ...] | None:
    """Of each request's nodes, the root left out. rows: of `verdict_rows`, of a verdict with a path."""
    if tree.is_chain:
        return None
    return tuple([tuple(row[2 + (len(row) - 2) // 3 * 2 :][: n - 1]) for row, n in zip(rows, tree.num_nodes, strict=True)])


def root_tree(tokens: Sequence[int], device: torch.device) -> TokenTree:
    """Trees of one node: plain decoding."""
    roots = on_device(tokens, device)[:, None]
    return TokenTree(roots, torch.full_like(roots, -1), (1,) * len(tokens), is_chain=True)


def paths_of(tree: TokenTree, requests: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """For each node of the padded [B * N] rows: its request, and the tokens below the root on its path."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    paths: list[tuple[int, tuple[int, ...]]] = []
    for b, request in enumerate(requests):
        own: list[tuple[int, ...]] = [()]
        for n in range(1, len(tokens[b])):
            live = n < tree.num_nodes[b]
            own.append((*own[parents[b][n]], tokens[b][n]) if live else ())
        paths.extend((request, path) for path in own)
    return paths


def committed_of(
    verdict: list[list[int]], requests: tuple[int, ...], taps: Mapping[str, Tensor], *, is_chain: bool = False
) -> Committed:
    """A round's additions from what was read back. verdict: rows of `verdict_rows`.

    Raises NonFiniteLogitsError where a token would have been chosen from a row with NaN; nothing is committed then.
    """
    counts, tokens, paths, bad = [], [], [], []
    for request, (count, token, *rest) in zip(requests, verdict, strict=True):
        counts.append(count)
        tokens.append((*rest[:count], token))
        paths.append(tuple(range(1, count + 1) if is_chain else rest[len(rest) // 3 :][:count]))
        if token < 0:
            bad.append(request)
    if bad:
        raise NonFiniteLogitsError(
            f"the target's logits are NaN for request(s) {bad}; check the weights and dtype, or pass remove_invalid_values=True"
        )
    return Committed(requests, tuple(tokens), tuple(counts), tuple(paths), taps)

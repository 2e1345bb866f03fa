"""Exact enumeration: a rule's every draw is explored with its weight, so that the law of its output is a finite sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from specdec.types import Draft, Law, Scores, TokenTree, Verdict

Law1 = dict[tuple[int, ...], float]


class Replay:
    """A chooser that replays a prefix of decisions and notes how many ways the next one can go."""

    def __init__(self, prefix: list[int]) -> None:
        self.prefix, self.taken, self.options = prefix, [], []  # type: ignore[var-annotated]
        self.weight = 1.0

    def _decide(self, weights: list[float]) -> int:
        at = len(self.taken)
        choice = self.prefix[at] if at < len(self.prefix) else next(i for i, w in enumerate(weights) if w > 0)
        self.taken.append(choice)
        self.options.append([i for i, w in enumerate(weights) if w > 0])
        self.weight *= weights[choice]
        return choice

    def accept(self, prob: Tensor) -> Tensor:
        flat = [self._decide([1.0 - p, p]) for p in prob.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.bool).view(prob.shape)

    def pick(self, weights: Tensor) -> Tensor:
        rows = weights.reshape(-1, weights.shape[-1])
        rows = rows / rows.sum(-1, keepdim=True)
        return torch.tensor([self._decide(r) for r in rows.tolist()]).view(weights.shape[:-1])

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        raise NotImplementedError("the coupled rule is tested by identity, not by enumeration")

    def branches(self) -> list[list[int]]:
        """The prefixes that leave this replay after its own prefix, each at another decision or by another option."""
        places = range(len(self.prefix), len(self.taken))
        return [[*self.taken[:at], option] for at in places for option in self.options[at] if option != self.taken[at]]

    def following(self) -> list[int] | None:
        """The next prefix in depth-first order."""
        for at in range(len(self.taken) - 1, -1, -1):
            later = [o for o in self.options[at] if o > self.taken[at]]
            if later:
                return [*self.taken[:at], later[0]]
        return None


def enumerate_all(run: Callable[[Replay], tuple[int, ...] | Law1]) -> Law1:
    """The law of what `run` returns; a dictionary is a law of its own, mixed in with the branch's weight."""
    law: Law1 = {}
    prefix: list[int] | None = []
    while prefix is not None:
        replay = Replay(prefix)
        out = run(replay)
        for outcome, weight in out.items() if isinstance(out, dict) else ((out, 1.0),):
            law[outcome] = law.get(outcome, 0.0) + replay.weight * weight
        prefix = replay.following()
    return law


def total_variation(a: Law1, b: Law1) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys()) / 2


class Table:
    """A tabular language model: a random law for every context."""

    def __init__(self, vocabulary: int, seed: int, kind: str = "random") -> None:
        self.vocabulary, self.seed, self.kind = vocabulary, seed, kind
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, context: tuple[int, ...]) -> Tensor:
        if context not in self._rows:
            generator = torch.Generator().manual_seed(hash((self.seed, context)) % 2**31)
            row = torch.rand(self.vocabulary, generator=generator, dtype=torch.float64) ** 2 + 1e-3
            if self.kind == "zeros":
                row[torch.randint(self.vocabulary, (1,), generator=generator)] = 0.0
            if self.kind == "one-hot":
                row = torch.zeros_like(row)
                row[torch.randint(self.vocabulary, (1,), generator=generator)] = 1.0
            self._rows[context] = row / row.sum()
        return self._rows[context]


def continue_law(p: Table, start: tuple[int, ...], length: int) -> Law1:
    """The target's own law of texts of this length that begin with `start`."""
    if len(start) >= length:
        return {start[:length]: 1.0}
    law: Law1 = {}
    for token, weight in enumerate(p(start).tolist()):
        if weight:
            for text, rest in continue_law(p, (*start, token), length).items():
                law[text] = law.get(text, 0.0) + weight * rest
    return law


def joint(laws: list[Law1]) -> Law1:
    """The product law of independent requests, texts joined."""
    out: Law1 = {}
    for combination in product(*(law.items() for law in laws)):
        text = sum((t for t, _ in combination), ())
        weight = 1.0
        for _, w in combination:
            weight *= w
        out[text] = out.get(text, 0.0) + weight
    return out


def scores_of(p: Table, contexts: list[tuple[int, ...]], tree: TokenTree) -> Scores:
    """log p at every node of every request; padding repeats the root."""
    rows, tokens, parents = [], tree.tokens.tolist(), tree.parents.tolist()
    for b, context in enumerate(contexts):
        paths: list[tuple[int, ...]] = [context]
        for n in range(1, tree.tokens.shape[1]):
            live = n < tree.num_nodes[b]
            paths.append((*paths[parents[b][n]], tokens[b][n]) if live else context)
        rows.append(torch.stack([p(path) for path in paths]))
    return Scores(torch.stack(rows).log())


def draw_chain(q: Table, contexts: list[tuple[int, ...]], counts: tuple[int, ...], replay: Replay) -> Draft:
    """Chains drawn from q, counts[b] tokens each, padded to the longest."""
    longest = max(counts)
    tokens = torch.zeros(len(contexts), longest + 1, dtype=torch.long)
    laws = torch.zeros(len(contexts), longest + 1, q.vocabulary, dtype=torch.float64)
    for b, context in enumerate(contexts):
        for k in range(counts[b]):
            laws[b, k] = q(context)
            token = int(replay.pick(q(context)[None]))
            tokens[b, k + 1] = token
            context = (*context, token)
    parents = torch.arange(-1, longest).expand(len(contexts), -1)
    return Draft(TokenTree(tokens, parents, tuple(n + 1 for n in counts), True), Law.INDEPENDENT, laws)


class Replays:
    """A chooser for many replays at once: `rows` rows of a batch belong to each, and replays know nothing of each other."""

    def __init__(self, prefixes: list[list[int]], rows: int) -> None:
        self.each = [Replay(prefix) for prefix in prefixes]
        self._rows = rows

    def of_row(self, row: int) -> Replay:
        """The replay that decides for this row of the batch."""
        return self.each[row // self._rows]

    def accept(self, prob: Tensor) -> Tensor:
        return torch.stack([self.of_row(b).accept(row) for b, row in enumerate(prob)])

    def pick(self, weights: Tensor) -> Tensor:
        return torch.stack([self.of_row(b).pick(row) for b, row in enumerate(weights)])

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        raise NotImplementedError("the coupled rule is tested by identity, not by enumeration")


Texts = tuple[tuple[int, ...], ...]
Verify = Callable[[Draft, Scores, Replays], Verdict]
Draw = Callable[[list[tuple[int, ...]], Replays], Draft]


def laws_of_round(verify: Verify, draw: Draw, p: Table, starts: list[Texts]) -> list[dict[Texts, float]]:
    """For each start, the law of the texts after a round, all branches being rows of one batch as soon as they are known."""
    laws: list[dict[Texts, float]] = [{} for _ in starts]
    requests = len(starts[0])
    pending: list[tuple[int, list[int]]] = [(start, []) for start in range(len(starts))]
    while pending:
        replays = Replays([prefix for _, prefix in pending], requests)
        contexts = [text for start, _ in pending for text in starts[start]]
        draft = draw(contexts, replays)
        texts = extend(contexts, draft.tree, verify(draft, scores_of(p, contexts, draft.tree), replays))
        found = []
        for place, (start, _) in enumerate(pending):
            replay = replays.each[place]
            out = tuple(texts[place * requests : (place + 1) * requests])
            laws[start][out] = laws[start].get(out, 0.0) + replay.weight
            found += [(start, prefix) for prefix in replay.branches()]
        pending = found
    return laws


def law_of_rounds(verify: Verify, draw: Draw, p: Table, contexts: Texts, rounds: int, length: int) -> Law1:
    """The law of the first `length` tokens of every request after some rounds, completed by p.

    Draws of different rounds are independent in a replay, so that a round is enumerated once for each text that it meets.
    """
    law = {contexts: 1.0}
    for _ in range(rounds):
        starts = list(law)
        after: dict[Texts, float] = {}
        for start, outcomes in zip(starts, laws_of_round(verify, draw, p, starts), strict=True):
            for texts, weight in outcomes.items():
                cut = tuple(text[:length] for text in texts)
                after[cut] = after.get(cut, 0.0) + law[start] * weight
        law = after
    total: Law1 = {}
    for texts, weight in law.items():
        for text, rest in joint([continue_law(p, text, length) for text in texts]).items():
            total[text] = total.get(text, 0.0) + weight * rest
    return total


def expected_acceptance(verify: Verify, draw: Draw, p: Table) -> float:
    """How many drafted tokens a round keeps on average behind the text (0,)."""
    outcomes = laws_of_round(verify, draw, p, [((0,),)])[0]
    return sum(weight * (len(text) - 2) for (text,), weight in outcomes.items())


def draw_tree(
    q: Table, contexts: list[tuple[int, ...]], shapes: Sequence[Sequence[int]], replays: Replays, *, without: bool = False
) -> Draft:
    """Trees of the given parents, every child drawn from q behind its parent, on its own or without replacement.

    shapes: the parents of each request's nodes, -1 first, repeated for every replay. Where nothing is left to draw a child
    repeats the node's first child.
    """
    shapes = [shapes[b % len(shapes)] for b in range(len(contexts))]
    nodes = max(map(len, shapes))
    tokens, parents = torch.zeros(len(contexts), nodes, dtype=torch.long), torch.zeros(len(contexts), nodes, dtype=torch.long)
    laws = torch.zeros(len(contexts), nodes, q.vocabulary, dtype=torch.float64)
    for b, context in enumerate(contexts):
        texts, left, first = [context], [q(context)], {}
        laws[b, 0], parents[b, 0] = q(context), -1
        for n, parent in enumerate(shapes[b][1:], start=1):
            rest = left[parent]
            token = int(replays.of_row(b).pick(rest)) if float(rest.sum()) > 0 else first[parent]
            first.setdefault(parent, token)
            if without:
                left[parent] = rest.index_fill(0, torch.tensor([token]), 0.0)
            texts.append((*texts[parent], token))
            left.append(q(texts[-1]))
            tokens[b, n], parents[b, n], laws[b, n] = token, parent, q(texts[-1])
    law = Law.WITHOUT_REPLACEMENT if without else Law.INDEPENDENT
    return Draft(TokenTree(tokens, parents, tuple(map(len, shapes))), law, laws)


def drawing(
    q: Table, shapes: Sequence[Sequence[int]], without: bool = False, *, chain: bool = False, told: Law | None = None
) -> Draw:
    """Draws as `draw_tree` does. chain: the trees are promised to be chains.  told: what the draft says of its draws instead."""

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = draw_tree(q, texts, shapes, replays, without=without)
        return replace(draft, tree=replace(draft.tree, is_chain=chain), law=draft.law if told is None else told)

    return draw


def law_error(verify: Verify, draw: Draw, p: Table, requests: int, rounds: int, length: int) -> float:
    """How far the joint law of the requests' first `length` tokens is from the target's. Request b's text begins with b."""
    contexts = tuple((b,) for b in range(requests))
    ours = law_of_rounds(verify, draw, p, contexts, rounds, length + 1)
    assert abs(sum(ours.values()) - 1) < 1e-12
    return total_variation(ours, joint([continue_law(p, context, length + 1) for context in contexts]))


def extend(contexts: list[tuple[int, ...]], tree: TokenTree, verdict: Verdict) -> list[tuple[int, ...]]:
    """The texts after a verdict."""
    out = []
    for b, context in enumerate(contexts):
        count = int(verdict.num_accepted[b])
        nodes = list(range(1, count + 1)) if verdict.path is None else verdict.path[b, :count].tolist()
        out.append((*context, *(int(tree.tokens[b, n]) for n in nodes), int(verdict.next_token[b])))
    return out

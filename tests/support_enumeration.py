"""Exact enumeration: a rule's every draw is explored with its weight, so that the law of its output is a finite sum."""

from __future__ import annotations

from collections.abc import Callable
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
    rows = []
    for b, context in enumerate(contexts):
        paths: list[tuple[int, ...]] = [context]
        for n in range(1, tree.tokens.shape[1]):
            live = n < tree.num_nodes[b]
            paths.append((*paths[int(tree.parents[b, n])], int(tree.tokens[b, n])) if live else context)
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


def extend(contexts: list[tuple[int, ...]], tree: TokenTree, verdict: Verdict) -> list[tuple[int, ...]]:
    """The texts after a verdict."""
    out = []
    for b, context in enumerate(contexts):
        count = int(verdict.num_accepted[b])
        nodes = list(range(1, count + 1)) if verdict.path is None else verdict.path[b, :count].tolist()
        out.append((*context, *(int(tree.tokens[b, n]) for n in nodes), int(verdict.next_token[b])))
    return out

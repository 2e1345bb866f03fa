"""Does what was drawn follow the law that was told? Chi-square tests with a stated power, for the output and for the drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Drafter, DraftSetup
from specdec.generator import SpeculativeGenerator
from specdec.trees.layout import depths
from specdec.types import Budget, Committed, Draft, Law

# Chance that a test refuses what is right, and that it finds a law as far away as its `smallest` says.
ALPHA, POWER = 1e-4, 0.99
# A cell in which fewer samples are expected is taken together with others, so that chi-square is the statistic's law.
_LEAST = 10.0
# Paths that are followed further, at most, on each level.
_OPEN = 128
# Ranks of q that are told apart.
_RANKS = 24
# Tokens whose joint law is tested.
DEPTH = 3
# Logits and rows of one sampled batch, and rows of one reference forward.
_MOST_LOGITS, _MOST_ROWS, _FORWARD_ROWS = 1 << 22, 256, 64

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A chi-square test. p: the chance of a statistic as large or larger, where the law is right.

    smallest: the least total variation, over these cells, that so many samples find with probability `POWER`.  impossible:
    samples that the law gives no probability.  distance: total variation between law and frequencies, noise included.
    alpha: the chance to refuse what is right.
    """

    samples: int
    cells: int
    statistic: float
    p: float
    distance: float
    smallest: float
    impossible: int = 0
    alpha: float = ALPHA

    @property
    def refused(self) -> bool:
        """Whether the law is not what was told."""
        return self.p < self.alpha or self.impossible > 0


def tail(statistic: float, freedom: int) -> float:
    """P(chi-square with so many degrees of freedom >= statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def critical(freedom: int, alpha: float) -> float:
    """What chi-square exceeds with probability alpha."""
    return _crossing(lambda x: alpha - tail(x, freedom), 40.0 * (freedom + 10))


def smallest_distance(samples: int, freedom: int, alpha: float = ALPHA) -> float:
    """The least total variation that a test at this alpha finds with probability `POWER`, wherever the difference lies.

    The statistic's noncentrality is n sum (p' - p)^2 / p >= n (sum |p' - p|)^2 = 4 n TV^2 (Cauchy and Schwarz), and grows with it
    the chance to exceed the critical value.
    """
    limit = critical(freedom, alpha)
    shift = _crossing(lambda shift: _beyond(limit, freedom, shift) - POWER, 4 * limit + 200.0)
    return min(1.0, math.sqrt(shift / samples) / 2)


def _beyond(limit: float, freedom: int, shift: float) -> float:
    """P(noncentral chi-square > limit): a Poisson mixture of central ones. shift: the noncentrality."""
    count = torch.arange(int(shift / 2 + 20 * (shift / 2 + 1) ** 0.5) + 20, dtype=torch.float64)
    mean = torch.tensor(shift / 2, dtype=torch.float64)
    weights = (torch.special.xlogy(count, mean) - mean - torch.lgamma(count + 1)).exp()
    return float((weights * torch.special.gammaincc(count + freedom / 2, torch.full_like(count, limit / 2))).sum())


def _crossing(rising: Callable[[float], float], high: float) -> float:
    """Where a rising function crosses 0 between 0 and high."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


class Cells:
    """The target's law of the first new tokens, over paths that are likely enough to be counted.

    A cell is a path with whatever follows it in no longer cell; unlikely cells are taken together. law: of the cells.
    """

    def __init__(
        self, behind: Callable[[Sequence[Path]], Tensor], depth: int, samples: int, ends: Collection[int], *, exact: bool = True
    ) -> None:
        """behind: [R, V], the law behind each of R paths.  depth: tokens.  ends: tokens behind which nothing follows.

        exact: a token of probability 0 is impossible; else it may lie beyond an edge that rounding moves.
        """
        self._exact = exact
        self._possible: dict[Path, Tensor] = {}
        mass: dict[Path, float] = {}
        open_: dict[Path, float] = {(): 1.0}
        for _ in range(depth):
            found = self._level(open_, behind(list(open_)).double().cpu(), samples, mass)
            likely = sorted((path for path in found if path[-1] not in ends), key=lambda path: -found[path])[:_OPEN]
            mass |= {path: value for path, value in found.items() if path not in set(likely)}
            open_ = {path: found[path] for path in likely}
            if not open_:
                break
        self._take_together(mass | open_, samples)

    def _level(self, open_: dict[Path, float], rows: Tensor, samples: int, mass: dict[Path, float]) -> dict[Path, float]:
        """The likely paths one token longer; what is left behind each open path goes to mass."""
        found: dict[Path, float] = {}
        for (path, value), row in zip(open_.items(), rows, strict=True):
            if self._exact:
                self._possible[path] = row > 0
            likely = (row * value * samples >= _LEAST).nonzero()[:, 0].tolist()
            own = {(*path, token): value * float(row[token]) for token in likely}
            mass[path] = max(0.0, value - sum(own.values()))
            found |= own
        return found

    def _take_together(self, mass: dict[Path, float], samples: int) -> None:
        order = sorted(mass, key=lambda path: -mass[path])
        alone = [path for path in order if mass[path] * samples >= _LEAST]
        rest = sum(mass[path] for path in order[len(alone) :])
        self.law = [mass[path] for path in alone]
        if not alone or rest * samples >= _LEAST:
            self.law.append(rest)
        else:
            self.law[-1] += rest
        self._index = {path: min(place, len(self.law) - 1) for place, path in enumerate(order)}

    def place(self, text: Path) -> int:
        """The cell of a text; -1 where the target cannot say it."""
        for length, token in enumerate(text):
            possible = self._possible.get(text[:length])
            if possible is None:
                break
            if not possible[token]:
                return -1
        return next(self._index[text[:length]] for length in range(len(text), -1, -1) if text[:length] in self._index)

    def fit(self, counts: Sequence[int], impossible: int) -> Fit:
        """The test of so many samples in each cell."""
        samples, law = max(1, sum(counts)), self.law
        statistic = sum((seen - samples * p) ** 2 / (samples * p) for seen, p in zip(counts, law, strict=True) if p > 0)
        distance = sum(abs(seen / samples - p) for seen, p in zip(counts, law, strict=True)) / 2
        freedom = len(law) - 1
        if not freedom:
            return Fit(samples, 1, 0.0, 1.0, 0.0, 1.0, impossible)
        smallest = smallest_distance(samples, freedom)
        return Fit(samples, len(law), statistic, tail(statistic, freedom), distance, smallest, impossible)


@dataclass(slots=True)
class _Depth:
    """Of one depth: how often each rank of q was drawn, how often it should be, and the covariance of the difference."""

    seen: Tensor
    expected: Tensor
    covariance: Tensor


class DraftTally:
    """Draws against the q that the drafter tells, by rank of the drawn token in its own q and by depth.

    Given what came before it each draw has law q, so sums of (drawn - q) over unlike contexts have mean 0 and a covariance that
    is the sum of those of each draw. impossible: tokens that q gives no probability.  laws: of the drafts that had any node.
    """

    def __init__(self) -> None:
        """Nothing is drawn yet."""
        self.laws: set[Law] = set()
        self.impossible, self.draws = 0, 0
        self._depths: dict[int, _Depth] = {}

    def add(self, draft: Draft) -> None:
        """Count a draft; only independent ones are counted."""
        nodes = draft.tree.tokens.shape[1]
        if nodes > 1 and max(draft.tree.num_nodes) > 1:
            self.laws.add(draft.law)
        if draft.law is not Law.INDEPENDENT or draft.q is None or nodes == 1:
            return
        sizes = torch.tensor(draft.tree.num_nodes, device=draft.q.device)[:, None]
        number = torch.arange(nodes, device=draft.q.device)
        request, node = ((number > 0) & (number < sizes)).nonzero(as_tuple=True)
        rows = draft.q[request, draft.tree.parents[request, node]].double()
        depth = depths(draft.tree.parents)[request, node]
        self._count(rows / rows.sum(-1, keepdim=True), draft.tree.tokens[request, node], depth)

    def _count(self, rows: Tensor, tokens: Tensor, depth: Tensor) -> None:
        """rows: [M, V], q of each draw.  tokens, depth: [M]."""
        own = rows.gather(1, tokens[:, None])
        before = torch.arange(rows.shape[1], device=rows.device) < tokens[:, None]
        rank = ((rows > own) | ((rows == own) & before)).sum(1)
        top = rows.topk(min(_RANKS, rows.shape[1]), dim=1).values
        cells = torch.cat((top, (1 - top.sum(1, keepdim=True)).clamp(min=0)), 1).cpu()
        rank, depth = rank.clamp(max=top.shape[1]).cpu(), depth.cpu()
        self.impossible += int((own <= 0).sum())
        self.draws += len(tokens)
        for level in depth.unique().tolist():
            here = cells[depth == level]
            seen = torch.bincount(rank[depth == level], minlength=cells.shape[1]).double()
            sums = here.sum(0)
            tally = self._depths.setdefault(level, _Depth(*(torch.zeros_like(x) for x in (seen, sums, sums.diag()))))
            tally.seen += seen
            tally.expected += sums
            tally.covariance += sums.diag() - here.T @ here

    def fits(self) -> dict[int, Fit]:
        """The test of each depth that has two cells or more to tell apart."""
        found = {level: _rank_fit(tally, ALPHA / len(self._depths)) for level, tally in sorted(self._depths.items())}
        return {level: fit for level, fit in found.items() if fit is not None}


def _rank_fit(tally: _Depth, alpha: float) -> Fit | None:
    """Rare ranks are taken together: the ranks' expected counts fall, so they are the last ones."""
    alone = int((tally.expected[:-1] >= _LEAST).sum())
    if float(tally.expected[alone:].sum()) < _LEAST:
        alone -= 1
    if alone < 1:
        return None
    together = torch.zeros(alone + 1, len(tally.expected), dtype=torch.float64)
    together[:alone, :alone] = torch.eye(alone, dtype=torch.float64)
    together[alone, alone:] = 1.0
    off = together @ (tally.seen - tally.expected)
    covariance = together @ tally.covariance @ together.T
    samples = int(tally.seen.sum())
    freedom = int(torch.linalg.matrix_rank(covariance, hermitian=True, rtol=1e-9))
    if not freedom:
        return None
    statistic = float(off @ torch.linalg.pinv(covariance, hermitian=True, rtol=1e-9) @ off)
    distance = float(off.abs().sum()) / samples / 2
    smallest = smallest_distance(samples, freedom, alpha)
    return Fit(samples, alone + 1, statistic, tail(statistic, freedom), distance, smallest, 0, alpha)


@dataclass(frozen=True, slots=True)
class Draws:
    """Samples to take. prompt: token ids.  how: arguments of `generate`.  seed: of the whole set.  progress: told the part done.

    exact: see `Cells`.
    """

    prompt: Path
    count: int
    how: Mapping[str, Any]
    seed: int
    progress: Callable[[float], None]
    exact: bool


def sampled_fit(generator: SpeculativeGenerator, draws: Draws) -> Fit:
    """The generator's samples of the first `DEPTH` new tokens against transformers' law of them.

    Noise comes from torch's CPU generator, seeded for the while, so that the rule is the one that runs without a seed.
    """
    target, prompt = generator.target, list(draws.prompt)
    reference = Reference(target, prompt, draws.how)

    def behind(paths: Sequence[Path]) -> Tensor:
        return reference.scores([[*prompt, *path] for path in paths])[1].softmax(-1)

    cells = Cells(behind, DEPTH, draws.count, ends_of(target), exact=draws.exact)
    counts, impossible, left = [0] * len(cells.law), 0, draws.count
    most = max(1, min(_MOST_ROWS, _MOST_LOGITS // generator.engine.runner.vocabulary))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draws.seed)
        while left:
            rows = continued(generator, target, [prompt], DEPTH + 2, {**draws.how, "num_return_sequences": min(left, most)})
            for place in [cells.place(tuple(row[:DEPTH])) for row in rows]:
                if place < 0:
                    impossible += 1
                else:
                    counts[place] += 1
            left -= len(rows)
            draws.progress(1 - left / draws.count)
    return cells.fit(counts, impossible)


class Reference:
    """Logits behind a text by transformers' own forward and processors; no part of specdec's loop is in it."""

    def __init__(self, target: PreTrainedModel, prompt: Sequence[int], how: Mapping[str, Any]) -> None:
        """how: arguments of `generate`, from which transformers makes the processors for this prompt."""
        found: dict[str, Any] = {}

        def keep(model: Any, input_ids: Tensor, logits_processor: Any = None, **rest: Any) -> Tensor:
            found["processor"] = logits_processor
            return input_ids

        ids = torch.tensor([list(prompt)], device=target.device)
        generate: Any = target.generate
        generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, custom_generate=keep, **how)
        self._target, self._processor = target, found["processor"]

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[R, V] fp32 each, behind texts of one length: raw logits, and processed ones."""
        ids = torch.tensor([list(text) for text in texts], device=self._target.device)
        parts = [self._target(part, use_cache=False).logits[:, -1].float() for part in ids.split(_FORWARD_ROWS)]
        raw = torch.cat(parts)
        return raw, self._processor(ids, raw.clone())


def ends_of(target: PreTrainedModel) -> frozenset[int]:
    """The tokens behind which the target says nothing more."""
    end = getattr(target.generation_config, "eos_token_id", None)
    return frozenset(() if end is None else end if isinstance(end, list | tuple) else (end,))


def continued(
    model: Any, target: PreTrainedModel, texts: Sequence[Sequence[int]], new: int, how: Mapping[str, Any]
) -> list[list[int]]:
    """New tokens of each text, the end token included. model: what generates.  how: more arguments of `generate`."""
    ends, pad, width = ends_of(target), target.generation_config.pad_token_id, max(map(len, texts))
    pad = min(ends, default=0) if pad is None else pad
    ids = torch.tensor([[*[pad] * (width - len(text)), *text] for text in texts], device=target.device)
    mask = torch.tensor([[*[0] * (width - len(text)), *[1] * len(text)] for text in texts], device=target.device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=pad, **how)
    rows: list[list[int]] = out[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


class WatchedDrafter:
    """A drafter as it is, with a look at each draft before the target sees it and at each commit."""

    def __init__(
        self,
        drafter: Drafter,
        *,
        drafted: Callable[[Budget, Draft], None],
        committed: Callable[[Committed], None] = lambda committed: None,
    ) -> None:
        """drafted, committed: told after the drafter has proposed, and before it commits."""
        self._drafter, self._drafted, self._committed = drafter, drafted, committed
        self.name, self.laws, self.shape, self.taps = drafter.name, drafter.laws, drafter.shape, drafter.taps
        self._setup: DraftSetup | None = None

    def __getattr__(self, name: str) -> Any:
        # What engines ask for where a drafter has it: vocabulary, runner, traits, drawn.
        return getattr(self._drafter, name)

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        self._setup = setup
        self._drafter.begin(prompts, setup)

    def propose(self, budget: Budget) -> Draft:
        """The drafter's own draft; see `Drafter.propose`."""
        draft = self._drafter.propose(budget)
        self._drafted(budget, draft)
        return draft

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self._committed(committed)
        self._drafter.commit(committed)

    def rebuild(self, prompts: Sequence[Path], commits: Sequence[Committed]) -> None:
        """Begin anew on prompts and what was committed since; only a drafter with taps is told round by round, without drafting."""
        assert self._setup is not None, "a call has begun"
        texts = list(prompts)
        if not self.taps:
            for committed in commits:
                for request, tokens in zip(committed.requests, committed.tokens, strict=True):
                    texts[request] = (*texts[request], *tokens)
        self._drafter.begin(tuple(texts), self._setup)
        for committed in commits if self.taps else ():
            self._drafter.commit(committed)

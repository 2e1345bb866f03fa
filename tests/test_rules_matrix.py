"""What the rules' own tests leave out: texts that end inside a round, drawn trees under sample-and-match, and shared noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import EosTokenCriteria, StoppingCriteriaList

from specdec.noise import Noise, Stream
from specdec.stopping import Stopping
from specdec.types import Draft, Law, Scores, TokenTree
from specdec.verify import traversal
from specdec.verify.block import Block
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import Rule
from specdec.verify.k_sequential import KSequential
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.recursive import Recursive, RecursiveWithoutReplacement
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from specdec.verify.traversal import Traversal
from tests.support_enumeration import (
    Draw,
    Law1,
    Replays,
    Table,
    drawing,
    expected_acceptance,
    law_error,
    laws_of_round,
    total_variation,
)

EXACT = 1e-12
CHAIN, FORK, RAGGED = (-1, 0, 1), (-1, 0, 0), (-1, 0, 1, 0, 1)
CHAINS: list[Rule] = [TokenRejection(), Block(), SampleAndMatch()]
INDEPENDENT: list[Rule] = [Recursive(), KSequential(), Traversal(), MultiPathBlock(), SampleAndMatch()]
WITHOUT: list[Rule] = [RecursiveWithoutReplacement(), Traversal(), SampleAndMatch()]
KINDS = ["random", "zeros", "one-hot"]


PAIRS = [(rule, CHAIN, False) for rule in CHAINS]
PAIRS += [(rule, shape, False) for rule in INDEPENDENT for shape in (FORK, RAGGED)]
PAIRS += [(rule, shape, True) for rule in WITHOUT for shape in (FORK, RAGGED)]
IDS = [f"{rule.name}-{len(shape)}-{'without' if without else 'independent'}" for rule, shape, without in PAIRS]


def _cut(text: tuple[int, ...], new: tuple[int, ...], end: int) -> tuple[tuple[int, ...], bool]:
    """The text with what is kept of the new tokens, by the code that ends requests; and whether it is finished."""
    stopping = Stopping(StoppingCriteriaList([EosTokenCriteria(end)]), [text])
    kept, finished = stopping.cut(0, new)
    return (*text, *new[:kept]), finished


def _ended(p: Table, text: tuple[int, ...], length: int, end: int) -> Law1:
    """The target's own law of texts that stop behind `end`, or at this length."""
    if len(text) >= length or (len(text) > 1 and text[-1] == end):
        return {text[:length]: 1.0}
    law: Law1 = {}
    for token, weight in enumerate(p(text).tolist()):
        for longer, rest in (_ended(p, (*text, token), length, end) if weight else {}).items():
            law[longer] = law.get(longer, 0.0) + weight * rest
    return law


# Where every node is drawn from the target as well, there are thousands of branches.
LONG = [isinstance(rule, SampleAndMatch) and shape == RAGGED for rule, shape, _ in PAIRS]
ENDING = [
    pytest.param(*pair, id=name, marks=pytest.mark.slow if long else ()) for pair, name, long in zip(PAIRS, IDS, LONG, strict=True)
]


@pytest.mark.parametrize(("rule", "shape", "without"), ENDING)
def test_a_text_that_ends_inside_a_round_ends_as_the_target_s(rule: Rule, shape: tuple[int, ...], without: bool) -> None:
    p, end, length, rounds = Table(2, 3), 1, 4, 2
    draw = drawing(Table(2, 4), (shape,), without, chain=shape == CHAIN)
    law: dict[tuple[tuple[int, ...], bool], float] = {((0,), False): 1.0}
    for _ in range(rounds):
        open_ = [text for text, finished in law if not finished]
        after = {key: weight for key, weight in law.items() if key[1]}
        for text, outcomes in zip(open_, laws_of_round(rule.verify, draw, p, [(text,) for text in open_]), strict=True):
            for (longer,), weight in outcomes.items():
                key = _cut(text, longer[len(text) :], end)
                after[key] = after.get(key, 0.0) + law[text, False] * weight
        law = after
    assert any(finished for _, finished in law)
    ours: Law1 = {}
    for (text, _), weight in law.items():
        for longer, rest in _ended(p, text, length, end).items():
            ours[longer] = ours.get(longer, 0.0) + weight * rest
    assert total_variation(ours, _ended(p, (0,), length, end)) < EXACT


@pytest.mark.parametrize("without", [False, True], ids=["independent", "without"])
@pytest.mark.parametrize("kind_q", KINDS)
@pytest.mark.parametrize("kind_p", KINDS)
def test_sample_and_match_takes_drawn_trees_of_all_kinds(kind_p: str, kind_q: str, without: bool) -> None:
    p, q = Table(3, 1, kind_p), Table(3, 2, kind_q)
    assert law_error(SampleAndMatch().verify, drawing(q, (FORK,), without), p, 1, 1, 2) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("without", [False, True], ids=["independent", "without"])
def test_sample_and_match_takes_ragged_trees_of_two_requests_over_two_rounds(without: bool) -> None:
    assert law_error(SampleAndMatch().verify, drawing(Table(2, 6), (FORK, (-1,)), without), Table(2, 5), 2, 2, 2) < EXACT


@pytest.mark.parametrize(("rule", "without"), [(r, False) for r in INDEPENDENT[:-1]] + [(r, True) for r in WITHOUT[:-1]])
def test_one_draft_has_the_law_of_token_rejection(rule: Rule, without: bool) -> None:
    p, q = Table(3, 11), Table(3, 12)
    found = laws_of_round(rule.verify, drawing(q, ((-1, 0),), without), p, [((0,),)])[0]
    wanted = laws_of_round(TokenRejection().verify, drawing(q, ((-1, 0),), chain=True), p, [((0,),)])[0]
    assert found.keys() == wanted.keys()
    assert max(abs(found[text] - wanted[text]) for text in wanted) < EXACT


@pytest.mark.parametrize("children", [1, 2])
def test_sample_and_match_keeps_the_target_s_mass_on_what_was_drawn(children: int) -> None:
    p, q = Table(3, 11), Table(3, 12)
    # A token is among independent draws unless all of them miss it.
    wanted = sum(a * (1 - (1 - b) ** children) for a, b in zip(p((0,)).tolist(), q((0,)).tolist(), strict=True))
    found = expected_acceptance(SampleAndMatch().verify, drawing(q, ((-1,) + (0,) * children,)), p)
    assert abs(found - wanted) < EXACT


def _reranked(q: Table) -> Draw:
    """Draws a fork and a child behind each, and keeps the three nodes of the largest drawn path probabilities: after the draws."""
    whole = drawing(q, ((-1, 0, 0, 1, 2),), True)

    def draw(texts: list[tuple[int, ...]], replays: Replays) -> Draft:
        draft = whole(texts, replays)
        assert draft.q is not None
        own = draft.q.gather(1, draft.tree.parents.clamp(min=0)[..., None].expand_as(draft.q))
        own = own.gather(2, draft.tree.tokens[..., None])[..., 0]
        path = own.clone()
        path[:, 3:] *= own[:, 1:3]
        keep = path[:, 1:].topk(2, dim=1).indices.sort(1).values + 1
        order = torch.nn.functional.pad(keep, (1, 0))
        places = (order[:, None] == draft.tree.parents.gather(1, keep)[..., None]).long().argmax(2)
        parents = torch.nn.functional.pad(places, (1, 0), value=-1)
        laws = draft.q.gather(1, order[..., None].expand(-1, -1, draft.q.shape[2]))
        tree = TokenTree(draft.tree.tokens.gather(1, order), parents, (3,) * len(texts))
        return Draft(tree, draft.law, laws)

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RecursiveWithoutReplacement(), Traversal()], ids=lambda rule: rule.name)
def test_a_rerank_by_drawn_path_probabilities_is_seen(rule: Rule) -> None:
    p, q = Table(3, 101), Table(3, 201)
    assert law_error(rule.verify, drawing(q, ((-1, 0, 0, 1, 2),), True), p, 1, 1, 2) < EXACT
    assert law_error(rule.verify, _reranked(q), p, 1, 1, 2) > 1e-3
    assert law_error(SampleAndMatch().verify, _reranked(q), p, 1, 1, 2) < EXACT


def test_a_weight_from_what_is_left_of_q_is_seen_in_traversal(monkeypatch: pytest.MonkeyPatch) -> None:
    p, draw, rest = Table(3, 101), drawing(Table(3, 201), ((-1, 0, 1, 1),), True), []
    assert law_error(Traversal().verify, draw, p, 1, 1, 2) < EXACT
    law = traversal._Visit._law

    def noted(visit: Any, parent: Tensor, token: Tensor) -> Tensor:
        found = law(visit, parent, token)
        rest.append(1 - found.gather(1, token))
        return found

    monkeypatch.setattr(traversal._Visit, "_law", noted)

    def broken(weight: Tensor, excess: Tensor) -> Tensor:
        return torch.where(weight < 1, (excess / rest[-1]).clamp(max=1.0), 1.0)

    monkeypatch.setattr(traversal, "_after_refusal", broken)
    assert law_error(Traversal().verify, draw, p, 1, 1, 2) > 1e-3


MANY = 60_000


def _first_tokens(draft_calls: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Counts of the token behind the text after a round of token rejection, and the target's law.

    draft_calls, stream: what the draft's noise is keyed by.
    """
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 5, generator=generator, dtype=torch.float64) ** 2 + 0.01
    p, q = p / p.sum(), q / q.sum()
    requests, starts = torch.zeros(MANY, dtype=torch.long), torch.arange(MANY)
    drafter = NoiseChooser(Noise(8), requests, starts, stream)
    drafter._calls = draft_calls
    drawn = drafter.pick(q.expand(MANY, -1))
    tokens = torch.stack((torch.zeros_like(drawn), drawn), 1)
    tree = TokenTree(tokens, torch.tensor([-1, 0]).expand(MANY, -1), (2,) * MANY, True)
    laws = torch.stack((q, torch.zeros_like(q))).expand(MANY, -1, -1)
    chooser = NoiseChooser(Noise(8), requests, starts, Stream.ACCEPT)
    verdict = TokenRejection().verify(Draft(tree, Law.INDEPENDENT, laws), Scores(p.log().expand(MANY, 2, -1)), chooser)
    first = torch.where(verdict.num_accepted > 0, drawn, verdict.next_token)
    return torch.bincount(first, minlength=5), p


def _fit(counts: Tensor, p: Tensor) -> float:
    return float(stats.chisquare(counts.numpy(), (p * counts.sum()).numpy()).pvalue)


def test_draft_noise_that_is_the_residual_s_own_is_seen() -> None:
    assert _fit(*_first_tokens(0, Stream.DRAFT)) > 1e-4
    # One call in, a chooser that is no drafter picks by the key that the rule's pick has after its one accept.
    assert _fit(*_first_tokens(1, Stream.ACCEPT)) < 1e-12


def test_noise_of_an_earlier_round_is_seen_in_the_joint_law() -> None:
    p, requests = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.zeros(MANY, dtype=torch.long)
    starts, fits = torch.arange(MANY) * 9, []
    for later in (1, 0):
        pair = [NoiseChooser(Noise(3), requests, starts + at, Stream.ACCEPT).pick(p.expand(MANY, -1)) for at in (0, later)]
        each: list[Any] = [_fit(torch.bincount(tokens, minlength=3), p) for tokens in pair]
        assert min(each) > 1e-4
        fits.append(_fit(torch.bincount(pair[0] * 3 + pair[1], minlength=9), (p[:, None] * p).flatten()))
    assert fits[0] > 1e-4
    assert fits[1] < 1e-12

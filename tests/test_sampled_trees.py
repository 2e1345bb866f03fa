"""Trees of drawn tokens: the draws follow the laws that they are said to follow, and so rules that trust them are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.noise import Noise, Stream
from specdec.trees.layout import ancestors, depths
from specdec.trees.sampled import (
    Level,
    beam_level,
    independent_level,
    level_gumbel,
    level_without_replacement,
    sampled_draft,
    start_beam,
)
from specdec.types import Draft, Law, Scores
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import Rule
from specdec.verify.k_sequential import KSequential
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.recursive import Recursive, RecursiveWithoutReplacement
from specdec.verify.traversal import Traversal

MANY, V = 25_000, 4


def _model(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits behind the root, behind each token, and behind each pair of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(1.5 * torch.randn(*(V,) * n, generator=generator, dtype=torch.float64) for n in (1, 2, 3))  # type: ignore[return-value]


def _gumbel(depth: int, slots: int, batch: int = MANY, seed: int = 1) -> Tensor:
    requests = torch.arange(batch)
    return level_gumbel(Noise(seed), requests, torch.full_like(requests, 9), depth, slots, V)


def _behind(logits: tuple[Tensor, ...], first: Level) -> Tensor:
    """[B, W, V]: logits behind the nodes of the first level."""
    return logits[1][first.tokens]


Grow = Callable[[tuple[Tensor, ...], int], list[Level]]


def _independent(logits: tuple[Tensor, ...], batch: int) -> list[Level]:
    first = independent_level(logits[0].expand(batch, 1, V), _gumbel(1, 2, batch))
    return [first, independent_level(_behind(logits, first), _gumbel(2, 4, batch))]


def _without(logits: tuple[Tensor, ...], batch: int) -> list[Level]:
    first = level_without_replacement(logits[0].expand(batch, 1, V), _gumbel(1, 1, batch), 2)
    return [first, level_without_replacement(_behind(logits, first), _gumbel(2, 2, batch), 2)]


def _beam(logits: tuple[Tensor, ...], batch: int) -> list[Level]:
    first, beam = beam_level(start_beam(batch, torch.device("cpu")), logits[0].expand(batch, 1, V), _gumbel(1, 1, batch), 2)
    return [first, beam_level(beam, _behind(logits, first), _gumbel(2, 2, batch), 3)[0]]


def _draft(grow: Grow, q: tuple[Tensor, ...], law: Law, batch: int = MANY) -> Draft:
    levels = grow(q, batch)
    size = sum(level.tokens.shape[1] for level in levels)
    return sampled_draft(torch.zeros(batch, dtype=torch.long), levels, law, (size,) * batch)


def _chi_square(counts: Tensor, expected: Tensor) -> tuple[float, int]:
    """The statistic over the cells of expected counts 5 and more, and its degrees of freedom."""
    large = expected >= 5
    return float(((counts - expected) ** 2 / expected)[large].sum()), int(large.sum()) - 1


def _fits(counts: Tensor, expected: Tensor) -> bool:
    """Within what 1 in 3,000 right samplers would exceed, by the normal form of the statistic (Wilson and Hilferty)."""
    statistic, freedom = _chi_square(counts, expected)
    spread = 2 / (9 * freedom)
    return (statistic / freedom) ** (1 / 3) < 1 - spread + 3.4 * spread**0.5


def _text_counts(rule: Rule, draft: Draft, p: tuple[Tensor, ...]) -> Tensor:
    """[V, V]: how often each pair of tokens came first in the texts after one round, completed by p."""
    tree, nodes = draft.tree, draft.tree.tokens.shape[1]
    depth, batch = depths(tree.parents), tree.tokens.shape[0]
    own, above = tree.tokens, tree.tokens.gather(1, tree.parents.clamp(min=0))
    logits = torch.where((depth == 1)[..., None], p[1][own], p[2][above, own])
    logits[:, 0] = p[0]
    requests = torch.arange(batch)
    chooser = NoiseChooser(Noise(7), requests, torch.full_like(requests, 9), Stream.ACCEPT)
    verdict = rule.verify(draft, Scores(logits), chooser)
    assert verdict.path is not None
    assert int(verdict.num_accepted.max()) == 2
    kept = tree.tokens.gather(1, verdict.path.clamp(max=nodes - 1))
    first = torch.where(verdict.num_accepted > 0, kept[:, 0], verdict.next_token)
    drawn = chooser.pick(p[1].softmax(-1)[first])
    second = torch.where(verdict.num_accepted > 1, kept[:, 1], torch.where(verdict.num_accepted > 0, verdict.next_token, drawn))
    return torch.bincount(first * V + second, minlength=V * V).double().view(V, V)


def _expected(p: tuple[Tensor, ...]) -> Tensor:
    return MANY * p[0].softmax(-1)[:, None] * p[1].softmax(-1)


CASES = [
    (_independent, Law.INDEPENDENT, Recursive()),
    (_independent, Law.INDEPENDENT, KSequential()),
    (_independent, Law.INDEPENDENT, Traversal()),
    (_independent, Law.INDEPENDENT, MultiPathBlock()),
    (_without, Law.WITHOUT_REPLACEMENT, RecursiveWithoutReplacement()),
    (_without, Law.WITHOUT_REPLACEMENT, Traversal()),
    (_beam, Law.WITHOUT_REPLACEMENT, RecursiveWithoutReplacement()),
    (_beam, Law.WITHOUT_REPLACEMENT, Traversal()),
]


@pytest.mark.parametrize(("grow", "law", "rule"), CASES, ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")))
def test_what_is_drawn_and_verified_follows_the_target(grow: Grow, law: Law, rule: Rule) -> None:
    p = _model(1)
    assert _fits(_text_counts(rule, _draft(grow, _model(2), law), p), _expected(p))


def test_the_same_harness_sees_a_tree_pruned_by_what_was_drawn() -> None:
    p, q, rule = _model(2), _model(11), RecursiveWithoutReplacement()
    level = level_without_replacement(q[0].expand(MANY, 1, V), _gumbel(1, 1), 2)
    draft = sampled_draft(torch.zeros(MANY, dtype=torch.long), [level], Law.WITHOUT_REPLACEMENT, (2,) * MANY)
    expected = MANY * p[0].softmax(-1)
    assert _fits(_first_token_counts(rule, draft, p), expected)
    # The second child goes where its token is of the less likely half.
    law = q[0].softmax(-1)
    sizes = 2 + (law[level.tokens[:, 1]] > law.median()).long()
    pruned = replace(draft, tree=replace(draft.tree, num_nodes=tuple(sizes.tolist())))
    assert not _fits(_first_token_counts(rule, pruned, p), expected)


def _first_token_counts(rule: Rule, draft: Draft, p: tuple[Tensor, ...]) -> Tensor:
    """[V]: how often each token came first in the texts after a round whose tree is one level deep."""
    logits = p[1][draft.tree.tokens]
    logits[:, 0] = p[0]
    requests = torch.arange(MANY)
    verdict = rule.verify(draft, Scores(logits), NoiseChooser(Noise(7), requests, torch.full_like(requests, 9), Stream.ACCEPT))
    assert verdict.path is not None
    kept = draft.tree.tokens.gather(1, verdict.path[:, :1])[:, 0]
    first = torch.where(verdict.num_accepted > 0, kept, verdict.next_token)
    return torch.bincount(first, minlength=V).double()


@pytest.mark.parametrize("by_beam", [False, True], ids=["per node", "beam"])
def test_siblings_without_replacement_come_in_the_order_of_their_draws(by_beam: bool) -> None:
    logits = _model(3)[0].expand(MANY, 1, V)
    if by_beam:
        level = beam_level(start_beam(MANY, logits.device), logits, _gumbel(1, 1), 2)[0]
    else:
        level = level_without_replacement(logits, _gumbel(1, 1), 2)
    q = logits[0, 0].softmax(-1)
    counts = torch.bincount(level.tokens[:, 0] * V + level.tokens[:, 1], minlength=V * V).double()
    expected = torch.zeros(V * V, dtype=torch.float64)
    for first, second in permutations(range(V), 2):
        expected[first * V + second] = MANY * q[first] * q[second] / (1 - q[first])
    assert float(counts[expected == 0].sum()) == 0
    assert _fits(counts[expected > 0], expected[expected > 0])


def test_independent_children_are_independent() -> None:
    logits = _model(3)[0].expand(MANY, 1, V)
    level = independent_level(logits, _gumbel(1, 2))
    q = logits[0, 0].softmax(-1)
    counts = torch.bincount(level.tokens[:, 0] * V + level.tokens[:, 1], minlength=V * V).double()
    assert _fits(counts, (MANY * q[:, None] * q).flatten())


def test_a_beam_draws_whole_paths_without_replacement() -> None:
    q = _model(4)
    first, beam = beam_level(start_beam(MANY, torch.device("cpu")), q[0].expand(MANY, 1, V), _gumbel(1, 1), V)
    second, beam = beam_level(beam, _behind(q, first), _gumbel(2, V), 2)
    paths = first.tokens.gather(1, second.parents) * V + second.tokens
    law = (q[0].softmax(-1)[:, None] * q[1].softmax(-1)).flatten()
    assert not (paths[:, 0] == paths[:, 1]).any()
    assert _fits(torch.bincount(paths[:, 0], minlength=V * V).double(), MANY * law)
    ours = torch.bincount(paths[:, 1], minlength=V * V).double()
    later = torch.stack([law[x] * (law / (1 - law[x])).index_fill(0, torch.tensor([x]), 0.0) for x in range(V * V)]).sum(0)
    assert _fits(ours, MANY * later)
    assert torch.allclose(beam.log_probs, law.log()[paths])
    assert (beam.scores[:, 0] >= beam.scores[:, 1]).all()


@pytest.mark.parametrize(
    ("grow", "law"), [(_independent, Law.INDEPENDENT), (_without, Law.WITHOUT_REPLACEMENT), (_beam, Law.WITHOUT_REPLACEMENT)]
)
def test_q_is_the_law_behind_every_node_and_a_cut_keeps_the_first_nodes(grow: Grow, law: Law) -> None:
    logits = tuple(level.float() for level in _model(5))
    levels = grow(logits, 6)
    roots, size = torch.arange(6), sum(level.tokens.shape[1] for level in levels)
    whole = sampled_draft(roots, levels, law, (size,) * 6)
    cut = sampled_draft(roots, levels, law, (0, 1, 2, 3, 4, 99))
    assert cut.tree.num_nodes == (1, 2, 3, 4, 5, size + 1)
    assert whole.q is not None
    assert whole.q.dtype == torch.float32
    for b, count in enumerate(cut.tree.num_nodes):
        assert cut.tree.tokens[b, :count].tolist() == whole.tree.tokens[b, :count].tolist()
        assert cut.tree.parents[b, :count].tolist() == whole.tree.parents[b, :count].tolist()
        assert not cut.tree.tokens[b, count:].any()
        assert not cut.tree.parents[b, count:].any()
    depth = depths(whole.tree.parents)
    assert torch.equal(whole.q[:, 0], logits[0].softmax(-1).expand(6, -1))
    inner = depth == 1
    assert torch.equal(whole.q[inner], logits[1].softmax(-1)[whole.tree.tokens[inner]])
    assert not whole.q[depth == 2].any()
    assert (whole.tree.parents[:, 1:] < torch.arange(1, size + 1)).all()
    assert ancestors(whole.tree.parents)[:, :, 0].all()


def test_where_a_law_holds_few_tokens_the_rest_has_none_of_it_and_the_rules_pass_it_over() -> None:
    logits = torch.tensor([0.3, float("-inf"), float("-inf"), float("-inf")]).expand(8, 1, V)
    level = level_without_replacement(logits, _gumbel(1, 1, 8), 3)
    assert (level.tokens[:, 0] == 0).all()
    first, beam = beam_level(start_beam(8, logits.device), logits, _gumbel(1, 1, 8), 3)
    second, beam = beam_level(beam, logits.expand(8, 3, V), _gumbel(2, 3, 8), 3)
    assert (first.tokens[:, 0] == 0).all()
    assert (second.tokens[:, 0] == 0).all()
    assert not beam.scores.isnan().any()
    draft = sampled_draft(torch.zeros(8, dtype=torch.long), [first, second], Law.WITHOUT_REPLACEMENT, (6,) * 8)
    target = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    chooser = NoiseChooser(Noise(2), torch.arange(8), torch.full((8,), 5), Stream.ACCEPT)
    for rule in (RecursiveWithoutReplacement(), Traversal()):
        verdict = rule.verify(draft, Scores(target.expand(8, 7, V)), chooser)
        assert verdict.path is not None
        tokens = draft.tree.tokens.gather(1, verdict.path)
        on_path = torch.arange(6) < verdict.num_accepted[:, None]
        assert not tokens[on_path].any()
        assert all(token in (0, 2) for token in verdict.next_token.tolist())


def test_levels_of_one_node_are_a_chain_and_no_level_is_a_root() -> None:
    levels = [independent_level(torch.zeros(2, 1, V), _gumbel(depth, 1, 2)) for depth in (1, 2)]
    assert sampled_draft(torch.zeros(2, dtype=torch.long), levels, Law.INDEPENDENT, (2, 1)).tree.is_chain
    alone = sampled_draft(torch.zeros(2, dtype=torch.long), [], Law.INDEPENDENT, (3, 3))
    assert alone.tree.num_nodes == (1, 1)
    assert alone.tree.is_chain


def test_a_law_that_is_not_drawn_is_refused() -> None:
    with pytest.raises(SpecDecError, match="deterministic"):
        sampled_draft(torch.zeros(1, dtype=torch.long), [], Law.DETERMINISTIC, (0,))


def test_noise_differs_by_request_depth_slot_and_start() -> None:
    requests, starts = torch.tensor([0, 1]), torch.tensor([4, 4])
    drawn = [level_gumbel(Noise(1), requests, starts + later, depth, 3, V) for later in (0, 1) for depth in (1, 2)]
    values = torch.cat([noise.flatten() for noise in drawn])
    assert values.unique().numel() == values.numel()

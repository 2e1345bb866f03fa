"""The noise is what it says, streams are independent, and the coupled rule is plain decoding whatever the draft."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from specdec.errors import IncompatibleRuleError
from specdec.noise import Noise, Stream
from specdec.types import Draft, Law, Scores, TokenTree
from specdec.verify.chooser import NoiseChooser
from specdec.verify.compatibility import rule_for
from specdec.verify.coupled import Coupled, coupled_pick
from specdec.verify.rejection import TokenRejection

# The chance that a right implementation fails one of these tests; seeds are fixed, so it fails always or never.
ALPHA = 1e-4


def _chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    return float(stats.chisquare(counts.numpy(), (p * counts.sum()).numpy()).pvalue)


def test_uniforms_are_uniform_and_streams_independent() -> None:
    positions = torch.arange(200_000)
    request = torch.tensor(3)
    draws = [Noise(5).uniform(s, request, positions) for s in Stream]
    for u in draws:
        assert float(u.min()) > 0
        assert float(u.max()) < 1
        assert stats.kstest(u.numpy(), "uniform").pvalue > ALPHA
    for i, a in enumerate(draws):
        for b in draws[:i]:
            grid = torch.histogramdd(torch.stack((a, b), 1), bins=[8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
            assert _chi_square(grid.flatten(), torch.full((64,), 1 / 64)) > ALPHA


def test_neighbouring_keys_are_independent() -> None:
    positions = torch.arange(200_000)
    base = Noise(5).uniform(Stream.ACCEPT, torch.tensor(0), positions)
    others = [
        Noise(6).uniform(Stream.ACCEPT, torch.tensor(0), positions),
        Noise(5).uniform(Stream.ACCEPT, torch.tensor(1), positions),
        Noise(5).uniform(Stream.ACCEPT, torch.tensor(0), positions + 1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((base, other)))[0, 1])) < 0.01


def test_coupled_draw_follows_the_law() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    positions = torch.arange(100_000)
    drawn = coupled_pick(Noise(9), torch.zeros_like(positions), positions, p.log().expand(len(positions), -1))
    assert _chi_square(torch.bincount(drawn, minlength=5).double(), p) > ALPHA


def test_chooser_accepts_and_picks_by_the_law() -> None:
    count = 100_000
    requests, starts = torch.zeros(count, dtype=torch.long), torch.arange(count)
    chooser = NoiseChooser(Noise(4), requests, starts, Stream.ACCEPT)
    prob = torch.tensor([0.0, 0.3, 1.0]).expand(count, -1)
    hits = chooser.accept(prob).sum(0)
    assert hits[0] == 0
    assert hits[2] == count
    assert stats.binomtest(int(hits[1]), count, 0.3).pvalue > ALPHA
    weights = torch.tensor([3.0, 0.0, 1.0, 4.0])
    picked = torch.bincount(chooser.pick(weights.expand(count, -1)), minlength=4)
    assert picked[1] == 0
    assert _chi_square(picked[[0, 2, 3]].double(), torch.tensor([3 / 8, 1 / 8, 4 / 8], dtype=torch.float64)) > ALPHA


def test_rejection_with_device_noise_follows_the_target() -> None:
    count = 60_000
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 5, generator=generator, dtype=torch.float64).softmax(-1) ** 2
    p, q = p / p.sum(), q / q.sum()
    requests, starts = torch.zeros(count, dtype=torch.long), torch.arange(count) * 7
    draft = NoiseChooser(Noise(8), requests, starts, Stream.DRAFT).pick(q.expand(count, -1))
    tokens = torch.stack((torch.zeros_like(draft), draft), 1)
    tree = TokenTree(tokens, torch.tensor([-1, 0]).expand(count, -1), (2,) * count, True)
    laws = torch.stack((q, torch.zeros_like(q))).expand(count, -1, -1)
    chooser = NoiseChooser(Noise(8), requests, starts, Stream.ACCEPT)
    verdict = TokenRejection().verify(Draft(tree, Law.INDEPENDENT, laws), Scores(p.log().expand(count, 2, -1)), chooser)
    first = torch.where(verdict.num_accepted > 0, draft, verdict.next_token)
    assert _chi_square(torch.bincount(first, minlength=5).double(), p) > ALPHA


def test_coupled_is_plain_decoding_on_100_000_random_cases() -> None:
    generator = torch.Generator().manual_seed(1)
    checked = 0
    for case in range(20):
        batch, nodes, vocabulary = 5_000, 6, int(torch.randint(2, 9, (1,), generator=generator))
        noise = Noise(case)
        parents = torch.stack([torch.randint(n, (batch,), generator=generator) for n in range(1, nodes)], 1)
        if case % 2:
            parents = torch.arange(nodes - 1).expand(batch, -1)
        parents = torch.cat((torch.full((batch, 1), -1), parents), 1)
        tokens = torch.randint(vocabulary, (batch, nodes), generator=generator)
        logits = torch.randn(batch, nodes, vocabulary, generator=generator) * (1 + case % 4)
        requests, starts = torch.arange(batch), torch.randint(1, 500, (batch,), generator=generator)
        tree = TokenTree(tokens, parents, (nodes,) * batch, bool(case % 2))
        chooser = NoiseChooser(noise, requests, starts, Stream.ACCEPT)
        verdict = Coupled().verify(Draft(tree, Law.DETERMINISTIC), Scores(logits), chooser)
        checked += _walk(noise, tree, logits, requests, starts, verdict)
    assert checked == 100_000


def _walk(noise: Noise, tree: TokenTree, logits: torch.Tensor, requests: torch.Tensor, starts: torch.Tensor, verdict) -> int:  # type: ignore[no-untyped-def]
    """Decode one token at a time at the nodes that the verdict went through, and compare."""
    batch = len(requests)
    node = torch.zeros(batch, dtype=torch.long)
    path = tree.parents[:, 1:] + 1 if verdict.path is None else verdict.path
    for step in range(int(verdict.num_accepted.max()) + 1):
        rows = logits[torch.arange(batch), node]
        plain = coupled_pick(noise, requests, starts + step, rows)
        ended = verdict.num_accepted == step
        assert torch.equal(plain[ended], verdict.next_token[ended])
        going = verdict.num_accepted > step
        following = path[:, min(step, path.shape[1] - 1)]
        assert torch.equal(tree.tokens[torch.arange(batch), following][going], plain[going])
        assert torch.equal(tree.parents[torch.arange(batch), following][going], node[going])
        node = torch.where(going, following, node)
    child_matches = (tree.parents == node[:, None]) & (tree.tokens == verdict.next_token[:, None])
    assert not child_matches.any(), "a matching child was left behind"
    return batch


ALL = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})
FIXED = frozenset({Law.DETERMINISTIC})


@pytest.mark.parametrize(
    ("laws", "shape", "sampling", "seeded", "post_draw", "rule", "law"),
    [
        (ALL, "chain", False, False, False, "greedy", Law.DETERMINISTIC),
        (ALL, "chain", True, False, False, "block", Law.INDEPENDENT),
        (ALL, "chain", True, True, False, "coupled", Law.COUPLED),
        (FIXED, "tree", True, False, False, "sample-and-match", Law.DETERMINISTIC),
        (FIXED, "tree", True, True, False, "coupled", Law.DETERMINISTIC),
        (ALL, "chain", True, False, True, "sample-and-match", Law.DETERMINISTIC),
    ],
)
def test_auto_picks_by_the_law(
    laws: frozenset[Law], shape: str, sampling: bool, seeded: bool, post_draw: bool, rule: str, law: Law
) -> None:
    found, drawn = rule_for("auto", laws, shape, sampling, seeded, post_draw)
    assert (found.name, drawn) == (rule, law)


@pytest.mark.parametrize(
    ("name", "laws", "shape", "sampling", "post_draw"),
    [
        ("greedy", ALL, "chain", True, False),
        ("rejection", FIXED, "tree", True, False),
        ("rejection", frozenset({Law.INDEPENDENT}), "chain", True, True),
        ("coupled", frozenset({Law.INDEPENDENT}), "chain", True, False),
        ("typical", ALL, "chain", True, False),
    ],
)
def test_incompatible_pairs_are_refused_by_name(
    name: str, laws: frozenset[Law], shape: str, sampling: bool, post_draw: bool
) -> None:
    with pytest.raises(IncompatibleRuleError, match=name):
        rule_for(name, laws, shape, sampling, False, post_draw)

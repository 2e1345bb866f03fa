"""Medusa: what the heads compute, the drafter's state, its laws, and losslessness end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from specdec.controller import root_tree
from specdec.drafters.base import DraftSampling, DraftSetup, Paths
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.types import Budget, Committed, Draft, Law
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, chi_square, flattened, setup_of
from tests.support_models import VOCABULARY, left_padded, prompts, tiny_model

pytestmark = pytest.mark.slow

K, WIDTH, NEW = 3, 32, 25
MODEL: Any = tiny_model()
LM_HEAD = MODEL.get_output_embeddings().weight.detach()
CHOICES = [[0], [0, 0], [1], [0, 1], [0, 0, 0], [2], [1, 0], [0, 0, 1]]
LENGTHS = {"one": (9,), "ragged": (9, 3, 14)}
ALPHA = 1e-4


def _heads(layers: int = 1, *, shared: bool = False, bias: bool = True, seed: int = 0, scale: float = 0.2) -> MedusaHeads:
    """Random heads over the model's own output matrix; scale 0 leaves them as they begin."""
    generator = torch.Generator().manual_seed(seed)
    heads = MedusaHeads(WIDTH, VOCABULARY, K, layers, shared_head=shared, bias=bias)
    with torch.no_grad():
        for layer in heads.layers():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for head in heads.heads:
            head.weight.copy_(LM_HEAD + torch.randn(LM_HEAD.shape, generator=generator) * scale)
    return heads


@torch.no_grad()
def _hidden(texts: list[list[int]]) -> torch.Tensor:
    """The last hidden state behind each text's last token but one: what chose the last token."""
    return torch.stack([MODEL.model(torch.tensor([text])).last_hidden_state[0, -2] for text in texts])


@cache
def _trained() -> MedusaHeads:
    """Heads fitted to the greedy continuations of the tests' prompts, so that they are often right there."""
    heads = _heads(scale=0.05)
    inputs = left_padded(prompts(LENGTHS["ragged"]))
    with torch.no_grad():
        ids = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        rows = [ids[b, int((inputs["attention_mask"][b] == 0).sum()) :][None] for b in range(len(ids))]
        states = [MODEL.model(row).last_hidden_state[0] for row in rows]
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for _ in range(120):
        loss = torch.zeros(())
        for state, row in zip(states, rows, strict=True):
            logits = heads.logits(state)
            for k in range(K):
                loss = loss + nn.functional.cross_entropy(logits[k, : -2 - k], row[0, 2 + k :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads


def _wrong() -> MedusaHeads:
    """Heads that say the opposite of the fitted ones."""
    heads = _heads(scale=0.0)
    heads.load_state_dict(_trained().state_dict())
    with torch.no_grad():
        for head in heads.heads:
            head.weight.neg_()
    return heads


MAKERS: dict[str, Callable[[], MedusaDrafter]] = {
    "chain": lambda: MedusaDrafter(_heads()),
    "shared chain": lambda: MedusaDrafter(_heads(2, shared=True), LM_HEAD),
    "choices": lambda: MedusaDrafter(_heads(), choices=CHOICES, shape="tree"),
    "accuracies": lambda: MedusaDrafter(_heads(), accuracies=[[0.6, 0.2, 0.1]] * K, shape="tree"),
    "product": lambda: MedusaDrafter(_heads(), shape="tree"),
}


def _begun(drafter: MedusaDrafter, texts: list[list[int]], setup: DraftSetup) -> MedusaDrafter:
    """A drafter that has seen the texts, the last token of each as a round of plain decoding gave it."""
    drafter.begin(tuple(tuple(text[:-1]) for text in texts), setup)
    requests = tuple(range(len(texts)))
    taps = {"last_hidden": _hidden(texts)[:, None]}
    drafter.commit(
        Committed(requests, tuple((text[-1],) for text in texts), (0,) * len(texts), paths=((),) * len(texts), taps=taps)
    )
    return drafter


def test_every_layer_and_head_is_its_own_and_named() -> None:
    heads = MedusaHeads(4, 7, 2, 2, shared_head=False)
    blocks = [f"blocks.{k}.{i}.{p}" for k in range(2) for i in range(2) for p in ("weight", "bias")]
    assert list(heads.state_dict()) == [*blocks, "heads.0.weight", "heads.1.weight"]
    assert len({p.data_ptr() for p in heads.parameters()}) == 10
    assert not any(p.any() for layer in heads.layers() for p in layer.parameters())
    assert "heads.0.weight" not in MedusaHeads(4, 7, 2, shared_head=True).state_dict()


def test_untrained_heads_say_what_the_target_says() -> None:
    heads = MedusaHeads(WIDTH, VOCABULARY, K, 2, shared_head=False)
    heads.init_from(LM_HEAD)
    h = torch.randn(2, 5, WIDTH)
    assert torch.equal(heads.hidden(h), h.expand(K, -1, -1, -1))
    torch.testing.assert_close(heads.logits(h), (h @ LM_HEAD.t()).expand(K, -1, -1, -1))


def test_heads_compute_their_definition() -> None:
    heads = _heads(2)
    h = torch.randn(5, WIDTH)
    for k in range(K):
        z = h
        for i in range(2):
            x = z @ heads.state_dict()[f"blocks.{k}.{i}.weight"].t() + heads.state_dict()[f"blocks.{k}.{i}.bias"]
            z = z + x / (1 + (-x).exp())
        torch.testing.assert_close(heads.hidden(h)[k], z)
        torch.testing.assert_close(heads.logits(h)[k], z @ heads.state_dict()[f"heads.{k}.weight"].t())
    assert heads.bfloat16().logits(h.bfloat16(), count=2).shape == (2, 5, VOCABULARY)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_drafted_chains_are_the_heads_argmax(batch: int, bias: bool, shared: bool) -> None:
    heads = _heads(2, shared=shared, bias=bias, seed=4)
    texts = prompts((9, 4, 6, 5, 12)[:batch], seed=8)
    drafter = _begun(MedusaDrafter(heads, LM_HEAD if shared else None), texts, setup_of())
    with torch.no_grad():
        expected = heads.logits(_hidden(texts), LM_HEAD if shared else None).argmax(-1).t()
    assert torch.equal(drafter.propose(budget_of(tuple(range(batch)))).tree.tokens[:, 1:], expected)


def test_changed_weights_are_seen_by_the_next_call() -> None:
    heads, texts = _heads(), prompts((9,), seed=8)
    drafter = _begun(MedusaDrafter(heads), texts, setup_of())
    before = drafter.propose(budget_of((0,))).tree.tokens
    with torch.no_grad():
        for head in heads.heads:
            head.weight.neg_()
    after = _begun(drafter, texts, setup_of()).propose(budget_of((0,))).tree.tokens
    assert_same_draft(drafter.propose(budget_of((0,))), _begun(MedusaDrafter(heads), texts, setup_of()).propose(budget_of((0,))))
    assert not torch.equal(after, before)


@torch.no_grad()
def _round(drafter: MedusaDrafter, texts: list[list[int]], draft: Draft, counts: list[int], token: int) -> None:
    """Accept the first counts[b] nodes of a path of each request's tree and a token; taps are the target's at every node."""
    tree = draft.tree
    new, paths, taps = [], [], torch.zeros(*tree.tokens.shape, WIDTH)
    for b, text in enumerate(texts):
        own: list[list[int]] = [[]]
        for n in range(1, tree.num_nodes[b]):
            own.append([*own[int(tree.parents[b, n])], n])
        path = max(own, key=len)[: counts[b]]
        for n, nodes in enumerate(own):
            line = [*text, *(int(tree.tokens[b, m]) for m in nodes)]
            taps[b, n] = MODEL.model(torch.tensor([line])).last_hidden_state[0, -1]
        new.append([*(int(tree.tokens[b, n]) for n in path), token])
        paths.append(tuple(path))
        text.extend(new[-1])
    sizes = tuple(map(len, paths))
    drafter.commit(Committed(tuple(range(len(texts))), tuple(map(tuple, new)), sizes, tuple(paths), {"last_hidden": taps}))
    # The next round may write where this one's hidden states were.
    taps.fill_(float("nan"))


@pytest.mark.parametrize("name", MAKERS)
def test_state_equals_state_rebuilt(name: str) -> None:
    drafter, texts = MAKERS[name](), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    assert drafter.propose(budget_of((0, 1))).tree.num_nodes == (1, 1), "there is no hidden state yet"
    for round_ in range(2 * (K + 1)):
        asked = round_ % 3 != 2
        plain = Draft(root_tree([text[-1] for text in texts], torch.device("cpu")), Law.DETERMINISTIC)
        draft = drafter.propose(budget_of((0, 1))) if asked else plain
        _round(drafter, texts, draft, [(round_ + b) % (K + 1) for b in range(2)], 3 + round_)
        fresh = _begun(MAKERS[name](), texts, setup_of())
        again = drafter.propose(budget_of((0, 1)))
        assert again.tree.num_nodes[0] > K
        assert_same_draft(again, fresh.propose(budget_of((0, 1))))


@pytest.mark.parametrize("name", MAKERS)
def test_requests_may_leave_and_budgets_differ(name: str) -> None:
    texts = prompts((9, 4, 6), seed=2)
    drafter = _begun(MAKERS[name](), texts, setup_of())
    draft = drafter.propose(Budget((2, 0), (4, 0), (K, K), (2, 2)))
    assert draft.tree.num_nodes[1] == 1
    assert draft.tree.tokens[:, 0].tolist() == [texts[2][-1], texts[0][-1]]
    alone = _begun(MAKERS[name](), [texts[2]], setup_of()).propose(Budget((0,), (4,), (K,), (2,)))
    assert alone.tree.num_nodes[0] == draft.tree.num_nodes[0]
    assert torch.equal(draft.tree.tokens[:1, : alone.tree.num_nodes[0]], alone.tree.tokens)


def test_drawn_chains_follow_the_law_that_they_tell() -> None:
    count, heads = 3000, _heads(seed=2)
    text = prompts((9,))[0]
    drafter = MedusaDrafter(heads)
    drafter.begin(((text[0],),) * count, setup_of(Law.INDEPENDENT, DraftSampling(flattened, Noise(3))))
    hidden = _hidden([text])
    taps = {"last_hidden": hidden[:, None].expand(count, -1, -1)}
    drafter.commit(Committed(tuple(range(count)), ((text[-1],),) * count, (0,) * count, ((),) * count, taps))
    draft = drafter.propose(budget_of(tuple(range(count))))
    assert draft.q is not None
    assert draft.q.shape == (count, K + 1, VOCABULARY)
    with torch.no_grad():
        expected = (heads.logits(hidden)[:, 0] / 3.0).softmax(-1)
    torch.testing.assert_close(draft.q[7, :K], expected, atol=1e-5, rtol=1e-4)
    for k in range(K):
        drawn = torch.bincount(draft.tree.tokens[:, k + 1], minlength=VOCABULARY).double()
        law = draft.q[0, k].double()
        assert chi_square(drawn, law / law.sum() * count) > ALPHA


def test_processors_see_the_tokens_drawn_before() -> None:
    seen: list[list[tuple[int, tuple[int, ...]]]] = []

    def process(logits: torch.Tensor, paths: Paths) -> torch.Tensor:
        seen.append(paths())
        return logits.float()

    texts = prompts((9, 4))
    drafter = _begun(MedusaDrafter(_heads()), texts, setup_of(Law.INDEPENDENT, DraftSampling(process, Noise(1))))
    tokens = drafter.propose(budget_of((0, 1))).tree.tokens.tolist()
    assert seen == [[(b, tuple(tokens[b][1 : 1 + k])) for b in range(2)] for k in range(K)]


def test_a_rule_may_stop_a_chain_before_a_place_is_drawn() -> None:
    drafter = _begun(MedusaDrafter(_heads()), prompts((9,)), setup_of())
    asked: list[int] = []

    def stop(depth: int, confidence: Sequence[float], entropy: Sequence[float]) -> list[bool]:
        asked.append(depth)
        return [len(asked) == 2]

    assert drafter.propose(Budget((0,), (K,), (K,), (1,), stop=stop)).tree.num_nodes == (2,)
    assert asked == [0, 1]
    assert drafter.propose(Budget((0,), (K,), (K,), (1,), stop=lambda *known: [True])).tree.num_nodes == (1,)


SHAPES: dict[str, tuple[dict[str, Any], FixedPlanner]] = {
    "chain": ({}, FixedPlanner(nodes=K, depth=K, width=1)),
    "choices": ({"choices": CHOICES, "shape": "tree"}, FixedPlanner(nodes=8, depth=K, width=3)),
    "product": ({"shape": "tree"}, FixedPlanner(nodes=12, depth=K, width=3)),
}


@pytest.mark.parametrize("batch", [pytest.param("one", marks=pytest.mark.slow), "ragged"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_generate(shape: str, batch: str) -> None:
    inputs = left_padded(prompts(LENGTHS[batch]))
    expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    options, fixed = SHAPES[shape]
    accepted = {}
    for name, heads in {"trained": _trained(), "untrained": _heads(scale=0.1), "wrong": _wrong()}.items():
        planner = RecordingPlanner(fixed)
        generator = SpeculativeGenerator(MODEL, MedusaDrafter(heads, **options), planner=planner)
        tokens = generator.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert_same_greedy(MODEL, inputs, tokens, expected)
        accepted[name] = planner.accepted_lengths()
    assert max(accepted["trained"]) == K
    assert accepted["wrong"] == {0}


@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_sampling_does_not_depend_on_the_drafter(shape: str) -> None:
    inputs = left_padded(prompts(LENGTHS["ragged"]))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    drafting, fixed = SHAPES[shape]
    planner = RecordingPlanner(fixed)
    generator = SpeculativeGenerator(MODEL, MedusaDrafter(_trained(), **drafting), verifier="coupled", planner=planner)
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert max(planner.accepted_lengths()) > 0


def test_rejection_sampling_runs_on_chains_and_repeats() -> None:
    inputs = left_padded(prompts(LENGTHS["ragged"]))
    planner = RecordingPlanner(SHAPES["chain"][1])
    generator = SpeculativeGenerator(MODEL, MedusaDrafter(_trained()), verifier="rejection", planner=planner)
    runs = [generator.generate(**inputs, max_new_tokens=20, do_sample=True, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert max(planner.accepted_lengths()) > 0
    with pytest.raises(SpecDecError, match="rejection"):
        SpeculativeGenerator(MODEL, MedusaDrafter(_trained(), shape="tree"), verifier="rejection")


def test_what_does_not_fit_is_told_with_names_and_numbers() -> None:
    heads = _heads()
    with pytest.raises(SpecDecError, match="num_heads=0"):
        MedusaHeads(4, 5, 0, shared_head=True)
    with pytest.raises(SpecDecError, match="lm_head_weight"):
        MedusaDrafter(heads, LM_HEAD)
    with pytest.raises(SpecDecError, match="lm_head_weight"):
        MedusaDrafter(_heads(shared=True))
    with pytest.raises(SpecDecError, match=r"32.*31"):
        MedusaDrafter(_heads(shared=True), LM_HEAD[:, :31])
    with pytest.raises(VocabularyMismatchError, match=r"61.*60"):
        heads.init_from(LM_HEAD[:60])
    with pytest.raises(SpecDecError, match="share"):
        _heads(shared=True).init_from(LM_HEAD)
    with pytest.raises(SpecDecError, match="head_weight"):
        heads.logits(torch.zeros(1, WIDTH), LM_HEAD)
    with pytest.raises(SpecDecError, match="shape='star'"):
        MedusaDrafter(heads, shape="star")  # type: ignore[arg-type]
    with pytest.raises(SpecDecError, match="shape='tree'"):
        MedusaDrafter(heads, choices=CHOICES)
    with pytest.raises(SpecDecError, match=r"4 deep.*3"):
        MedusaDrafter(heads, accuracies=[[0.5]] * 4, shape="tree")
    with pytest.raises(VocabularyMismatchError, match=r"61.*62"):
        MedusaDrafter(heads).begin(((1,),), DraftSetup(torch.device("cpu"), VOCABULARY + 1, 64, Law.DETERMINISTIC))
    with pytest.raises(SpecDecError, match=r"cpu.*meta"):
        MedusaDrafter(heads).begin(((1,),), DraftSetup(torch.device("meta"), VOCABULARY, 64, Law.DETERMINISTIC))
    drafter = MedusaDrafter(heads)
    drafter.begin(((1, 2),), setup_of())
    with pytest.raises(SpecDecError, match=r"32.*48"):
        drafter.commit(Committed((0,), ((5,),), (0,), ((),), {"last_hidden": torch.zeros(1, 1, 48)}))
    with pytest.raises(SpecDecError, match="nothing"):
        drafter.commit(Committed((0,), ((5,),), (0,), ((),)))

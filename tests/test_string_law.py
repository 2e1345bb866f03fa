"""Laws over target tokens from a draft that writes single bytes: by hand, as drawn, and end to end."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specdec.drafters.base import DraftSampling, DraftSetup, Paths
from specdec.drafters.vocab_map import VocabMap
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.runner import RunnerOptions
from specdec.types import Committed, Draft, Law
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, chain_budget, chi_square, flattened
from tests.support_models import left_padded
from tests.support_tokenizers import PHRASE, model_for, reciter, tokenizer_of, vocabulary_of

# Every letter once, so what follows a letter is known from that letter.
LETTERS = " thequickbrown"
WAY = "string-rejection"
# Capturing takes longer than these texts.
PLAINLY = RunnerOptions(capture="off")


def _drafter(model: Any, nodes: int, forwards: int, target: str = "byte-level") -> VocabMap:
    return VocabMap(tokenizer_of(target), tokenizer_of("bytes"), model, WAY, nodes=nodes, forwards=forwards, options=PLAINLY)


def _setup(law: Law = Law.DETERMINISTIC, sampling: DraftSampling | None = None) -> DraftSetup:
    return DraftSetup(torch.device("cpu"), len(tokenizer_of("byte-level")), 64, law, sampling)


def _prompt(text: str) -> tuple[int, ...]:
    return tuple(vocabulary_of("byte-level").encode(text.encode())[0])


def _following(model: Any, texts: list[bytes]) -> list[Tensor]:
    """For texts of one length, the probability of each next byte [256] in float64."""
    ids = vocabulary_of("bytes").ids
    with torch.no_grad():
        logits = model(torch.tensor([[ids[bytes([byte])] for byte in text] for text in texts])).logits[:, -1]
    return list(logits.double().softmax(-1)[:, [ids[bytes([byte])] for byte in range(256)]])


def _joined(last: int) -> list[int]:
    """Tokens that are one token with this one."""
    ids, data = vocabulary_of("byte-level").ids, vocabulary_of("byte-level").bytes_of(last) or b""
    return [token for own, token in ids.items() if data + own in ids and data]


def _by_hand(model: Any, text: bytes, last: int, nodes: int | None = None, at_once: int = 1) -> Tensor:
    """Of each target token, the chance that it is the longest that the draft's text begins with; unknown tokens are no tokens.

    last: token of the text.  nodes: how many beginnings are asked for behind the empty one, None for all.
    """
    target = vocabulary_of("byte-level")
    inner = {data[:size] for data in target.ids for size in range(len(data))}
    reach = {b"": 1.0}
    open_ = {b""}
    left = len(inner) if nodes is None else nodes
    while open_:
        if open_ == {b""}:
            chosen = [b""]
        else:
            chosen = sorted(open_, key=lambda name: -reach[name])[: min(at_once, left)]
            left -= len(chosen)
        for size in {len(name) for name in chosen}:
            names = [name for name in chosen if len(name) == size]
            for name, law in zip(names, _following(model, [text + name for name in names]), strict=True):
                reach |= {name + bytes([byte]): reach[name] * p for byte, p in enumerate(law.tolist())}
        open_ = {name for name in (open_ - set(chosen)) | (inner & set(_children(chosen, reach))) if left > 0}
    q = torch.zeros(len(tokenizer_of("byte-level")), dtype=torch.double)
    for data, token in target.ids.items():
        if data in reach:
            q[token] += reach[data]
            shorter = [target.ids[data[:size]] for size in range(1, len(data)) if data[:size] in target.ids]
            q[shorter[-1:]] -= reach[data]
    q[_joined(last)] = 0.0
    return q / q.sum()


def _children(chosen: list[bytes], reach: dict[bytes, float]) -> list[bytes]:
    return [name + bytes([byte]) for name in chosen for byte in range(256) if name + bytes([byte]) in reach]


# The law.


@pytest.mark.parametrize(("nodes", "forwards", "known"), [(1600, 20, None), (6, 3, 6), (5, 2, 5)])
def test_the_law_is_that_of_the_longest_token(nodes: int, forwards: int, known: int | None) -> None:
    """Of all tokens, or of those behind the most likely beginnings; for two requests and two places of their chains."""
    model: Any = model_for(tokenizer_of("bytes"), sharpness=6.0)
    drafter = _drafter(model, nodes, forwards)
    texts = ["the quick brown", "春 while"]
    drafter.begin(tuple(map(_prompt, texts)), _setup(Law.INDEPENDENT, DraftSampling(lambda logits, paths: logits, Noise(3))))
    found = drafter.propose(chain_budget((0, 1), 2))
    assert found.q is not None
    own = vocabulary_of("byte-level")
    for b, text in enumerate(texts):
        data = text.encode()
        for place in range(2):
            last = int(found.tree.tokens[b, place])
            wanted = _by_hand(model, data, last, known, -(-nodes // forwards))
            assert known is None or (wanted > 0).sum() < len(own.ids), "some tokens are out of reach"
            torch.testing.assert_close(found.q[b, place].double(), wanted, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(found.q[b, place].sum(), torch.tensor(1.0))
            data += own.bytes_of(int(found.tree.tokens[b, place + 1])) or b""
    assert found.q[:, 2].abs().sum() == 0
    assert _joined(int(found.tree.tokens[0, 0])) or _joined(int(found.tree.tokens[1, 0])), "some pairs are one token"


@pytest.mark.parametrize("law", [Law.INDEPENDENT, Law.COUPLED])
def test_tokens_are_drawn_from_the_law(law: Law) -> None:
    copies = 800
    model: Any = model_for(tokenizer_of("bytes"), sharpness=6.0)
    drafter = _drafter(model, 4, 2)
    drafter.begin((_prompt("the quick"),) * copies, _setup(law, DraftSampling(flattened, Noise(3))))
    found = drafter.propose(chain_budget(tuple(range(copies)), 1))
    wanted = (_by_hand(model, b"the quick", _prompt("the quick")[-1], 4, 2).clamp(min=0).log() / 3.0).softmax(0)
    drawn = found.tree.tokens[:, 1].bincount(minlength=len(wanted)).double()
    assert chi_square(drawn, wanted * copies) > 1e-3
    assert drawn[wanted == 0].sum() == 0
    assert (found.q is None) == (law is Law.COUPLED)


def test_a_draft_that_only_ends_texts_leaves_a_law() -> None:
    """Its probability is all on a special token, which is no target token's text."""
    model: Any = model_for(tokenizer_of("bytes"))
    head = torch.nn.Linear(32, len(tokenizer_of("bytes")))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(float("-inf"))[2] = 0.0
    model.lm_head = head
    drafter = _drafter(model, 4, 2)
    drafter.begin((_prompt("the"),), _setup(Law.INDEPENDENT, DraftSampling(flattened, Noise(3))))
    found = drafter.propose(chain_budget((0,), 2))
    assert found.q is not None
    for place in range(2):
        q = torch.zeros(len(tokenizer_of("byte-level")))
        q[[token for data, token in vocabulary_of("byte-level").ids.items() if len(data) == 1]] = 1.0
        q[_joined(int(found.tree.tokens[0, place]))] = 0.0
        torch.testing.assert_close(found.q[0, place], q / q.sum())


def test_a_forced_special_token_is_drafted_and_passed_over() -> None:
    def forced(logits: Tensor, paths: Paths) -> Tensor:
        return torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor([2]), 0.0)

    drafter = _drafter(model_for(tokenizer_of("bytes")), 4, 2)
    drafter.begin((_prompt("the"),), _setup(Law.COUPLED, DraftSampling(forced, Noise(3))))
    assert drafter.propose(chain_budget((0,), 3)).tree.tokens[0, 1:].tolist() == [2, 2, 2]


# State.


def test_state_equals_state_rebuilt() -> None:
    model, own = model_for(tokenizer_of("bytes")), vocabulary_of("byte-level")
    generator = torch.Generator().manual_seed(7)
    ends = [torch.randint(1, len(tokenizer_of("byte-level")), (20,), generator=generator).tolist() for _ in range(2)]
    wholes = [own.encode(PHRASE.encode())[0][:12] + ends[0], own.encode("春眠不觉晓".encode())[0] + ends[1]]
    texts = [wholes[0][:9], wholes[1][:4]]
    drafter = _drafter(model, 6, 3)
    drafter.begin(tuple(map(tuple, texts)), _setup())

    def rebuilt(order: tuple[int, ...]) -> Draft:
        fresh = _drafter(model, 6, 3)
        fresh.begin(tuple(tuple(texts[b]) for b in order), _setup())
        return fresh.propose(chain_budget(tuple(range(len(order))), 2))

    for round_ in range(6):
        new = [wholes[b][len(texts[b]) :][: 1 + (round_ * 3 + b) % 4] for b in range(2)]
        for text, tokens in zip(texts, new, strict=True):
            text.extend(tokens)
        drafter.commit(Committed((0, 1), tuple(map(tuple, new)), tuple(len(t) - 1 for t in new)))
        if round_ % 3 != 2:
            assert_same_draft(drafter.propose(chain_budget((0, 1), 2)), rebuilt((0, 1)))
    for order in ((1, 0), (1,)):
        assert_same_draft(drafter.propose(chain_budget(order, 2)), rebuilt(order))
    assert drafter.propose(chain_budget((1,), 0)).tree.num_nodes == (1,)


def test_chains_get_shorter_where_the_drafts_positions_end() -> None:
    drafter = _drafter(model_for(tokenizer_of("bytes")), 4, 2)
    text = (PHRASE * 8).encode()
    # 512 positions, and a token takes up to 3 of them.
    for length, drafted in ((512 - 12, 4), (512 - 7, 2), (512 - 2, 0)):
        drafter.begin((tuple(vocabulary_of("byte-level").ids[bytes([byte])] for byte in text[:length]),), _setup())
        assert drafter.propose(chain_budget((0,), 4)).tree.num_nodes == (1 + drafted,)


# What does not fit.


def _twofold() -> Any:
    """Every token is one byte, and many bytes have two tokens: a letter, and the byte token of a fallback."""
    spec = json.loads(tokenizer_of("byte-fallback").backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    spec["model"]["merges"] = []
    names = [n for n in vocabulary if n[0] + n[-1] == "<>" or (len(n) == 1 and (n == "▁" or n.isascii()))]
    spec["model"]["vocab"] = {name: i for i, name in enumerate(sorted(names, key=vocabulary.__getitem__))}
    made = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_drafts_that_are_not_byte_level_are_refused() -> None:
    target = tokenizer_of("byte-level")
    for kind in ("byte-level", "byte-fallback", "unigram"):
        with pytest.raises(VocabularyMismatchError, match=r"one byte .* draft's token \d+ is b.* by='intersection' .* by='string'"):
            VocabMap(target, tokenizer_of(kind), model_for(tokenizer_of(kind)), WAY)
    twofold = _twofold()
    with pytest.raises(VocabularyMismatchError, match=r"no byte has two.* tokens \d+ and \d+ are both b'"):
        VocabMap(target, twofold, model_for(twofold), WAY)
    for wrong in ({"nodes": 0}, {"forwards": 0}, {"nodes": 2.5}):
        with pytest.raises(SpecDecError, match="at least 1"):
            VocabMap(target, tokenizer_of("bytes"), model_for(tokenizer_of("bytes")), WAY, **wrong)  # type: ignore[arg-type]


# End to end.


def test_texts_are_the_targets_own() -> None:
    """Greedy as generate; sampled as without a drafter. Both models know one text."""
    model: Any = reciter(tokenizer_of("byte-level"), LETTERS)
    tokens = tokenizer_of("byte-level")(LETTERS * 2).input_ids
    assert len(tokens) < len(LETTERS) * 1.5, "some tokens are longer than a byte"
    assert len(set(pairwise(tokens))) == len(set(tokens)), "what follows a token is known from that token"
    planner = RecordingPlanner(FixedPlanner(nodes=3, depth=3))
    drafter = _drafter(reciter(tokenizer_of("bytes"), LETTERS), 8, 4)
    generator = SpeculativeGenerator(model, drafter, planner=planner, options=PLAINLY)
    inputs = left_padded([tokenizer_of("byte-level")(text).input_ids for text in (" the", "thequick")])
    plain: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    assert_same_greedy(model, inputs, generator.generate(**inputs, **plain), model.generate(**inputs, **plain))
    accepted, drafted = [sum(sum(getattr(r, name)) for r in planner.rounds) for name in ("accepted", "drafted")]
    assert accepted > 0.7 * drafted > 0
    sampled: dict[str, Any] = {**plain, "do_sample": True, "temperature": 0.7, "seed": 11}
    without = SpeculativeGenerator(model, verifier="coupled", options=PLAINLY).generate(**inputs, **sampled)
    assert torch.equal(generator.generate(**inputs, **sampled), without)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_two_sampled_tokens_follow_the_targets_law(rule: str) -> None:
    copies = 1500
    model: Any = model_for(tokenizer_of("byte-level"), sharpness=8.0)
    planner = RecordingPlanner(FixedPlanner(nodes=2, depth=2))
    drafter = _drafter(model_for(tokenizer_of("bytes"), sharpness=8.0), 4, 2)
    prompt = _prompt("the quick")
    inputs = {"input_ids": torch.tensor([prompt] * copies), "attention_mask": torch.ones(copies, len(prompt), dtype=torch.long)}
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "top_k": 0, "seed": 5}
    found = SpeculativeGenerator(model, drafter, verifier=rule, planner=planner, options=PLAINLY).generate(**inputs, **options)
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        texts = torch.tensor([[*prompt, token] for token in range(len(first))])
        second = model(texts).logits[:, -1].double().softmax(-1)
    joint = (first[:, None] * second).flatten()
    drawn = (found[:, -2] * len(first) + found[:, -1]).bincount(minlength=len(joint)).double()
    assert chi_square(drawn, joint * copies) > 1e-3
    accepted = [count for r in planner.rounds for count in r.accepted]
    assert 0 < sum(accepted) < sum(sum(r.drafted) for r in planner.rounds)

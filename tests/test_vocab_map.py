"""Drafts from another vocabulary: tokens as bytes, contexts that follow the text, laws, and losslessness end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from specdec.drafters.base import DraftSampling, DraftSetup
from specdec.drafters.byte_alignment import ByteText, ByteVocabulary, shared_tokens, without_open_end
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.vocab_map import WAYS, VocabMap
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.graphs import run_again
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.runner import RunnerOptions
from specdec.types import Budget, Committed, Draft, Law
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, chain_budget, chi_square, flattened
from tests.support_models import left_padded
from tests.support_tokenizers import PHRASE, SPECIAL, TEXTS, model_for, permuted, reciter, tokenizer_of, vocabulary_of

KINDS = ("byte-level", "bytes", "byte-fallback", "unigram")
PAIRS = (("byte-level", "byte-fallback"), ("byte-fallback", "byte-level"), ("unigram", "bytes"), ("byte-level", "unigram"))
CASES = [(*pair, by) for pair in PAIRS for by in ("intersection", "string")] + [("byte-level", "bytes", "string-rejection")]
SLOWER = [*CASES[:2], *[pytest.param(*case, marks=pytest.mark.slow) for case in CASES[2:]]]
K, NEW = 4, 24
# Capturing takes longer than these texts.
PLAINLY = RunnerOptions(capture="off")


def _bytes(own: ByteVocabulary, tokens: list[int]) -> bytes:
    return b"".join(own.bytes_of(token) or b"" for token in tokens)


# The table.


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_their_bytes(kind: str, text: str) -> None:
    own, tokenizer = vocabulary_of(kind), tokenizer_of(kind)
    tokens = tokenizer(TEXTS[text], add_special_tokens=False).input_ids
    decoded = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    data = b"".join(own.bytes_of(t) if own.bytes_of(t) is not None else tokenizer.decode([t]).encode() for t in tokens)
    assert data.removeprefix(b" " if own.prepends else b"") == decoded.encode()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_keeps_every_byte(kind: str, text: str) -> None:
    own, data = vocabulary_of(kind), TEXTS[text].encode()
    tokens, used = own.encode(data)
    assert _bytes(own, tokens) == data[:used]
    assert used == len(data), "all characters are in every vocabulary here"
    assert not {own.table[t] for t in tokens} & {None}
    for cut in range(len(data)):
        # From the middle of a character on, and up to one.
        tokens, used = own.encode(data[cut:][:9])
        assert _bytes(own, tokens) == data[cut:][:used]
        assert used == len(data[cut:][:9]) or kind == "unigram"


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_chooses_as_the_tokenizer_does(kind: str) -> None:
    own, tokenizer = vocabulary_of(kind), tokenizer_of(kind)
    for text in ("the cat sat on the mat", PHRASE, TEXTS["code"]):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert own.encode((" " * own.prepends + text).encode())[0] == expected


def test_special_and_unknown_tokens_have_no_bytes() -> None:
    for kind in KINDS:
        own = vocabulary_of(kind)
        assert [own.bytes_of(i) for i in range(len(SPECIAL))] == [None] * len(SPECIAL)
        assert own.bytes_of(10**6) is None
        assert b"<s>" not in own.ids
    assert vocabulary_of("unigram").encode("ab ☃".encode())[1] == 3


def test_a_byte_token_yields_to_an_ordinary_one() -> None:
    own, tokenizer = vocabulary_of("byte-fallback"), tokenizer_of("byte-fallback")
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    assert names[own.ids[b"e"]] == "e"
    assert names[own.ids[b" "]] == "▁"
    assert names[own.ids[b"\xf0"]] == "<0xF0>"
    assert own.bytes_of(tokenizer.get_vocab()["<0x0A>"]) == b"\n"


def test_shared_tokens_have_the_same_bytes() -> None:
    for a, b in PAIRS:
        target, draft = vocabulary_of(a), vocabulary_of(b)
        ids = shared_tokens(target, draft)
        assert len(ids[0]) > 40
        assert len(set(ids[0])) == len(set(ids[1])) == len(ids[0])
        assert all(target.table[i] == draft.table[j] for i, j in zip(*ids, strict=True))
        assert set(target.ids) & set(draft.ids) == {target.table[i] for i in ids[0]}


def test_an_open_character_is_held_back() -> None:
    whole = "aé春😀".encode()
    for cut in range(len(whole) + 1):
        kept = without_open_end(whole[:cut])
        assert whole.decode().startswith(kept.decode())
        assert cut - len(kept) < 4
    assert without_open_end(b"\x80\x80") == b"\x80\x80"
    assert without_open_end(b"\xff") == b"\xff"


# The draft's reading of the text.


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_text_does_not_depend_on_how_it_came(target: str, draft: str) -> None:
    own = vocabulary_of(target)
    text = (" " * own.prepends + "".join(TEXTS.values()) + PHRASE).encode()
    tokens = [1, *own.encode(text)[0]]
    whole = ByteText(own, vocabulary_of(draft))
    whole.add(tokens)
    for piece in (1, 3, 50):
        parts = ByteText(own, vocabulary_of(draft))
        for i in range(0, len(tokens), piece):
            closed = list(parts.closed)
            parts.add(tokens[i : i + piece])
            assert parts.closed[: len(closed)] == closed
        assert parts.draft_tokens() == whole.draft_tokens()
        assert parts.closed == whole.closed
    read = _bytes(vocabulary_of(draft), whole.draft_tokens()).removeprefix(b" " * vocabulary_of(draft).prepends)
    assert read == text.removeprefix(b" " * own.prepends)


@pytest.mark.parametrize("draft", ["bytes", "unigram"])
def test_of_several_spaces_at_the_beginning_one_is_the_tokenizer_s(draft: str) -> None:
    own, theirs = vocabulary_of("byte-fallback"), vocabulary_of(draft)
    space, the = own.ids[b" "], tokenizer_of("byte-fallback")("the", add_special_tokens=False).input_ids
    text = ByteText(own, theirs)
    text.add([1, space])
    assert text.ahead(b"the") == b"the", "the space before the text is there"
    text.add(the)
    assert _bytes(own, [space, *the]) == b"  the"
    assert _bytes(theirs, text.draft_tokens()) == b" " * theirs.prepends + b" the"


def test_a_split_character_waits_for_its_end() -> None:
    parts = ByteText(vocabulary_of("byte-fallback"), vocabulary_of("unigram"))
    emoji = [vocabulary_of("byte-fallback").ids[bytes([byte])] for byte in "😀".encode()]
    for token in emoji[:-1]:
        parts.add([token])
        assert parts.draft_tokens() == [vocabulary_of("unigram").ids[b" "]]
    parts.add(emoji[-1:])
    assert _bytes(vocabulary_of("unigram"), parts.draft_tokens()).decode() == " 😀"


def test_special_tokens_end_a_segment_and_unknown_characters_become_unknown() -> None:
    own = vocabulary_of("byte-level")
    text = ByteText(own, vocabulary_of("unigram"))
    text.add([1, *own.encode("the ☃".encode())[0], 2, *own.encode(b"dog")[0]])
    found = text.draft_tokens()
    assert found.count(vocabulary_of("unigram").unknown) == 1
    assert _bytes(vocabulary_of("unigram"), found) == b" the dog"
    assert ByteText(own, vocabulary_of("byte-level")).draft_tokens() == [0]


# The drafter by itself.


def _setup(size: int, law: Law = Law.DETERMINISTIC, sampling: DraftSampling | None = None) -> DraftSetup:
    return DraftSetup(torch.device("cpu"), size, 256, law, sampling)


def _drafted(draft: Draft, b: int = 0) -> list[int]:
    row: list[int] = draft.tree.tokens[b, 1 : draft.tree.num_nodes[b]].tolist()
    return row


def _sayable(target: str, draft: str) -> Any:
    """A random model that says only what the target can say as well."""
    model: Any = model_for(tokenizer_of(draft))
    with torch.no_grad():
        for i, data in enumerate(vocabulary_of(draft).table):
            if not data or vocabulary_of(target).encode(data)[1] < len(data):
                model.lm_head.weight[i] = 0.0
    return model


@pytest.mark.parametrize(("target", "draft", "by"), SLOWER)
def test_state_equals_state_rebuilt(target: str, draft: str, by: str) -> None:
    tokenizer, own, model = tokenizer_of(target), vocabulary_of(target), _sayable(target, draft)
    size = len(tokenizer)
    # Text of both vocabularies, then tokens at random: parts of characters and special tokens are among them.
    generator = torch.Generator().manual_seed(7)
    ends = [torch.randint(1, size, (30,), generator=generator).tolist() for _ in range(2)]
    wholes = [own.encode((PHRASE * 2).encode())[0][:40] + ends[0], own.encode(TEXTS["cjk"].encode())[0] + ends[1] * 3]
    texts = [wholes[0][:9], wholes[1][:4]]
    drafter = VocabMap(tokenizer, tokenizer_of(draft), model, by, options=PLAINLY)
    drafter.begin(tuple(map(tuple, texts)), _setup(size))
    seen = 0
    for round_ in range(12):
        new = [wholes[b][len(texts[b]) :][: 1 + (round_ * 3 + b) % (K + 1)] for b in range(2)]
        for text, tokens in zip(texts, new, strict=True):
            text.extend(tokens)
        drafter.commit(Committed((0, 1), tuple(map(tuple, new)), tuple(len(t) - 1 for t in new)))
        if round_ % 3 == 2:
            continue
        fresh = VocabMap(tokenizer, tokenizer_of(draft), model, by, options=PLAINLY)
        fresh.begin(tuple(map(tuple, texts)), _setup(size))
        found = drafter.propose(chain_budget((0, 1), K))
        assert_same_draft(found, fresh.propose(chain_budget((0, 1), K)))
        assert found.tree.tokens[:, 0].tolist() == [text[-1] for text in texts]
        seen += sum(found.tree.num_nodes) - 2
    assert seen > 10
    # Requests change their places and leave.
    for order in ((1, 0), (1,)):
        fresh = VocabMap(tokenizer, tokenizer_of(draft), model, by, options=PLAINLY)
        fresh.begin(tuple(tuple(texts[b]) for b in order), _setup(size))
        assert_same_draft(drafter.propose(chain_budget(order, K)), fresh.propose(chain_budget(tuple(range(len(order))), K)))
    assert drafter.propose(chain_budget((1,), 0)).tree.num_nodes == (1,)


@pytest.mark.parametrize("by", WAYS)
def test_what_a_request_drafts_does_not_depend_on_its_place_in_the_batch(by: str) -> None:
    tokenizer, model, counts, drafted = tokenizer_of("byte-level"), _sayable("byte-level", "bytes"), (K, 0, 2), []
    law = Law.DETERMINISTIC if by == "string" else Law.INDEPENDENT
    for order in ((0, 1, 2), (2, 0, 1)):
        drafter = VocabMap(tokenizer, tokenizer_of("bytes"), model, by, nodes=4, forwards=2, options=PLAINLY)
        texts = tuple(tuple(tokenizer(text).input_ids) for text in ("the cat", "春", "x"))
        drafter.begin(texts, _setup(len(tokenizer), law, DraftSampling(flattened, Noise(3))))
        found = drafter.propose(Budget(order, tuple(counts[r] for r in order), (K,) * 3, (1,) * 3))
        drafted.append({request: _drafted(found, row) for row, request in enumerate(order)})
    assert drafted[0] == drafted[1]
    assert len(drafted[0][0]) > 1
    assert drafted[0][1] == []


@pytest.mark.parametrize("law", [Law.INDEPENDENT, Law.COUPLED])
def test_the_law_is_the_drafts_over_shared_tokens(law: Law) -> None:
    target, draft, copies = "byte-level", "byte-fallback", 1500
    own, tokenizer = vocabulary_of(target), tokenizer_of(target)
    model: Any = model_for(tokenizer_of(draft), sharpness=6.0)
    drafter = VocabMap(tokenizer, tokenizer_of(draft), model)
    prompt = tuple(own.encode(b"the quick brown")[0])
    drafter.begin((prompt,) * copies, _setup(len(tokenizer), law, DraftSampling(flattened, Noise(3))))
    found = drafter.propose(chain_budget(tuple(range(copies)), 1))
    with torch.no_grad():
        tokens = tokenizer_of(draft)("the quick brown", add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(tokens).logits[0, -1].double() / 3.0
    ids, theirs = shared_tokens(own, vocabulary_of(draft))
    wanted = torch.zeros(len(tokenizer), dtype=torch.double).scatter(0, torch.tensor(ids), logits[theirs].softmax(0))
    drawn = found.tree.tokens[:, 1].bincount(minlength=len(tokenizer)).double()
    assert chi_square(drawn, wanted * copies) > 1e-3
    assert drawn[wanted == 0].sum() == 0
    if law is Law.INDEPENDENT:
        assert found.q is not None
        torch.testing.assert_close(found.q[:, 0], wanted.float().expand(copies, -1), atol=1e-6, rtol=1e-4)
    else:
        assert found.q is None


def test_processing_that_allows_no_shared_token_leaves_a_law() -> None:
    def only_special(logits: torch.Tensor, paths: object) -> torch.Tensor:
        return torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor([2]), 0.0) + logits

    tokenizer = tokenizer_of("byte-level")
    drafter = VocabMap(tokenizer, tokenizer_of("bytes"), model_for(tokenizer_of("bytes")))
    drafter.begin(((9, 8),), _setup(len(tokenizer), Law.INDEPENDENT, DraftSampling(only_special, Noise(3))))
    found = drafter.propose(chain_budget((0,), K))
    assert found.q is not None
    torch.testing.assert_close(found.q[0, :K].sum(-1), torch.ones(K))
    assert float(found.q[0, 0, 2]) == 0.0


@pytest.mark.parametrize("by", WAYS)
def test_texts_longer_than_the_draft_are_left_alone(by: str) -> None:
    tokenizer = tokenizer_of("byte-level")
    long, short = tuple(tokenizer(PHRASE * 8).input_ids), tuple(tokenizer(PHRASE).input_ids)
    drafter = VocabMap(tokenizer, tokenizer_of("bytes"), model_for(tokenizer_of("bytes")), by)
    drafter.begin((long, short), _setup(len(tokenizer)))
    assert drafter.propose(chain_budget((0, 1), K)).tree.num_nodes == (1, 1)
    assert drafter.propose(chain_budget((1,), K)).tree.num_nodes[0] > 1


def test_a_prefix_that_requests_share_is_not_written_again() -> None:
    tokenizer = tokenizer_of("byte-level")
    model, options = _sayable("byte-level", "bytes"), RunnerOptions(capture="off", share_from=1)
    text = tokenizer(PHRASE * 2).input_ids
    drafter = VocabMap(tokenizer, tokenizer_of("bytes"), model, "string", options=options)
    drafter.begin((tuple(text),) * 2, _setup(len(tokenizer)))
    (common,) = drafter.runner.cache.shared
    assert common.slots > 50
    drafter.commit(Committed((0, 1), ((9,), (vocabulary_of("byte-level").ids[b" "],)), (0, 0)))
    drafter.propose(chain_budget((0, 1), K))
    assert min(drafter.runner.cache.lengths) >= common.slots


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "by"), [case[1:] for case in CASES if case[1] == "byte-fallback"] + [CASES[-1][1:]])
def test_captured_forwards_draft_the_same(draft: str, by: str) -> None:
    """Replays run again on buffers of fixed size, with a cache that sometimes gets shorter."""
    options = RunnerOptions(attention="triton", capture="off", pack="off", row_invariant=False, capture_after=1)
    own, tokenizer, model = vocabulary_of("byte-level"), tokenizer_of("byte-level"), _sayable("byte-level", draft)
    whole = own.encode(PHRASE.encode())[0]
    both = (PLAINLY, options)
    drafters = [VocabMap(tokenizer, tokenizer_of(draft), model, by, nodes=4, forwards=2, options=own) for own in both]
    drafters[1].runner.use_graphs(run_again)
    for drafter in drafters:
        drafter.begin((tuple(whole[:6]),), _setup(len(tokenizer)))
    for place in range(6, 12):
        plain, replayed = [drafter.propose(chain_budget((0,), 2)) for drafter in drafters]
        assert_same_draft(plain, replayed)
        for drafter in drafters:
            drafter.commit(Committed((0,), ((whole[place],),), (0,)))
    found = drafters[1].runner
    captures = found._chains if by == "string" else found._graphs
    assert captures is not None
    assert len(captures.captures)


def test_what_does_not_fit_is_refused() -> None:
    a, b = tokenizer_of("byte-level"), tokenizer_of("bytes")
    model = model_for(b)
    with pytest.raises(SpecDecError, match="'intersection', 'string', 'string-rejection'"):
        VocabMap(a, b, model, by="text")
    with pytest.raises(SpecDecError, match="PromptLookupDrafter"):
        VocabMap(a, b, PromptLookupDrafter())  # type: ignore[arg-type]
    with pytest.raises(VocabularyMismatchError, match="WordPiece"):
        VocabMap(a, tokenizer_of("wordpiece"), model)
    with pytest.raises(VocabularyMismatchError, match="ByT5Tokenizer"):
        VocabMap(ByT5Tokenizer(), b, model)
    with pytest.raises(VocabularyMismatchError, match="the draft's own tokenizer"):
        VocabMap(b, a, model)
    with pytest.raises(VocabularyMismatchError, match="the target's own tokenizer"):
        VocabMap(a, b, model).begin(((3, 4),), _setup(len(b)))
    with pytest.raises(VocabularyMismatchError, match="VocabMap"):
        SpeculativeGenerator(model_for(a), model)  # type: ignore[arg-type]


# End to end.


def _inputs(kind: str, texts: list[str]) -> dict[str, torch.Tensor]:
    return left_padded([tokenizer_of(kind)(text).input_ids for text in texts])


def _share(planner: RecordingPlanner) -> float:
    """Accepted of drafted tokens."""
    return sum(sum(r.accepted) for r in planner.rounds) / max(sum(sum(r.drafted) for r in planner.rounds), 1)


def _lossless(model: Any, inputs: dict[str, torch.Tensor], drafter: VocabMap) -> tuple[float, float]:
    """Greedy and sampled text are the target's own; the acceptance rate of each."""
    plain = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    planner = RecordingPlanner(FixedPlanner(nodes=K, depth=K))
    generator = SpeculativeGenerator(model, drafter, planner=planner, options=PLAINLY)
    tokens = generator.generate(**inputs, **plain)
    assert_same_greedy(model, inputs, tokens, model.generate(**inputs, **plain))
    greedy = _share(planner)
    options: dict[str, Any] = {**plain, "do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 11}
    planner = RecordingPlanner(FixedPlanner(nodes=K, depth=K))
    sampled = SpeculativeGenerator(model, drafter, planner=planner, options=PLAINLY).generate(**inputs, **options)
    assert torch.equal(sampled, SpeculativeGenerator(model, verifier="coupled", options=PLAINLY).generate(**inputs, **options))
    assert len(set(sampled[:, inputs["input_ids"].shape[1] :].flatten().tolist())) >= 5
    return greedy, _share(planner)


@pytest.mark.parametrize(("target", "draft", "by"), SLOWER)
def test_two_that_know_one_text_agree_on_it(target: str, draft: str, by: str) -> None:
    model, other = reciter(tokenizer_of(target)), reciter(tokenizer_of(draft))
    drafter = VocabMap(tokenizer_of(target), tokenizer_of(draft), other, by, options=PLAINLY)
    greedy, _ = _lossless(model, _inputs(target, ["The quick", "while 4 big wizards vex 春", "naïve 😀"]), drafter)
    # What only one vocabulary has is out of reach of the intersection.
    assert greedy > (0.15 if by == "string" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "draft", "by"), CASES)
def test_random_models_disagree_and_lose_nothing(target: str, draft: str, by: str) -> None:
    model, other = model_for(tokenizer_of(target)), model_for(tokenizer_of(draft), seed=9)
    drafter = VocabMap(tokenizer_of(target), tokenizer_of(draft), other, by, options=PLAINLY)
    _lossless(model, _inputs(target, [TEXTS["code"], TEXTS["emoji"]]), drafter)


@pytest.mark.parametrize("by", WAYS)
def test_one_model_under_other_numbers_is_itself(by: str) -> None:
    """Every byte is a token, so the text has one reading; most of it is no UTF-8."""
    model: Any = model_for(tokenizer_of("bytes"), sharpness=14.0)
    tokenizer, old = permuted(tokenizer_of("bytes"))
    other: Any = model_for(tokenizer_of("bytes"), sharpness=14.0)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[old])
        other.lm_head.weight.copy_(model.lm_head.weight[old])
    drafter = VocabMap(tokenizer_of("bytes"), tokenizer, other, by, options=PLAINLY)
    assert drafter.shared == 256
    greedy, sampled = _lossless(model, _inputs("bytes", ["春眠不觉晓 and then", "😀 x"]), drafter)
    # Only the first and the last are laws.
    assert greedy > (0.6 if by == "string" else 0.95)
    assert sampled > (0.05 if by == "string" else 0.95)

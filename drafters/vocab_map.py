"""Draft models with another vocabulary than the target's (Timor et al., arXiv 2502.05202)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from specdec.drafters.base import DraftSetup
from specdec.drafters.byte_alignment import ByteText, ByteVocabulary, shared_tokens, without_open_end
from specdec.drafters.cached import draft_options
from specdec.drafters.chains import CHAIN_LAWS, ChainDrafts, Draw, Process, replayed
from specdec.drafters.string_law import StringLaw
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.rows import next_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law

WAYS = ("intersection", "string", "string-rejection")
# A token of the target is at most so many of the draft's, when it is told how far to write.
_MOST_PER_TOKEN = 16.0


class VocabMap:
    """Any transformers causal LM as drafter, whatever its tokenizer. Lossless: drafts come in the target's vocabulary.

    Both vocabularies are read as bytes, see `drafters.byte_alignment`; special tokens are in neither's bytes and never map. The
    committed target tokens are the truth and are never encoded again. The draft model reads the committed bytes in its own
    tokens, a function of the text alone, and its cache keeps the longest beginning that still holds.

    "intersection" (TLI, algorithm 4): the draft's law over the tokens that both have, made to sum to 1. It is a law over target
    tokens like any other, so every rule for chains is exact with it. Best where the vocabularies share much.
    "string" (SLEM, algorithm 2): the draft writes text, greedily, which becomes target tokens behind the committed ones.
    Deterministic. Best where they share little; a drafted token takes as many draft steps as the text so far took for one of its
    tokens.
    "string-rejection" (SLRS): for drafts that write single bytes, a law over all of the target's tokens, see
    `drafters.string_law`. It takes 1 + `forwards` draft forwards for a drafted token, and every rule for chains is exact with it.
    On a GPU reading the text costs one more synchronisation a round, and "string-rejection" one for every drafted token.
    """

    taps: tuple[str, ...] = ()
    shape: Literal["chain", "tree"] = "chain"

    def __init__(
        self,
        target_tokenizer: PreTrainedTokenizerBase,
        draft_tokenizer: PreTrainedTokenizerBase,
        model: nn.Module,
        by: str = "intersection",
        *,
        nodes: int = 64,
        forwards: int = 8,
        options: RunnerOptions | None = None,
    ) -> None:
        """model: the draft, of draft_tokenizer's vocabulary; left as it was found.

        nodes, forwards: for "string-rejection" only. Behind how many beginnings of tokens the draft is asked what follows, for one
        drafted token, and in how many forwards; tokens of up to forwards + 1 bytes are drafted.
        Raises SpecDecError for another `by`, and for what is no model; VocabularyMismatchError for a tokenizer that cannot be
        read as bytes, for vocabularies that share nothing, and with "string-rejection" for drafts that are not byte-level.
        """
        _check(by, model)
        self.name = f"vocab-map-{by}"
        self.laws = frozenset({Law.DETERMINISTIC}) if by == "string" else CHAIN_LAWS
        self._by = by
        self._target, self._draft = ByteVocabulary(target_tokenizer, "target"), ByteVocabulary(draft_tokenizer, "draft")
        self.runner = ModelRunner(model, options=options or draft_options(model))
        _check_size(self._draft, self.runner.vocabulary, "draft")
        target_ids, draft_ids = shared_tokens(self._target, self._draft)
        if by == "intersection" and not target_ids:
            raise VocabularyMismatchError("the two vocabularies share no token; use by='string'")
        self._strings = StringLaw(self._target, self._draft, self.runner, nodes, forwards) if by == "string-rejection" else None
        self.shared = len(target_ids) if self._strings is None else self._strings.tokens
        self._pairs = on_device([target_ids, draft_ids], self.runner.device)

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the target is not the tokenizer's, or lies on another device."""
        if setup.device != self.runner.device:
            raise SpecDecError(f"the draft model is on {self.runner.device}, the target on {setup.device}; move one of them")
        _check_size(self._target, setup.vocabulary, "target")
        self._vocabulary = setup.vocabulary
        self._chains = ChainDrafts(setup, self.laws, len(prompts))
        self._texts = SyncedTexts(self.runner, [ByteText(self._target, self._draft) for _ in prompts])
        self._texts.begin(prompts, setup.capacity)
        target_ids, draft_ids = self._pairs
        # Draft token of each target token; those that have none are never drawn.
        self._as_draft = torch.zeros(setup.vocabulary, dtype=torch.long, device=setup.device).scatter(0, target_ids, draft_ids)

    def propose(self, budget: Budget) -> Draft:
        """A chain for budget.requests; see `Drafter.propose`."""
        self._texts.arrange(budget.requests)
        counts = tuple(map(min, budget.nodes, budget.depth))
        if max(counts) > 0:
            found = self._texts.read(budget.requests)
            room = self._texts.room(found)
            if self._by == "string":
                return self._written(found, budget, counts, room)
            depth = min(max(counts), room // (1 if self._strings is None else self._strings.reach))
            # By shared tokens a chain is whole or not there.
            if depth > 0 and (depth == max(counts) or self._strings is not None):
                return self._drawn(self._texts.pending(budget.requests, found), budget, depth)
        return self._chains.nothing(self._texts.roots(budget.requests))

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._texts.texts[request].add(tokens)

    def _written(self, found: list[list[int]], budget: Budget, counts: tuple[int, ...], room: int) -> Draft:
        """The text that the draft writes, in the target's tokens. found: the texts in draft tokens."""
        texts = [self._texts.texts[r] for r in budget.requests]
        steps = [_steps(len(own), len(text.tokens), count) for own, text, count in zip(found, texts, counts, strict=True)]
        depth = min(max(steps), room)
        if depth <= 0:
            return self._chains.nothing(self._texts.roots(budget.requests))
        pending = self._texts.pending(budget.requests, found)
        written = self._greedy(pending, depth).tolist()
        chains = []
        for text, row, own, count in zip(texts, written, steps, counts, strict=True):
            chains.append([text.tokens[-1], *self._in_target(text, row[:own])[:count]])
        lines = [list(range(-1, len(chain) - 1)) for chain in chains]
        return Draft(tree_from_lists(chains, lines, self.runner.device), Law.DETERMINISTIC)

    def _in_target(self, text: ByteText, written: Sequence[int]) -> list[int]:
        """Target tokens of what the draft wrote, up to a special token and to the last whole character."""
        data = bytearray()
        for token in written:
            own = self._draft.bytes_of(token)
            if own is None:
                break
            data += own
        return self._target.encode(without_open_end(text.ahead(bytes(data))))[0]

    def _greedy(self, pending: list[list[int]], depth: int) -> Tensor:
        """[B, depth]: the draft's likeliest token, one after the other."""
        drafted = replayed(self.runner, pending, depth)
        if drafted is not None:
            return drafted
        logits = self.runner.extend(pending)
        tokens = [logits.argmax(-1, keepdim=True)]
        for step in range(depth - 1):
            logits = self.runner.forward(next_rows(self.runner.cache, step, tokens[-1]))[0]
            tokens.append(logits.argmax(-1, keepdim=True))
        return torch.cat(tokens, 1)

    def _drawn(self, pending: list[list[int]], budget: Budget, depth: int) -> Draft:
        """A chain drawn from laws over target tokens."""
        requests = budget.requests
        lengths = [len(self._texts.texts[slot].tokens) for slot in requests]
        draws = self._chains.draws(requests, lengths)
        if self._chains.sampling is not None:
            draws = _with_law(*draws)
        roots = self._texts.roots(requests)
        return self._chains.drawn(roots, lambda drafted: self._next(pending, requests, drafted), draws, budget, depth)

    def _next(self, pending: list[list[int]], slots: Sequence[int], drafted: list[Tensor]) -> Tensor:
        """Logits [B, V of the target] behind what was drafted so far. Tokens that the draft cannot write are out."""
        if self._strings is not None:
            last = drafted[-1][:, 0].tolist() if drafted else [self._texts.texts[slot].tokens[-1] for slot in slots]
            return self._strings.logits(self._strings.spelled(last) if drafted else pending, last, self._vocabulary)
        if drafted:
            logits = self.runner.forward(next_rows(self.runner.cache, len(drafted) - 1, self._as_draft[drafted[-1]]))[0]
        else:
            logits = self.runner.extend(pending)
        target_ids, draft_ids = self._pairs
        wide = logits.new_full((logits.shape[0], self._vocabulary), float("-inf"))
        return wide.index_copy(1, target_ids, logits.index_select(1, draft_ids))


class SyncedTexts:
    """The committed text of every request in draft tokens, and a runner whose cache follows it.

    The last draft tokens of a text may change when it goes on ("hel", then "hello"). So the cache keeps the longest beginning that
    is still right, and the first forward of a round takes in the rest.
    """

    def __init__(self, runner: ModelRunner, texts: Sequence[ByteText]) -> None:
        """texts: one a request."""
        self._runner, self.texts = runner, texts
        self._order = list(range(len(texts)))
        # Of each request: what the cache holds, and how much of that can never change.
        self._held: list[list[int]] = [[] for _ in texts]
        self._firm = [0] * len(texts)

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        """Read the prompts. Texts that are longer than the model's positions are never run."""
        for text, prompt in zip(self.texts, prompts, strict=True):
            text.add(prompt)
        found = self.read(self._order)
        self._runner.begin(len(prompts), capacity + max(map(len, found)))
        for request, (text, tokens) in enumerate(zip(self.texts, found, strict=True)):
            if self.room([tokens]) > 0:
                # Only what never changes: a prefix that requests share must not be written again.
                self._firm[request] = min(len(text.closed), len(tokens) - 1)
                self._held[request] = tokens[: self._firm[request]]
        self._runner.prefill(self._held)

    def arrange(self, requests: tuple[int, ...]) -> None:
        """Put the cache's rows in the order of the round; requests that ended leave the cache."""
        if tuple(self._order) != requests:
            self._runner.cache.arrange([self._order.index(r) for r in requests])
            self._order = list(requests)

    def roots(self, requests: Sequence[int]) -> Tensor:
        """[B, 1] int64: the last committed target token of each."""
        return on_device([self.texts[r].tokens[-1:] for r in requests], self._runner.device)

    def read(self, requests: Sequence[int]) -> list[list[int]]:
        """Each text in draft tokens."""
        return [self.texts[r].draft_tokens() for r in requests]

    def room(self, found: Sequence[Sequence[int]]) -> int:
        """How many draft tokens the model has positions for behind the longest of these texts."""
        limit = self._runner.max_positions
        return 1 << 30 if limit is None else limit - max(map(len, found))

    def pending(self, requests: Sequence[int], found: Sequence[list[int]]) -> list[list[int]]:
        """What the cache does not hold of the texts, one or more draft tokens a request; the runner is to take it in next.

        found: the texts in draft tokens. What does not hold any more leaves the cache, and so does what was drafted.
        """
        cache, starts = self._runner.cache, []
        for r, tokens in zip(requests, found, strict=True):
            held, start = self._held[r], self._firm[r]
            most = min(len(held), len(tokens) - 1)
            while start < most and held[start] == tokens[start]:
                start += 1
            starts.append(min(start, most))
            self._held[r], self._firm[r] = tokens, min(len(self.texts[r].closed), len(tokens))
        cache.lengths = starts
        return [tokens[start:] for tokens, start in zip(found, starts, strict=True)]


def _with_law(process: Process, draw: Draw) -> tuple[Process, Draw]:
    """Where the processing allows none of the tokens there is no law; the unprocessed one is, though nothing will be accepted."""

    def mended(wide: Tensor, drafted: list[Tensor]) -> Tensor:
        processed = process(wide, drafted)
        return torch.where(processed.amax(-1, keepdim=True).isneginf(), wide.to(processed.dtype), processed)

    return mended, draw


def _steps(draft_tokens: int, target_tokens: int, count: int) -> int:
    """How many tokens the draft writes for so many of the target's: as many as the text so far took, and one that ends the last."""
    return ceil(count * min(draft_tokens / target_tokens, _MOST_PER_TOKEN)) + 1 if count else 0


def _check(by: str, model: object) -> None:
    if by not in WAYS:
        raise SpecDecError(f"by={by!r}: allowed are {', '.join(map(repr, WAYS))}")
    if not isinstance(model, nn.Module):
        raise SpecDecError(
            f"VocabMap maps a model, and was given a {type(model).__name__}; give the draft model itself. Drafters that look "
            "text up need no map, and heads read the target's hidden states"
        )


def _check_size(own: ByteVocabulary, vocabulary: int, whose: str) -> None:
    """Raises VocabularyMismatchError where the tokenizer has tokens that its model lacks."""
    if len(own.table) > vocabulary:
        raise VocabularyMismatchError(
            f"the {whose}'s tokenizer has ids up to {len(own.table) - 1}, and the {whose} {vocabulary} tokens; give VocabMap the "
            f"{whose}'s own tokenizer"
        )

"""The law of the next target token under a draft that writes byte by byte (SLRS of Timor et al., arXiv 2502.05202)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from specdec.drafters.byte_alignment import ByteVocabulary
from specdec.drafters.frontier import Frontier
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.runner import ModelRunner
from specdec.trees.best_first import Chosen

_NEVER = float("-inf")


class StringLaw:
    """Laws over target tokens from a byte-level draft: the chance that a token is the longest one its text begins with.

    That is SLRS's psi where text becomes tokens by the longest match. What a draft of single bytes writes has one probability and
    not a sum over all the ways to write it, and the law is a sum over the trie of the target's tokens. Of the trie's inner nodes
    only the most likely are asked for, by the draft's probabilities alone. Behind the others the trie ends: their text counts for
    the longest token so far. A token that is one token together with the one before it is out: a tokenizer writes no such pair.

    So whatever is asked for, what comes out is a law over target tokens that is wholly known before anything is drawn from it, and
    every rule for chains is exact with it.
    """

    def __init__(
        self, target: ByteVocabulary, draft: ByteVocabulary, runner: ModelRunner, nodes: int = 64, forwards: int = 8
    ) -> None:
        """nodes: most inner nodes asked for behind a text, in so many forwards; tokens of up to forwards + 1 bytes are reached.

        Raises VocabularyMismatchError where a token of the draft is not one byte, or no token can be written.
        """
        for name, value in (("nodes", nodes), ("forwards", forwards)):
            if not isinstance(value, int) or value < 1:
                raise SpecDecError(f"VocabMap {name}={value!r}: give a whole number, at least 1")
        self._runner, self._nodes, self._at_once = runner, nodes, -(-nodes // forwards)
        self._trie = TokenTrie(target, draft, runner.device)
        self.tokens = len(self._trie.spelling)
        # Most draft positions that one target token takes, drawn or only asked for.
        self.reach = max(min(forwards + 1, self._trie.depth), self._trie.least)

    def logits(self, texts: Sequence[Sequence[int]], last: Sequence[int], vocabulary: int) -> Tensor:
        """Append texts[b], one draft token or more, to row b of the cache. Log law of the target token behind it, [B, V] fp32.

        last: the target token that each text ends with. vocabulary: V of the target. The law is not made to sum to 1.
        """
        runner, cache = self._runner, self._runner.cache
        law = TextLaw(self._trie, runner.extend(texts))
        seen = Frontier(tuple(cache.lengths), runner.device)
        for asked in range(0, self._nodes if self._trie.depth > 1 else 0, self._at_once):
            chosen = law.choose(min(self._at_once, self._nodes - asked))
            rows = seen.rows(chosen.tokens, chosen.parents, chosen.depths, cache.shared)
            cache.ensure(rows.span)
            law.expand(runner.forward(rows)[0])
        known = law.log_law(vocabulary)
        out = [(row, token) for row, before in enumerate(last) for token in self._trie.joined(before)]
        if not out:
            return known
        rows, tokens = on_device(list(zip(*out, strict=True)), runner.device)
        left = known.index_put((rows, tokens), known.new_tensor(_NEVER))
        return torch.where(left.amax(1, keepdim=True).isneginf(), known, left)

    def spelled(self, tokens: Sequence[int]) -> list[list[int]]:
        """Each target token in draft tokens, one or more; what the draft cannot write is its token 0.

        A token out of reach, which only a processor can bring about, is cut off.
        """
        return [self._trie.spelling.get(token, [0])[: self.reach] for token in tokens]


class TokenTrie:
    """The beginnings of all target tokens that the draft can write. Node 0 is the empty one; the children of a node are neighbours.

    Of each node, int64 [M]. first, count: its children.  letter: the draft token of its last byte.  longest: the longest token that
    it begins with or is, -1 for none.  Then, spelling: draft tokens of each target token.  depth, least: bytes of the
    longest and of the shortest tokens.  shortest: those tokens.  widest: most children of a node.
    """

    def __init__(self, target: ByteVocabulary, draft: ByteVocabulary, device: torch.device) -> None:
        """Raises VocabularyMismatchError where a token of the draft is not one byte, or no token can be written."""
        letters = _letters(draft)
        tokens = {data: token for data, token in target.ids.items() if letters.keys() >= set(data)}
        if not tokens:
            raise VocabularyMismatchError("the draft has the bytes of none of the target's tokens; give another draft")
        names = sorted({data[:size] for data in tokens for size in range(len(data) + 1)}, key=lambda name: (len(name), name))
        number = {name: node for node, name in enumerate(names)}
        first, count, letter, longest = [[0] * len(names) for _ in range(4)]
        longest[0] = -1
        for node, name in enumerate(names[1:], 1):
            above = number[name[:-1]]
            first[above] = first[above] or node
            count[above] += 1
            letter[node] = letters[name[-1]]
            longest[node] = tokens.get(name, longest[above])
        self.first, self.count, self.letter, self.longest = on_device([first, count, letter, longest], device)
        self.spelling = {token: [letters[byte] for byte in data] for data, token in tokens.items()}
        self.depth, self.least, self.widest = len(names[-1]), min(map(len, tokens)), max(count)
        self.shortest = on_device([token for data, token in tokens.items() if len(data) == self.least], device)
        self._names, self._ids, self._bytes = sorted(tokens), tokens, {token: data for data, token in tokens.items()}
        self._joined: dict[int, list[int]] = {}

    def joined(self, token: int) -> list[int]:
        """The tokens that are one token together with this one before them."""
        if token not in self._joined:
            data = self._bytes.get(token, b"")
            longer = self._names[bisect_right(self._names, data) :] if data else []
            ends = [name[len(data) :] for name in takewhile(lambda name: name.startswith(data), longer)]
            self._joined[token] = [self._ids[end] for end in ends if end in self._ids]
        return self._joined[token]


class TextLaw:
    """The law of one place, while more and more inner nodes of the trie are known. No value is read on the host."""

    def __init__(self, trie: TokenTrie, logits: Tensor) -> None:
        """logits: [B, V of the draft] behind the text."""
        self._trie = trie
        nothing = torch.zeros(logits.shape[0], 0, dtype=torch.long, device=logits.device)
        # Of the candidates: node, logarithm of its text's probability, depth, number of the asked node above; whether it was asked.
        self._nodes = self._depths = self._above = nothing
        self._scores, self._done = nothing.float(), nothing.bool()
        # Of the asked nodes: the node, and the logarithm of the probability that the text leaves the trie behind it.
        self._asked, self._left = nothing, nothing.float()
        root = nothing.new_zeros(logits.shape[0], 1)
        self._last = root, root.float(), root
        self.expand(logits)

    def choose(self, count: int) -> Chosen:
        """The `count` most likely inner nodes, in draft tokens. Where a request has fewer, what fills its row changes nothing."""
        useful = ~self._done & (self._trie.count[self._nodes] > 0)
        scores, best = self._scores.masked_fill(~useful, _NEVER).topk(min(count, useful.shape[1]), dim=1)
        self._done = self._done | torch.zeros_like(useful).scatter(1, best, scores > _NEVER)
        nodes, depths, above = [values.gather(1, best) for values in (self._nodes, self._depths, self._above)]
        self._last = nodes, scores, depths
        return Chosen(self._trie.letter[nodes], above, depths)

    def expand(self, logits: Tensor) -> None:
        """Take in what follows the chosen nodes. logits: [B * W, V of the draft], in their order."""
        trie, (nodes, scores, depths) = self._trie, self._last
        batch, chosen = nodes.shape
        log_d = logits.float().log_softmax(-1).view(batch, chosen, -1) + scores[..., None]
        places = torch.arange(trie.widest, device=nodes.device)
        there = places < trie.count[nodes][..., None]
        children = torch.where(there, trie.first[nodes][..., None] + places, 0)
        # One more column takes the places without a child.
        letters = torch.where(there, trie.letter[children], log_d.shape[2])
        within = torch.zeros(*log_d.shape[:2], log_d.shape[2] + 1, dtype=torch.bool, device=nodes.device).scatter(2, letters, True)
        left = log_d.masked_fill(within[..., :-1], _NEVER).logsumexp(-1)
        found = log_d.gather(2, letters.clamp(max=log_d.shape[2] - 1)).masked_fill(~there, _NEVER)
        # The root is number -1.
        number = torch.arange(chosen, device=nodes.device) + self._asked.shape[1] - 1
        self._nodes = torch.cat((self._nodes, children.flatten(1)), 1)
        self._scores = torch.cat((self._scores, found.flatten(1)), 1)
        self._done = torch.cat((self._done, torch.zeros_like(there).flatten(1)), 1)
        self._depths = torch.cat((self._depths, (depths + 1).repeat_interleave(trie.widest, 1)), 1)
        self._above = torch.cat((self._above, number.repeat_interleave(trie.widest).expand(batch, -1)), 1)
        self._asked, self._left = torch.cat((self._asked, nodes), 1), torch.cat((self._left, left), 1)

    def log_law(self, vocabulary: int) -> Tensor:
        """[B, V] fp32: what the draft writes that begins with no known token is missing.

        Where that is everything, the shortest tokens are equally likely.
        """
        trie = self._trie
        tokens = trie.longest[torch.cat((self._nodes, self._asked), 1)]
        ends = torch.cat((self._scores.masked_fill(self._done, _NEVER), self._left), 1).double().exp()
        # In double precision, so that the order in which a GPU adds does not show.
        mass = ends.new_zeros(ends.shape[0], vocabulary).scatter_add(1, tokens.clamp(min=0), ends.masked_fill(tokens < 0, 0.0))
        even = mass.new_zeros(vocabulary).index_fill(0, trie.shortest, 1.0)
        return torch.where(mass.sum(1, keepdim=True) == 0, even, mass).log().float()


def _letters(draft: ByteVocabulary) -> dict[int, int]:
    """The draft token of each byte."""
    why = (
        "by='string-rejection' needs a byte-level draft, of whose tokens each is one byte and no byte has two: only then is the "
        "probability of a text one product, and not a sum over all the ways to write it. "
    )
    instead = "; use by='intersection' for a law over the tokens that both have, or by='string' for text"
    found: dict[int, int] = {}
    for token, data in enumerate(draft.table):
        if data is None:
            continue
        if len(data) != 1:
            raise VocabularyMismatchError(f"{why}The draft's token {token} is {data!r}{instead}")
        if data[0] in found:
            raise VocabularyMismatchError(f"{why}The draft's tokens {found[data[0]]} and {token} are both {data!r}{instead}")
        found[data[0]] = token
    return found

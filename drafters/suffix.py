"""Suffix lookup: a tree of what followed the longest earlier occurrence, in the request's own text and in a corpus."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters.lookup_base import LookupDrafter, Tree, likeliest_tree
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.errors import SpecDecError


class SuffixFinder:
    """The longest suffix of the text that occurred before, in the text itself or in the corpus, and its continuations."""

    def __init__(self, corpus: SuffixAutomaton, min_match: int) -> None:
        """corpus: shared and not changed.  min_match: fewest tokens that have to agree."""
        self._own = SuffixAutomaton()
        self._corpus, self._min_match = corpus, min_match
        self._state, self._matched = 0, 0

    def add(self, token: int) -> None:
        """See `Finder.add`."""
        self._own.add(token)
        self._state, self._matched = self._corpus.follow(self._state, self._matched, token)

    def find(self, nodes: int, depth: int, width: int) -> Tree:
        """Best first by the probability that the counts give a path; see `Finder.find`."""
        automaton, state, matched = self._longest()
        if matched < self._min_match:
            return [], []
        return likeliest_tree(state, automaton.following, nodes, depth, width)

    def _longest(self) -> tuple[SuffixAutomaton, int, int]:
        """Where the longer match is; the request's own text wins a tie, for it is nearer."""
        own, own_matched = self._own.shorten(self._own.last)
        if self._matched > own_matched:
            return self._corpus, self._state, self._matched
        return self._own, own, own_matched


class SuffixDrafter(LookupDrafter):
    """A suffix automaton over prompt and output, and optionally over a corpus of token ids (compare SuffixDecoding,
    arXiv 2411.04975); a tree where continuations differ."""

    def __init__(self, corpus: Sequence[Sequence[int]] = (), *, min_match: int = 2) -> None:
        """corpus: texts as the target's token ids, built into the automaton once.  min_match: at least 1."""
        if min_match < 1:
            raise SpecDecError(f"min_match={min_match}: need at least 1")
        shared = SuffixAutomaton(corpus)
        super().__init__("suffix", "tree", lambda: SuffixFinder(shared, min_match))

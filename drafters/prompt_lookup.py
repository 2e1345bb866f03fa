"""Prompt lookup: propose what followed the last occurrence of the text's last few tokens."""

from __future__ import annotations

from specdec.drafters.lookup_base import LookupDrafter
from specdec.errors import SpecDecError


class NgramFinder:
    """The most recent earlier occurrence of the longest suffix of max_ngram down to min_ngram tokens."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        """An empty text. The index grows by one entry a size for each token."""
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._found: int | None = None

    def add(self, token: int) -> None:
        """See `Finder.add`. Looks up before it files, so that an occurrence is always an earlier one."""
        text = self._text
        text.append(token)
        self._found = None
        for size in self._sizes:
            if len(text) < size:
                continue
            key = tuple(text[-size:])
            if self._found is None:
                self._found = self._ends.get(key)
            self._ends[key] = len(text)

    def find(self, nodes: int, depth: int, width: int) -> tuple[list[int], list[int]]:
        """A chain of what followed; see `Finder.find`."""
        if self._found is None:
            return [], []
        tokens = self._text[self._found : self._found + min(nodes, depth)]
        return tokens, list(range(len(tokens)))


class PromptLookupDrafter(LookupDrafter):
    """Prompt lookup decoding: n-grams of the request's own text, prompt and output."""

    def __init__(self, *, min_ngram: int = 2, max_ngram: int = 4) -> None:
        """min_ngram, max_ngram: tokens that have to agree; the longest match wins, then the most recent."""
        if not 1 <= min_ngram <= max_ngram:
            raise SpecDecError(f"min_ngram={min_ngram}, max_ngram={max_ngram}: need 1 <= min_ngram <= max_ngram")
        super().__init__("prompt-lookup", "chain", lambda: NgramFinder(min_ngram, max_ngram))

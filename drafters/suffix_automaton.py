"""A suffix automaton over token ids, grown one token at a time (Blumer et al., 1985)."""

from __future__ import annotations

from collections.abc import Iterable

_MOST_SUFFIXES = 64


class SuffixAutomaton:
    """Every substring of the texts added, with how often it occurs.

    State 0 is the empty string. A new token raises the counts of its suffixes, longest first, at most `_MOST_SUFFIXES` classes
    of them, so that text which repeats one token stays linear. `follow` and `shorten` let a caller keep the longest suffix of
    its own text that occurs here.
    """

    def __init__(self, texts: Iterable[Iterable[int]] = ()) -> None:
        """texts: token ids; no substring crosses from one text into the next."""
        self.next: list[dict[int, int]] = [{}]
        self.link: list[int] = [-1]
        self.length: list[int] = [0]
        self.count: list[int] = [0]
        self.last = 0
        for text in texts:
            self.last = 0
            for token in text:
                self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the present text."""
        known = self.next[self.last].get(token)
        if known is not None and self.length[known] == self.length[self.last] + 1:
            self.last = known
        elif known is not None:
            self.last = self._clone(self.last, token, known)
        else:
            self.last = self._new_state(token)
        self._count_suffixes(self.last)

    def _new_state(self, token: int) -> int:
        state = self._state({}, self.length[self.last] + 1, -1, 0)
        at = self.last
        while at != -1 and token not in self.next[at]:
            self.next[at][token] = state
            at = self.link[at]
        if at == -1:
            self.link[state] = 0
        else:
            known = self.next[at][token]
            exact = self.length[known] == self.length[at] + 1
            self.link[state] = known if exact else self._clone(at, token, known)
        return state

    def _clone(self, at: int, token: int, known: int) -> int:
        clone = self._state(dict(self.next[known]), self.length[at] + 1, self.link[known], self.count[known])
        self.link[known] = clone
        while at != -1 and self.next[at].get(token) == known:
            self.next[at][token] = clone
            at = self.link[at]
        return clone

    def _state(self, transitions: dict[int, int], length: int, link: int, count: int) -> int:
        self.next.append(transitions)
        self.length.append(length)
        self.link.append(link)
        self.count.append(count)
        return len(self.next) - 1

    def _count_suffixes(self, state: int) -> None:
        for _ in range(_MOST_SUFFIXES):
            if state <= 0:
                return
            self.count[state] += 1
            state = self.link[state]

    def following(self, state: int) -> list[tuple[float, int, int]]:
        """What came behind a state, the most often first: (share of it, token, state behind that)."""
        found = [(self.count[to], token, to) for token, to in self.next[state].items()]
        total = sum(count for count, _, _ in found)
        return [(count / total, token, to) for count, token, to in sorted(found, key=lambda f: (-f[0], -f[2]))]

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest suffix of (the matched string and then token) that occurs here, as (state, its length)."""
        while state != -1 and token not in self.next[state]:
            state = self.link[state]
            matched = self.length[state] if state != -1 else 0
        return (self.next[state][token], matched + 1) if state != -1 else (0, 0)

    def shorten(self, state: int) -> tuple[int, int]:
        """The next shorter suffix that occurs in more places, as (state, its length)."""
        shorter = max(self.link[state], 0)
        return shorter, self.length[shorter]

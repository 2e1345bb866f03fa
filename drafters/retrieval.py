"""Retrieval: what followed the longest match in the request's own text, in earlier answers, and in datastores.

After REST (arXiv 2311.08252, a datastore), CodeSwift (arXiv 2502.17139, several of them, a cache and skipping) and
SuffixDecoding (arXiv 2411.04975, best-first trees from counts).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from specdec.drafters.base import DraftSetup
from specdec.drafters.datastore import Datastore, Occurrences
from specdec.drafters.lookup_base import LookupDrafter, Tree, likeliest_tree
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.errors import SpecDecError
from specdec.types import Committed

# Occurrences that a count is made from: fewer are too coarse for the line above, more cost time.
_MOST_HITS = 24
# Answers that are remembered, in tokens, and how many of the latest places for each n-gram.
_CACHE_TOKENS, _CACHE_PLACES = 1 << 16, 4
# A source's moving average: the weight of the past, and what it starts with. Rounds a skipped source waits, at first and at most.
_PAST, _START = 0.8, 0.3
_FIRST_WAIT, _LONGEST_WAIT = 4, 64


def tree_of_rows(rows: Sequence[Sequence[int]], nodes: int, depth: int, width: int) -> Tree:
    """The most likely nodes by how many continuations go through them. rows: continuations, which may end early."""

    def children(state: tuple[int, list[int]]) -> list[tuple[float, int, tuple[int, list[int]]]]:
        level, members = state
        if len(members) == 1:
            row = rows[members[0]]
            return [(1.0, row[level], (level + 1, members))] if level < len(row) else []
        groups: dict[int, list[int]] = {}
        for member in members:
            if level < len(rows[member]):
                groups.setdefault(rows[member][level], []).append(member)
        ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
        return [(len(own) / len(members), token, (level + 1, own)) for token, own in ranked]

    return likeliest_tree((0, list(range(len(rows)))), children, nodes, depth, width)


class Source(Protocol):
    """Where continuations of one request's text are looked for."""

    def longest(self, text: list[int]) -> int:
        """How many of the text's last tokens agree with the best match here; 0 for none that will do."""

    def tree(self, nodes: int, depth: int, width: int) -> Tree:
        """What followed the match that `longest` found last; see `Finder.find`."""


class OwnText:
    """The request's own text: prompt and answer."""

    def __init__(self, min_match: int) -> None:
        """min_match: fewest tokens that have to agree."""
        self.automaton = SuffixAutomaton()
        self._min_match, self._state = min_match, 0

    def longest(self, text: list[int]) -> int:
        """See `Source.longest`."""
        self._state, matched = self.automaton.shorten(self.automaton.last)
        return matched if matched >= self._min_match else 0

    def tree(self, nodes: int, depth: int, width: int) -> Tree:
        """See `Source.tree`."""
        return likeliest_tree(self._state, self.automaton.following, nodes, depth, width)


class AnswerCache:
    """What the target said, in all requests: the latest places of its n-grams, the oldest tokens forgotten first.

    A function of the committed tokens, in the order in which they came, and of nothing else.
    """

    def __init__(self, min_match: int, max_match: int, capacity: int = _CACHE_TOKENS) -> None:
        """min_match, max_match: the n-grams filed are of min_match tokens, twice that, and so on.  capacity: in tokens."""
        self._sizes = [max_match]
        while self._sizes[-1] // 2 >= min_match:
            self._sizes.append(self._sizes[-1] // 2)
        if self._sizes[-1] != min_match:
            self._sizes.append(min_match)
        self._most, self._capacity = max_match, capacity
        self._places: dict[int, list[tuple[list[int], int]]] = {}
        self._filed: deque[tuple[list[int], list[int], int]] = deque()

    def add(self, text: list[int]) -> None:
        """File the last token of the text, which the target said, under the n-grams before it. text: kept, and may grow."""
        place = len(text) - 1
        keys = [hash(tuple(text[place - size : place])) for size in self._sizes if size <= place]
        for key in keys:
            places = self._places.setdefault(key, [])
            places.append((text, place))
            del places[:-_CACHE_PLACES]
        self._filed.append((keys, text, place))
        if len(self._filed) > self._capacity:
            self._forget(*self._filed.popleft())

    def _forget(self, keys: list[int], text: list[int], place: int) -> None:
        """Drop the oldest token's places; those that newer ones have displaced are gone already."""
        for key in keys:
            places = self._places.get(key, [])
            if places and places[0][0] is text and places[0][1] == place:
                del places[0]
                if not places:
                    del self._places[key]

    def longest(self, text: list[int]) -> tuple[int, list[tuple[list[int], int]]]:
        """The longest match of the text's last tokens, and where it goes on, latest first; 0 and nothing without one."""
        for size in self._sizes:
            places = self._places.get(hash(tuple(text[-size:])), []) if len(text) >= size else []
            agreed = [_agreement(text, other, place, self._most) for other, place in places]
            best = max(agreed, default=0)
            # An n-gram of another text may have the same hash.
            if best >= size:
                return best, [at for at, n in zip(reversed(places), reversed(agreed), strict=True) if n == best]
        return 0, []


def _agreement(text: list[int], other: list[int], place: int, most: int) -> int:
    """How many tokens before `place` of the other text equal the last tokens of this one, up to `most`."""
    most = min(most, len(text), place)
    for n in range(1, most + 1):
        if text[-n] != other[place - n]:
            return n - 1
    return most


class EarlierAnswers:
    """The shared cache, as one request's source."""

    def __init__(self, cache: AnswerCache) -> None:
        """cache: shared by all requests."""
        self._cache = cache
        self._found: list[tuple[list[int], int]] = []

    def longest(self, text: list[int]) -> int:
        """See `Source.longest`."""
        length, self._found = self._cache.longest(text)
        return length

    def tree(self, nodes: int, depth: int, width: int) -> Tree:
        """See `Source.tree`."""
        return tree_of_rows([text[place : place + depth] for text, place in self._found], nodes, depth, width)


class Stored:
    """A datastore, as one request's source."""

    def __init__(self, store: Datastore, min_match: int, max_match: int) -> None:
        """min_match, max_match: fewest and most tokens that have to agree."""
        self._store, self._least, self._most = store, min_match, max_match
        self._found = Occurrences()

    def longest(self, text: list[int]) -> int:
        """See `Source.longest`."""
        self._found = self._store.longest(text, self._least, self._most)
        return self._found.length

    def tree(self, nodes: int, depth: int, width: int) -> Tree:
        """See `Source.tree`."""
        return tree_of_rows(self._store.continuations(self._found, depth, _MOST_HITS), nodes, depth, width)


class Worth:
    """Which sources are asked: one whose drafts are not accepted is left out for a growing number of rounds, then tried again.

    It learns from finished rounds only and so never depends on a draw; it decides what is drafted and never what is said.
    """

    def __init__(self, sources: int, least: float) -> None:
        """least: accepted for each drafted token, as a moving average, below which a source is left out; 0 never does."""
        self._least = least
        self._average = [_START] * sources
        self._wait = [_FIRST_WAIT] * sources
        self._resume = [0] * sources
        self._learned: set[int] = set()
        self._round = 0

    def is_asked(self, source: int) -> bool:
        """Whether the source is searched in this round."""
        return self._round >= self._resume[source]

    def learn(self, source: int, accepted: int, drafted: int) -> None:
        """A draft of the source has been verified."""
        self._average[source] = _PAST * self._average[source] + (1 - _PAST) * accepted / drafted
        self._learned.add(source)

    def end_round(self) -> None:
        """Decide about the sources that drafted in it."""
        self._round += 1
        for source in self._learned:
            if self._average[source] >= self._least:
                self._wait[source] = _FIRST_WAIT
            else:
                self._resume[source] = self._round + self._wait[source]
                self._wait[source] = min(2 * self._wait[source], _LONGEST_WAIT)
        self._learned.clear()


class RetrievalFinder:
    """One request's search in all sources. The longest match that leads to a draft wins, a tie goes to the earlier source."""

    def __init__(self, own: OwnText | None, cache: AnswerCache | None, stores: Sequence[Source], worth: Worth) -> None:
        """stores: searched after the own text and the cache.  worth: shared by all requests."""
        self._text: list[int] = []
        self._own, self._cache, self._worth = own, cache, worth
        mine: list[Source] = [own] if own is not None else []
        self._sources = mine + ([EarlierAnswers(cache)] if cache is not None else []) + list(stores)
        self._answering = False
        # What was proposed last, until the round is over: its source, its nodes by (parent, token), and how far the text follows.
        self._proposed: dict[tuple[int, int], int] = {}
        self._source, self._at, self._followed = 0, 0, 0

    def add(self, token: int) -> None:
        """See `Finder.add`."""
        self._text.append(token)
        if self._own is not None:
            self._own.automaton.add(token)
        if self._answering and self._cache is not None:
            self._cache.add(self._text)
        # A node that is not there is nobody's parent.
        self._at = self._proposed.get((self._at, token), -1)
        self._followed += self._at > 0

    def begin_answer(self) -> None:
        """The prompt is over: what is added from here on, the target said."""
        self._answering = True

    def find(self, nodes: int, depth: int, width: int) -> Tree:
        """Best first by the probability that the counts give a path; see `Finder.find`."""
        asked = [i for i in range(len(self._sources)) if self._worth.is_asked(i)]
        matched = [(self._sources[i].longest(self._text), i) for i in asked]
        for _, i in sorted((m for m in matched if m[0]), key=lambda m: -m[0]):
            tokens, parents = self._sources[i].tree(nodes, depth, width)
            if tokens:
                self._proposed = {pair: n for n, pair in enumerate(zip(parents, tokens, strict=True), 1)}
                self._source, self._at, self._followed = i, 0, 0
                return tokens, parents
        return [], []

    def end_round(self) -> None:
        """Tell what the proposal was worth, and forget it."""
        if self._proposed:
            self._worth.learn(self._source, self._followed, len(self._proposed))
            self._proposed = {}


class RetrievalDrafter(LookupDrafter):
    """Drafts from the longest match among the request's own text, earlier answers of this drafter, and datastores.

    A draft depends on the committed tokens of this request and, with the cache or with skipping, on those of earlier rounds
    and calls of this instance. The text that comes out depends on neither. Every token is deterministic.
    """

    def __init__(
        self,
        datastores: Sequence[Datastore | str | Path] = (),
        *,
        own_text: bool = True,
        min_match: int = 2,
        max_match: int = 16,
        cache: bool = True,
        skip_below: float = 0.05,
        tokenizer: Any = None,
    ) -> None:
        """datastores: nearest first, say a project's own and then a common one; of equal matches the earlier source wins.

        own_text: search the request's prompt and answer, first.  min_match, max_match: tokens that have to agree; more than
        max_match count as max_match, but in the own text.  cache: remember answers across requests and calls.
        skip_below: accepted for each drafted token, under which a source is left out for some rounds; 0 always asks.
        tokenizer: the target's, to check that the datastores were built with it.
        Raises SpecDecError for a wrong option, CheckpointError for a folder that is no datastore.
        """
        if not 1 <= min_match <= max_match:
            raise SpecDecError(f"min_match={min_match}, max_match={max_match}: need 1 <= min_match <= max_match")
        if not 0 <= skip_below <= 1:
            raise SpecDecError(f"skip_below={skip_below}: need a share from 0 to 1")
        if isinstance(datastores, (str, Path, Datastore)):
            raise SpecDecError("datastores is one datastore; give a list of them")
        if not (datastores or own_text or cache):
            raise SpecDecError("there is nothing to search: give a datastore, or set own_text or cache")
        self.datastores = tuple(d if isinstance(d, Datastore) else Datastore(d) for d in datastores)
        for store in self.datastores:
            if max_match > store.meta.order:
                raise SpecDecError(
                    f"max_match={max_match}: datastore {store.path} is sorted by {store.meta.order} tokens, the most"
                )
            if tokenizer is not None:
                store.check_tokenizer(tokenizer)
        self._own_text, self._matches = own_text, (min_match, max_match)
        self._cache = AnswerCache(min_match, max_match) if cache else None
        self._worth = Worth(own_text + cache + len(self.datastores), skip_below)
        self._searches: list[RetrievalFinder] = []
        super().__init__("retrieval", "tree", self._search)

    def _search(self) -> RetrievalFinder:
        own = OwnText(self._matches[0]) if self._own_text else None
        stores = [Stored(store, *self._matches) for store in self.datastores]
        self._searches.append(RetrievalFinder(own, self._cache, stores, self._worth))
        return self._searches[-1]

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises VocabularyMismatchError for a datastore of another target."""
        for store in self.datastores:
            store.check_vocabulary(setup.vocabulary)
        self._searches.clear()
        super().begin(prompts, setup)
        for search in self._searches:
            search.begin_answer()

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text, and what the drafts were worth."""
        super().commit(committed)
        for request in committed.requests:
            self._searches[request].end_round()
        self._worth.end_round()

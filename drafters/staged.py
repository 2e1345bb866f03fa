"""A draft model that is itself sped up by a drafter (staged speculative decoding, arXiv 2308.04623, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specdec.drafters.base import Drafter, DraftSampling, DraftSetup, Paths
from specdec.drafters.cached import CachedTexts, draft_options
from specdec.drafters.chains import ChainDrafts, SlotWatch
from specdec.drafters.several import Runners
from specdec.drafters.slots import Shape
from specdec.errors import IncompatibleRuleError, SpecDecError
from specdec.kernels.transfer import on_device
from specdec.noise import Noise, Stream
from specdec.rows import next_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law, Scores, TokenTree
from specdec.verify.chooser import Chooser, NoiseChooser
from specdec.verify.compatibility import Rule, rule_for
from specdec.verify.coupled import Coupled, coupled_pick
from specdec.verify.walk import verdict_rows

# Keeps the inner drafter's draws apart from the draft model's own, which are keyed by the same requests and places.
_INNER = 0x3C6EF372FE94F82B


@dataclass(frozen=True, slots=True)
class _Begun:
    """The chains after one forward. processed: [B, N, V], at every node of the inner tree.

    nodes: for each request node 0 and the accepted ones.  tokens: as many, those drawn behind these nodes.
    """

    processed: Tensor
    nodes: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


class Staged:
    """A causal LM with the target's vocabulary whose chains begin with one forward over what another drafter proposes.

    The chain has exactly the law that the draft model alone would have given it, with the same q: the inner tree is verified
    against the draft model by a rule that is lossless for its draws, which gives the first tokens, and the rest is drawn one by
    one. So K tokens take 1 + K - (accepted + 1) forwards. Greedy chains are the draft model's greedy chains, and coupled
    chains its coupled chains.

    Both states are functions of the committed tokens: the inner drafter never sees a drafted token, so it proposes once a round.
    On a GPU a round costs two synchronisations more than a draft model's.
    """

    name = "staged"
    shape: Shape = "chain"
    taps: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        inner: Drafter,
        *,
        nodes: int | None = None,
        width: int = 1,
        options: RunnerOptions | None = None,
    ) -> None:
        """model: left as it was found.  inner: any drafter that needs no hidden states.

        nodes: most nodes of the inner tree, None for as many as the chain may still have tokens.  width: of the inner tree, see
        `Budget`. Raises SpecDecError for other numbers, IncompatibleRuleError for a drafter that needs hidden states.
        """
        if not isinstance(inner, Drafter):
            raise SpecDecError(
                f"the inner drafter of a staged one is a {type(inner).__name__}; give a Drafter, as PromptLookupDrafter()"
            )
        if inner.taps:
            raise IncompatibleRuleError(
                f"drafter {inner.name!r} needs {', '.join(inner.taps)} of the model that it drafts for, and a staged drafter "
                "keeps none between rounds; use a lookup or a model of its own"
            )
        for name, value in (("nodes", nodes), ("width", width)):
            if (value is not None or name == "width") and (not isinstance(value, int) or value < 1):
                raise SpecDecError(f"Staged {name}={value!r}: give a whole number, at least 1")
        self._inner, self._nodes, self._width = inner, nodes, width
        self.laws = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT}) | (
            Coupled().laws if inner.laws & Coupled().laws else frozenset()
        )
        self._model = ModelRunner(model, options=options or draft_options(model))
        self.vocabulary = self._model.vocabulary
        own = getattr(inner, "runner", None)
        self.runner = Runners({self.name: self._model} if own is None else {self.name: self._model, inner.name: own})
        self._texts = CachedTexts(self._model, "draft model")

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        self._chains = ChainDrafts(setup, self.laws, len(prompts))
        self._texts.begin(prompts, setup)
        self._rule, law = self._chosen()
        sampling = self._chains.sampling
        if sampling is not None and self._chains.law is not Law.COUPLED:
            sampling = DraftSampling(sampling.process, Noise(sampling.noise.seed ^ _INNER))
        self._inner.begin(prompts, replace(setup, law=law, sampling=sampling))

    def propose(self, budget: Budget) -> Draft:
        """A chain for budget.requests; see `Drafter.propose`."""
        requests = budget.requests
        self._texts.arrange(requests)
        counts = tuple(map(min, budget.nodes, budget.depth))
        # A request with a long accepted path goes on as long as the others need.
        if not max(counts) or not self._texts.has_room(requests, 2 * max(counts)):
            return self._chains.nothing(self._texts.roots(requests))
        proposed = self._inner.propose(self._inner_budget(requests, counts))
        pending = self._texts.pending(requests, counts)
        lengths = tuple([n + len(text) for n, text in zip(self._model.cache.lengths, pending, strict=True)])
        chooser = self._chooser(requests, lengths)
        begun = self._verified(proposed, pending, requests, chooser)
        tokens, rows = self._continued(begun, counts, requests, lengths, chooser)
        self._model.cache.lengths = list(lengths)
        return self._draft(budget, tokens, rows)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self._texts.commit(committed)
        self._inner.commit(committed)

    def _chosen(self) -> tuple[Rule, Law]:
        """The rule between the two stages, lossless, and the law that the inner drafter draws by."""
        inner, law = self._inner, self._chains.law
        name = "coupled" if law is Law.COUPLED else "auto"
        return rule_for(name, inner.laws, inner.shape, law is not Law.DETERMINISTIC, False, False)

    def _chooser(self, requests: tuple[int, ...], lengths: tuple[int, ...]) -> Chooser:
        """All of a round's draws are draws of the draft, so none is shared with the target's rule. Greedily nothing is drawn."""
        sampling = self._chains.sampling
        own = on_device([requests, lengths], self._model.device)
        return NoiseChooser(Noise(0) if sampling is None else sampling.noise, own[0], own[1], Stream.DRAFT)

    def _inner_budget(self, requests: tuple[int, ...], counts: tuple[int, ...]) -> Budget:
        """One token less than the chain may have: the verification adds one."""
        depth = tuple([max(count - 1, 0) for count in counts])
        nodes = tuple([deep if self._nodes is None or not deep else self._nodes for deep in depth])
        return Budget(requests, nodes, depth, (self._width,) * len(requests))

    def _verified(self, proposed: Draft, pending: list[list[int]], requests: tuple[int, ...], chooser: Chooser) -> _Begun:
        """Score the pending tokens and the inner tree behind them, keep a path in the cache, and draw one token more."""
        tree = proposed.tree
        read = torch.stack((tree.tokens, tree.parents)).tolist()
        texts = [row[1:size] for row, size in zip(read[0], tree.num_nodes, strict=True)]
        parents = [row[1:size] for row, size in zip(read[1], tree.num_nodes, strict=True)]
        whole = _behind(pending, texts, parents, self._model.device)
        firsts = [len(text) - 1 for text in pending]
        nodes = tree.tokens.shape[1]
        index = [[first + (n if n < size else 0) for n in range(nodes)] for first, size in zip(firsts, tree.num_nodes, strict=True)]
        logits = self._model.score(whole).logits
        own = logits.gather(1, on_device(index, logits.device)[..., None].expand(-1, -1, logits.shape[2]))
        processed = self._processed(own.flatten(0, 1), lambda: _paths(requests, texts, parents, nodes)).view(own.shape)
        verdict = self._rule.verify(proposed, Scores(processed), chooser)
        rows = verdict_rows(verdict, tree.tokens, tree.parents).tolist()
        paths, tokens = [], []
        for count, token, *rest in rows:
            paths.append(tuple(range(1, count + 1)) if verdict.path is None else tuple(rest[nodes - 1 :][:count]))
            # Behind a row of NaN any token will do: the target judges it.
            tokens.append((*rest[:count], max(token, 0)))
        self._model.commit([[*range(1, first + 1), *[first + n for n in path]] for first, path in zip(firsts, paths, strict=True)])
        return _Begun(processed, tuple([(0, *path) for path in paths]), tuple(tokens))

    def _processed(self, logits: Tensor, paths: Paths) -> Tensor:
        sampling = self._chains.sampling
        return logits if sampling is None else sampling.process(logits, paths)

    def _continued(
        self, begun: _Begun, counts: tuple[int, ...], requests: tuple[int, ...], lengths: tuple[int, ...], chooser: Chooser
    ) -> tuple[Tensor, Tensor]:
        """[B, K] tokens and [B, K, V], the processed logits that each was drawn from; behind counts[b] they mean nothing."""
        device, longest = self._model.device, max(counts)
        steps = max([count - len(own) for count, own in zip(counts, begun.tokens, strict=True)])
        drafted, rows = [on_device([own[-1:] for own in begun.tokens], device)], [begun.processed]
        slots, starts = on_device([requests, [n + len(own) for n, own in zip(lengths, begun.tokens, strict=True)]], device)

        def paths() -> list[tuple[int, tuple[int, ...]]]:
            later = torch.cat(drafted, 1).tolist()
            return [(r, (*own[:-1], *new)) for r, own, new in zip(requests, begun.tokens, later, strict=True)]

        for step in range(max(steps, 0)):
            logits = self._model.forward(next_rows(self._model.cache, step, drafted[-1]))[0]
            processed = self._processed(logits, paths)
            drafted.append(self._drawn(processed, slots, starts + step, chooser)[:, None])
            rows.append(processed[:, None])
        first = begun.processed.shape[1]
        order = [[*own, *range(first, first + max(steps, 0))] for own in begun.nodes]
        index = [[own[min(k, len(own) - 1)] for k in range(longest)] for own in order]
        known = [[*own[:-1], *[0] * longest][:longest] for own in begun.tokens]
        place = [[max(k - len(own) + 1, 0) for k in range(longest)] for own in begun.tokens]
        early, at, late = on_device([known, index, place], device)
        later = torch.cat(drafted, 1)
        is_late = torch.arange(longest, device=device) >= on_device([len(own) - 1 for own in begun.tokens], device)[:, None]
        tokens = torch.where(is_late, later.gather(1, late.clamp(max=later.shape[1] - 1)), early)
        laws = torch.cat(rows, 1)
        return tokens, laws.gather(1, at[..., None].expand(-1, -1, laws.shape[2]))

    def _drawn(self, processed: Tensor, slots: Tensor, positions: Tensor, chooser: Chooser) -> Tensor:
        """[B]: a token behind each text by the law of the call."""
        sampling = self._chains.sampling
        if sampling is None:
            return processed.argmax(-1)
        if self._chains.law is Law.COUPLED:
            return coupled_pick(sampling.noise, slots, positions, processed)
        return chooser.pick(processed.softmax(-1))

    def _draft(self, budget: Budget, tokens: Tensor, rows: Tensor) -> Draft:
        """The chains as far as the budget's rule lets them go, which looks at no drawn token."""
        watch = SlotWatch(budget, tokens.shape[1])
        drafted = list(tokens.split(1, 1))
        for place, token in enumerate(drafted):
            if not watch.goes_on(rows[:, place]):
                break
            watch.drew(token)
        draft = self._chains.known(self._texts.roots(budget.requests), drafted, watch.counts, watch.stats())
        last = max(watch.counts)
        if draft.law is not Law.INDEPENDENT or not last:
            return draft
        return replace(draft, q=torch.nn.functional.pad(rows[:, :last].softmax(-1), (0, 0, 0, 1)))


def _behind(pending: list[list[int]], tokens: list[list[int]], parents: list[list[int]], device: torch.device) -> TokenTree:
    """The pending tokens as a chain, and each request's tree behind the last of them."""
    lines = []
    for text, row in zip(pending, parents, strict=True):
        lines.append([*range(-1, len(text) - 1), *[len(text) - 1 + parent for parent in row]])
    return tree_from_lists([[*text, *row] for text, row in zip(pending, tokens, strict=True)], lines, device)


def _paths(
    requests: tuple[int, ...], tokens: list[list[int]], parents: list[list[int]], nodes: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Of each node of the padded [B * N] rows, its request and the tokens below the root on its path; padding repeats the root."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for request, row, above in zip(requests, tokens, parents, strict=True):
        own: list[tuple[int, ...]] = [()]
        for token, parent in zip(row, above, strict=True):
            own.append((*own[parent], token))
        found.extend((request, path) for path in [*own, *[()] * (nodes - len(own))])
    return found

"""A small causal LM with the target's vocabulary as drafter: a chain, or a top-k tree grown level by level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.expansion import Expansion
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.linear import cpu_has_fast_bf16
from specdec.noise import Stream
from specdec.rows import next_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.chain import chain_tree
from specdec.trees.host import tree_from_lists
from specdec.trees.layout import chain_parents
from specdec.types import Budget, Committed, Draft, Law, TokenTree
from specdec.verify.chooser import NoiseChooser
from specdec.verify.coupled import coupled_pick


class DraftModelDrafter:
    """Any transformers causal LM with the target's vocabulary.

    The cache holds committed tokens only: what was drafted is forgotten, and the first forward of a round takes in all
    tokens committed since, whether drafted, recovered or bonus. So full acceptance, no acceptance and rounds without a
    draft are one case. Chains are drawn by the law of the call; trees are the draft's most likely nodes (EAGLE-2, arXiv
    2406.16858, section 4), which is deterministic.
    """

    name = "draft-model"
    laws = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})
    taps: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, *, shape: Literal["chain", "tree"] = "chain", options: RunnerOptions | None = None
    ) -> None:
        """model: left as it was found.  shape: "tree" draws deterministically and serves every rule but rejection."""
        if shape not in ("chain", "tree"):
            raise SpecDecError(f"shape={shape!r}: allowed are 'chain' and 'tree'")
        self.shape = shape
        if shape == "tree":
            self.laws = frozenset({Law.DETERMINISTIC})
        self.runner = ModelRunner(model, options=options or _draft_options(model))
        self.vocabulary = self.runner.vocabulary

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        if setup.vocabulary != self.vocabulary:
            raise VocabularyMismatchError(
                f"the draft model has {self.vocabulary} tokens, the target {setup.vocabulary}; use a draft of the same family"
            )
        if setup.device != self.runner.device:
            raise SpecDecError(f"the draft model is on {self.runner.device}, the target on {setup.device}; move one of them")
        self._setup = setup
        self._texts = [list(prompt) for prompt in prompts]
        self._order = list(range(len(prompts)))
        self._line = chain_parents(len(prompts), setup.capacity, setup.device)
        self.runner.begin(len(prompts), setup.capacity)
        self.runner.prefill([prompt[:-1] for prompt in prompts])

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        self._arrange(budget.requests)
        depth = self._depth(budget)
        if depth == 0:
            roots = on_device([[self._texts[r][-1]] for r in budget.requests], self.runner.device)
            return Draft(chain_tree(roots, (), (0,) * len(budget.requests), self._line), self._law)
        pending = self._pending(budget.requests)
        whole = self._whole_chain(pending, budget, depth)
        if whole is not None:
            return whole
        roots, logits = self.runner.extend(pending)
        if self.shape == "tree":
            return Draft(self._grow(roots[:, 0], logits, budget, depth), Law.DETERMINISTIC)
        return self._chain(roots, logits, budget, depth)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._texts[request].extend(tokens)

    @property
    def _law(self) -> Law:
        return Law.DETERMINISTIC if self.shape == "tree" or self._setup.sampling is None else self._setup.law

    def _arrange(self, requests: tuple[int, ...]) -> None:
        """Put the cache's rows in the order of the round; requests that ended leave the cache."""
        if tuple(self._order) != requests:
            self.runner.cache.arrange([self._order.index(r) for r in requests])
            self._order = list(requests)

    def _depth(self, budget: Budget) -> int:
        """How deep the deepest request drafts; none where the text would leave the draft model's positions."""
        depth = max(map(min, budget.nodes, budget.depth))
        limit = self.runner.max_positions
        longest = max([len(self._texts[r]) for r in budget.requests])
        return depth if limit is None or longest + depth <= limit else 0

    def _pending(self, requests: Sequence[int]) -> list[list[int]]:
        """The tokens committed since the last forward, one or more a request; what was drafted leaves the cache."""
        cache = self.runner.cache
        cache.lengths = [min(n, len(self._texts[r]) - 1) for n, r in zip(cache.lengths, requests, strict=True)]
        return [self._texts[r][n:] for n, r in zip(cache.lengths, requests, strict=True)]

    def _whole_chain(self, pending: list[list[int]], budget: Budget, depth: int) -> Draft | None:
        """A greedy chain in one replay; None where the runner has none, or where drawing is left to be done here."""
        if self.shape == "tree" or self._setup.sampling is not None or budget.stop is not None or not self.runner.replays:
            return None
        lines = [list(range(-1, len(text) - 1)) for text in pending]
        drafted = self.runner.whole_chain(tree_from_lists(pending, lines, self.runner.device), depth)
        if drafted is None:
            return None
        counts = tuple(map(min, budget.nodes, budget.depth))
        roots = on_device([text[-1:] for text in pending], self.runner.device)
        return Draft(chain_tree(roots, drafted.split(1, 1), counts, self._line), Law.DETERMINISTIC)

    def _chain(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        """Draw one token after the other, each from the law given the ones before it."""
        lengths = tuple(self.runner.cache.lengths)
        draw = self._draws(budget.requests, lengths)
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        for step in range(depth):
            if step:
                logits = self.runner.forward(next_rows(self.runner.cache, step - 1, drafted[-1]))[0]
            if budget.stop is not None and budget.stop(float(logits.float().softmax(-1).amax(-1).max())):
                break
            token, q = draw(logits, drafted)
            drafted.append(token)
            laws.append(q)
        counts = tuple([min(n, d, len(drafted)) for n, d in zip(budget.nodes, budget.depth, strict=True)])
        tree = chain_tree(roots, drafted, counts, self._line)
        if self._law is not Law.INDEPENDENT:
            return Draft(tree, self._law)
        laws.append(torch.zeros_like(laws[0]))
        return Draft(tree, self._law, torch.stack(laws, 1)[:, : tree.tokens.shape[1]])

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]:
        """How the next token is drawn in this round: (logits [B, V], tokens so far) to (token [B, 1], its law [B, V])."""
        sampling = self._setup.sampling
        if sampling is None or self._law is Law.DETERMINISTIC:
            return lambda logits, drafted: (logits.argmax(-1, keepdim=True), logits)
        requests, starts = on_device([slots, lengths], self.runner.device)
        chooser = NoiseChooser(sampling.noise, requests, starts, Stream.DRAFT)

        def draw(logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor]:
            processed = sampling.process(logits, lambda: _paths(slots, drafted))
            if self._law is Law.COUPLED:
                return coupled_pick(sampling.noise, requests, starts + len(drafted), processed)[:, None], processed
            q = processed.softmax(-1)
            return chooser.pick(q)[:, None], q

        return draw

    def _grow(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> TokenTree:
        """Expand the most likely nodes of each level, then keep the most likely of all."""
        lengths = tuple(self.runner.cache.lengths)
        growth = Expansion(logits, width=max(budget.width), lengths=lengths)
        for _ in range(depth - 1):
            rows = growth.rows(self.runner.cache.shared)
            self.runner.cache.ensure(rows.span)
            growth.expand(self.runner.forward(rows)[0])
        return growth.tree(roots, budget)


def _paths(slots: tuple[int, ...], drafted: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    rows = torch.cat(drafted, 1).tolist() if drafted else [[] for _ in slots]
    return [(slot, tuple(row)) for slot, row in zip(slots, rows, strict=True)]


def _draft_options(model: nn.Module) -> RunnerOptions:
    """A half-precision draft on a CPU without fast bf16 runs in fp32: its rounding is free, and casts cost more than products."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    slow = any(p.dtype in (torch.bfloat16, torch.float16) for p in weights) and not cpu_has_fast_bf16()
    small = sum(p.numel() for p in weights) * 4 <= RunnerOptions().pack_limit_bytes
    on_cpu = all(p.device.type == "cpu" for p in weights)
    return RunnerOptions(compute=torch.float32 if slow and small and on_cpu else None, row_invariant=False)

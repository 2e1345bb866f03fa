"""Medusa: heads over the target's last hidden state propose a chain, a fixed tree or the likeliest paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.checkpoints import check_fits, load_medusa
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.slots import Shape, SlotDrafts, checked_shape, tree_slots
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.linear import PackedLinear, cpu_has_fast_bf16
from specdec.runner import RunnerOptions
from specdec.taps import LAST_HIDDEN
from specdec.trees.static import StaticTrees
from specdec.types import Budget, Committed, Draft, Law


class MedusaDrafter:
    """Heads that predict the tokens behind the next one from the target's last hidden state (arXiv 2401.10774).

    The hidden state of the last accepted node, which gave the round's next token, is kept for each request: head k gives the
    (k + 1)-th token behind that. Before a request's first round there is none, and the root alone is proposed. Drafts are chains,
    drawn by the law of the call, or trees, which are deterministic: fixed choices cut to the budget, or the likeliest paths
    by the product of the heads' laws.
    """

    name = "medusa"
    taps: tuple[str, ...] = (LAST_HIDDEN,)

    def __init__(
        self,
        heads: MedusaHeads,
        lm_head_weight: Tensor | None = None,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        accuracies: Sequence[Sequence[float]] | None = None,
        shape: Shape = "chain",
    ) -> None:
        """lm_head_weight: the target's output matrix [V, H], for heads that share it.

        choices: a fixed tree, see `trees.static.static_tree`.  accuracies: of which the best tree for each budget is made, see
        `trees.static.tree_from_accuracies`.  Both need shape="tree"; with neither, trees are products of marginals.
        """
        self.shape, self.laws = checked_shape(shape)
        if lm_head_weight is None and heads.shared_head:
            raise SpecDecError("these Medusa heads share the target's output matrix; pass it as lm_head_weight")
        if lm_head_weight is not None and not heads.shared_head:
            raise SpecDecError("these Medusa heads have output matrices of their own; pass no lm_head_weight")
        if lm_head_weight is not None:
            heads.check_head_weight(lm_head_weight)
        if lm_head_weight is not None and lm_head_weight.device != heads.weight.device:
            raise SpecDecError(
                f"the Medusa heads are on {heads.weight.device}, lm_head_weight on {lm_head_weight.device}; move one"
            )
        fixed = choices is not None or accuracies is not None
        if fixed and shape == "chain":
            raise SpecDecError("tree choices and accuracies need shape='tree'")
        self._trees = StaticTrees(choices, accuracies) if fixed else None
        if self._trees is not None and self._trees.depth > heads.num_heads:
            raise SpecDecError(f"the tree is {self._trees.depth} deep, and there are {heads.num_heads} Medusa heads; cut the tree")
        self.heads, self.vocabulary = heads, heads.vocabulary
        self.runner = _HeadRunner(heads, lm_head_weight)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        target: nn.Module,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        shape: Shape = "chain",
        num_heads: int | None = None,
    ) -> MedusaDrafter:
        """From a folder in any layout of `drafters.checkpoints`; the heads take the target's device and keep their dtype.

        choices: a fixed tree; without it the checkpoint's accuracies, where it has any, shape the tree.  num_heads: use only the
        first so many heads.  Raises CheckpointError for what cannot be read or does not fit the target.
        """
        head: Any = target.get_output_embeddings()  # type: ignore[operator]  # transformers' method
        weight = head.weight.detach()
        heads, config = load_medusa(path, num_heads=num_heads, vocabulary=weight.shape[0])
        check_fits(path, heads, target)
        heads = heads.to(weight.device)
        if heads.shared_head:
            own = config.head_weight
            weight = weight.to(heads.weight.dtype) if own is None else own.to(weight.device)
        accuracies = config.accuracies if shape == "tree" and choices is None else None
        return cls(heads, weight if heads.shared_head else None, choices=choices, accuracies=accuracies, shape=shape)

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        if setup.vocabulary != self.vocabulary:
            raise VocabularyMismatchError(
                f"the Medusa heads have {self.vocabulary} tokens, the target {setup.vocabulary}; "
                "use heads that were trained for this target"
            )
        device = self.heads.weight.device
        if setup.device != device:
            raise SpecDecError(f"the Medusa heads are on {device}, the target on {setup.device}; move one of them")
        self.runner.refresh()
        self._slots = SlotDrafts(setup, self.shape, len(prompts))
        self._last, self._lengths = [prompt[-1] for prompt in prompts], [len(prompt) for prompt in prompts]
        self._known = [False] * len(prompts)
        self._hidden = torch.zeros(len(prompts), self.heads.hidden_size, dtype=self.runner.dtype, device=device)

    @torch.no_grad()
    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        requests = budget.requests
        roots = on_device([[self._last[r]] for r in requests], self._hidden.device)
        depth = tuple([min(n, d, self.heads.num_heads) for n, d in zip(budget.nodes, budget.depth, strict=True)])
        depth = tuple([d if self._known[r] else 0 for d, r in zip(depth, requests, strict=True)])
        if not max(depth):
            return self._slots.nothing(roots)
        whole = requests == tuple(range(len(self._last)))
        hidden = self._hidden if whole else self._hidden[on_device(requests, self._hidden.device)]
        logits = self.runner.logits(hidden, max(depth))
        budget = replace(budget, depth=depth)
        if self.shape == "chain":
            return self._slots.chain(roots, logits, budget, tuple([self._lengths[r] for r in requests]))
        if self._trees is None:
            return self._slots.tree(roots, logits, budget)
        guesses = logits.topk(min(self._trees.guesses, self.vocabulary), dim=-1).indices
        tree = self._trees.build(roots[:, 0], guesses, budget.nodes, depth, budget.width)
        return Draft(tree, Law.DETERMINISTIC, slots=tree_slots(logits, tree) if budget.slots else None)

    @torch.no_grad()
    def commit(self, committed: Committed) -> None:
        """Keep the hidden state of each request's last accepted node, copied: the round's memory may be used again."""
        tap = committed.taps.get(LAST_HIDDEN)
        if tap is None or tap.shape[-1] != self.heads.hidden_size:
            came = "nothing" if tap is None else f"hidden width {tap.shape[-1]}"
            raise SpecDecError(
                f"the Medusa heads read the target's {LAST_HIDDEN!r} of width {self.heads.hidden_size}, and the round gave {came}; "
                "use heads that were trained for this target"
            )
        last = [path[-1] if path else 0 for path in committed.paths]
        if len(last) == 1:
            self._hidden[committed.requests[0]].copy_(tap[0, last[0]])
        else:
            rows, nodes, slots = on_device([list(range(len(last))), last, committed.requests], self._hidden.device)
            self._hidden[slots] = tap[rows, nodes].to(self._hidden.dtype)
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._last[request], self._known[request] = tokens[-1], True
            self._lengths[request] += len(tokens)


class _HeadRunner:
    """Runs all heads in a few products. On a CPU from copies of the weights that lie right for few rows, elsewhere as they are."""

    def __init__(self, heads: MedusaHeads, lm_head_weight: Tensor | None) -> None:
        self._heads, self._shared = heads, lm_head_weight
        if lm_head_weight is not None and lm_head_weight.dtype != heads.weight.dtype:
            self._shared = lm_head_weight.to(heads.weight.dtype)
        on_cpu = heads.weight.device.type == "cpu"
        slow = on_cpu and not cpu_has_fast_bf16()
        needed = 4 * sum(p.numel() for p in (*heads.parameters(), *([] if lm_head_weight is None else [lm_head_weight])))
        self._packed = on_cpu and (slow or heads.weight.dtype is torch.float32) and needed <= RunnerOptions().pack_limit_bytes
        self.dtype = torch.float32 if self._packed else heads.weight.dtype
        self.device, self.forward_s, self.cold = heads.weight.device, 0.0, 0
        self._versions: list[int] | None = None

    def refresh(self) -> None:
        """Copy the weights anew if they were changed in place since they were copied."""
        if not self._packed:
            return
        weights = [*self._heads.parameters(), *([] if self._shared is None else [self._shared])]
        versions = [-1 if w.is_inference() else w._version for w in weights]
        if versions != self._versions:
            self._versions = versions
            self._pack()

    @torch.no_grad()
    def _pack(self) -> None:
        """Residual layers as [K, in, out] each, own output matrices as [K, H, V]: the layouts of the fastest products."""
        heads = self._heads
        layers = [[block[i] for block in heads.blocks] for i in range(heads.num_layers)]  # type: ignore[index]  # ModuleLists
        self._weights = [torch.stack([layer.weight.float().t() for layer in row]).contiguous() for row in layers]
        self._biases = [torch.stack([layer.bias.float() for layer in row])[:, None] if heads.has_bias else None for row in layers]
        if self._shared is None:
            self._outputs = torch.stack([head.weight.float().t() for head in heads.heads]).contiguous()  # type: ignore[operator]
            return
        source = nn.Linear(heads.hidden_size, heads.vocabulary, bias=False, device="meta")
        source.weight = nn.Parameter(self._shared.detach(), requires_grad=False)
        self._output = PackedLinear(source, grouped=False)

    def logits(self, h: Tensor, count: int) -> Tensor:
        """[B, K, V] of the first `count` heads. h: [B, H] in `dtype`."""
        began = perf_counter()
        logits = self._packed_logits(h, count) if self._packed else self._heads.logits(h, self._shared, count).transpose(0, 1)
        self.forward_s += perf_counter() - began
        return logits

    def _packed_logits(self, h: Tensor, count: int) -> Tensor:
        z = h.expand(count, -1, -1)
        for weight, bias in zip(self._weights, self._biases, strict=True):
            step = torch.bmm(z, weight[:count]) if bias is None else torch.baddbmm(bias[:count], z, weight[:count])
            z = z + nn.functional.silu(step)
        if self._shared is None:
            return torch.bmm(z, self._outputs[:count]).transpose(0, 1)
        rows: Tensor = self._output(z.transpose(0, 1).reshape(1, -1, z.shape[-1]))
        return rows.view(h.shape[0], count, -1)

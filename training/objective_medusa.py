"""Medusa: heads on the target's last hidden state, the target frozen or adapted with them (arXiv 2401.10774)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.bundled import checkpoint
from specdec.drafters.base import Drafter
from specdec.drafters.checkpoints import load_medusa, save_medusa
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.training.config import MedusaTraining
from specdec.training.divergences import Divergence
from specdec.training.losses import chunked_loss, taught_loss
from specdec.training.medusa_layout import MedusaRows, medusa_rows
from specdec.training.models import Body, load_lm, next_tokens, set_training
from specdec.training.objectives import Figures, Micro, sums_by_slot
from specdec.training.packing import PackedRows
from specdec.training.settings import ConfigError

_KL = Divergence("forward_kl")
_LINEARS = "all-linear"


class MedusaObjective(nn.Module):
    """Heads only (Medusa-1), or heads and LoRA adapters of the target (Medusa-2); slot k is head k."""

    def __init__(self, config: MedusaTraining, tokenizer: Any, device: torch.device) -> None:
        """The target is loaded here; without `joint` it is no part of the module."""
        super().__init__()
        self._config, self._tokenizer, settings = config, tokenizer, config.medusa
        self._path = checkpoint(config.run.target, "target")
        target = load_lm(self._path, device=device).requires_grad_(False)
        body = Body(target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.optim.seed)
            heads = MedusaHeads(
                body.hidden_size, body.vocabulary, settings.num_heads, settings.num_layers, shared_head=settings.shared_head
            )
            adapted = _adapted(target, config) if settings.joint else None
        if adapted is not None:
            set_training(target, config.optim)
        if settings.init is not None:
            _begin_as(heads, settings.init)
        elif not settings.shared_head:
            heads.init_from(body.head_weight.cpu())
        self.heads, self.adapted = heads.to(device), adapted
        # A tuple hides the frozen target from torch: it is neither trained nor sent between processes.
        self._body = (body,)
        self._divergence = Divergence(settings.loss, settings.temperature)
        self.slots = [f"head {k + 1}" for k in range(settings.num_heads)]

    def prepare(self, rows: PackedRows, generator: torch.Generator) -> Micro:
        """See `Objective.prepare`; nothing here is random."""
        settings = self._config.medusa
        layout = medusa_rows(rows.ids, rows.documents, rows.loss_mask, num_heads=settings.num_heads, decay=settings.decay)
        # The weight of a text is its number of pairs for the first head: losses of heads are summed, as in the paper.
        return Micro(rows, layout, torch.tensor(float(layout.bounds[1]), device=rows.ids.device))

    def forward(self, micro: Micro, denominator: Tensor) -> Figures:
        """See `Objective.forward`."""
        hidden, extra = self._target_hidden(micro, denominator)
        layout: MedusaRows = micro.layout
        flat, settings, head = hidden.flatten(0, 1), self._config.medusa, self._body[0].head_weight
        loss = extra
        matched = []
        for k in range(settings.num_heads):
            pairs = layout.of_head(k)
            places = layout.rows[pairs]
            found = taught_loss(
                self.heads.through(k, flat.index_select(0, places)),
                self.heads.output_weight(k, head),
                self._divergence,
                labels=layout.labels[pairs],
                # The token k + 2 places on is what the target says one place before it.
                teacher=partial(_said, flat, places + (k + 1), head),
                denominator=denominator,
            )
            loss = loss + settings.head_weight * settings.decay ** (k + 1) * found.loss
            matched.append(found.matched)
        return Figures(loss, *sums_by_slot(torch.cat(matched), layout.heads, settings.num_heads))

    def _target_hidden(self, micro: Micro, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that heads read, and the target's own loss, 0 where it does not learn."""
        body, rows = self._body[0], micro.rows
        if self.adapted is None:
            with torch.no_grad():
                hidden = body.of_rows(rows)
            return hidden, hidden.new_zeros(())
        hidden = body.of_rows(rows)
        places, labels = next_tokens(rows)
        own = hidden.flatten(0, 1).index_select(0, places)
        if not self._config.medusa.self_distill:
            return hidden, chunked_loss(own, body.head_weight, labels=labels, denominator=denominator).loss
        with torch.no_grad(), self.adapted.disable_adapter():  # type: ignore[operator]  # peft's method
            teacher = body.of_rows(rows).flatten(0, 1).index_select(0, places)
        found = chunked_loss(
            own, body.head_weight, teacher_hidden=teacher, teacher_head_weight=body.head_weight, divergence=_KL,
            denominator=denominator,
        )  # fmt: skip
        return hidden, found.loss

    def groups(self) -> list[tuple[list[tuple[str, nn.Parameter]], float]]:
        """See `Objective.groups`: heads, and then adapters."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        heads = [(name, p) for name, p in named if name.startswith("heads.")]
        others = [(name, p) for name, p in named if not name.startswith("heads.")]
        found = [(heads, self._config.optim.head_learning_rate_factor)]
        return [*found, (others, 1.0)] if others else found

    def learns(self, group: int, step: int) -> bool:
        """See `Objective.learns`: the adapters wait for the heads."""
        return group == 0 or step >= self._config.medusa.heads_warmup_steps

    def drafter(self) -> Drafter:
        """See `Objective.drafter`."""
        weight = self._body[0].head_weight.detach() if self._config.medusa.shared_head else None
        return MedusaDrafter(self.heads, weight)

    def target(self) -> Any:
        """See `Objective.target`; with `joint` as adapted so far."""
        return self._body[0].model

    @torch.no_grad()
    def accuracies(self, rows: PackedRows, most: int = 10) -> list[list[float]]:
        """Of each head, the share of tokens that its guess of each rank gets right: what trees are chosen by."""
        layout = medusa_rows(rows.ids, rows.documents, rows.loss_mask, num_heads=self.heads.num_heads)
        flat, found = self._body[0].of_rows(rows).flatten(0, 1), []
        for k in range(self.heads.num_heads):
            pairs, right = layout.of_head(k), torch.zeros(most, device=flat.device)
            weight = self.heads.output_weight(k, self._body[0].head_weight)
            for places, labels in zip(layout.rows[pairs].split(512), layout.labels[pairs].split(512), strict=True):
                logits = self.heads.through(k, flat[places]) @ weight.T
                right += (logits.topk(most).indices == labels[:, None]).sum(0)
            found.append((right / max(pairs.stop - pairs.start, 1)).tolist())
        return found

    def save(self, folder: Path, held_out: PackedRows | None) -> None:
        """Heads in bf16, and their accuracies by rank; with `joint` also the target, its adapters merged."""
        heads = MedusaHeads(
            self.heads.hidden_size, self.heads.vocabulary, self.heads.num_heads, self.heads.num_layers,
            shared_head=self.heads.shared_head, dtype=torch.bfloat16,
        )  # fmt: skip
        heads.load_state_dict({name: value.to(torch.bfloat16) for name, value in self.heads.state_dict().items()})
        name = self._config.run.target
        accuracies = None if held_out is None or not len(held_out) else self.accuracies(held_out)
        save_medusa(folder, heads, "specdec", name, accuracies)
        if self.adapted is not None:
            merged = self.adapted.merge_and_unload()  # type: ignore[operator]  # peft's method
            merged.to(torch.bfloat16).save_pretrained(folder / "target")
            self._tokenizer.save_pretrained(folder / "target")


def _begin_as(heads: MedusaHeads, path: str) -> None:
    """Copy trained heads into these. A residual layer of zeros passes on what it gets, so more layers begin as the same heads."""
    given, _ = load_medusa(path)
    same = (given.num_heads, given.hidden_size, given.vocabulary, given.shared_head)
    if same != (heads.num_heads, heads.hidden_size, heads.vocabulary, heads.shared_head) or given.num_layers > heads.num_layers:
        raise ConfigError(
            f"medusa.init {path}: {given.num_heads} heads of {given.num_layers} layers, width {given.hidden_size}, "
            f"shared_head {given.shared_head}; the run wants {heads.num_heads} of {heads.num_layers} or more layers, width "
            f"{heads.hidden_size}, shared_head {heads.shared_head}"
        )
    heads.load_state_dict({name: value.float() for name, value in given.state_dict().items()}, strict=False)


def _said(hidden: Tensor, places: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """What the target says at these places of its hidden states [M * L, H], and its output matrix."""
    return hidden.detach().index_select(0, places), head.detach()


def _adapted(target: Any, config: MedusaTraining) -> nn.Module:
    """The target with LoRA on all linear layers; they are put into it in place."""
    from peft import LoraConfig, get_peft_model

    settings = config.medusa
    adapters = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=_LINEARS, task_type="CAUSAL_LM")  # type: ignore[arg-type, unused-ignore]  # peft is typed loosely
    return get_peft_model(target, adapters)  # type: ignore[return-value, unused-ignore]

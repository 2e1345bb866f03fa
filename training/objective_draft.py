"""A small LM that drafts token by token, drawn to the target's law (DistillSpec, arXiv 2310.08461)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.bundled import checkpoint
from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.training.config import DraftTraining
from specdec.training.divergences import Divergence
from specdec.training.losses import taught_loss
from specdec.training.models import Body, check_vocabularies, load_lm, make_draft, next_tokens, set_training
from specdec.training.objectives import Figures, Micro, sums_by_slot
from specdec.training.packing import PackedRows


class DraftObjective(nn.Module):
    """All weights of the draft are trained; its one slot is acceptance, sum min(p, q)."""

    def __init__(self, config: DraftTraining, tokenizer: Any, device: torch.device) -> None:
        """Target and draft are loaded here; the target is no part of the module, and with "ce" only says the sizes."""
        super().__init__()
        self._config, self._tokenizer, settings = config, tokenizer, config.draft
        target = load_lm(checkpoint(config.run.target, "target"), device=device).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.optim.seed)
            self.model = make_draft(settings, target, device)
        set_training(self.model.requires_grad_(True), config.optim)
        self._target = (Body(target),)
        check_vocabularies(Body(self.model), self._target[0])
        self._divergence = Divergence(settings.loss, settings.temperature or 1.0, settings.jsd_beta)
        self.slots = ["acceptance"]

    def prepare(self, rows: PackedRows, generator: torch.Generator) -> Micro:
        """See `Objective.prepare`; on-policy batches are written anew by the draft behind what their rows are asked."""
        settings = self._config.draft
        if settings.data == "on_policy":
            drawn = torch.rand((), generator=generator, device=rows.ids.device)
            if bool(drawn < settings.on_policy_share):
                rows = continued(self.model, rows, settings.temperature, generator)
        places, labels = next_tokens(rows)
        return Micro(rows, (places, labels), torch.tensor(float(len(labels)), device=rows.ids.device))

    def forward(self, micro: Micro, denominator: Tensor) -> Figures:
        """See `Objective.forward`."""
        places, labels = micro.layout
        body, target = Body(self.model), self._target[0]
        own = body.of_rows(micro.rows).flatten(0, 1).index_select(0, places)
        found = taught_loss(
            own,
            body.head_weight,
            self._divergence,
            labels=labels,
            teacher=lambda: (target.of_rows(micro.rows).flatten(0, 1).index_select(0, places), target.head_weight),
            denominator=denominator,
        )
        values = found.matched if self._divergence.kind == "ce" else found.acceptance
        return Figures(found.loss, *sums_by_slot(values, torch.zeros_like(labels), 1))

    def groups(self) -> list[tuple[list[tuple[str, nn.Parameter]], float]]:
        """See `Objective.groups`."""
        return [([(name, p) for name, p in self.named_parameters() if p.requires_grad], 1.0)]

    def learns(self, group: int, step: int) -> bool:
        """See `Objective.learns`."""
        return True

    def drafter(self) -> Drafter:
        """See `Objective.drafter`."""
        return DraftModelDrafter(self.model)

    def target(self) -> Any:
        """See `Objective.target`."""
        return self._target[0].model

    def save(self, folder: Path, held_out: PackedRows | None) -> None:
        """A transformers folder, weights in bf16."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self.model.to(torch.float32)


@torch.no_grad()
def continued(model: Any, rows: PackedRows, temperature: float, generator: torch.Generator) -> PackedRows:
    """The rows with every token that is trained on drawn by the model instead, its own choices before it; nothing else changes.

    Token by token over all rows at once, so that documents, positions and lengths stay.
    """
    body, ids = Body(model), rows.ids.clone()
    was_training = model.training
    model.eval()
    for place in range(1, ids.shape[1]):
        wanted = rows.loss_mask[:, place] & (rows.documents[:, place] == rows.documents[:, place - 1])
        # A whole forward for each column is slow and exact; columns that nobody writes cost nothing.
        if not bool(wanted.any()):
            continue
        part = PackedRows(*(x[:, :place] for x in (ids, rows.positions, rows.documents, rows.loss_mask)))
        logits = (body.of_rows(part)[:, -1] @ body.head_weight.T).float()
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        ids[:, place] = torch.where(wanted, drawn, ids[:, place])
    model.train(was_training)
    return PackedRows(ids, rows.positions, rows.documents, rows.loss_mask)

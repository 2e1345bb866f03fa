"""PARD: a small LM learns to predict several tokens in one forward (arXiv 2504.18583)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.bundled import checkpoint
from specdec.drafters.base import Drafter
from specdec.drafters.checkpoints import save_pard
from specdec.drafters.pard import PardDrafter
from specdec.training.config import PardTraining
from specdec.training.divergences import Divergence
from specdec.training.losses import taught_loss
from specdec.training.models import Body, check_vocabularies, load_lm, set_training, vocabulary_ids
from specdec.training.objectives import Figures, Micro, sums_by_slot
from specdec.training.packing import PackedRows
from specdec.training.pard_layout import PardLayout, PardRows, bool_mask, pard_rows
from specdec.training.settings import ConfigError


class PardObjective(nn.Module):
    """All weights of the draft are trained, on the text or drawn to the target's law behind it; slot i is the i-th token.

    Nothing of the target but its law of the next token is used: a row learns that law as it is several tokens on, whatever
    stands between, and so its mean over what may stand there.
    """

    def __init__(self, config: PardTraining, tokenizer: Any, device: torch.device) -> None:
        """The draft is loaded here."""
        super().__init__()
        settings = config.pard
        self.model = load_lm(checkpoint(settings.draft, "draft"), device=device)
        set_training(self.model.requires_grad_(True), config.optim)
        self._tokenizer, self._path = tokenizer, checkpoint(config.run.target, "target")
        # A tuple hides it from torch: it is neither trained nor sent between processes.
        self._target: tuple[Any] | None = None
        self._mask = _mask_token(settings.mask_token_id, tokenizer, vocabulary_ids(self.model))
        retain = settings.retain if settings.conditional_drop else 1.0
        self._layout = PardLayout(settings.num_tokens, self._mask, retain, settings.retain_min)
        self._mask_only = settings.train_mask_only
        self._divergence = Divergence(settings.loss, settings.temperature)
        if settings.loss != "ce":
            check_vocabularies(Body(self.model), Body(self.target()))
        self.slots = [f"token {i + 1}" for i in range(settings.num_tokens)]

    def prepare(self, rows: PackedRows, generator: torch.Generator) -> Micro:
        """See `Objective.prepare`."""
        layout = pard_rows(rows.ids, rows.documents, rows.loss_mask, self._layout, generator)
        if self._mask_only:
            layout = replace(layout, weights=layout.weights * (layout.depths > 0))
        return Micro(rows, layout, layout.weights.sum())

    def forward(self, micro: Micro, denominator: Tensor) -> Figures:
        """See `Objective.forward`."""
        rows: PardRows = micro.layout
        body = Body(self.model)
        hidden = body.hidden(rows.ids, rows.positions, bool_mask(rows))
        found = taught_loss(
            hidden.flatten(0, 1),
            body.head_weight,
            self._divergence,
            labels=rows.labels.flatten(),
            teacher=lambda: self._teacher(micro),
            weights=rows.weights.flatten(),
            denominator=denominator,
        )
        here = found.counted.nonzero()[:, 0]
        depths = rows.depths.flatten()[here]
        return Figures(found.loss, *sums_by_slot(found.matched[here], depths, len(self.slots)))

    def _teacher(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """The target's hidden state in front of each row's label, [M * P, Ht], and its output matrix."""
        body, places = Body(self.target()), micro.layout.places
        hidden = body.of_rows(micro.rows)
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1), body.head_weight

    def groups(self) -> list[tuple[list[tuple[str, nn.Parameter]], float]]:
        """See `Objective.groups`."""
        return [([(name, p) for name, p in self.named_parameters() if p.requires_grad], 1.0)]

    def learns(self, group: int, step: int) -> bool:
        """See `Objective.learns`."""
        return True

    def drafter(self) -> Drafter:
        """See `Objective.drafter`."""
        return PardDrafter(self.model, self._mask)

    def target(self) -> Any:
        """See `Objective.target`; loaded when it is first asked for, since training on the text does without."""
        if self._target is None:
            self._target = (load_lm(self._path, device=Body(self.model).head_weight.device).requires_grad_(False),)
        return self._target[0]

    def save(self, folder: Path, held_out: PackedRows | None) -> None:
        """A transformers folder whose config.json names the mask token; weights in bf16."""
        save_pard(folder, self.model.to(torch.bfloat16), self._mask)
        self._tokenizer.save_pretrained(folder)
        self.model.to(torch.float32)


# What tokenizers call a token that texts do not hold.
_MASK_NAMES = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>")


def _mask_token(given: int | None, tokenizer: Any, vocabulary: int) -> int:
    """The id of the mask: given, or the tokenizer's own, or one that the tokenizer gives no text to. Raises ConfigError."""
    if given is None:
        given = getattr(tokenizer, "mask_token_id", None)
    if given is None:
        known = tokenizer.get_vocab()
        named = [known[name] for name in _MASK_NAMES if name in known]
        unused = [i for i in reversed(range(vocabulary)) if i not in set(known.values())] if not named else []
        given = next(iter(named + unused), None)
    if given is None:
        raise ConfigError(
            f"pard.mask_token_id is not set, and the tokenizer leaves none of the {vocabulary} ids unused; "
            "name a token that no text holds"
        )
    if given >= vocabulary:
        raise ConfigError(f"pard.mask_token_id is {given}, and the draft has ids 0 to {vocabulary - 1}")
    return given

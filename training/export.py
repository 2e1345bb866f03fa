"""Drafters in the layouts that other programs read; what was written is read back and compared before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from specdec.bundled import bundled_path
from specdec.drafters.checkpoints import load_medusa, load_pard, save_medusa, save_pard
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.errors import CheckpointError
from specdec.training.models import load_lm

EXPORTS = ("medusa", "vllm-medusa", "pard", "hf-assistant")


def export(source: str | Path, to: str, out: str | Path, target: str | None = None) -> str:
    """Write the drafter in `source` to `out`; says what was compared. target: for heads that share its output matrix.

    Raises CheckpointError where the drafter cannot be said in that layout, or came back different.
    """
    if Path(out).exists() and any(Path(out).iterdir()):
        raise CheckpointError(f"{out} is not empty; name a new folder")
    if to in ("medusa", "vllm-medusa"):
        return _medusa(Path(source), to, Path(out), target)
    return _lm(Path(source), to, Path(out))


def _medusa(source: Path, to: str, out: Path, target: str | None) -> str:
    heads, config = load_medusa(source)
    weight = _head_weight(target) if to == "vllm-medusa" and heads.shared_head else None
    layout: Any = "vllm" if to == "vllm-medusa" else "medusa-2" if heads.shared_head else "medusa"
    save_medusa(out, heads, layout, config.base_model, config.accuracies, head_weight=weight)
    again, _ = load_medusa(out, vocabulary=heads.vocabulary)
    count = _same_tensors(heads.state_dict(), again.state_dict(), out)
    _same_drafts(heads, again, weight)
    return f"{out}: {layout} layout, {count} tensors and the drafts of {heads.num_heads} heads are the same as {source}'s"


def _head_weight(target: str | None) -> torch.Tensor:
    path = str(bundled_path("target")) if target is None else target
    model = load_lm(path, device=torch.device("cpu"), dtype=torch.bfloat16)
    weight: torch.Tensor = model.get_output_embeddings().weight.detach()
    return weight


def _same_drafts(heads: MedusaHeads, again: MedusaHeads, weight: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, heads.hidden_size, generator=generator).to(heads.weight.dtype)
    shared = torch.randn(heads.vocabulary, heads.hidden_size, generator=generator).to(hidden) if heads.shared_head else None
    shared = shared if weight is None else weight.to(hidden)
    if not torch.equal(heads.logits(hidden, shared).argmax(-1), again.logits(hidden, shared).argmax(-1)):
        raise CheckpointError("the heads that were read back draft other tokens; this is a bug, please report it")


def _lm(source: Path, to: str, out: Path) -> str:
    """PARD or a plain draft model: transformers folders both."""
    if to == "pard":
        model, mask = load_pard(source)
        save_pard(out, model, mask)
        _, again_mask = load_pard(out)
        if again_mask != mask:
            raise CheckpointError(f"{out} names mask token {again_mask}, {source} {mask}; this is a bug, please report it")
    else:
        model = load_lm(str(source), device=torch.device("cpu"), dtype=torch.bfloat16)
        model.generation_config = _assistant(model.generation_config)
        model.save_pretrained(out)
    again = load_lm(str(out), device=torch.device("cpu"), dtype=model.dtype)
    count = _same_tensors(model.state_dict(), again.state_dict(), out)
    _copy_tokenizer(source, out)
    ids = torch.arange(12)[None] % again.config.vocab_size
    if not torch.equal(model(ids).logits, again(ids).logits):
        raise CheckpointError(f"{out} gives other logits than {source}; this is a bug, please report it")
    return f"{out}: {to} layout, {count} tensors and the logits are the same as {source}'s"


def _assistant(config: GenerationConfig) -> GenerationConfig:
    """What `generate(assistant_model=...)` reads of its assistant: a constant number of tokens, no confidence threshold."""
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    return config


def _copy_tokenizer(source: Path, out: Path) -> None:
    for path in source.glob("*"):
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")) and path.is_file():
            (out / path.name).write_bytes(path.read_bytes())


def _same_tensors(ours: dict[str, Any], theirs: dict[str, Any], out: Path) -> int:
    different = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])] + sorted(theirs.keys() - ours.keys())
    if different:
        raise CheckpointError(f"{out} was read back with {len(different)} other tensors, first {different[0]}; please report it")
    return len(ours)

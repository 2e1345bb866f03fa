"""Models from checkpoints: safetensors only, no code from the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec.errors import CheckpointError, SpecDecError

# What a model may be loaded in by name; "auto" is the checkpoint's own.
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in evaluation mode from a folder, or from the hub when path is an "owner/name" that is no local path.

    kwargs: for transformers, as `local_files_only`, `revision`, `cache_dir`. Raises CheckpointError for a missing
    path, a folder that is no checkpoint, weights that are not safetensors, and code that would have to be trusted, and
    SpecDecError for the name of a dtype that models are not loaded in.
    """
    _check_options(kwargs)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise SpecDecError(f"dtype {dtype!r}: allowed are {', '.join(_DTYPES)}; leave it away for the checkpoint's own")
    check_checkpoint(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path), dtype="auto" if dtype is None else dtype, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it as a causal LM from safetensors: {error}") from error
    placed: PreTrainedModel = (model if device is None else model.to(device)).eval()
    return placed


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None where it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer


def need_tokenizer(path: str | Path, option: str = "--target") -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. option: what named the checkpoint, for the message. Raises CheckpointError where it has none."""
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise no_tokenizer(path, option)
    return tokenizer


def no_tokenizer(path: str | Path, option: str = "--target") -> CheckpointError:
    """What a command raises where text has to become tokens and the checkpoint has no tokenizer."""
    return CheckpointError(
        f"{option} {path}: transformers finds no tokenizer there, and texts need the target's own; "
        "save it there with its save_pretrained, or name a checkpoint that has it"
    )


def check_checkpoint(path: str | Path) -> None:
    """Raises CheckpointError unless path is a folder with config.json and safetensors weights, or a hub name."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if _HUB_NAME.fullmatch(str(path)):
            return
        raise CheckpointError(f"{path} does not exist; give a checkpoint's folder, or a hub name written owner/name")
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: a folder with config.json and *.safetensors is needed")
    if any(folder.glob("*.safetensors")):
        return
    if any(file for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(pattern)):
        raise CheckpointError(
            f"{path} holds pickle weights, which can run code when they are loaded; convert them with save_pretrained"
        )
    raise CheckpointError(f"{path} holds no *.safetensors weights; save the model there with save_pretrained")


def _check_options(kwargs: dict[str, Any]) -> None:
    for name in ("trust_remote_code", "use_safetensors"):
        if name in kwargs:
            raise CheckpointError(f"{name} is not an option: weights are safetensors and a checkpoint's code is never run")

"""`specdec generate`: a prompt, a file or a chat, streamed or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TextStreamer

from specdec.bundled import BUNDLED, bundled_path
from specdec.errors import InvalidRequestError
from specdec.generator import SpeculativeGenerator
from specdec.loading import no_tokenizer
from specdec.planner import planner_of


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """The command's options. sampling: empty for greedy decoding, else arguments of `generate`."""

    target: str | None
    drafter: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    seed: int | None
    verifier: str
    nodes: int | None
    chat: bool
    as_json: bool


def run_generate(prompt: str | None, file: Path | None, options: GenerateOptions, console: Console) -> None:
    """Answer one prompt, or hold a conversation when --chat came without one."""
    generator = make_generator(options)
    tokenizer = generator.tokenizer
    if tokenizer is None:
        raise no_tokenizer(options.target or BUNDLED)
    if prompt is None and file is None and options.chat and sys.stdin.isatty():
        _converse(generator, tokenizer, options, console)
        return
    text = prompt if prompt is not None else _read(file)
    _answer(generator, tokenizer, _encode(tokenizer, text, options.chat, []), options)


def make_generator(options: GenerateOptions) -> SpeculativeGenerator:
    """The generator that the options describe, on the bundled models unless they name others."""
    target = options.target or str(bundled_path("target"))
    drafter: str | None = options.drafter
    if drafter is None and options.target is None:
        drafter = str(bundled_path("draft"))
    drafter = None if drafter == "none" else drafter
    return SpeculativeGenerator.from_pretrained(target, drafter, verifier=options.verifier, planner=planner_of(options.nodes))


def _read(file: Path | None) -> str:
    if file is None:
        return sys.stdin.read()
    if not file.is_file():
        raise InvalidRequestError(f"--file {file}: no such file; give the path of a text file")
    return file.read_text()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, before: list[dict[str, str]]) -> torch.Tensor:
    if not chat:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise InvalidRequestError("--chat: this model's tokenizer has no chat template; leave --chat away")
        messages = [*before, {"role": "user", "content": text}]
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = encoded["input_ids"]
    tensor: torch.Tensor = ids
    return tensor


def _answer(
    generator: SpeculativeGenerator, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, options: GenerateOptions
) -> str:
    """Stream the answer, or print it as JSON; returns its text."""
    streamer: Any = None if options.as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = ids.to(generator.target.device)
    out = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        do_sample=bool(options.sampling),
        streamer=streamer,
        seed=options.seed,
        **{k: v for k, v in options.sampling.items() if v is not None},
    )
    tokens = out[0, ids.shape[1] :].tolist()
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if options.as_json:
        stats = generator.stats
        assert stats is not None
        one = stats.requests[0]
        numbers = asdict(one) | {
            "mean_acceptance_length": one.mean_acceptance_length,
            "acceptance_rate": one.acceptance_rate,
            "acceptance_per_position": list(one.acceptance_per_position),
        }
        print(json.dumps({"text": text, "tokens": tokens, "stats": numbers}, ensure_ascii=False))
    return text


def _converse(
    generator: SpeculativeGenerator, tokenizer: PreTrainedTokenizerBase, options: GenerateOptions, console: Console
) -> None:
    messages: list[dict[str, str]] = []
    while said := console.input("[bold]you>[/] ").strip():
        answer = _answer(generator, tokenizer, _encode(tokenizer, said, True, messages), options)
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

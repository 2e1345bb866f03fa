"""Small tokenizers of every kind that can be mapped, trained on the spot, and models that say one phrase over and over."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specdec.drafters.byte_alignment import ByteVocabulary

SPECIAL = ["<unk>", "<s>", "</s>"]
PHRASE = "The quick brown fox jumps over my lazy dog, while 4 big wizards vex 春 and naïve 😀 zebras; "
TEXTS = {
    "plain": "Pack my box with five dozen liquor jugs, please.",
    "unicode": "naïve café — Ωμέγα, “straße” №5 ½",
    "code": "def f(x):\n\tif x  >= 10:\n        return {'a': x}  # ok\r\n\n",
    "cjk": "春眠不觉晓，处处闻啼鸟。ひらがな 한국어",
    "emoji": "😀👩‍👩‍👧‍👦 🇩🇪 ok ✌🏽",
    "spaces": "  two  spaces   ",
    "special": "a <s> b </s> <unk> <0x41>",
}
_CORPUS = [PHRASE, *TEXTS.values(), "def g(y):\n    return y + 1\n", "the cat sat on the mat while the dog jumps"] * 4


@cache
def tokenizer_of(kind: str) -> Any:
    """Made once; leave it as it is. kind: "byte-level", "bytes" (no merges), "byte-fallback", "unigram", "wordpiece"."""
    made = {
        "byte-level": lambda: _byte_level(420),
        "bytes": lambda: _byte_level(0),
        "byte-fallback": _byte_fallback,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }[kind]()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def vocabulary_of(kind: str) -> ByteVocabulary:
    """The tokenizer's vocabulary as bytes."""
    return ByteVocabulary(tokenizer_of(kind), "target")


def permuted(tokenizer: Any, seed: int = 5) -> tuple[PreTrainedTokenizerBase, torch.Tensor]:
    """The same tokens under other ids, and old id of each new one [V]. Special tokens keep theirs."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kept, size = len(SPECIAL), len(spec["model"]["vocab"])
    order = torch.randperm(size - kept, generator=torch.Generator().manual_seed(seed)) + kept
    old = torch.cat((torch.arange(kept), order))
    new = {int(o): n for n, o in enumerate(old)}
    spec["model"]["vocab"] = {name: new[i] for name, i in spec["model"]["vocab"].items()}
    made = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), old


def model_for(tokenizer: Any, seed: int = 4, sharpness: float = 12.0) -> nn.Module:
    """A random fp32 model of the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(len(tokenizer))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(sharpness)
    return _plain(model)


def reciter(tokenizer: Any, phrase: str = PHRASE, seed: int = 1) -> nn.Module:
    """A model that goes on with the phrase, and begins again: what follows a token depends on that token only."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(len(tokenizer), hidden_size=64, num_hidden_layers=1)).eval()
    tokens = tokenizer(phrase + phrase, add_special_tokens=False).input_ids
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=-1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.copy_(0.05 * torch.randn(len(tokenizer), 64))
        for now, then in dict(pairwise(tokens)).items():
            model.lm_head.weight[then] += 1.5 * directions[now]
    return _plain(model)


def _config(vocabulary: int, **changed: Any) -> LlamaConfig:
    small: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**small, **changed})


def _plain(model: Any) -> nn.Module:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out: nn.Module = model
    return out


def _byte_level(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, limit_alphabet=50, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    spec["model"]["byte_fallback"] = True
    # As Llama's: words are not cut before merging.
    spec["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(spec))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(_CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return tokenizer

"""A small Llama inside a big one: the same logits at the big one's cost, so that real acceptance meets real cost.

No pretrained weights of 8B travel with this package, and random weights accept nothing. `enlarge` therefore puts a trained
small model into a model of a bigger shape, in which every matrix is read in full while the function stays what it was:

- Width. The residual stream is padded with zeros from h to H. RMSNorm then divides by sqrt(sum(x^2) / H + eps') instead of
  sqrt(sum(x^2) / h + eps); with eps' = eps * h / H that is larger by sqrt(H / h), so norm weights become w * sqrt(h / H).
  Matrices that read the stream hold random numbers in the new columns, those that write to it zeros in the new rows.
- Heads. The big model has its own rule of which query heads share a KV head, so a small KV head whose queries do not fit
  one big group is copied into several. Further heads are random and o_proj ignores them.
- Head width. Rotary pairs go where the big head turns at the same frequency: with the same base and a width that is m
  times as large, pair j goes to pair m * j. The other dimensions of the query are zero. Softmax scales by the big
  width, so q_proj is multiplied by sqrt(D / d).
- Layers. New layers come last; their o_proj and down_proj are zero, all else is random.
- Vocabulary. New tokens must never win, at the cost of the whole lm_head and without help from decoding code. One new
  dimension of the stream holds a constant s in every embedding, and only the final norm lets it through, where it is
  s / rms > 0; in lm_head the new tokens' rows read that dimension alone, with -1e30, the old tokens' rows not at all. Its s^2
  under the norm is taken from eps', so the function stays exact.

lm_head and embedding are two matrices even where the shape ties them: a forward reads as many bytes (an embedding is a
look-up), only memory is larger. Rotary base and scaling are the small model's: they cost nothing.

In float32 the logits are equal up to the order of sums (`tests/test_enlarge.py`). In bf16 the scaled norm weights and q_proj are
rounded once more, by at most 2**-9 of each weight, since their factors are no powers of two; norms themselves round as in the
small model, since relative error does not depend on size. So an enlarged bf16 model is one fixed model very near the small one,
and its output is to be compared with its own plain decoding. On one prompt, with the 8B shape cut to 8 layers and 9,000 tokens,
the bundled target's bf16 logits differ from its fp32 ones by 0.46 % of their norm enlarged, and by 0.39 % as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig

from specdec.errors import SpecDecError

Shape = Mapping[str, Any]

LLAMA_8B: Shape = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_1B: Shape = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN_4B: Shape = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

_SIZES = tuple(key for key in LLAMA_8B if key not in ("model_type", "tie_word_embeddings"))
_DEVIATION = 0.02
_NEVER = -1e30


def random_model(config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Any:
    """A causal LM of random weights, made tensor by tensor in its final place, so that memory never holds it twice.

    Matrices are normal with deviation 0.02, norm weights one.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _DEVIATION, generator=generator)
    return model.eval()


def random_of_shape(shape: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Any:
    """`random_model` of a named shape, with its family's own defaults for all else."""
    config = AutoConfig.for_model(**shape)
    return random_model(config, dtype=dtype, device=device, seed=seed)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the small model lies in the big one.

    dims: [d] int64, the big head's dimension for each of a small head's queries and keys.  unused: its other dimensions.
    heads: (big, small) query heads.  kv_heads: (big, small) KV heads.  constant: dimension of the stream that holds `level`,
    None where the width is unchanged.
    """

    width: int
    dims: Tensor
    unused: Tensor
    heads: tuple[tuple[int, int], ...]
    kv_heads: tuple[tuple[int, int], ...]
    constant: int | None
    level: float


@torch.no_grad()
def enlarge(
    model: Any, shape: Shape, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, seed: int = 0
) -> LlamaForCausalLM:
    """A LlamaForCausalLM of this shape whose logits over the model's vocabulary are the model's; new tokens never win.

    model: a Llama-architecture causal LM, left as it was found.  shape: sizes as a LlamaConfig names them, each at least the
    model's; what is not named stays.  dtype, device: of the result, by default the model's; float16 is refused, its range
    does not hold what shuts out new tokens. Raises SpecDecError where the shape cannot hold the model.
    """
    parameter = next(model.parameters())
    dtype, device = dtype or parameter.dtype, device or parameter.device
    small = model.config
    _check(small, shape, dtype)
    wide = {key: shape.get(key, getattr(small, key)) for key in _SIZES}
    level = float(torch.tensor(sqrt(small.rms_norm_eps * small.hidden_size / 2), dtype=dtype))
    level = level if wide["hidden_size"] > small.hidden_size else 0.0
    eps = (small.rms_norm_eps * small.hidden_size - level**2) / wide["hidden_size"]
    changes = {**wide, "rms_norm_eps": eps, "tie_word_embeddings": False}
    big: Any = random_model(type(small)(**{**small.to_dict(), **changes}), dtype=dtype, device=device, seed=seed)
    places = _places(model, big, level)
    _vocabulary(model, big, places)
    for index, layer in enumerate(big.model.layers):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if index < small.num_hidden_layers:
            _layer(model.model.layers[index], layer, places)
    big.generation_config = copy.deepcopy(model.generation_config)
    enlarged: LlamaForCausalLM = big
    return enlarged


def _check(small: Any, shape: Shape, dtype: torch.dtype) -> None:
    if small.model_type != "llama" or shape.get("model_type", "llama") != "llama":
        kind = f"{small.model_type} into {shape.get('model_type', 'llama')}"
        raise SpecDecError(f"enlarging {kind}: only llama into llama is possible; other families have norms or biases more")
    if small.attention_bias or small.mlp_bias:
        raise SpecDecError("the model has biases in its linear layers; enlarge a Llama without them")
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise SpecDecError(f"dtype={dtype}: an enlarged model can be float32, float64 or bfloat16")
    unknown = sorted(set(shape) - set(LLAMA_8B))
    if unknown:
        raise SpecDecError(f"shape names {unknown}; it may name {sorted(LLAMA_8B)}")
    smaller = {key: shape[key] for key in _SIZES if shape.get(key, getattr(small, key)) < getattr(small, key)}
    if smaller:
        own = {key: getattr(small, key) for key in smaller}
        raise SpecDecError(f"the shape is smaller than the model in {smaller}, where the model has {own}; give at least that")
    heads, width = (shape.get(key, getattr(small, key)) for key in ("num_attention_heads", "hidden_size"))
    if width % heads:
        raise SpecDecError(f"hidden_size={width} must be a whole multiple of num_attention_heads={heads}; change one of them")
    if shape.get("vocab_size", small.vocab_size) > small.vocab_size and width == small.hidden_size:
        raise SpecDecError("a bigger vocabulary needs a bigger hidden_size: one dimension more, which shuts out the new tokens")


def _places(model: Any, big: Any, level: float) -> _Places:
    small, wide = model.config, big.config
    dims = _rotary_dims(model.model.rotary_emb, big.model.rotary_emb)
    unused = [i for i in range(wide.head_dim) if i not in set(dims.tolist())]
    heads, kv_heads = _head_places(small, wide)
    return _Places(
        width=small.hidden_size,
        dims=dims,
        unused=torch.tensor(unused, dtype=torch.long, device=dims.device),
        heads=heads,
        kv_heads=kv_heads,
        constant=small.hidden_size if wide.hidden_size > small.hidden_size else None,
        level=level,
    )


def _rotary_dims(small: Any, big: Any) -> Tensor:
    """The big head's dimensions that turn as the small head's do: pair j is dimensions j and j + d / 2."""
    device = big.inv_freq.device
    wanted, there = small.inv_freq.to(device).double(), big.inv_freq.double()
    found = (there[None] - wanted[:, None]).abs().argmin(1)
    branching = {small.rope_type, big.rope_type} & {"dynamic", "longrope"}
    same = torch.allclose(there[found], wanted, rtol=1e-6, atol=0.0) and small.attention_scaling == big.attention_scaling
    if not same or (branching and len(there) != len(wanted)):
        raise SpecDecError(
            f"heads of {2 * len(there)} dimensions do not turn at all the frequencies of the model's {2 * len(wanted)}; "
            "choose the model's head_dim or a whole multiple of it"
        )
    return torch.cat((found, found + len(there)))


def _head_places(small: Any, wide: Any) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(big, small) query heads and (big, small) KV heads: each small group in as many big groups as it fills."""
    own = small.num_attention_heads // small.num_key_value_heads
    group = wide.num_attention_heads // wide.num_key_value_heads
    heads: list[tuple[int, int]] = []
    kv_heads: list[tuple[int, int]] = []
    for kv in range(small.num_key_value_heads):
        for first in range(0, own, group):
            heads.extend((len(kv_heads) * group + i, kv * own + first + i) for i in range(min(group, own - first)))
            kv_heads.append((len(kv_heads), kv))
    if len(kv_heads) > wide.num_key_value_heads:
        raise SpecDecError(
            f"groups of {own} query heads need {len(kv_heads)} KV heads in groups of {group}, and the shape has "
            f"{wide.num_key_value_heads}; give more KV heads or larger groups"
        )
    return tuple(heads), tuple(kv_heads)


def _vocabulary(model: Any, big: Any, places: _Places) -> None:
    """Embedding, final norm and lm_head; new tokens read the constant dimension only."""
    known, width, constant = model.config.vocab_size, places.width, places.constant
    embedding, head = big.model.embed_tokens.weight, big.lm_head.weight
    embedding[:, width:] = 0.0
    embedding[:known, :width].copy_(model.model.embed_tokens.weight)
    head[:known, :width].copy_(model.lm_head.weight)
    _norm(model.model.norm.weight, big.model.norm.weight, places)
    if constant is not None:
        embedding[:, constant] = places.level
        head[:known, constant] = 0.0
        head[known:, :width] = 0.0
        head[known:, constant] = _NEVER
        big.model.norm.weight[constant] = 1.0


def _norm(small: Tensor, big: Tensor, places: _Places) -> None:
    """The factor is applied in float64, so that each weight is rounded once; the constant dimension does not pass."""
    big[: places.width].copy_(small.double() * sqrt(places.width / big.shape[0]))
    if places.constant is not None:
        big[places.constant] = 0.0


def _layer(small: Any, big: Any, places: _Places) -> None:
    """One layer, its o_proj and down_proj already zero."""
    width, inner = places.width, small.mlp.gate_proj.weight.shape[0]
    _norm(small.input_layernorm.weight, big.input_layernorm.weight, places)
    _norm(small.post_attention_layernorm.weight, big.post_attention_layernorm.weight, places)
    _attention(small.self_attn, big.self_attn, places)
    big.mlp.gate_proj.weight[:inner, :width].copy_(small.mlp.gate_proj.weight)
    big.mlp.up_proj.weight[:inner, :width].copy_(small.mlp.up_proj.weight)
    big.mlp.down_proj.weight[:width, :inner].copy_(small.mlp.down_proj.weight)


def _attention(small: Any, big: Any, places: _Places) -> None:
    """Heads [heads, dimension, width] of q, k and v, and [width, heads, dimension] of o."""
    width, dims, near, wide = places.width, places.dims, small.head_dim, big.head_dim
    query, key, value = (p.weight.view(-1, wide, p.weight.shape[1]) for p in (big.q_proj, big.k_proj, big.v_proj))
    own_query, own_key, own_value = (p.weight.view(-1, near, width) for p in (small.q_proj, small.k_proj, small.v_proj))
    out = big.o_proj.weight.view(big.o_proj.weight.shape[0], -1, wide)
    own_out = small.o_proj.weight.view(width, -1, near)
    for there, here in places.heads:
        query[there, places.unused] = 0.0
        scaled = own_query[here].double() * sqrt(wide / near)
        query[there, dims, :width] = scaled.to(query.device, query.dtype)
        out[:width, there, :near].copy_(own_out[:, here])
    for there, here in places.kv_heads:
        key[there, dims, :width] = own_key[here].to(key.device, key.dtype)
        value[there, :near, :width].copy_(own_value[here])

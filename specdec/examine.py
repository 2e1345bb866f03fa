"""Finds out, when a runner is built, whether a model gives its own logits on packed rows; refuses it by name where it does not.

Four things are looked at, from the surest to the widest: every layer calls the attention interface, once; what it hands over
(mask, window, other tensors) is something that tree attention knows; a row's result depends on its token and position
alone, not on its place among the rows; and a small tree scores as the model's own forward scores its paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specdec.cache import KVCache, LayerSpec
from specdec.errors import UnsupportedModelError
from specdec.kernels.dispatch import AttentionContext
from specdec.kernels.rows import Rows
from specdec.rows import chain_rows, tree_rows
from specdec.twin import EAGER, Twin, context_of
from specdec.types import TokenTree

PROBE = "specdec_probe"

# Tensors that attention is handed and that change nothing: what they say is in the rows.
_HARMLESS = frozenset({"position_ids", "tree_ctx", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k"})
# A forward that cannot take packed rows fails in one of these ways; running out of memory is another matter.
_FAILURES = (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError, NotImplementedError)
# Mean difference of logits over their deviation. Right models stay under a hundredth of it, wrong ones are ten times over.
_MOST = {torch.float32: 0.01, torch.float64: 0.01}
_MOST_HALF = 0.25
_PARENTS = (-1, 0, 0, 1, 2)
_PATHS = ((0, 1, 3), (0, 2, 4))
_PROMPT = 3


class _Meaning:
    """What a mask says, kept on the mask itself: seen(request, head, query, key) of any places; local: its window or chunk."""

    def __init__(self, seen: Callable[..., Any], local: int | None, mask: Tensor) -> None:
        self.seen, self.local, self.values = seen, local, mask.clone()

    def is_causal(self, window: int | None, most: int | None) -> bool:
        """Whether it is the causal mask of this window, near the start and far from it, over the first `most` places."""
        near, device = window or 1, self.values.device
        last = (1 << 20) if most is None else most - 1
        far = sorted({min(q, last) for w in (1, near) for q in (0, 1, w - 1, w, w + 1, 5 * w + 3, last)})
        back = sorted({*range(-2, 6), *range(near - 2, near + 3), 777, 8192, 70_000, *far})
        query = torch.tensor(far, device=device)[:, None].expand(-1, len(back))
        key = query - torch.tensor(back, device=device)
        query, key = query[key >= 0], key[key >= 0]
        zero = torch.zeros_like(query)
        try:
            seen = torch.as_tensor(self.seen(zero, zero, query, key), device=device)
        except IndexError:
            # It reads the kinds of the tokens at hand, which say nothing of other places.
            size = self.values.shape[-1]
            plain = torch.ones(size, size, dtype=torch.bool, device=device).tril()
            return self.local == window and bool((self.values[0, 0] == plain).all())
        ago = query - key
        expected = (ago >= 0) if window is None else (ago >= 0) & (ago < window)
        return bool((seen == expected).all())


def _probe_mask(**kwargs: Any) -> Tensor:
    """SDPA's mask, never left out, with its meaning."""
    made: Any = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    mask = made.clone()
    mask.specdec_meaning = _Meaning(kwargs["mask_function"], kwargs.get("local_size"), mask)
    found: Tensor = mask
    return found


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    probe = context_of(module, kwargs)
    if probe is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    probe.look(module, attention_mask, kwargs)
    scale = kwargs.get("scaling")
    return probe.attend(
        query, key, value, module.layer_idx, scale, kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    ), None


class _Probe:
    """Takes the place of the attention context, to learn what each layer writes. A row's output is made of that row alone."""

    def __init__(self, name: str, most: int | None = None) -> None:
        self.name, self.most = name, most
        self.specs: dict[int, LayerSpec] = {}
        self.calls: dict[int, int] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Note the layer; see `AttentionContext.attend`. The result varies with query, key and value of its own row."""
        self.specs[layer] = LayerSpec(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device, window)
        self.calls[layer] = self.calls.get(layer, 0) + 1
        group = query.shape[1] // key.shape[1]
        turn = query.mean(-1, keepdim=True) + key.mean(-1, keepdim=True).repeat_interleave(group, 1)
        return (value.repeat_interleave(group, 1) * (1 + torch.tanh(turn))).transpose(1, 2).contiguous()

    def look(self, module: nn.Module, mask: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """Refuse what tree attention would leave out."""
        strange = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _HARMLESS]
        if strange:
            refuse(self.name, f"{type(module).__name__} hands attention {', '.join(strange)}, which tree attention does not know")
        if kwargs.get("is_causal") is False:
            refuse(self.name, f"{type(module).__name__} attends in both directions")
        if mask is None:
            return
        meaning = getattr(mask, "specdec_meaning", None) or getattr(mask._base, "specdec_meaning", None)
        if meaning is None:
            refuse(self.name, f"{type(module).__name__} attends under a mask of its own making, which a draft tree cannot replace")
        if not meaning.is_causal(kwargs.get("sliding_window"), self.most):
            refuse(
                self.name,
                f"the mask of {type(module).__name__} is not the causal one of the sliding window that it tells attention "
                f"({kwargs.get('sliding_window')}): chunks, blocks, or a window that only the mask knows",
            )


def refuse(name: str, why: str) -> NoReturn:
    """Raise UnsupportedModelError: the model, the reason, and what works."""
    raise UnsupportedModelError(f"{name}: {why}; use a model that works on draft trees, or plain model.generate")


def examine(twin: Twin, device: torch.device) -> list[LayerSpec]:
    """What each layer writes to the cache, once it is sure that the model can be run on packed rows.

    Five or six forwards of a few tokens. Raises UnsupportedModelError with the model's name and the reason.
    """
    AttentionInterface.register(PROBE, _probe_attention)
    AttentionMaskInterface.register(PROBE, _probe_mask)
    name = type(twin.model).__name__
    with torch.no_grad(), _failures(name):
        ids = _ids(twin.model, device)
        specs = _look(twin, ids, name)
        _permute(twin, ids, name)
        if twin.copied or not twin.model.training:
            _compare(twin, ids, specs, name)
            _pad(twin, ids, name)
    return specs


@contextmanager
def _failures(name: str) -> Iterator[None]:
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        why = str(error).strip().split("\n")[0][:200]
        raise UnsupportedModelError(
            f"{name}: its forward fails on packed rows without a mask ({type(error).__name__}: {why}); "
            "use a model that works on draft trees, or plain model.generate"
        ) from error


def _ids(model: nn.Module, device: torch.device) -> Tensor:
    """[8] ordinary token ids: spread over the vocabulary, none that the configuration gives a meaning."""
    config: Any = model.config
    both = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = {v for k, v in both.items() if "token" in k and isinstance(v, int)}
    size = config.get_text_config().vocab_size
    found = [t for t in range(size // 9, size, max(1, size // 23)) if t not in special]
    return torch.tensor((found * 8)[:8], device=device)


def most_positions(text: Any) -> int | None:
    """Positions that a text may reach, of a text configuration; None without a limit.

    Rotary embeddings that change their frequencies once a text is long do so for all rows of a forward, and leave
    the keys of before as they are: texts stop where they begin to.
    """
    most: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for own in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if own.get("rope_type") in ("dynamic", "longrope"):
            before = own.get("original_max_position_embeddings") or most
            most = before if most is None or before is None else min(most, before)
    return most


def _look(twin: Twin, ids: Tensor, name: str) -> list[LayerSpec]:
    """What each layer hands to attention."""
    config: Any = twin.model.config
    text = config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", 0)
    index = next((type(m).__name__ for m in twin.model.modules() if "Indexer" in type(m).__name__), None)
    if index is not None:
        refuse(name, f"{index} chooses the keys that a token attends to, and a draft tree would not be in its index")
    most = most_positions(text)
    probe = _Probe(name, most)
    tokens = ids[None, :4]
    positions = torch.arange(4, device=ids.device)[None]
    with twin.under(PROBE) as forward:
        forward(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False, tree_ctx=probe)
    if sorted(probe.specs) != list(range(num_layers)):
        refuse(
            name,
            f"{len(probe.specs)} of {num_layers} layers call the attention interface of transformers, so the others would "
            "ignore the draft tree",
        )
    if set(probe.calls.values()) != {1}:
        refuse(name, "a layer calls attention more than once, and keeps keys and values for each call")
    specs = [probe.specs[i] for i in range(num_layers)]
    for layer, spec in zip(DynamicCache(config=text).layers, specs, strict=False):
        window = getattr(layer, "sliding_window", None)
        if window is not None and window != spec.window and (most is None or window < most):
            refuse(name, f"the cache of generate keeps a window of {window}, the mask one of {spec.window}: they disagree")
    return specs


def _permute(twin: Twin, ids: Tensor, name: str) -> None:
    """A row's result must not depend on its place among the rows."""
    tokens = ids[[0, 1, 2, 3, 4]]
    positions = torch.tensor([3, 4, 4, 5, 5], device=ids.device)
    order = torch.tensor([3, 0, 4, 1, 2], device=ids.device)
    both = []
    for which in (torch.arange(5, device=ids.device), order):
        rows = tokens[which][None]
        out = twin(
            input_ids=rows, position_ids=positions[which][None], attention_mask=torch.ones_like(rows), use_cache=False,
            tree_ctx=_Probe(name),
        )  # fmt: skip
        both.append(out.logits[0])
    if _differ(both[0][order], both[1]):
        refuse(
            name,
            "a row's logits depend on its place among the rows, so it ignores position_ids or mixes tokens outside attention "
            "(convolution, recurrence)",
        )


def _compare(twin: Twin, ids: Tensor, specs: list[LayerSpec], name: str) -> None:
    """A prompt, then a tree of two paths, against the model's own attention on each path."""
    prompt, nodes = ids[:_PROMPT], ids[_PROMPT : _PROMPT + len(_PARENTS)]
    paths = torch.stack([torch.cat([prompt, nodes[list(path)]]) for path in _PATHS])
    with twin.under(EAGER) as forward:
        positions = torch.arange(paths.shape[1], device=ids.device).expand(paths.shape)
        mask = torch.ones_like(paths)
        plain = forward(input_ids=paths, position_ids=positions, attention_mask=mask, use_cache=False).logits
    cache = KVCache(specs, 1, _PROMPT + len(_PARENTS))
    _packed(twin, cache, chain_rows(cache, [prompt.tolist()]), logits_to_keep=prompt.new_zeros(1))
    cache.lengths = [_PROMPT]
    parents = torch.tensor([_PARENTS], device=ids.device)
    logits = _packed(twin, cache, tree_rows(cache, TokenTree(nodes[None], parents, (len(_PARENTS),))))
    expected = torch.cat([plain[i, _PROMPT:] for i in range(len(_PATHS))])
    if _differ(logits[[node for path in _PATHS for node in path]], expected):
        refuse(name, "a small draft tree does not score as its own forward scores the tree's paths")


def _pad(twin: Twin, ids: Tensor, name: str) -> None:
    """Where generate cannot tell the model positions, the model itself must not count the pads."""
    model: Any = twin.model
    if "position_ids" in signature(model.forward).parameters:
        return
    short, long = ids[None, 3:], ids[None]
    mask = torch.tensor([[0] * 3 + [1] * (len(ids) - 3)], device=ids.device)
    with twin.under(EAGER) as forward:
        plain = forward(input_ids=short, attention_mask=torch.ones_like(short), use_cache=False).logits
        padded = forward(input_ids=long, attention_mask=mask, use_cache=False).logits
    if _differ(padded[0, 3:], plain[0]):
        refuse(name, "its forward takes no position_ids and counts the pads of a batch as positions")


def _packed(twin: Twin, cache: KVCache, rows: Rows, **kwargs: Any) -> Tensor:
    out: Tensor = twin(
        input_ids=rows.tokens, position_ids=rows.positions, attention_mask=torch.ones_like(rows.tokens), use_cache=False,
        tree_ctx=AttentionContext(rows, cache.layers), **kwargs,
    ).logits[0]  # fmt: skip
    return out


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits differ by more than rounding does; equal NaN are equal."""
    a, b = ours.float(), theirs.float()
    if not bool(torch.isfinite(b).all()):
        return not torch.equal(a.isfinite(), b.isfinite())
    share = float((a - b).abs().mean() / b.std().clamp(min=1e-9))
    return not share <= _MOST.get(ours.dtype, _MOST_HALF)

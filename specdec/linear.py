"""Linear layers for few rows on a CPU.

A matrix product of 2 to 16 rows is what verification costs on a CPU, and PyTorch's own kernels are poor there: bf16
without hardware support converts the weights in every call, and the fp32 kernel is several times faster when the weights
lie right for the number of rows. The twin's linear layers therefore keep fp32 copies; the user's weights stay untouched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


# PyTorch's fp32 product on weights as [out, in] is fastest for 2 and 3 rows, and gives a row the same bits for both. Groups of
# that size therefore make a token's logits independent of how many rows are scored with it, so that plain and speculative
# decoding agree bit for bit in half precision too. One row alone takes another kernel, so it is doubled (the runner, which
# knows when it comes, gives two in the first place).
_GROUP = 3
_GROUPED_ROWS = 8


class PackedLinear(nn.Module):
    """`nn.Linear` with the products summed in fp32 and the result rounded once to the input's dtype.

    source keeps the shared parameters, so that `refresh` can follow a change of the weights in place. The two layouts are made
    when first used, so a runner that only ever sees few rows holds one of them.
    """

    def __init__(self, source: nn.Linear, *, grouped: bool = True) -> None:
        """source: the layer to stand for; shares its parameters and adds up to 8 bytes a weight.

        grouped: make each row's result independent of the number of rows, up to 8; costs a little speed.
        """
        super().__init__()
        self._grouped_rows = _GROUPED_ROWS if grouped else 0
        self._least_rows = 2 if grouped else 1
        self.source = source
        self.out_features = source.out_features
        self._rows_first: Tensor | None = None
        self._columns_first: Tensor | None = None
        self._bias: Tensor | None = None
        self._versions: tuple[int, ...] | None = None
        self.refresh()

    @property
    def weight(self) -> Tensor:
        """The shared weight, whose dtype some families look at."""
        return self.source.weight

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(-1 if p.is_inference() else p._version for p in self.source.parameters())

    def refresh(self) -> bool:
        """Forget the copies if the weights were changed in place since they were made; returns whether they were."""
        versions = self._current_versions()
        changed = versions != self._versions
        if changed:
            self._versions = versions
            self._rows_first = self._columns_first = None
            self._bias = None if self.source.bias is None else self.source.bias.detach().float()
        return changed

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of x."""
        if x.dim() == 3 and x.shape[0] == 1 and self._least_rows <= x.shape[1] <= _GROUP:
            return self._few(x.float()).to(x.dtype)
        rows = x.float().reshape(-1, x.shape[-1])
        if rows.shape[0] <= self._grouped_rows:
            out = self._grouped(rows)
        else:
            out = self._few(rows) if rows.shape[0] <= _GROUP else self._wide(rows)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _few(self, rows: Tensor) -> Tensor:
        """Up to 3 rows [..., R, in], on weights as [out, in]."""
        if self._rows_first is None:
            self._rows_first = self.source.weight.detach().float()
        return nn.functional.linear(rows, self._rows_first, self._bias)

    def _grouped(self, rows: Tensor) -> Tensor:
        """Few rows, in groups of 2 and 3; a row's result does not depend on the others."""
        sizes = group_sizes(rows.shape[0])
        if sizes == [1]:
            return self._few(rows.expand(2, -1))[:1]
        return self._few(rows) if len(sizes) == 1 else torch.cat([self._few(part) for part in rows.split(sizes)])

    def _wide(self, rows: Tensor) -> Tensor:
        """Many rows, on weights as [in, out]."""
        if self._columns_first is None:
            self._columns_first = self.source.weight.detach().float().t().contiguous()
        out = torch.mm(rows, self._columns_first)
        return out if self._bias is None else out + self._bias


class SharedInput:
    """Linear layers that are fed the same tensor (query, key and value; gate and up), run as one product.

    The first of them to be called with an input computes for all; the others take their part of that result.
    """

    def __init__(self, parts: Sequence[nn.Linear], *, grouped: bool) -> None:
        """parts: layers of one input width, all with bias or all without."""
        self._sources, self._grouped = list(parts), grouped
        self._whole: PackedLinear | None = None
        self._versions: list[int] = []
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def layers(self) -> list[SharedLinear]:
        """What stands for each part. They hold this, and not the other way round, so that the copies go when the model goes."""
        return [SharedLinear(part, self, i) for i, part in enumerate(self._sources)]

    def refresh(self) -> bool:
        """Forget the copies if any of the weights changed; returns whether."""
        versions = [-1 if p.is_inference() else p._version for part in self._sources for p in part.parameters()]
        changed = self._whole is None or versions != self._versions
        if changed:
            self._versions = versions
            self._whole = PackedLinear(self._joined(), grouped=self._grouped)
        return changed

    def _joined(self) -> nn.Linear:
        """One layer with the parts' rows under each other."""
        first = self._sources[0]
        whole = nn.Linear(first.in_features, sum(s.out_features for s in self._sources), bias=False, device="meta")
        whole.weight = nn.Parameter(torch.cat([s.weight.detach() for s in self._sources]), requires_grad=False)
        if first.bias is not None:
            whole.bias = nn.Parameter(torch.cat([s.bias.detach() for s in self._sources]), requires_grad=False)
        return whole

    def output(self, x: Tensor, part: int) -> Tensor:
        """The part's output for x."""
        if self._input is not x:
            if self._whole is None:
                self.refresh()
            assert self._whole is not None
            self._outputs = self._whole(x).split([s.out_features for s in self._sources], -1)
            self._input = x
        out = self._outputs[part]
        if part == len(self._sources) - 1:
            self._input, self._outputs = None, ()
        return out


class SharedLinear(nn.Module):
    """One of the layers of a `SharedInput`."""

    def __init__(self, source: nn.Linear, shared: SharedInput, part: int) -> None:
        """source: the layer to stand for."""
        super().__init__()
        self.source, self.out_features = source, source.out_features
        self._shared, self._part = shared, part

    @property
    def weight(self) -> Tensor:
        """The shared weight, whose dtype some families look at."""
        return self.source.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self._shared.output(x, self._part)


def group_sizes(rows: int) -> list[int]:
    """Split rows into groups of 2 and 3, as few as can be; one row stays alone."""
    if rows <= _GROUP:
        return [rows]
    groups = -(-rows // _GROUP)
    return [rows // groups + (i < rows % groups) for i in range(groups)]


def kind_of(rows: int, *, grouped: bool) -> int:
    """Equal for numbers of rows that run the same operations: up to 3, apart from one alone; each in groups; and wide ones."""
    if rows <= _GROUP:
        return min(rows, 2)
    return rows if grouped and rows <= _GROUPED_ROWS else _GROUPED_ROWS + 1


def cpu_has_fast_bf16() -> bool:
    """Whether bf16 products run on this CPU without converting the weights first."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def packable(model: nn.Module, limit_bytes: int) -> str | None:
    """None when packing helps this model on its device, else the reason why not."""
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        return "adapters read the weights of the layers that they wrap"
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    weights = [m.weight for m in linears]
    if not weights or any(w.device.type != "cpu" for w in weights):
        return "only CPU weights are packed"
    if any(w.dtype not in _PACKABLE for w in weights):
        return f"weights of {sorted({str(w.dtype) for w in weights})} are not packed"
    if any(w.dtype != torch.float32 for w in weights) and cpu_has_fast_bf16():
        return "this CPU multiplies bf16 by itself"
    needed = sum(w.numel() * 10 for w in weights)
    if needed > limit_bytes:
        return f"packed copies could take {needed / 2**30:.1f} GiB, more than the limit of {limit_bytes / 2**30:.1f} GiB"
    return None


# Layers that every supported family feeds with one tensor, in the order in which it calls them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def pack_linears(model: nn.Module, *, grouped: bool = True) -> list[PackedLinear | SharedInput]:
    """Replace every plain `nn.Linear` of a twin by a packed one; returns what has to be refreshed."""
    packed: list[PackedLinear | SharedInput] = []
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
        for names in _TOGETHER:
            if _joinable([children.get(name) for name in names]):
                shared = SharedInput([children.pop(name) for name in names], grouped=grouped)
                for name, part in zip(names, shared.layers(), strict=True):
                    setattr(parent, name, part)
                packed.append(shared)
        for name, child in children.items():
            layer = PackedLinear(child, grouped=grouped)
            setattr(parent, name, layer)
            packed.append(layer)
    return packed


def _joinable(parts: list[nn.Linear | None]) -> bool:
    found = [part for part in parts if part is not None]
    if len(found) != len(parts):
        return False
    kinds = {(part.in_features, part.weight.dtype, part.bias is None) for part in found}
    return len(kinds) == 1

"""Linear layers for few rows on a CPU.

A matrix product of 2 to 16 rows is what verification costs on a CPU, and PyTorch's own kernels are poor there: bf16
without hardware support converts the weights in every call, and the fp32 kernel is several times faster when the weights
lie right for the number of rows. The twin's linear layers therefore keep fp32 copies; the user's weights stay untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


# PyTorch's fp32 product on weights as [out, in] is fastest for 2 and 3 rows, and gives a row the same bits for both. Groups of
# that size therefore make a token's logits independent of how many rows are scored with it, so that plain and speculative
# decoding agree bit for bit in half precision too. One row alone takes another kernel, so it is doubled.
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
        self.source = source
        self.out_features = source.out_features
        self._rows_first: Tensor | None = None
        self._columns_first: Tensor | None = None
        self._bias: Tensor | None = None
        self._versions: tuple[int, ...] | None = None
        self.refresh()

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
        rows = x.float().reshape(-1, x.shape[-1])
        if rows.shape[0] <= self._grouped_rows:
            out = self._grouped(rows)
        else:
            out = self._few(rows) if rows.shape[0] <= _GROUP else self._wide(rows)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _few(self, rows: Tensor) -> Tensor:
        """Up to 3 rows, on weights as [out, in]."""
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


def group_sizes(rows: int) -> list[int]:
    """Split rows into groups of 2 and 3, as few as can be; one row stays alone."""
    if rows <= _GROUP:
        return [rows]
    groups = -(-rows // _GROUP)
    return [rows // groups + (i < rows % groups) for i in range(groups)]


def cpu_has_fast_bf16() -> bool:
    """Whether bf16 products run on this CPU without converting the weights first."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def packable(model: nn.Module, limit_bytes: int) -> str | None:
    """None when packing helps this model on its device, else the reason why not."""
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    weights = [m.weight for m in linears]
    if not weights or any(w.device.type != "cpu" for w in weights):
        return "only CPU weights are packed"
    if any(w.dtype not in _PACKABLE for w in weights):
        return f"weights of {sorted({str(w.dtype) for w in weights})} are not packed"
    if any(w.dtype != torch.float32 for w in weights) and cpu_has_fast_bf16():
        return "this CPU multiplies bf16 by itself"
    needed = sum(w.numel() * 8 for w in weights)
    if needed > limit_bytes:
        return f"packed copies could take {needed / 2**30:.1f} GiB, more than the limit of {limit_bytes / 2**30:.1f} GiB"
    return None


def pack_linears(model: nn.Module, *, grouped: bool = True) -> list[PackedLinear]:
    """Replace every plain `nn.Linear` of a twin by a packed one; returns them for `refresh`."""
    packed: list[PackedLinear] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = PackedLinear(child, grouped=grouped)
                setattr(parent, name, layer)
                packed.append(layer)
    return packed

"""The rows of a draft model while a tree of any shape grows: which slots each node sees."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.rows import Rows, Shared
from specdec.kernels.transfer import on_device


class Frontier:
    """Nodes that were run so far, T of each request, in the order of their slots behind the committed tokens."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """lengths: committed tokens of each request, all in the draft's cache."""
        self._lengths, self._device = lengths, device
        self._seen = torch.zeros(len(lengths), 0, 0, dtype=torch.bool, device=device)
        self._offsets = torch.zeros(len(lengths), 0, dtype=torch.long, device=device)

    @property
    def written(self) -> int:
        """T."""
        return self._offsets.shape[1]

    def rows(self, tokens: Tensor, parents: Tensor, depths: Tensor, shared: tuple[Shared, ...]) -> Rows:
        """The rows of one forward over W more nodes of every request, which take the next W slots.

        tokens, parents, depths: [B, W].  parents: numbers of nodes that were run before, -1 for the root.  depths: 1 and more.
        shared: as in `Rows`.
        """
        before, width = self.written, tokens.shape[1]
        base = tuple([length + before for length in self._lengths])
        above = self._seen.gather(1, parents.clamp(min=0)[..., None].expand(-1, -1, before)) if before else self._seen
        above = above & (parents >= 0)[..., None] if before else above.new_zeros(len(base), width, 0)
        own = torch.eye(width, dtype=torch.bool, device=self._device).expand(len(base), -1, -1)
        seen = torch.cat((above, own), 2)
        self._seen = torch.cat((torch.nn.functional.pad(self._seen, (0, width)), seen), 1)
        self._offsets = torch.cat((self._offsets, depths - 1), 1)
        start = on_device([base, self._lengths], self._device)[..., None]
        slots = (start[0] + torch.arange(width, device=self._device)).reshape(-1)
        positions = (start[1] + depths - 1).reshape(1, -1)
        sizes = (width,) * len(base)
        return Rows(self._lengths, sizes, tokens.reshape(1, -1), positions, slots, base, seen, self._offsets, shared)

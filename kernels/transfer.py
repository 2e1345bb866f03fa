"""Host integers to the device, without waiting for what the device still has to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device) -> Tensor:
    """int64 of nested sequences of integers. To a GPU they go from pinned memory: a copy from other memory waits for the stream."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.long, device=device)
    return torch.tensor(values, dtype=torch.long).pin_memory().to(device, non_blocking=True)

"""What every test may rely on: one torch thread a worker and a fixed seed."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that torch's default generator is set to before each test."""
    torch.manual_seed(0)
    return 0

"""What every test may rely on: one torch thread a worker, a fixed seed, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Read when a kernel is defined, so it has to be set before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What this machine's user has tuned is not seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "no-profiles"))


@pytest.fixture(autouse=True)
def no_other_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other guests take of this machine is not seen, so no benchmark makes a call again because of it."""
    monkeypatch.setattr("specdec.bench.measuring.ticks", lambda: None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that torch's default generator is set to before each test."""
    torch.manual_seed(0)
    return 0

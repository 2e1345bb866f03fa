"""Every kernel compiles for sm_80 and sm_90 without a GPU, and none spills registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time_and_spills_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "specdec.kernels.ahead"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    usage = re.findall(r"^(.+?)\s+sm_(\d+)\s+(\d+) registers\s+(\d+) spilled\s+(\d+) shared$", done.stdout, flags=re.MULTILINE)
    assert len(usage) == len(done.stdout.splitlines()) >= 30
    limits = {"80": 163 << 10, "90": 227 << 10}
    for name, architecture, registers, spilled, shared in usage:
        assert int(registers) <= 255, name
        assert int(spilled) == 0, name
        assert int(shared) <= limits[architecture], name

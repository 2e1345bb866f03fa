"""What numbers are measured on: the processor, the threads, the versions, and the package's own commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import specdec


def machine() -> dict[str, Any]:
    """For JSON: cpu, threads, cores, torch, transformers and commit, which is empty where it is unknown."""
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """As `git describe` says of specdec's own checkout, whatever folder the program runs in.

    Empty for an installed package, also where that lies in another repository. SPECDEC_COMMIT goes before: it names the commit
    where the sources travelled without their history.
    """
    folder = str(Path(specdec.__file__).parent)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)

    if given := os.environ.get("SPECDEC_COMMIT"):
        return given
    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py").returncode == 0
        return git("describe", "--always", "--dirty").stdout.strip() if tracked else ""
    except OSError:
        return ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())

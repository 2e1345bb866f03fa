"""Stage `tests` of `specdec.bench.gpu`: the test files that use a GPU where there is one, compiled instead of interpreted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from specdec.bench.gpu_store import Point, Setup, Store, Value
from specdec.errors import SpecDecError

# It would run this stage in itself.
_OWN = "test_gpu_suite.py"
_WORKERS = "8"
_SOURCES = ("specdec", "drafters", "trees", "verify", "kernels", "tests")


def run(setup: Setup) -> Store:
    """One point a test file; a file is run again when it failed or any source has changed. Needs a checkout and pytest."""
    root = Path.cwd()
    files = sorted(path for path in (root / "tests").glob("test_*.py") if _uses_gpu(path))
    if setup.small:
        files = [path for path in files if path.name == "test_compaction_kernel.py"] or files[:1]
    if not files:
        raise SpecDecError("no tests that use a GPU under ./tests; run this stage from the root of a checkout")
    store, digest = Store("tests", setup), _digest(root)
    for path in files:
        settings: dict[str, Value] = {"file": path.relative_to(root).as_posix(), "sources": digest}
        found = store.find(settings)
        if found is not None and failing([found]):
            store.points.remove(found)
        store.measure(settings, partial(_point, path, setup, store))
    return store


def failing(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files whose latest run had failures or could not be run."""
    latest = {p["file"]: p for p in points}
    return [p for p in latest.values() if "failed" in p or p["failures"]]


def _uses_gpu(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return path.name != _OWN and ("cuda" in text or "mark.gpu" in text)


def _digest(root: Path) -> str:
    """Of all sources: a commit's name says nothing of what has changed since."""
    found = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _output_of(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the tests took longer than {seconds:.0f} s") from error


def _point(path: Path, setup: Setup, store: Store) -> Point:
    """Counts of one file, from pytest's own report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", f"--junitxml={report}", str(path)]
        if setup.device.type == "cuda" and find_spec("xdist"):
            # Compiling kernels keeps one core busy and the GPU idle.
            command += ["-n", _WORKERS]
        done = _output_of(command, store.seconds_left)
        if not report.exists():
            raise RuntimeError(f"pytest gave no report: {(done.stdout + done.stderr)[-200:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise RuntimeError("pytest's report holds no test suite")
    if done.returncode:
        setup.console.print(done.stdout[-4000:], markup=False, highlight=False)
    total, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    seconds = float(suite.attrib["time"])
    return {"passed": total - failures - errors - skipped, "failures": failures + errors, "skipped": skipped, "seconds": seconds}

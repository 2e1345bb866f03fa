"""The wheel holds specdec/ and nothing beside it, and the checkout does not get in the way of transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from specdec.bundled import bundled_path
from specdec.errors import SpecDecError

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("drafters", "trees", "verify", "training", "kernels", "bench")
SKIPPED = (".*", "build", "dist", "*.egg-info", "__pycache__")


def run_python(code: str, *, path: tuple[Path, ...] = ()) -> str:
    """What the code prints in a new interpreter started in the repository root."""
    lines = "\n".join(f"import sys; sys.path.append({str(entry)!r})" for entry in path)
    command = [sys.executable, "-c", f"{lines}\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a clean copy: a stale build folder would leak into one built in place."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED))
    out = copy.parent / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.mark.slow
def test_the_wheel_installs_one_package(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"specdec"}


@pytest.mark.slow
def test_the_wheel_holds_every_python_file(wheel: zipfile.ZipFile) -> None:
    expected = {f"specdec/{path.name}" for path in (ROOT / "specdec").glob("*.py")}
    expected |= {f"specdec/{folder}/{path.name}" for folder in MAPPED for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


@pytest.mark.slow
def test_the_wheel_holds_the_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "specdec/models").rglob("*") if path.is_file()}
    prompts = {f"specdec/bench/{path.name}" for path in (ROOT / "bench").glob("*.jsonl")}
    recipes = {f"specdec/training/{path.name}" for path in (ROOT / "training").glob("*.yaml")}
    assert len([name for name in models if name.endswith(".safetensors")]) == 4
    assert sum((ROOT / name).stat().st_size for name in models) < 45e6
    assert models | prompts | recipes | {"specdec/py.typed"} <= names


@pytest.mark.slow
def test_the_installed_wheel_imports_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import specdec, specdec.trees.chain as chain;"
        "print(specdec.bundled_path('draft'), chain.__file__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.split())


def test_importing_the_package_leaves_torch_and_transformers_alone() -> None:
    code = "import specdec, sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    assert run_python(code) == "[]"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import specdec

    with pytest.raises(AttributeError, match="public names: BestFirstDrafter, FixedPlanner"):
        specdec.Speculative  # noqa: B018  the access is the test
    assert set(specdec.__all__) <= set(dir(specdec))
    assert specdec.FixedPlanner.__module__ == "specdec.planner"


def test_transformers_imports_from_the_checkout() -> None:
    assert run_python("from transformers import LlamaForCausalLM as model; print(model.__name__)") == "LlamaForCausalLM"


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("origin = 'installed'\n", encoding="utf-8")
    assert run_python("import kernels; print(kernels.origin)", path=(tmp_path,)) == "installed"


@pytest.mark.parametrize("name", ["target", "draft"])
def test_the_bundled_checkpoints_are_complete(name: str) -> None:
    files = {path.name for path in bundled_path(name).iterdir()}  # type: ignore[arg-type]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files


def test_an_unknown_bundled_name_is_refused() -> None:
    with pytest.raises(SpecDecError, match="choose one of target, draft, medusa, pard"):
        bundled_path("oracle")  # type: ignore[arg-type]

"""The import order, the flat folders and the sizes that CONTRIBUTING promises, read from the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("drafters", "trees", "verify", "training", "kernels", "bench")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

# A module imports from its own line and from the lines above it. "specdec.x.*" stands for a folder.
ORDER = (
    ("specdec.types", "specdec.errors", "specdec.bundled", "specdec.loading"),
    ("specdec.noise", "specdec.sampling", "specdec.trees.*", "specdec.kernels.*"),
    (
        "specdec.verify.*",
        "specdec.rows",
        "specdec.taps",
        "specdec.cache",
        "specdec.linear",
        "specdec.capture",
        "specdec.flat",
        "specdec.graphs",
        "specdec.round_inputs",
        "specdec.rounds",
        "specdec.round_rows",
        "specdec.chains",
        "specdec.twin",
        "specdec.examine",
        "specdec.runner",
    ),
    ("specdec.drafters.*",),
    (
        "specdec.planner",
        "specdec.profile",
        "specdec.allocation",
        "specdec.acceptance",
        "specdec.costs",
        "specdec.arms",
        "specdec.guard",
        "specdec.hopes",
        "specdec.stragglers",
        "specdec.goodput",
        "specdec.confidence",
        "specdec.tetris",
        "specdec.bass",
        "specdec.metrics",
    ),
    (
        "specdec.past",
        "specdec.targets",
        "specdec.processing",
        "specdec.processing_table",
        "specdec.request",
        "specdec.stopping",
        "specdec.streaming",
        "specdec.controller",
    ),
    ("specdec.engine",),
    ("specdec.output",),
    ("specdec.generator",),
    ("specdec",),
    ("specdec.training.*", "specdec.bench.*"),
    (
        "specdec.demo",
        "specdec.generate_command",
        "specdec.datastore_command",
        "specdec.train_command",
        "specdec.tune",
        "specdec.tune_command",
        "specdec.trace",
        "specdec.trace_page",
        "specdec.trace_command",
        "specdec.doctor",
        "specdec.certify_sampling",
        "specdec.certify",
        "specdec.certify_command",
        "specdec.bench_command",
        "specdec.cli",
        "specdec.__main__",
    ),
)
# What training and bench may use of specdec, beside their own folder, the drafters and the kernels.
PUBLIC = {"specdec", "specdec.types", "specdec.errors", "specdec.bundled", "specdec.generator", "specdec.planner"}


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "specdec" else ("specdec", *relative.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    folders = [ROOT / "specdec", *(ROOT / name for name in MAPPED)]
    return {module_name(path): path for folder in folders for path in sorted(folder.glob("*.py"))}


MODULES = source_files()


def imports_of(path: Path) -> set[str]:
    """The specdec modules that a file imports anywhere in it, under TYPE_CHECKING and in functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(inner or {node.module})
    return {name for name in found if name.split(".")[0] == "specdec"}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def level(name: str) -> int:
    folder = name.rpartition(".")[0] + ".*"
    for index, names in enumerate(ORDER):
        if name in names or (folder != "specdec.*" and folder in names):
            return index
    pytest.fail(f"{name} has no place in the import order: add it to ORDER in tests/test_architecture.py")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_line_of_the_order_or_above(name: str) -> None:
    later = sorted(used for used in IMPORTS[name] if level(used) > level(name))
    assert not later, f"{name} imports {later}, which come after it in the import order"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for used in sorted(IMPORTS.get(name, ())):
                visit(used, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("specdec.training.", "specdec.bench."))])
def test_training_and_bench_use_the_public_api(name: str) -> None:
    own = name.rpartition(".")[0] + "."
    folders = (own, "specdec.drafters.", "specdec.kernels.")
    inner = sorted(used for used in IMPORTS[name] - PUBLIC if not used.startswith(folders))
    assert not inner, f"{name} reaches into {inner}; training and bench use the public API"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("specdec.kernels.")])
def test_kernels_know_torch_and_triton_only(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not sorted(module for module in used if module.split(".")[0] in {"transformers", "peft", "accelerate"})


@pytest.mark.parametrize("folder", MAPPED)
def test_a_mapped_folder_is_flat_and_has_no_init(folder: str) -> None:
    nested = [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]
    assert not nested, "nested folders are left out of the wheel"
    assert not (ROOT / folder / "__init__.py").exists(), "an __init__.py here breaks the package map or transformers"


def test_specdec_holds_no_nested_python() -> None:
    assert not [path for path in (ROOT / "specdec").rglob("*.py") if path.parent != ROOT / "specdec"]


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_absolute_and_named(name: str) -> None:
    nodes = [n for n in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    assert all(node.level == 0 for node in nodes)
    assert not any(alias.name == "*" for node in nodes for alias in node.names)


def test_files_stay_short() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").glob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_functions_stay_short() -> None:
    long = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name}.{node.name}"] = lines
    assert not long

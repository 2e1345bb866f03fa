"""What README.md and docs/files.md say is so: the tree is on disk, the commands exist, the Python blocks run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
FOLDERS = ("specdec", "drafters", "trees", "verify", "kernels", "training", "bench")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> set[str]:
    """The words that follow a program's name in shell blocks and in inline code."""
    code = "\n".join([*blocks("sh"), *re.findall(r"`([^`\n]+)`", README)])
    return set(re.findall(rf"^{program} ([a-z][a-z-]*)", code, flags=re.MULTILINE))


def tree_entries() -> set[str]:
    """The paths in the file tree: a folder ends in "/", what is indented below it lies in it; a line may name several."""
    (tree,) = blocks("text", FILES)
    folder, found = "", set()
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") and len(names) == 1 else ""
        found |= {name if name.endswith("/") else folder + name for name in names}
    return found


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_the_tree_names_only_what_exists() -> None:
    assert not sorted(entry for entry in tree_entries() if not (ROOT / entry).exists())


def test_the_tree_names_every_source_file() -> None:
    listed = tree_entries()
    on_disk = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert not sorted(on_disk - listed), "add them to docs/files.md"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    named = commands("make")
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("command", sorted(commands("specdec")))
def test_every_command_exists(command: str) -> None:
    arguments = [sys.executable, "-m", "specdec", command, "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_point_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_python_blocks_run_in_order() -> None:
    space: dict[str, object] = {}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, block {number}", "exec"), space)
    assert space["plain"] == space["fast"]

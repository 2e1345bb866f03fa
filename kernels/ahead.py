"""Compiles every kernel without a GPU and reads what it takes: `python -P -m specdec.kernels.ahead`.

A kernel that spills registers to memory is slow in a way that no correctness test sees, so the report is a test too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec.kernels import accept, fused_loss, kv_compact, sampling, tree_attention, tree_rows
from specdec.kernels.variant import Variant

ARCHITECTURES = (80, 90)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled variant takes. registers: a thread.  spilled: bytes a thread.  shared: bytes a program."""

    name: str
    architecture: int
    registers: int
    spilled: int
    shared: int


def compile_ahead(variant: Variant, architecture: int) -> Usage:
    """Compile for sm_{architecture} and read registers and spills from the assembler."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if signature[name].startswith("*") or _is_stride(name)}
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps, "num_stages": variant.stages})
    registers, spilled = _resources(compiled.asm["ptx"], architecture)
    return Usage(variant.name, architecture, registers, spilled, compiled.metadata.shared)


def _is_stride(name: str) -> bool:
    return name.endswith(("_row", "_head", "_slot", "_split", "_layer", "_stride"))


def _resources(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers, and bytes of spill stores, that the assembler reports. sm_90's own instructions have a suffix of their own."""
    name = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={name}",
            str(path),
            "-o",
            f"{path}.cubin",
        ]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores.*Used (\d+) registers", text, flags=re.DOTALL)
    assert found, f"no resource usage in {text!r}"
    return int(found[2]), int(found[1])


def variants() -> Iterator[Variant]:
    """Every kernel in the shapes that are used."""
    for module in (tree_attention, kv_compact, accept, sampling, tree_rows, fused_loss):
        yield from module.variants()


def main() -> None:
    """A line for each kernel and architecture; exit status 1 if any spills."""
    spilled = False
    for variant in variants():
        for architecture in ARCHITECTURES:
            usage = compile_ahead(variant, architecture)
            spilled = spilled or usage.spilled > 0
            taken = f"{usage.registers:4d} registers {usage.spilled:5d} spilled {usage.shared:7d} shared"
            print(f"{usage.name:44s} sm_{architecture} {taken}", flush=True)
    sys.exit(int(spilled))


if __name__ == "__main__":
    main()

"""Compiles the kernels of realignment at LLaVA-1.5-7B's shape without a GPU; `test_kernels.py` runs this.

python tests/steering/kernels_compiled.py 90      # sm_90; prints one line per kernel
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steering.kernels import launch

HIDDEN = SHARED = 4096
CONCEPTS, ACTIVE = 32_768, 256
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory of one program."""
INTEGERS = {
    "plan": "*i32",
    "ids_E2k": "*i32",
    "count_E": "*i32",
    "active_MK": "*i1",
    "edit_ids_MX": "*i64",
    "first": "i32",
    "bound": "i32",
}
STREAMS = {"mean_ND", "hidden_ND", "residual_ND", "twin_hidden_ND", "twin_residual_ND"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compilations() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, options) of everything that a launch at this shape may need."""
    for bound in (1, 256):
        for precision in ("tf32x3", "ieee"):
            project = launch.product_options(bound, HIDDEN, SHARED, gather=True, precision=precision)
            compare = launch.product_options(bound, SHARED, CONCEPTS, gather=False, precision=precision)
            yield f"project of {project['BLOCK_E']}, {precision}", launch.product_kernel, project
            yield f"compare of {compare['BLOCK_E']}, {precision}", launch.product_kernel, compare
    yield "select", launch.select_kernel, launch.selection_options(SHARED, CONCEPTS, ACTIVE)
    yield "accumulate", launch.accumulate_kernel, launch.accumulation_options(HIDDEN, ACTIVE)
    yield "finish", launch.finish_kernel, launch.finish_options(HIDDEN)


def source(kernel: Any, options: dict[str, Any]) -> ASTSource:
    """The kernel as a launch with bfloat16 states would specialise it."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        streamed = name in STREAMS or (name == "inputs" and options["GATHER"])
        if name in options:
            signature[name] = "constexpr"
        elif name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = INTEGERS.get(name, "*bf16" if streamed else "*fp32")
        if signature[name].startswith("*") or name.endswith("_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(registers), int(stack)


def main(capability: int) -> None:
    for name, kernel, options in compilations():
        started = time.monotonic()
        how = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
        compiled = triton.compile(source(kernel, options), target=GPUTarget("cuda", capability, 32), options=how)
        seconds = time.monotonic() - started
        registers, stack = resources(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        print(f"{name}: {seconds:.1f} s, {registers} registers, {stack} bytes spilled, {shared} bytes shared")
        assert stack <= 64
        assert shared <= SHARED_BYTES[capability]


if __name__ == "__main__":
    main(int(sys.argv[1]))

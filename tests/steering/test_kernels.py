"""The kernels of realignment without a GPU: interpreted against torch, and compiled for the GPUs they are meant for.

Each in a process of its own: whether Triton interprets is decided once, when it is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton")


def run(arguments: list[str], cache: Path, *, interpret: bool) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent.parent),
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=250)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_interpreted_they_are_the_equations(tmp_path):
    pytest_alone = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    run([*pytest_alone, str(HERE / "kernels_interpreted.py")], tmp_path, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_they_compile_without_spilling(capability, tmp_path):
    run([str(HERE / "kernels_compiled.py"), capability], tmp_path, interpret=False)

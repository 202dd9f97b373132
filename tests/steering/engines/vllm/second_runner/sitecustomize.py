"""Lets vLLM's second model runner, which wants Triton, run on a CPU: its kernels are interpreted.

Python imports this by itself where the folder is on PYTHONPATH; with TRITON_INTERPRET=1 no kernel is ever compiled,
so that a backend for the CPU need only look present.
"""

from types import SimpleNamespace
from typing import Any

from triton.backends import backends  # pyright: ignore[reportMissingImports]

looks_present: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
backends.setdefault("cpu", looks_present)

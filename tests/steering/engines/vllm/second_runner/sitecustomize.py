"""Lets vLLM's second model runner, which wants Triton, run on a CPU: its kernels are interpreted.

Python imports this by itself where the folder is on PYTHONPATH; with TRITON_INTERPRET=1 no kernel is ever compiled,
so that a backend for the CPU need only look present.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

from triton.backends import backends  # pyright: ignore[reportMissingImports]
from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

looks_present: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
backends.setdefault("cpu", looks_present)

make_interpreted = interpreter._patch_lang
interpreted: set[frozenset[str]] = set()


def make_interpreted_once(function: Any) -> Any:
    """Triton looks for what to interpret in its language at every call of every function: half of a kernel's time.

    Here nothing is compiled in between, so that what has been found stays as it is.
    """
    names = {value.__name__ for value in function.__globals__.values() if isinstance(value, ModuleType)}
    language = frozenset(names & {"triton.language", "triton.language.core"})
    if language not in interpreted:
        make_interpreted(function)
        interpreted.add(language)
    return SimpleNamespace(restore=lambda: None)


interpreter._patch_lang = make_interpreted_once

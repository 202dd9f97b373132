"""vLLM's processes, forked from one that has imported all they need, so that an engine starts in seconds.

On a CPU vLLM spawns two processes or more per engine, and each imports torch, transformers and vLLM anew. Here a fork
server has done so, one per environment: what they read of it, they read as they are imported.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest

IMPORTED = "tests.steering.engines.vllm.imported"
READ_ON_IMPORT = ("TORCHDYNAMO_DISABLE", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
ROOT = Path(__file__).parents[4]
SECOND_RUNNER = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "second_runner"), str(ROOT)]),
}
"""vLLM's second model runner, the default on GPUs; see second_runner/sitecustomize.py."""

_servers: dict[tuple[str | None, ...], forkserver.ForkServer] = {}


@contextmanager
def second_runner() -> Iterator[None]:
    """Engines that start in here take it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        for name, value in SECOND_RUNNER.items():
            patch.setenv(name, value)
        yield


@contextmanager
def forked_processes() -> Iterator[None]:
    """Engines that start in here have their processes forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: multiprocessing.get_context("forkserver"))
        patch.setattr(forkserver, "connect_to_new_process", lambda fds: fork_server().connect_to_new_process(fds))
        yield


def fork_server() -> forkserver.ForkServer:
    """The present environment's; from the first call on it imports, in the background."""
    environment = tuple(os.environ.get(name) for name in READ_ON_IMPORT)
    if environment not in _servers:
        _servers[environment] = server = forkserver.ForkServer()
        server.set_forkserver_preload([IMPORTED])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # how the engine core starts its workers
            patch.chdir(ROOT)
            server.ensure_running()
    return _servers[environment]

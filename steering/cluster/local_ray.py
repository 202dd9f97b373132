"""A Ray of our own on this machine: private, token-protected, and gone without a trace when we are done.

Ray's ports listen on every interface, so each start makes a fresh token; a client without it is refused. Here because
the service and training both need one; knows nothing of what runs on it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FOREIGN_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
)
"""What could make us join somebody else's cluster, or take somebody else's token."""
PR_SET_CHILD_SUBREAPER = 36
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""What a service manager or a closing terminal sends to every process of ours; Ray itself sees to Ctrl-C."""
SHARED_MEMORY = "/dev/shm"
MAX_FOLDER_LENGTH = 28
"""107 less our folder's name and Ray's /session_DATE_TIME_PID/sockets/plasma_store."""


@contextmanager
def private_ray(
    *, cpus: int, gpus: int | None = None, object_store_bytes: int = 512 * 1024 * 1024, in_memory: bool = False
) -> Iterator[None]:
    """Ray runs inside the block. Must be entered before anything imports ray: it reads its environment then.

    `cpus` and `gpus`: what Ray may hand out; None: all GPUs it finds. `in_memory`: what finds no place in the object
    store stays in shared memory, too, and never touches a disk; there must be room for `object_store_bytes`.
    """
    prepare_environment()
    adopt_orphans()
    not_ray_s = set(descendants(os.getpid()))
    import ray

    folder = tempfile.mkdtemp(prefix="vlsae-", dir=short_folder())
    overflow = tempfile.mkdtemp(prefix="vlsae-", dir=SHARED_MEMORY) if in_memory else folder
    places: dict[str, Any] = (
        {"_plasma_directory": SHARED_MEMORY, "object_spilling_directory": overflow} if in_memory else {}
    )
    try:
        with end_signals_held_back():
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=object_store_bytes,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
                **places,
            )
        yield
    finally:
        ray.shutdown()
        end_descendants(spare=not_ray_s)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(overflow, ignore_errors=True)


def short_folder() -> str:
    """Where temporary files go, unless that is too deep for the paths of Ray's sockets (107 bytes on Linux)."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= MAX_FOLDER_LENGTH else "/tmp"


def prepare_environment() -> None:
    """For this process and all that Ray starts: a token, no telemetry, no network, our own modules importable.

    Ray starts its workers at niceness 15; these are all there is to do here.
    """
    for name in FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    path = os.environ.get("PYTHONPATH")
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_SERVE_LOG_TO_STDERR="0",
        RAY_worker_niceness="0",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY),
    )


@contextmanager
def end_signals_held_back() -> Iterator[None]:
    """Processes started inside never see END_SIGNALS, only SIGKILL: this process alone decides when they go.

    Without it a signal to all of us takes Ray from under the process that is to stop it in order. One that comes
    meanwhile is delivered at the end, to the handler that was there before, if the caller had set one.
    """
    handlers = {number: signal.getsignal(number) for number in END_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def adopt_orphans() -> None:
    """Children of a child that dies become ours (Linux), so that `end_descendants` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace_s: float = 5.0, spare: Collection[int] = ()) -> None:
    """Whatever Ray left: given a moment to go by itself, then killed. Only our own descendants are touched."""
    deadline = time.monotonic() + grace_s
    while remaining := [pid for pid in descendants(os.getpid()) if pid not in spare]:
        if time.monotonic() > deadline:
            for pid in remaining:
                _kill(pid)
        _reap()
        time.sleep(0.05)


def descendants(root: int) -> list[int]:
    """Process ids of all children, grandchildren and so on that are not zombies."""
    children: dict[int, list[int]] = {}
    dead = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended while we looked
            continue
        children.setdefault(int(parent), []).append(int(entry.name))
        if state == "Z":
            dead.add(int(entry.name))
    found, frontier = [], [root]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += [pid for pid in frontier if pid not in dead]
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

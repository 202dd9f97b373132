"""Collections as a user runs them, in a process of their own, and what they leave on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from steering.cluster.local_ray import descendants
from training.miniature.paths import LLAVA

REPOSITORY = Path(__file__).parents[3]
PAIRS, PORTION = 320, 16
SETTINGS = [
    "--model", str(LLAVA), "--pairs", f"miniature:vl_sae_pairs:{PAIRS}", "--layers", "2", "3",
    "--portion-size", str(PORTION), "--batch-size", "4", "--threads", "1",
]  # fmt: skip
WAIT_S = 180


def environment() -> dict[str, str]:
    """Compiled modules are kept between the runs, also where they usually are not."""
    kept = {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "vlsae-pycache"), "PYTHONPATH": str(REPOSITORY)}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | kept


def start(output: Path, *options: str, settings: list[str] = SETTINGS) -> subprocess.Popen[str]:
    """Leads a process group of its own."""
    command = [sys.executable, "-m", "training.collect_representations", *settings, "--output", str(output), *options]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(run: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, said
    return said


def shards(output: Path) -> int:
    return len(list((output / "shards").glob("*[0-9].json")))


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)


def actors(run: subprocess.Popen[str]) -> list[int]:
    """Processes of Ray that make shards."""
    return [pid for pid in descendants(run.pid) if "ShardActor" in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

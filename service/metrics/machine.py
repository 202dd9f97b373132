"""The metrics of all processes of this machine, summed from the files that prometheus_client keeps for each.

`python -m service.metrics.machine --port 9400` answers `/metrics` with them: one per machine of a cluster, beside Ray
and in its process namespace, so that Prometheus reaches every machine whichever replica Serve's proxy would choose.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client reads it when it is first imported."""
PREFIX = "vlsae_"
LIVE_GAUGE = re.compile(r"gauge_live[a-z]+_(\d+)\.db")


def metrics_folder() -> Path | None:
    """Where this machine's processes keep their metrics; None: each keeps its own in memory."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


class MachineCollector(MultiProcessCollector):
    """Sums of our metrics; Ray's and vLLM's processes write to the same folder and are left out."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        super().__init__(registry, path=str(folder))
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        files = [str(path) for path in self._folder.glob("*.db") if counts(path)]
        return [metric for metric in self.merge(files) if metric.name.startswith(PREFIX)]


def counts(path: Path) -> bool:
    """What a process was doing when it died is not being done; what it has counted stays counted.

    Nothing is deleted: whoever cannot see a process (another container, another user) must not take its file from it.
    """
    owner = LIVE_GAUGE.fullmatch(path.name)
    return size_of(path) > 0 and (owner is None or has_open(int(owner[1]), path))


def has_open(pid: int, path: Path) -> bool:
    """Whether a process lives and has the file mapped: a process id may be somebody else's by now."""
    try:
        return path.name in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended, or is another user's
        return False


def size_of(path: Path) -> int:
    """In bytes; 0 for a file that has just been made, or is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.metrics.machine", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9400, help="TCP port")
    arguments = parser.parse_args()
    folder = metrics_folder()
    if folder is None or not folder.is_dir():
        print(f"error: {FOLDER_VARIABLE} must name the folder that the service's processes share", file=sys.stderr)
        return 2
    registry = CollectorRegistry()
    MachineCollector(registry, folder)
    _, thread = start_http_server(arguments.port, arguments.host, registry)
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())

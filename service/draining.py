"""How the service goes away without cutting anybody short: a file says so, and a lock on it says who still works.

While the file exists new requests are refused and the running ones get so many seconds; then they end with the error
`shutting_down`. A process that still answers somebody holds a shared lock on the file, so whoever made it can wait for
all processes of the machine, however they end. `python -m service.draining FILE` does so before a container stops.
Knows no Ray and no engine.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from service.errors import ApiError

POLL_S = 0.2
"""A process that answers somebody looks for the file so often."""
SETTLE_S = 1.0
"""By then every process has seen the file, be it ever so busy."""
RETRY_AFTER_S = 5.0
"""By then another replica, or the next start, should be there."""


def shutting_down() -> ApiError:
    """What a request gets that comes after the end has begun."""
    return ApiError("shutting_down", "the server is shutting down; try again later", retry_after_s=RETRY_AFTER_S)


class Drain:
    """One process's view of the file, and the requests that it bounds. Without a file nothing ever ends."""

    def __init__(self, file: str | None, timeout_s: float) -> None:
        """`timeout_s`: seconds that running requests get, from when this process sees the file."""
        self._file = None if file is None else Path(file)
        self._timeout_s = timeout_s
        self._running: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        return self._file is not None and self._file.exists()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around all work on one request. Raises ApiError at once, or inside the block when the time is over."""
        if self._file is None:
            yield
            return
        if self.begun:
            raise shutting_down()
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._running.add(limit)
                self._start_watching(self._file)
                try:
                    yield
                finally:
                    self._running.discard(limit)
        except TimeoutError:
            raise ApiError(
                "shutting_down",
                "the server is shutting down and the answer was not finished in time; ask again",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def _start_watching(self, file: Path) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._bound_requests(file))

    async def _bound_requests(self, file: Path) -> None:
        lock: IO | None = None
        try:
            while self._running:
                if lock is None and (lock := share(file)) is not None:
                    end = asyncio.get_running_loop().time() + self._timeout_s
                    for limit in self._running:
                        limit.reschedule(end)
                await asyncio.sleep(POLL_S)
        finally:
            if lock is not None:
                lock.close()


def share(file: Path) -> IO | None:
    """The file with a shared lock until it is closed or the process dies; None where there is no file."""
    try:
        opened = file.open()
    except FileNotFoundError:
        return None
    fcntl.flock(opened, fcntl.LOCK_SH)
    return opened


def drain(file: Path, timeout_s: float) -> bool:
    """Make the file and wait until nobody answers anybody; whether that was so within `timeout_s` seconds."""
    file.touch()
    time.sleep(SETTLE_S)
    deadline = time.monotonic() + timeout_s
    with file.open() as opened:
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S / 4)


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

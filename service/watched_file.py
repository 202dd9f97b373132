"""A file that somebody may change while we run. Knows nothing of what is in it."""

from __future__ import annotations

import time
from pathlib import Path

FileVersion = tuple[int, int, int, int]
LOOK_EVERY_S = 1.0


class WatchedFile:
    """Tells once of each change, and of the file as it was first found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: FileVersion | None = None
        self._looked = float("-inf")

    def changed(self) -> bool:
        """Whether the file came, went or changed since the last time this said so; looks once a second at most."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return False
        self._looked, version = now, self._look()
        found, self._version = version != self._version, version
        return found

    def forget(self) -> None:
        """What was read could not be used: the next look tells again."""
        self._version = None

    def _look(self) -> FileVersion | None:
        """Changes with the file; None where there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino

"""The service's log: one JSON object per line, one write per line, so that processes can share a file.

What an exception says is left out, and only its type and the places it went through are kept: messages of other
people's code quote what they were given, and that may be a prompt, a picture or a key.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from datetime import UTC, datetime
from pathlib import Path

LOGGER = "service"
"""Parent of every logger of this package: `logging.getLogger(__name__)`."""
ROOT = Path(__file__).parents[2]


def configure(log_file: str | None) -> None:
    """For this process: what the service logs goes to `log_file`, or to standard error, and nowhere else."""
    handler = LineFile(log_file) if log_file else logging.StreamHandler()
    handler.setFormatter(JsonLine())
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class LineFile(logging.Handler):
    """Appends. The file is opened for every line, so whoever rotates it may simply move it away."""

    def __init__(self, path: str) -> None:
        """Raises OSError where the file cannot be written."""
        super().__init__()
        self._path = path
        self._append(b"")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._append(self.format(record).encode() + b"\n")
        except OSError:
            self.handleError(record)

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.write(file, line)
        finally:
            os.close(file)


class JsonLine(logging.Formatter):
    """time (UTC, RFC 3339), level, process id, logger, message, then what the record carries as `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= _anatomy(record.exc_info[1])
        return json.dumps(line)


def _anatomy(error: BaseException) -> dict[str, object]:
    """Types of an exception and of what it came from, and the first one's way through the code."""
    types, cause = [], error
    while cause is not None and len(types) < 5:
        types.append(f"{type(cause).__module__}.{type(cause).__qualname__}")
        cause = cause.__cause__ if cause.__suppress_context__ else cause.__context__
    frames = traceback.extract_tb(error.__traceback__)
    return {"exception": types, "frames": [f"{_short(one.filename)}:{one.lineno} {one.name}" for one in frames[-20:]]}


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])

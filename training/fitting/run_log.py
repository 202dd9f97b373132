"""What is logged while a run goes: `metrics.jsonl` and TensorBoard. Measures nothing.

An interrupted run may have logged steps after its last checkpoint: these lines go when it is resumed, and come again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.durable_files import write_json_lines
from training.errors import InvalidTraining
from training.run_folder import METRICS_LOG_FILE

TENSORBOARD_FOLDER = "tensorboard"
Row = dict[str, Any]


class RunLog:
    """A context manager; one line and one set of TensorBoard points for each evaluation."""

    def __init__(self, run: Path, step: int) -> None:
        """`step`: steps done; later lines are dropped."""
        self._file = run / METRICS_LOG_FILE
        write_json_lines(self._file, [row for row in read_log(run) if row["step"] <= step])
        self._board_folder = run / TENSORBOARD_FOLDER
        with _naming(self._board_folder):
            self._board = SummaryWriter(str(self._board_folder), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with _naming(self._board_folder):
                self._board.close()
            return
        with suppress(OSError):  # what ended the run is what the user must read
            self._board.close()

    def write(self, row: Row, histograms: Mapping[str, Tensor]) -> None:
        """`row` has a `step`; its other numbers are drawn over it. Raises InvalidTraining for one that is not finite,
        which no JSON file can hold, and where the disk refuses.
        """
        for name, value in row.items():
            if not math.isfinite(value):
                raise InvalidTraining(
                    f"{self._file}: {name} is {value} at step {row['step']}: the training diverged or its "
                    "representations do not vary; try a lower learning_rate, in another --output"
                )
        with _naming(self._file), self._file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row, allow_nan=False) + "\n")
        with _naming(self._board_folder):
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])
            for name, values in histograms.items():
                self._board.add_histogram(name, values, row["step"])
            self._board.flush()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError becomes an InvalidTraining that says where."""
    try:
        yield
    except OSError as error:
        raise InvalidTraining(
            f"{path} cannot be written: {error.strerror or error}; make room, then run the same command again"
        ) from error


def read_log(run: Path) -> list[Row]:
    """All whole lines; none where nothing was logged."""
    file = run / METRICS_LOG_FILE
    rows = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the run was killed while it wrote this line
                break
    return rows

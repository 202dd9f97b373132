"""What is logged while a run goes: `metrics.jsonl` and TensorBoard. Measures nothing.

An interrupted run may have logged steps after its last checkpoint: these lines go when it is resumed, and come again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.durable_files import write_json_lines
from training.run_folder import METRICS_LOG_FILE

TENSORBOARD_FOLDER = "tensorboard"
Row = dict[str, Any]


class RunLog:
    """A context manager; one line and one set of TensorBoard points for each evaluation."""

    def __init__(self, run: Path, step: int) -> None:
        """`step`: steps done; later lines are dropped."""
        self._file = run / METRICS_LOG_FILE
        write_json_lines(self._file, [row for row in read_log(run) if row["step"] <= step])
        self._board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()

    def write(self, row: Row, histograms: Mapping[str, Tensor]) -> None:
        """`row` has a `step`; its other numbers are drawn over it."""
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])
        for name, values in histograms.items():
            self._board.add_histogram(name, values, row["step"])
        self._board.flush()


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

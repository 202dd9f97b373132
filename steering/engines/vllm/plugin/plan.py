"""What a step does to which row, on the device before the pass begins: a graph that was captured once reads it anew.

One int32 table, filled by one copy from fresh pinned memory: the copy is ordered after the pass that read the table
last, so nobody waits and nothing is overwritten early, however far ahead the host runs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steering.engines.vllm.plugin.batch import Step
from steering.slot_tables import (
    CLASS,
    COUNTED,
    FLAGS,
    IN_TWIN,
    LAST_SLOT,
    PLAN_COLUMNS,
    ROW,
    SLOT,
    TALLY,
    TWIN_SLOT,
    SteeredRows,
)  # fmt: skip


class Plan:
    """The table of `steering.slot_tables`, and how much of it a step has filled."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """`capacity`: most token rows of a step."""
        self.table = torch.zeros(1 + capacity, len(PLAN_COLUMNS), dtype=torch.int32, device=device)
        self._filled = 0

    def fill(self, step: Step | None, token_rows: int) -> None:
        """Write the coming step. Token rows behind its last, up to `token_rows`, are padding."""
        if step is None and not self._filled:
            return
        entries = 0 if step is None else len(step.row_R)
        rows = np.zeros((1 + max(token_rows, self._filled, entries), len(PLAN_COLUMNS)), np.int32)
        self._filled = 0 if step is None else max(len(step.class_N), entries)
        if step is not None:
            rows[0, 0] = entries
            tokens, own = rows[1 : 1 + len(step.class_N)], rows[1 : 1 + entries]
            tokens[:, CLASS], tokens[:, TWIN_SLOT] = step.class_N, step.twin_N
            tokens[step.last_s, LAST_SLOT] = step.last_slot_s
            own[:, ROW], own[:, SLOT], own[:, TALLY] = step.row_R, step.slot_R, step.tally_R
            own[:, FLAGS] = COUNTED * step.counts_R + IN_TWIN * step.twin_R
        made = torch.from_numpy(rows)
        if self.table.device.type == "cuda":
            made = made.pin_memory()
        self.table[: len(rows)].copy_(made, non_blocking=True)

    def class_of(self, token_rows: int) -> Tensor:
        """[N] int32."""
        return self.table[1 : 1 + token_rows, CLASS]

    def twin_slot_of(self, token_rows: int) -> Tensor:
        """[N] int32; 0 for rows without a branch of their own."""
        return self.table[1 : 1 + token_rows, TWIN_SLOT]

    def last_slot_of(self, token_rows: int) -> Tensor:
        """[N] int64: slot of a watched sequence whose last token this is; 0 for other rows."""
        return self.table[1 : 1 + token_rows, LAST_SLOT].long()

    def entries(self, number: int) -> tuple[Tensor, SteeredRows, Tensor]:
        """The first entries: rows [R] int64, their sequences' places, and [R, 1] bool: in the twin."""
        listed_R7 = self.table[1 : 1 + number].long()
        row_R, slot_R, tally_R, flags_R = listed_R7[:, ROW : FLAGS + 1].unbind(1)
        rows = SteeredRows(slot_R, tally_R, (flags_R & COUNTED) > 0)
        return row_R, rows, ((flags_R & IN_TWIN) > 0)[:, None]

"""One steering step for every engine: per-sequence settings, image codes and tallies as tensors, and what a step does.

Rows of a step name their sequence's slot, so a step's cost does not grow with the number of Python objects in a batch.
Slot 0 and tally 0 belong to nobody. Nothing here reads a value back from the device; it knows no engine and no pooling.

Shapes: M slots, T tallies, R steered rows, n images, D hidden size, K concepts, k active concepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steering.realignment import FORM_TERMS, ConceptCode, Edits, Mix, Realignment
from steering.request import MAX_EDITS, Control, Form
from steering.settings import Edit


class StepSettings(Protocol):
    """What a step must know of a request; `ResolvedSteering` has it, and so has what travels to vLLM's workers."""

    @property
    def form(self) -> Form: ...
    @property
    def scale(self) -> float:
        """strength * alpha."""
        ...

    @property
    def beta_up(self) -> float: ...
    @property
    def beta_down(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def plausibility(self) -> float: ...
    @property
    def control(self) -> Control: ...
    @property
    def control_seed(self) -> int: ...
    @property
    def max_shift(self) -> float | None: ...
    @property
    def edits(self) -> tuple[Edit, ...]: ...


SETTINGS_COLUMNS = range(10)
BETA_UP, BETA_DOWN, SCALE, DENSE, SUBTRACT, RANDOM, MAX_SHIFT, EDITS, GAMMA, LOG_PLAUSIBILITY = SETTINGS_COLUMNS
"""Columns of `SlotTables.settings_MC`; EDITS is how many there are."""
POSITIONS, SHIFT, CLAMPED = TALLY_COLUMNS = range(3)
"""Columns of `SlotTables.tally_T3`."""

CLASS, TWIN_SLOT, ROW, SLOT, TALLY, FLAGS, LAST_SLOT = PLAN_COLUMNS = range(7)
"""Columns of a step's plan where it lies on the device: the first two and the last are of token rows, the others of
entries, the list of the rows that are steered. Row 0 begins with their number; token row i and entry i stand in row
1 + i."""
COUNTED, IN_TWIN = 1, 2
"""Flags of an entry: it is tallied; it is steered in its sequence's own branch."""


class SteeredRows(NamedTuple):
    """The rows of a step that are steered, [R] int64 each unless noted."""

    slot_R: Tensor
    tally_R: Tensor
    counts_R: Tensor
    """[R] bool: False for a position that was counted before."""


class Stream(NamedTuple):
    """A residual stream, which is the sum of two tensors [N, D]."""

    hidden: Tensor
    residual: Tensor


class SlotTables:
    """Everything a step gathers from, with one row per sequence; enlarged only where an owner says so."""

    def __init__(
        self, realignment: Realignment, control_image_MD: Tensor, *, slots: int, tallies: int, device: torch.device
    ) -> None:
        """`control_image_MD`: pooled image states that `other_image` draws from; may be empty."""
        self.realignment, self.device = realignment, device
        self._control_image_MD = control_image_MD.to(device=device, dtype=torch.float32)
        self.code = ConceptCode(*(self._table(0, *column) for column in self._code_columns()))
        """The image's code by slot."""
        self.settings_MC = self._table(0, len(SETTINGS_COLUMNS))
        """float32, columns as above."""
        self.edits = Edits(*(self._table(0, MAX_EDITS, dtype) for dtype in (torch.int64, torch.float32, torch.float32)))
        """By slot, [M, E] each."""
        self._editing: set[int] = set()
        """Slots with edits: where there are none, a step does not look for them."""
        self.direction_MD = self._table(0, realignment.hidden_size)
        """float32: unit direction of the control `random`."""
        self.tally_T3 = self._table(0, len(TALLY_COLUMNS))
        """float32: positions that were changed, the sum of |delta| / |h| over them, those whose delta was shortened."""
        self.enlarge(slots, tallies)

    @property
    def slots(self) -> int:
        return self.settings_MC.shape[0]

    @torch.inference_mode(False)
    def enlarge(self, slots: int, tallies: int) -> None:
        """New, larger tensors with the old contents; a graph that was captured with the old ones must not run again."""
        before = self.slots
        self.code = ConceptCode(*(_longer(table, slots) for table in self.code))
        self.edits = Edits(*(_longer(table, slots) for table in self.edits))
        self.settings_MC, self.direction_MD = _longer(self.settings_MC, slots), _longer(self.direction_MD, slots)
        self.settings_MC[before:, LOG_PLAUSIBILITY] = -math.inf
        self.settings_MC[before:, MAX_SHIFT] = math.inf
        self.tally_T3 = _longer(self.tally_T3, tallies)

    @torch.no_grad()
    def set_images(
        self, slots: Sequence[int], settings: Sequence[StepSettings], pooled_nD: Tensor, new_tallies: Sequence[int] = ()
    ) -> None:
        """Images are known, [n, D] float32: encode them and take over their requests' settings; tallies begin at 0."""
        number = len(self._control_image_MD)
        others = [one.control_seed % number if one.control == "other_image" and number else -1 for one in settings]
        slot_n, other_n = self.send([list(slots), others], torch.int64)
        if number:
            other_nD = self._control_image_MD[other_n.clamp(min=0)]
            pooled_nD = torch.where(other_n[:, None] >= 0, other_nD, pooled_nD)
        for table, rows in zip(self.code, self.realignment.encode_image(pooled_nD), strict=True):
            table.index_copy_(0, slot_n, rows)
        self.settings_MC.index_copy_(0, slot_n, self.send([_columns(one) for one in settings], torch.float32))
        for slot, one in zip(slots, settings, strict=True):
            self._set_edits(slot, one.edits)
            if one.control == "random":
                self.direction_MD[slot] = self.send(random_direction(pooled_nD.shape[1], one.control_seed))
        if new_tallies:
            self.tally_T3.index_fill_(0, self.send(list(new_tallies), torch.int64), 0)

    @torch.no_grad()
    def delta(self, mean_RD: Tensor, slot_R: Tensor) -> Tensor:
        """Changes [R, D] float32 of rows whose text means are `mean_RD` float32: with controls and edits, no bound."""
        settings_RC = self.settings_MC[slot_R]
        mix = Mix(*settings_RC[:, :RANDOM].split(1, dim=1))
        edits = Edits(*(table[slot_R] for table in self.edits)) if self._editing else None
        delta_RD, edited_RD = self.realignment.changes(mean_RD, self.code, slot_R, mix, edits)
        random_RD = delta_RD.norm(dim=-1, keepdim=True) * self.direction_MD[slot_R]
        delta_RD = torch.where(settings_RC[:, RANDOM, None] > 0, random_RD, delta_RD)
        return delta_RD if edits is None else delta_RD + edited_RD

    @torch.no_grad()
    def step(self, rows: SteeredRows, stream_RD: Tensor, mean_RD: Tensor) -> Tensor:
        """What the rows of the residual stream become, [R, D] in its dtype; tallies are kept."""
        hidden_RD = stream_RD.float()
        delta_RD = self.delta(mean_RD.float(), rows.slot_R)
        shift_R = delta_RD.norm(dim=-1) / hidden_RD.norm(dim=-1)
        share_R = share_within(shift_R, self.settings_MC[rows.slot_R, MAX_SHIFT])
        shift_R = shift_R * share_R
        told_R3 = torch.stack([(shift_R > 0).float(), shift_R, (share_R < 1).float()], dim=1)
        self.tally_T3.index_add_(0, rows.tally_R, told_R3 * rows.counts_R[:, None])
        return (hidden_RD + delta_RD * share_R[:, None]).to(stream_RD.dtype)

    def _set_edits(self, slot: int, edits: tuple[Edit, ...]) -> None:
        """Most requests have none, and neither had who was here before."""
        if not edits and slot not in self._editing:
            return
        self._editing.add(slot) if edits else self._editing.discard(slot)
        for table, values in zip(self.edits, zip(*edits, strict=True), strict=False):
            table[slot, : len(values)] = self.send(list(values), table.dtype)
        if edits:
            self.edits.gain[slot] -= 1
        for table in self.edits:
            table[slot, len(edits) :] = 0

    def send(self, values: list | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """To the device without waiting for it."""
        return send(values, self.device, dtype)

    def _table(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(rows, columns, dtype=dtype, device=self.device)

    def _code_columns(self) -> list[tuple[int, torch.dtype]]:
        concepts, active = self.realignment.num_concepts, self.realignment.active_concepts
        return [(active, torch.int64), (concepts, torch.float32), (concepts, torch.bool)]


def send(values: list | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Host values as a tensor on a device; from pinned memory, so that nobody waits for the copy."""
    made = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


def random_direction(hidden_size: int, seed: int) -> Tensor:
    """Isotropic unit vector [D] on the host, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    direction_D = torch.randn(hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    return direction_D / direction_D.norm()


def share_within(shift_R: Tensor, max_shift: Tensor | float) -> Tensor:
    """The share of a delta that stays within `max_shift`; 1, exactly, where all of it does."""
    return (max_shift / shift_R).clamp(max=1)


def mix_of(settings: StepSettings, positions: int, device: torch.device) -> Mix:
    """As a step has it, for positions of one request."""
    return Mix(*torch.tensor([_columns(settings)[:RANDOM]], device=device).expand(positions, -1).split(1, dim=1))


def _columns(settings: StepSettings) -> list[float]:
    """A row of `settings_MC`."""
    log_plausibility = math.log(settings.plausibility) if settings.plausibility > 0 else -math.inf
    return [
        settings.beta_up,
        settings.beta_down,
        -settings.scale if settings.control == "reversed" else settings.scale,
        *FORM_TERMS[settings.form],
        float(settings.control == "random"),
        math.inf if settings.max_shift is None else settings.max_shift,
        float(len(settings.edits)),
        settings.gamma,
        log_plausibility,
    ]


def _longer(table: Tensor, rows: int) -> Tensor:
    longer = table.new_zeros(rows, *table.shape[1:])
    longer[: table.shape[0]] = table
    return longer

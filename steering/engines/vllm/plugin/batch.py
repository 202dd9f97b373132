"""Which sequences are in vLLM's batch, and what each row of a step is. Host-side bookkeeping: numpy, no model.

Both model runners feed it: V1 through a logits processor, V2 through its model state. Sequences are known by the id in
their parameters, so that one which leaves the batch and comes back (preempted, or not scheduled) keeps its state.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from steering.engines.vllm.plugin.pooling import IMAGE, OTHER, TEXT
from steering.engines.vllm.plugin.wire import WireSteering

log = logging.getLogger(__name__)
MAX_FORGOTTEN = 4096
"""Sequences kept, those outside the batch for their receipt; the oldest of these are dropped beyond."""


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """One sequence that is to be steered (or probed)."""

    wire: WireSteering
    slot: int
    """Its row in the tables on the device."""
    is_image: np.ndarray
    """[prompt length] bool: image tokens."""
    last_image: int
    """Position of the prompt's last image token."""
    encoded: bool = False
    """z_v is in the tables."""
    seen: bool = False
    """A step had rows of this sequence."""
    reused: int = 0
    """Positions that came steered out of the prefix cache."""
    counted: int = 0
    """Positions below are counted already; a preempted sequence computes them again."""
    visited: bool = False
    """The hook has seen this sequence."""
    visited_text: bool = False
    """A delta was computed for at least one position, be it zero."""
    gone: bool = False
    """Forgotten: its slot may be another's by now."""
    probe: dict[str, Tensor] = field(default_factory=dict)
    """'probe' only: pooled v and t of the prompt, [D] float32 each."""


@dataclass(kw_only=True)
class Step:
    """What the rows of one forward pass are. N rows, padding included; R of them are steered."""

    class_N: np.ndarray
    """Class of each token, for the keys."""
    asked_N: np.ndarray
    """Class whose mean each row wants."""
    image_complete: list[tuple[SequenceState, int]] = field(default_factory=list)
    """Sequences without z_v, with the row that holds their whole v."""
    image_cached: list[tuple[SequenceState, int]] = field(default_factory=list)
    """Likewise, but all their image tokens came out of the cache: the row must be asked for IMAGE first."""
    text_complete: list[tuple[SequenceState, int]] = field(default_factory=list)
    """Probed sequences with the row of their prompt's last token."""
    two_branches: list[tuple[SequenceState, int, int]] = field(default_factory=list)
    """Sequences with a steered branch of their own, and their rows from, to: that branch attends to all of them."""
    states: list[SequenceState] = field(default_factory=list)
    """The sequences with steered rows."""
    row_R: list[int] = field(default_factory=list)
    state_R: list[int] = field(default_factory=list)
    """For each steered row, its sequence's place in `states`."""
    counts_R: list[bool] = field(default_factory=list)
    """False for a position that was counted before."""

    def of_branches(self, branches: int) -> list[int]:
        """Which of the R steered rows belong to sequences of one branch, or of two."""
        return [index for index, place in enumerate(self.state_R) if self.states[place].wire.branches == branches]


class Batch:
    """The sequences of one worker."""

    def __init__(
        self, image_token_id: int, min_text_tokens: int, *, branches: int = 2, has_control_images: bool = True
    ) -> None:
        self._image_token_id, self._min_text_tokens = image_token_id, min_text_tokens
        self._branches, self._has_control_images = branches, has_control_images
        self._by_id: dict[str, SequenceState] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        self.rows: list[SequenceState | None] = []
        """The batch, row by row; None is a request that is off."""
        self.elsewhere: Collection[SequenceState | None] = ()
        """Sequences that the runner holds though they are in no row of this step."""

    @property
    def sequences(self) -> int:
        """Sequences that hold a slot."""
        return len(self._by_id)

    def enter(self, wire: WireSteering | None, prompt_token_ids: Rows[int] | None) -> SequenceState | None:
        """A sequence joins the batch, for the first time or again. None where there is nothing to do for it.

        An impossible one is not steered, which its receipt and the log tell: this is no place to stop everybody else.
        """
        if wire is None:
            return None
        known = self._by_id.get(wire.id)
        if known is not None:
            if known.wire == wire and len(known.is_image) == len(prompt_token_ids or ()):
                return known
            log.error("sequence %r is running with other settings; this one is not steered", wire.id)
            return None
        if wire.branches > self._branches or (wire.control == "other_image" and not self._has_control_images):
            log.error("sequence %r asks for what this engine was not started with; it is not steered", wire.id)
            return None
        is_image = np.asarray(prompt_token_ids, dtype=np.int64) == self._image_token_id
        if not is_image.any():
            return None
        self._drop_forgotten()
        state = SequenceState(
            wire=wire, slot=self._take_slot(), is_image=is_image, last_image=int(np.flatnonzero(is_image)[-1])
        )
        self._by_id[wire.id] = state
        return state

    def leave(self, sequence_id: str) -> SequenceState | None:
        """Forget a sequence for good and free its slot; unknown ids are ignored."""
        state = self._by_id.pop(sequence_id, None)
        if state is not None:
            state.gone = True
            self._free_slots.append(state.slot)
        return state

    def step(self, starts: Rows[int], firsts: Rows[int], padded: int) -> Step | None:
        """Rows of a pass: `starts` [rows + 1] are first rows, `firsts` [rows] the position of each first row.

        None where nobody is steered.
        """
        if not any(self.rows):
            return None
        step = Step(class_N=np.full(padded, OTHER), asked_N=np.full(padded, IMAGE))
        for index, state in enumerate(self.rows[: len(firsts)]):
            if state is not None and not state.gone:
                self._describe(step, state, int(starts[index]), int(starts[index + 1]), int(firsts[index]))
        return step

    def _describe(self, step: Step, state: SequenceState, start: int, stop: int, first: int) -> None:
        last = first + stop - start - 1
        text_from = state.last_image + self._min_text_tokens
        if not state.seen:
            state.seen, state.reused = True, max(0, first - text_from)
        if first > state.last_image:
            step.class_N[start:stop] = step.asked_N[start:stop] = TEXT
        else:
            position = np.arange(first, last + 1)
            is_text = position > state.last_image
            is_image = ~is_text & state.is_image[np.minimum(position, len(state.is_image) - 1)]
            step.class_N[start:stop] = np.where(is_text, TEXT, np.where(is_image, IMAGE, OTHER))
            step.asked_N[start:stop] = np.where(is_text, TEXT, IMAGE)
        if not state.encoded and last >= state.last_image:
            if first <= state.last_image:
                step.image_complete.append((state, start + state.last_image - first))
            else:
                step.image_cached.append((state, start))
        if state.wire.task == "probe":
            prompt_end = len(state.is_image) - 1
            if first <= prompt_end <= last:
                step.text_complete.append((state, start + prompt_end - first))
            return
        if state.wire.branches == 2:
            step.two_branches.append((state, start, stop))
        steered_from = max(first, text_from)
        if steered_from > last:
            return
        place = len(step.states)
        step.states.append(state)
        step.row_R.extend(range(start + steered_from - first, stop))
        step.state_R.extend([place] * (last + 1 - steered_from))
        step.counts_R.extend(position >= state.counted for position in range(steered_from, last + 1))
        state.counted = max(state.counted, last + 1)

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._slots += 1
        return self._slots - 1

    def _drop_forgotten(self) -> None:
        """Who never asks for a receipt must not fill the memory."""
        if len(self._by_id) < MAX_FORGOTTEN:
            return
        present = {id(row) for row in (*self.rows, *self.elsewhere)}
        for sequence_id, state in list(self._by_id.items()):
            if id(state) not in present:
                log.warning("nobody asked what was done to sequence %r; it is forgotten", sequence_id)
                self.leave(sequence_id)
                return

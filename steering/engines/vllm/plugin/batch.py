"""Which sequences are in vLLM's batch, and what each row of a step is. Host-side bookkeeping: numpy, no model, no vLLM.

Both model runners feed it: V1 through a logits processor, V2 through its model state. Sequences are known by the id in
their parameters, so that one which leaves the batch and comes back (preempted, or not scheduled) keeps its tally.

Shapes: B batch rows, s steered sequences among them, P their positions in this step, N token rows, R steered rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from steering.engines.vllm.plugin.wire import WireSteering
from steering.lvlm.token_spans import first_steered_position

log = logging.getLogger(__name__)
NEVER = np.iinfo(np.int64).max // 2
"""A position that no sequence reaches."""
OTHER, IMAGE, TEXT = 0, 1, 2
"""Token classes: before or between images and of requests that are off; image; text after the last image. A row asks
for the mean over its own class; one of class OTHER for the image's, that of `IMAGE`, the lowest with a mean."""
MAX_FORGOTTEN = 4096
"""Tallies kept of sequences that have left and whose receipt nobody has asked for."""
_BOOK = np.dtype(
    [
        ("slot", "i4"),  # in the tables on the device; 0: none now
        ("last_image", "i8"),  # position of the prompt's last image token
        ("prompt_end", "i8"),  # position of the prompt's last token; what is computed again after it is still answer
        ("steer_from", "i8"),  # first position that is steered
        ("reused", "i8"),  # positions that came steered out of the prefix cache; -1: no step had rows of it yet
        ("counted", "i8"),  # positions below are counted already; a preempted sequence computes them again
        ("encoded", "?"),  # its image's code is at its slot
        ("visited", "?"),  # the hook has seen it
        ("visited_text", "?"),  # a delta was computed for at least one position, be it zero
        ("probe", "?"),
        ("pooled", "?"),  # of a probe: the text's state is known
        ("two", "?"),  # it has a steered branch of its own
        ("explained", "?"),  # the means at its tokens are kept
    ]
)
"""What is known of a sequence, by its tally."""


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """One sequence that is to be steered, or probed; the rest of what is known of it stands in the batch's book."""

    wire: WireSteering
    tally: int
    """Its place in the book, and in the tallies on the device."""
    is_image: np.ndarray
    """[prompt length] bool: image tokens."""
    probe: dict[str, Tensor] = field(default_factory=dict)
    """'probe' only: pooled v and t of the prompt, [D] float32 each."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """Of one that is explained: position to the text's mean [D] there, on the host once the device is done."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the rows of one forward pass are."""

    class_N: np.ndarray
    """Class of each token."""
    twin_N: np.ndarray
    """Slot of each row whose sequence has two branches, else 0."""
    row_R: np.ndarray
    slot_R: np.ndarray
    tally_R: np.ndarray
    """The rows that are steered, with their sequences' places."""
    counts_R: np.ndarray
    """bool: False for a position that was counted before."""
    twin_R: np.ndarray
    """bool: the row is steered in its sequence's own branch."""
    last_s: np.ndarray
    """Of each watched sequence the row of its last token."""
    last_slot_s: np.ndarray
    """Its slot, 0 for a probe."""
    to_keep: list[tuple[SequenceState, int, int]]
    """Sequences that are explained, each with its slot and the position of its last token here."""
    image_complete: list[tuple[SequenceState, int]]
    """Sequences without z_v, with the row that holds their whole v."""
    text_complete: list[tuple[SequenceState, int]]
    """Probed sequences with the row of their prompt's last token."""
    image_cached: list[tuple[SequenceState, int]]
    text_cached: list[tuple[SequenceState, int]]
    """Likewise, but all tokens of the class lie in the cache: the row must be asked for it beforehand."""

    @property
    def recalls(self) -> bool:
        """Something must be learned from the cache."""
        return bool(self.image_cached or self.text_cached)

    @property
    def two_branches(self) -> bool:
        """Some sequence has a branch of its own."""
        return bool(self.twin_N.any())


class Batch:
    """The sequences of one worker."""

    def __init__(
        self,
        image_token_id: int,
        min_text_tokens: int,
        *,
        max_sequences: int,
        branches: int = 2,
        has_control_images: bool = True,
        concepts: int = 2**31,
    ) -> None:
        """`max_sequences` bounds the batch; twice as many can be steered, some of them preempted."""
        self._image_token_id, self._min_text_tokens = image_token_id, min_text_tokens
        self._branches, self._has_control_images, self._concepts = branches, has_control_images, concepts
        self.slots, self.tallies = 2 * max_sequences + 1, MAX_FORGOTTEN + 2 * max_sequences + 1
        self._by_id: dict[str, SequenceState] = {}
        self._by_tally: dict[int, SequenceState] = {}
        self._free_slots, self._free_tallies = list(range(self.slots - 1, 0, -1)), list(range(self.tallies - 1, 0, -1))
        self.book = np.zeros(self.tallies, _BOOK)
        self.inside = np.zeros(max_sequences, np.int64)
        """The runner's requests by its own index: the sequence's tally; 0 for one that is off."""

    @property
    def sequences(self) -> int:
        """Sequences whose receipt has not been asked for yet."""
        return len(self._by_id)

    def enter(self, index: int, wire: WireSteering | None, prompt_token_ids: Rows[int] | None) -> None:
        """A request takes the runner's place `index`, for the first time or again.

        One that cannot be steered is left alone, which its receipt and the log tell: this is no place to stop
        everybody else.
        """
        self.inside[index] = 0
        if wire is not None:
            self.inside[index] = self._admit(wire, prompt_token_ids or ())

    def find(self, sequence_id: str) -> SequenceState | None:
        """One that is running, or whose receipt has not been asked for."""
        return self._by_id.get(sequence_id)

    def leave(self, sequence_id: str) -> tuple[SequenceState, np.void] | None:
        """Forget a sequence for good; what was known of it. None for an unknown one."""
        state = self._by_id.pop(sequence_id, None)
        if state is None:
            return None
        known = self.book[state.tally].copy()
        self.inside[self.inside == state.tally] = 0
        self._give_up_slot(state.tally)
        self._by_tally.pop(state.tally)
        self._free_tallies.append(state.tally)
        return state, known

    def step(self, tally_B: np.ndarray, starts: np.ndarray, firsts: np.ndarray) -> Step | None:
        """Rows of a pass: `starts` [B + 1] are first rows, `firsts` [B] the position of each first row.

        None where nobody is steered.
        """
        place_s = np.flatnonzero(tally_B)
        if not len(place_s):
            return None
        tally_s, start_s, first_s = tally_B[place_s], starts[place_s], firsts[place_s]
        length_s = starts[place_s + 1] - start_s
        last_s, known = first_s + length_s - 1, self.book[tally_s]
        steer_from_s = known["steer_from"]
        unseen_s = known["reused"] < 0
        self.book["reused"][tally_s[unseen_s]] = np.maximum(0, first_s - steer_from_s)[unseen_s]

        of_P = np.repeat(np.arange(len(place_s)), length_s)
        within_P = np.arange(len(of_P)) - (np.cumsum(length_s) - length_s)[of_P]
        position_P, row_P = first_s[of_P] + within_P, start_s[of_P] + within_P
        class_N = np.zeros(int(starts[-1]), np.int32)
        class_N[row_P] = np.where(position_P > known["last_image"][of_P], TEXT, OTHER)
        for place in np.flatnonzero(first_s <= known["last_image"]):
            is_image = self._by_tally[int(tally_s[place])].is_image[first_s[place] : last_s[place] + 1]
            class_N[start_s[place] : start_s[place] + len(is_image)][is_image] = IMAGE
        twin_N = np.zeros_like(class_N)
        # an image that ends in a step of one token, perhaps a full graph, is learned in the next one only
        blends_s = known["two"] & (known["encoded"] | (length_s > 1) | (last_s > known["last_image"]))
        twin_N[row_P] = np.where(blends_s, known["slot"], 0)[of_P]

        steered_P = position_P >= steer_from_s[of_P]
        of_R = of_P[steered_P]
        self.book["counted"][tally_s] = np.maximum(known["counted"], last_s + 1)
        self.book["visited_text"][tally_s[of_R]] = True
        return Step(
            class_N=class_N, twin_N=twin_N, row_R=row_P[steered_P], slot_R=known["slot"][of_R],
            tally_R=tally_s[of_R], counts_R=position_P[steered_P] >= known["counted"][of_R],
            twin_R=known["two"][of_R], last_s=start_s + length_s - 1,
            last_slot_s=np.where(known["probe"], 0, known["slot"]), to_keep=self._to_keep(tally_s, last_s, known),
            **self._to_learn(tally_s, start_s, first_s, last_s, known),
        )  # fmt: skip

    def _to_keep(
        self, tally_s: np.ndarray, last_s: np.ndarray, known: np.ndarray
    ) -> list[tuple[SequenceState, int, int]]:
        """Those of prompts are not: only what tokens of the answer were chosen at."""
        wanted_s = known["explained"] & (last_s >= known["prompt_end"])
        columns = zip(
            tally_s[wanted_s].tolist(), known["slot"][wanted_s].tolist(), last_s[wanted_s].tolist(), strict=True
        )
        return [(self._by_tally[tally], slot, last) for tally, slot, last in columns]

    def _to_learn(
        self, tally_s: np.ndarray, start_s: np.ndarray, first_s: np.ndarray, last_s: np.ndarray, known: np.ndarray
    ) -> dict[str, list[tuple[SequenceState, int]]]:
        """Whose pooled image and prompt can be read in this step, and where."""
        image, prompt_end = known["last_image"], known["prompt_end"]
        wants_image = ~known["encoded"] & (last_s >= image)
        wants_text = known["probe"] & ~known["pooled"] & (last_s >= prompt_end)

        if not (wants_image.any() or wants_text.any()):
            return {key: [] for key in ("image_complete", "image_cached", "text_complete", "text_cached")}

        def those(wanted: np.ndarray, row_s: np.ndarray) -> list[tuple[SequenceState, int]]:
            return [(self._by_tally[int(tally_s[one])], int(row_s[one])) for one in np.flatnonzero(wanted)]

        return {
            "image_complete": those(wants_image & (first_s <= image), start_s + image - first_s),
            "image_cached": those(wants_image & (first_s > image), start_s),
            "text_complete": those(wants_text & (first_s <= prompt_end), start_s + prompt_end - first_s),
            "text_cached": those(wants_text & (first_s > prompt_end) & known["encoded"], start_s),
        }

    def _admit(self, wire: WireSteering, prompt_token_ids: Rows[int]) -> int:
        """The sequence's tally, 0 where it cannot be steered."""
        state = self._by_id.get(wire.id)
        if state is not None and (state.wire != wire or len(state.is_image) != len(prompt_token_ids)):
            log.error("sequence %r is running with other settings; this one is not steered", wire.id)
            return 0
        unknown = any(edit.concept_id >= self._concepts for edit in wire.edits)
        lacking = wire.control == "other_image" and not self._has_control_images
        if wire.branches > self._branches or lacking or unknown:
            log.error("sequence %r asks for what this engine was not started with; it is not steered", wire.id)
            return 0
        if state is None:
            is_image = np.asarray(prompt_token_ids, dtype=np.int64) == self._image_token_id
            if not is_image.any():
                return 0
            state = self._open(wire, is_image)
        if not self.book["slot"][state.tally]:
            self.book["slot"][state.tally] = self._take_slot()
        return state.tally

    def _open(self, wire: WireSteering, is_image: np.ndarray) -> SequenceState:
        if not self._free_tallies:
            oldest = next(one for one in self._by_id.values() if one.tally not in self.inside)
            log.warning("nobody asked what was done to sequence %r; it is forgotten", oldest.wire.id)
            self.leave(oldest.wire.id)
        state = SequenceState(wire=wire, tally=self._free_tallies.pop(), is_image=is_image)
        row = self.book[state.tally]
        row["slot"] = row["counted"] = 0
        row["encoded"] = row["visited"] = row["visited_text"] = row["pooled"] = False
        row["last_image"], row["prompt_end"] = np.flatnonzero(is_image)[-1], len(is_image) - 1
        row["steer_from"] = first_steered_position(
            text_start=int(row["last_image"]) + 1,
            prompt_length=len(is_image),
            min_text_tokens=self._min_text_tokens,
            min_answer_tokens=wire.min_answer_tokens,
        )
        row["reused"], row["probe"], row["two"] = -1, wire.task == "probe", wire.branches == 2
        row["explained"] = wire.explain is not None
        if wire.task != "steer":
            row["steer_from"] = NEVER
        self._by_id[wire.id] = self._by_tally[state.tally] = state
        return state

    def _take_slot(self) -> int:
        """A free slot, else that of the first who came among those who have left: its code can be made again."""
        if not self._free_slots:
            outside = set(np.flatnonzero(self.book["slot"]).tolist()) - set(self.inside.tolist())
            self._give_up_slot(next(one.tally for one in self._by_id.values() if one.tally in outside))
        return self._free_slots.pop()

    def _give_up_slot(self, tally: int) -> None:
        row = self.book[tally]
        if row["slot"]:
            self._free_slots.append(int(row["slot"]))
        row["slot"], row["encoded"] = 0, False

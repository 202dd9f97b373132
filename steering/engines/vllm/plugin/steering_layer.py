"""What happens after the hook layer inside vLLM: pool, learn images, steer in place or in the twin.

torch.compile sees one opaque operator. Between CUDA graphs it runs eagerly and may look at the step on the host. Inside
a full graph it is captured once, for a step about which nothing is known: there it reads the plan on the device only.

Shapes: N rows of this step (padding included), R steered rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context

from steering.engines.vllm.plugin.batch import IMAGE, TEXT, Batch, SequenceState, Step
from steering.engines.vllm.plugin.configuration import OPERATOR
from steering.engines.vllm.plugin.plan import Plan
from steering.engines.vllm.plugin.pooling import PoolingAttention
from steering.engines.vllm.plugin.twin import TwinTail
from steering.explaining import explain
from steering.slot_tables import GAMMA, SlotTables, Stream

if TYPE_CHECKING:
    from steering.kernels.launch import RealignKernels

MAX_AHEAD = 32
"""Positions behind an answer's end that are computed before its end is known: by a step that was on its way, or until a
stop string is found. Behind more than these, what is told is of the latest."""
STEERING_LAYER = "vl_sae_steering"
"""Our key among the engine's layers; by it the operator, the logits processor and the worker find this object."""


class SteeringLayer:
    """One per worker. Not a module: it has no parameter that a checkpoint could hold."""

    def __init__(
        self, batch: Batch, tables: SlotTables, pool: PoolingAttention, twin: TwinTail | None, *,
        kernels: RealignKernels | None, max_token_rows: int,
    ) -> None:  # fmt: skip
        self.batch, self.tables, self.pool, self.twin = batch, tables, pool, twin
        self._kernels = kernels
        """Where Triton runs; elsewhere the step is plain torch."""
        self._plan = Plan(max_token_rows, tables.device)
        self.attached = True
        """False: the hook is off, and receipts will tell."""
        self.announced = False
        """The runner announces its steps (V2); the operator finds out by itself where it does not (V1)."""
        self.capturing = False
        """The passes to come are captured, or warm up for it: nothing is known of their rows."""
        self._reading: torch.cuda.Stream | None = None
        hidden_size = tables.realignment.hidden_size
        self._last_MD = torch.zeros(tables.slots, hidden_size, dtype=pool.dtype, device=tables.device)
        """By slot: the mean at the latest token of a sequence, of the text if that is text."""
        self._step: Step | None = None
        self.blends = True
        """The coming logits may belong to two branches; false lets them alone without a look at the device."""
        self._twin_ND: Tensor | None = None
        """The steered branch after the final norm, where this step has one."""
        self._blend_N2: Tensor | None = None

    # -- before the forward pass ----------------------------------------------------------------------------------

    def announce(self, step: Step | None, token_rows: int) -> None:
        """What the coming pass is, padded to `token_rows`. Does not wait for the device."""
        self._keep_means()
        self._step = step if self.attached else None
        self.blends = self._step is not None and self._step.two_branches
        self._plan.fill(self._step, token_rows)

    def describe(self, tally_B: np.ndarray, starts: np.ndarray, firsts: np.ndarray) -> Step | None:
        """See `Batch.step`; None where steering is off, too."""
        return self.batch.step(tally_B, starts, firsts) if self.attached else None

    def recall(self, step: Step, token_rows: int) -> None:
        """Before the announced pass: learn what only cached tokens tell, inside a forward context.

        The current rows take part as tokens of no class; the pass itself writes them anew.
        """
        hidden_size, device = self.tables.realignment.hidden_size, self.tables.device
        nothing_ND = torch.zeros(token_rows, hidden_size, dtype=self.pool.dtype, device=device)
        self._learn_cached(step, nothing_ND, torch.zeros(token_rows, dtype=torch.int32, device=device))
        self._step = replace(step, image_cached=[], text_cached=[])

    # -- in the forward pass --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward pass starts."""
        self._twin_ND = self._blend_N2 = None

    def steer(self, hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
        """Change a pass in place; the residual stream is `hidden + residual`. Rows that are off keep their bits."""
        metadata: Any = get_forward_context().attn_metadata
        stream = Stream(hidden_ND, residual_ND)
        if metadata is None:
            self._rehearse(stream, positions)
            return
        if not self.announced:
            self._announce_by_metadata(metadata, len(hidden_ND))
        if self._step is not None or self.capturing:
            self._change(stream, positions, None if self.capturing else self._step)

    def join(self, hidden_ND: Tensor) -> Tensor:
        """After the tail: [N, D], or with the steered branch and its settings beside, if this step has one.

        Where steps may be captured, an engine for two branches always makes the wide one: its graphs share a buffer.
        """
        if self._twin_ND is None or self._blend_N2 is None:
            settings = torch.float32.itemsize // hidden_ND.dtype.itemsize * 2
            wide = self.twin is not None and self.announced
            return F.pad(hidden_ND, (0, hidden_ND.shape[1] + settings)) if wide else hidden_ND
        return torch.cat([hidden_ND, self._twin_ND, self._blend_N2.view(hidden_ND.dtype)], dim=1)

    def split(self, joined_MW: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Undo `join` for some of its rows: base [M, D], and where there is one, steered [M, D] and blend [M, 2]."""
        if joined_MW.shape[1] == hidden_size:
            return joined_MW, None, None
        base, twin, values = joined_MW.tensor_split([hidden_size, 2 * hidden_size], dim=1)
        return base.contiguous(), twin.contiguous(), values.contiguous().view(torch.float32)

    def _announce_by_metadata(self, metadata: Any, token_rows: int) -> None:
        """V1 runner: row i of the batch is place i; how far each sequence is, the attention's metadata says."""
        tally_B, step = self.batch.inside, None
        if tally_B.any():
            of_pool = metadata[self.pool.first_layer_name]
            rows = len(of_pool.query_start_loc) - 1
            starts = of_pool.query_start_loc.cpu().numpy()
            firsts = of_pool.seq_lens[:rows].cpu().numpy() - (starts[1:] - starts[:-1])
            step = self.describe(tally_B[:rows], starts, firsts)
        self.announce(step, token_rows)

    def _change(self, stream: Stream, positions: Tensor, step: Step | None) -> None:
        """`step` is None while a graph is captured: then all is done that any step may need, as the plan says."""
        count = len(stream.hidden)
        class_N = self._plan.class_of(count)
        asked_N = class_N.clamp(min=IMAGE)
        stream_ND = stream.hidden + stream.residual
        mean_ND = self.pool(stream_ND, class_N, asked_N)
        if step is not None:
            self._learn(step.image_complete, step.text_complete, mean_ND)
            if step.recalls:  # now that this pass has written its own tokens: they may be another sequence's cache
                self._learn_cached(step, stream_ND, class_N)
        if step is None:
            self._last_MD.index_copy_(0, self._plan.last_slot_of(count), mean_ND)
        else:
            rows, slots = (self.tables.send(torch.from_numpy(part)) for part in (step.last_s, step.last_slot_s))
            self._last_MD.index_copy_(0, slots.long(), mean_ND[rows])
        twin = None
        if self.twin is not None and (step is None or step.two_branches):
            twin = Stream(stream.hidden.clone(), stream.residual.clone())
        self._steer_rows(count if step is None else len(step.row_R), stream_ND, mean_ND, stream, twin)
        if twin is not None:
            self._run_twin(twin, positions, self._plan.twin_slot_of(count))

    def _learn_cached(self, step: Step, stream_ND: Tensor, class_N: Tensor) -> None:
        """As `_learn`, where the tokens themselves are no rows of this step."""
        asked_N = np.full(len(stream_ND), IMAGE, np.int32)
        asked_N[[row for _, row in step.text_cached]] = TEXT
        mean_ND = self.pool(stream_ND, class_N, self.tables.send(torch.from_numpy(asked_N)))
        self._learn(step.image_cached, step.text_cached, mean_ND)

    def _learn(
        self, images: list[tuple[SequenceState, int]], texts: list[tuple[SequenceState, int]], mean_ND: Tensor
    ) -> None:
        """Rows of `mean_ND` hold images and prompts that were unknown: encode those, keep what probes ask for."""
        book = self.batch.book
        watched = [(state, row) for state, row in images if state.wire.task != "probe"]
        if watched:
            states, rows = zip(*watched, strict=True)
            tallies = [state.tally for state in states]
            self.tables.set_images(
                [int(slot) for slot in book["slot"][tallies]],
                [state.wire for state in states],
                mean_ND[self.tables.send(list(rows), torch.int64)].float(),
                new_tallies=[tally for tally in tallies if not book["visited"][tally]],
            )
        for what, learned, flag in (("image", images, "encoded"), ("text", texts, "pooled")):
            for state, row in learned:
                if state.wire.task == "probe":
                    state.probe[what] = mean_ND[row].float()
                book[flag][state.tally] = book["visited"][state.tally] = True

    def _steer_rows(self, bound: int, stream_ND: Tensor, mean_ND: Tensor, base: Stream, twin: Stream | None) -> None:
        """Steer the plan's entries, at most `bound`, each in the branch that its flag names."""
        if self._kernels is not None:
            self._kernels(self._plan.table, bound, mean_ND, base, twin or base)
            return
        row_R, rows, in_twin_R1 = self._plan.entries(bound)
        moved_RD = self.tables.step(rows, stream_ND[row_R], mean_ND[row_R])
        base.hidden[row_R] = torch.where(in_twin_R1, base.hidden[row_R], 0)
        base.residual[row_R] = torch.where(in_twin_R1, base.residual[row_R], moved_RD)
        if twin is not None:
            twin.hidden[row_R], twin.residual[row_R] = 0, moved_RD

    def _run_twin(self, twin: Stream, positions: Tensor, slot_N: Tensor) -> None:
        assert self.twin is not None
        self._twin_ND = self.twin(positions, *twin)
        self._blend_N2 = self.tables.settings_MC[slot_N][:, GAMMA:]

    def _rehearse(self, stream: Stream, positions: Tensor) -> None:
        """A pass without requests, in which vLLM measures memory: do all that a real one may do, and change nothing."""
        class_N = torch.full((len(stream.hidden),), IMAGE, dtype=torch.int32, device=stream.hidden.device)
        stream_ND = stream.hidden + stream.residual
        mean_ND = self.pool(stream_ND, class_N, class_N)
        if self._kernels is None:
            self.tables.delta(mean_ND.float(), torch.zeros_like(class_N, dtype=torch.int64))
        for bound in self._kernels.variants if self._kernels else ():
            self._steer_rows(bound, stream_ND, mean_ND, stream, None)  # compiles them; the plan lists nobody
        if self.twin is not None:
            self._run_twin(Stream(stream.hidden.clone(), stream.residual.clone()), positions, torch.zeros_like(class_N))
            self.blends = True

    # -- for the worker -------------------------------------------------------------------------------------------

    def finish(self, ended: list[tuple[str, int | None]]) -> list[dict[str, Any] | None]:
        """What was done to sequences, which are forgotten thereby; None for an unknown one.

        `ended`: id, and the position that the last token of the answer was chosen at, None where nobody wants to know.
        Their last tokens have reached whoever asks, so their tallies are complete and nothing need be waited for.
        """
        self._keep_means()
        told = [self._explain(sequence_id, end) for sequence_id, end in ended]
        left = [self.batch.leave(sequence_id) for sequence_id, _ in ended]
        tally_T3 = self._read_tallies() if any(left) else None
        return [
            None if one is None else _told(*one, tally_T3) | {"explanation": explanation}
            for one, explanation in zip(left, told, strict=True)
        ]

    def _keep_means(self) -> None:
        """Of the latest step, before another one: the means that tokens of explained answers were chosen at; of those
        that are explained at their end only, as many as may be computed ahead of it. Does not wait for the device."""
        for state, slot, position in self._step.to_keep if self._step is not None else ():
            state.means[position] = self._last_MD[slot].to("cpu", non_blocking=True, copy=True)
            if state.wire.explain == "answer":
                state.means.pop(position - MAX_AHEAD, None)
        if self._step is not None:
            self._step.to_keep.clear()

    def _explain(self, sequence_id: str, end: int | None) -> dict[str, Any] | None:
        """None where nobody wants to know, or its image's code has made way for others'."""
        state = self.batch.find(sequence_id)
        if state is None or end is None:
            return None
        known = self.batch.book[state.tally]
        if not known["encoded"] or known["probe"]:
            return None
        slot = int(known["slot"])
        tokens, latest_D = state.wire.explain == "tokens", self._last_MD[slot]
        if state.means and self.tables.device.type == "cuda":
            torch.cuda.current_stream(self.tables.device).synchronize()
        positions = range(int(known["prompt_end"]) if tokens else end, end + 1)
        means = [state.means.get(one, latest_D) if one > known["last_image"] else None for one in positions]
        with self._aside():
            return asdict(explain(self.tables, slot, means, state.wire, tokens=tokens))

    def _read_tallies(self) -> Tensor:
        """[T, 3] on the host."""
        with self._aside():
            return self.tables.tally_T3.cpu()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is read from the device in here waits for nothing: the steps that are running meanwhile go on."""
        device = self.tables.device
        if device.type != "cuda":
            yield
            return
        if self._reading is None:  # of another priority than vLLM's streams, so that it is none of theirs
            self._reading = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(self._reading):
            yield


def _told(state: SequenceState, known: np.void, tally_T3: Tensor | None) -> dict[str, Any]:
    counted = tally_T3[state.tally].tolist() if tally_T3 is not None and known["visited"] else (0, 0.0, 0)
    computed, shift_sum, clamped = counted
    return {
        "positions": int(computed + max(0, known["reused"])) if computed else 0,
        "relative_shift": shift_sum / computed if computed else 0.0,
        "clamped": int(clamped),
        "visited": bool(known["visited"]),
        "visited_text": bool(known["visited_text"]),
        "probe": {name: value.tolist() for name, value in state.probe.items()},
    }


@torch.library.custom_op(OPERATOR, mutates_args=("hidden_ND", "residual_ND"))
def steer(hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
    """`SteeringLayer.steer` of this worker, as an operator that no compiler looks into."""
    get_forward_context().no_compile_layers[STEERING_LAYER].steer(hidden_ND, residual_ND, positions)


@steer.register_fake
def _(hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
    return None

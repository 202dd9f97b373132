"""What happens after the hook layer inside vLLM: pool, encode, steer in place or in the twin. Runs eagerly, always.

torch.compile sees one opaque operator, and CUDA graphs end before it (`configuration.OPERATOR`); so this code may look
at the batch on the host and skip everything where nobody is steered.

Shapes: N rows of this step (padding included), R steered rows, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from steering.engines.vllm.plugin.batch import Batch, SequenceState, Step
from steering.engines.vllm.plugin.configuration import OPERATOR
from steering.engines.vllm.plugin.pooling import IMAGE, PoolingAttention
from steering.engines.vllm.plugin.tables import SlotTables
from steering.engines.vllm.plugin.twin import TwinTail

STEERING_LAYER = "vl_sae_steering"
"""Our key among the engine's layers; by it the operator, the logits processor and the worker find this object."""
NO_BLEND = (0.0, -math.inf)
"""gamma and log(plausibility) with which the base branch's logits stay as they are."""


class SteeringLayer:
    """One per worker. Not a module: it has no parameter that a checkpoint could hold."""

    def __init__(self, batch: Batch, tables: SlotTables, pool: PoolingAttention, twin: TwinTail | None) -> None:
        self.batch, self.tables, self.pool, self.twin = batch, tables, pool, twin
        self.attached = True
        """False: the hook is off, and receipts will tell."""
        self.step_rows: tuple[Any, Any] | None = None
        """V2 runner: first rows [rows + 1] and first positions [rows] of the coming step, on the host."""
        self._twin_ND: Tensor | None = None
        """The steered branch after the final norm, where this step has one."""
        self._blend_N2: Tensor | None = None

    # -- in the forward pass --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward pass starts."""
        self._twin_ND = self._blend_N2 = None

    def steer(self, hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
        """Change a pass in place; the residual stream is `hidden + residual`. Rows that are off keep their bits."""
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            self._rehearse(hidden_ND, residual_ND, positions)
            return
        step = self._describe(metadata, len(hidden_ND)) if self.attached else None
        if step is None:
            return
        stream_ND = hidden_ND + residual_ND
        mean_ND = self._pool(step, stream_ND)
        row_R = torch.tensor(step.row_R, device=stream_ND.device, dtype=torch.int64)
        moved_RD = self._steered(step, row_R, stream_ND, mean_ND)
        if not step.two_branches:
            _move(hidden_ND, residual_ND, row_R, moved_RD)
            return
        of_one = torch.tensor(step.of_branches(1), device=row_R.device, dtype=torch.int64)
        of_two = torch.tensor(step.of_branches(2), device=row_R.device, dtype=torch.int64)
        self._run_twin(step, row_R[of_two], moved_RD[of_two], hidden_ND, residual_ND, positions)
        _move(hidden_ND, residual_ND, row_R[of_one], moved_RD[of_one])

    def join(self, hidden_ND: Tensor) -> Tensor:
        """After the tail: [N, D], or with the steered branch and its settings beside, if this step has one."""
        if self._twin_ND is None or self._blend_N2 is None:
            return hidden_ND
        return torch.cat([hidden_ND, self._twin_ND, self._blend_N2.view(hidden_ND.dtype)], dim=1)

    def split(self, joined_MW: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Undo `join` for some of its rows: base [M, D], and where there is one, steered [M, D] and blend [M, 2]."""
        if joined_MW.shape[1] == hidden_size:
            return joined_MW, None, None
        base, twin, values = joined_MW.tensor_split([hidden_size, 2 * hidden_size], dim=1)
        return base.contiguous(), twin, values.contiguous().view(torch.float32)

    def _describe(self, metadata: Any, padded: int) -> Step | None:
        if self.step_rows is not None:
            return self.batch.step(*self.step_rows, padded)
        if not any(self.batch.rows):
            return None
        of_pool = metadata[self.pool.first_layer_name]
        rows = len(self.batch.rows)
        starts = of_pool.query_start_loc[: rows + 1].cpu().numpy()
        firsts = of_pool.seq_lens[:rows].cpu().numpy() - (starts[1:] - starts[:-1])
        return self.batch.step(starts, firsts, padded)

    def _pool(self, step: Step, stream_ND: Tensor) -> Tensor:
        """Means [N, D]; on the way, encode the images that became known and keep what probes ask for."""
        device = stream_ND.device
        class_N, asked_N = torch.from_numpy(step.class_N).to(device), torch.from_numpy(step.asked_N).to(device)
        if step.image_cached:
            image_ND = self.pool(stream_ND, class_N, torch.full_like(asked_N, IMAGE))
            self._encode(step.image_cached, image_ND)
        mean_ND = self.pool(stream_ND, class_N, asked_N)
        self._encode(step.image_complete, mean_ND)
        for state, row in step.text_complete:
            state.probe["text"] = mean_ND[row].float()
        return mean_ND

    def _encode(self, known: list[tuple[SequenceState, int]], mean_ND: Tensor) -> None:
        for state, row in known:
            image_D = mean_ND[row].float()
            state.encoded = state.visited = True
            if state.wire.task == "probe":
                state.probe["image"] = image_D
            else:
                self.tables.set_image(state, image_D)

    def _steered(self, step: Step, row_R: Tensor, stream_ND: Tensor, mean_ND: Tensor) -> Tensor:
        """What the steered rows become, [R, D] in the stream's dtype."""
        if not step.states:
            return stream_ND[row_R]
        stream_RD = stream_ND[row_R].float()
        delta_RD = self.tables.delta(step, mean_ND[row_R].float())
        self.tables.tally(step, stream_RD, delta_RD)
        for state in step.states:
            state.visited_text = True
        return (stream_RD + delta_RD).to(stream_ND.dtype)

    def _run_twin(
        self, step: Step, row_R: Tensor, moved_RD: Tensor, hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor
    ) -> None:
        assert self.twin is not None, "an engine without a twin refuses such requests"
        hidden_ND, residual_ND = hidden_ND.clone(), residual_ND.clone()
        _move(hidden_ND, residual_ND, row_R, moved_RD)
        self._twin_ND = self.twin(positions, hidden_ND, residual_ND)
        blend = [NO_BLEND] * len(hidden_ND)
        for state, start, stop in step.two_branches:
            blend[start:stop] = [state.wire.blend] * (stop - start)
        self._blend_N2 = torch.tensor(blend, device=hidden_ND.device, dtype=torch.float32)

    def _rehearse(self, hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
        """A pass without requests, in which vLLM measures memory: do all that a real one may do, and change nothing."""
        stream_ND = hidden_ND + residual_ND
        classes_N = torch.full((len(stream_ND),), IMAGE, device=stream_ND.device)
        mean_ND = self.pool(stream_ND, classes_N, classes_N).float()
        self.tables.rehearse(mean_ND)
        if self.twin is not None:
            self._twin_ND = self.twin(positions, hidden_ND.clone(), residual_ND.clone())
            nobody_12 = torch.tensor([NO_BLEND], device=hidden_ND.device, dtype=torch.float32)
            self._blend_N2 = nobody_12.repeat(len(hidden_ND), 1)

    # -- for the worker -------------------------------------------------------------------------------------------

    def finish(self, sequence_id: str) -> dict[str, Any] | None:
        """What was done to a sequence, which is thereby forgotten; None for an unknown one."""
        state = self.batch.leave(sequence_id)
        if state is None:
            return None
        computed, shift_sum = self.tables.counted(state.slot) if state.encoded else (0, 0.0)
        return {
            "positions": computed + state.reused if computed else 0,
            "relative_shift": shift_sum / computed if computed else 0.0,
            "visited": state.visited,
            "visited_text": state.visited_text,
            "probe": {name: value.tolist() for name, value in state.probe.items()},
        }


def _move(hidden_ND: Tensor, residual_ND: Tensor, row_R: Tensor, moved_RD: Tensor) -> None:
    """Make `hidden + residual` of some rows what was steered, to the bit."""
    hidden_ND[row_R] = 0
    residual_ND[row_R] = moved_RD


@torch.library.custom_op(OPERATOR, mutates_args=("hidden_ND", "residual_ND"))
def steer(hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
    """`SteeringLayer.steer` of this worker, as an operator that no compiler looks into."""
    get_forward_context().no_compile_layers[STEERING_LAYER].steer(hidden_ND, residual_ND, positions)


@steer.register_fake
def _(hidden_ND: Tensor, residual_ND: Tensor, positions: Tensor) -> None:
    return None

"""Carries each request's steering to the batch on vLLM's second model runner (the default on GPUs)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from steering.engines.vllm.plugin.batch import SequenceState
from steering.engines.vllm.plugin.steering_layer import STEERING_LAYER, SteeringLayer
from steering.engines.vllm.plugin.wire import parse_extra_args


class SteeringModelState(DefaultModelState):
    """Tells the steering layer, before each pass, which sequence each row of the batch is and where it stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        context = self.vllm_config.compilation_config.static_forward_context
        self._steering: SteeringLayer = context[STEERING_LAYER]
        self._sequences: dict[int, SequenceState | None] = {}
        """By the runner's request index, which is stable while a request is in the batch."""
        self._steering.batch.elsewhere = self._sequences.values()

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        parameters = new_req_data.sampling_params
        wire = parse_extra_args(parameters.extra_args) if parameters is not None else None
        self._sequences[req_index] = self._steering.batch.enter(wire, new_req_data.prompt_token_ids)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Tensor | None]:
        indices = input_batch.idx_mapping_np[: input_batch.num_reqs].tolist()
        self._steering.batch.rows = [self._sequences.get(index) for index in indices]
        self._steering.step_rows = (
            input_batch.query_start_loc_np[: input_batch.num_reqs + 1],
            input_batch.num_computed_tokens_np[: input_batch.num_reqs],
        )
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self._steering.batch.rows = []
        self._steering.step_rows = None
        return super().prepare_dummy_inputs(num_reqs, num_tokens)

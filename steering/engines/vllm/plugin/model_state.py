"""Carries each request's steering to the batch on vLLM's second model runner (the default on GPUs)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from steering.engines.vllm.plugin.batch import Step
from steering.engines.vllm.plugin.steering_layer import STEERING_LAYER, SteeringLayer
from steering.engines.vllm.plugin.wire import parse_extra_args


class SteeringModelState(DefaultModelState):
    """Tells the steering layer, before each pass, which sequence each row of the batch is and where it stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        context = self.vllm_config.compilation_config.static_forward_context
        self._steering: SteeringLayer = context[STEERING_LAYER]
        self._steering.announced = True
        self._index: dict[str, int] = {}
        """By request: the runner's index, which is stable while a request is in the batch."""
        self._attention: dict[str, Any] = {}
        """What the coming pass gives its attention layers, as `set_forward_context` takes it."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        parameters = new_req_data.sampling_params
        wire = parse_extra_args(parameters.extra_args) if parameters is not None else None
        self._index[new_req_data.req_id] = req_index
        self._steering.batch.enter(req_index, wire, new_req_data.prompt_token_ids)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        index = self._index.pop(req_id, None)
        if index is not None:
            self._steering.batch.inside[index] = 0

    def prepare_attn(self, input_batch: InputBatch, cudagraph_mode: Any, block_tables: Any, slot_mappings: Tensor,
                     attn_groups: Any, kv_cache_config: Any, for_capture: bool = False, **kwargs: Any):  # fmt: skip
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            **kwargs,
        )
        self._steering.capturing = for_capture
        self._attention = {
            "attn_metadata": metadata,
            "slot_mapping": build_slot_mappings_by_layer(slot_mappings, kv_cache_config),
        }
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Tensor | None]:
        tally_B = self._steering.batch.inside[input_batch.idx_mapping_np[: input_batch.num_reqs]]
        step = None
        if tally_B.any():
            starts = np.asarray(input_batch.query_start_loc_np[: input_batch.num_reqs + 1], np.int64)
            firsts = np.asarray(input_batch.num_computed_tokens_np[: input_batch.num_reqs], np.int64)
            step = self._steering.describe(tally_B, starts, firsts)
        padded = input_batch.num_tokens_after_padding
        self._steering.announce(step, padded)
        if step is not None and step.recalls and input_batch.num_tokens == input_batch.num_reqs:
            self._recall(step, padded)
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self._steering.announce(None, num_tokens)
        return super().prepare_dummy_inputs(num_reqs, num_tokens)

    def _recall(self, step: Step, padded: int) -> None:
        """A step of one token each may be a full graph, in which nothing is learned: so before it."""
        with set_forward_context(vllm_config=self.vllm_config, num_tokens=padded, **self._attention):
            self._steering.recall(step, padded)

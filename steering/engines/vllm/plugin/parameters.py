"""Carries each request's steering from `SamplingParams` to the batch, on vLLM's first model runner; checks it on both.

One class, because an engine is started with one list of logits processors whichever runner it takes; no logit is
changed here.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as FirstRunnerProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SecondRunnerProcessor

from steering.engines.vllm.plugin.batch import Batch
from steering.engines.vllm.plugin.steering_layer import STEERING_LAYER
from steering.engines.vllm.plugin.wire import parse_extra_args
from steering.errors import InvalidSteering


class SteeringParameters(FirstRunnerProcessor, SecondRunnerProcessor):
    """For `logits_processors=` of an engine."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError, naming the field, for steering that is malformed; vLLM makes it a 400."""
        try:
            parse_extra_args(sampling_params.extra_args)
        except InvalidSteering as error:
            raise ValueError(error.message) from error

    def __init__(self, vllm_config: VllmConfig, *_: Any) -> None:
        self._layers = vllm_config.compilation_config.static_forward_context

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: row i of the batch is slot i; requests left, then came, then moved."""
        if batch_update is None:
            return
        batch: Batch = self._layers[STEERING_LAYER].batch
        inside = batch.inside
        for index in batch_update.removed:
            inside[index] = 0
        for index, parameters, prompt, _output in batch_update.added:
            batch.enter(index, parse_extra_args(parameters.extra_args), prompt)
        for source, target, direction in batch_update.moved:
            displaced = inside[target] if direction == MoveDirectionality.SWAP else 0
            inside[target], inside[source] = inside[source], displaced
        inside[batch_update.batch_size :] = 0

    def is_argmax_invariant(self) -> bool:
        return True

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Second runner: the model state does the work; no logits are changed here."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        return logits

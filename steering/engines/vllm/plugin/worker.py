"""What the engine asks of its workers about steering; mixed into vLLM's worker (`worker_extension_cls`)."""

from __future__ import annotations

from typing import Any

from steering.engines.vllm.plugin.steering_layer import STEERING_LAYER, SteeringLayer


class SteeringWorker:
    """Called over vLLM's `collective_rpc`, between two steps."""

    vllm_config: Any
    model_runner: Any

    def finish_steering(self, ended: list[tuple[str, int | None]]) -> list[dict[str, Any] | None]:
        """Per sequence: positions, relative_shift, clamped, visited, visited_text, probe, explanation. It is forgotten
        thereby. See `SteeringLayer.finish`."""
        return self._layer().finish([(sequence_id, end) for sequence_id, end in ended])

    def detach_steering(self) -> None:
        """Take steering off the model; receipts then say `hook_detached`."""
        self._layer().attached = False

    def count_steered_sequences(self) -> int:
        """Sequences whose steering state is still held."""
        return self._layer().batch.sequences

    def model_runner_name(self) -> str:
        """Module of the model runner: vLLM has two, and which one runs is its choice."""
        return type(self.model_runner).__module__

    def _layer(self) -> SteeringLayer:
        return self.vllm_config.compilation_config.static_forward_context[STEERING_LAYER]

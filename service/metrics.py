"""What Prometheus sees. Counted in the ingress process, where requests begin and end.

Each ingress replica has its own registry, and a scrape through the proxy reaches one of them; sums over several
replicas need a scrape per replica. Labels take values from fixed lists or from the operator's configuration, never
from a caller.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from steering.engines.base import GenerationEnd, TextDelta

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
SHIFT_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """All metrics of one ingress replica."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vlsae_requests_total", "Requests that reached the model.", ["arm", "applied", "finish"], registry=registry
        )
        self.rejections = Counter(
            "vlsae_rejections_total", "Requests answered with an error, by error code.", ["reason"], registry=registry
        )
        self.in_progress = Gauge(
            "vlsae_requests_in_progress", "Chat requests that this replica works on now.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "vlsae_time_to_first_token_seconds",
            "From the request's arrival to the first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "vlsae_inter_token_latency_seconds",
            "Between two tokens of a choice.",
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.duration = Histogram(
            "vlsae_request_duration_seconds",
            "From the request's arrival to the last token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.prompt_tokens = Counter("vlsae_prompt_tokens_total", "Prompt tokens, images included.", registry=registry)
        self.completion_tokens = Counter("vlsae_completion_tokens_total", "Generated tokens.", registry=registry)
        self.images = Counter("vlsae_images_total", "Images decoded.", registry=registry)
        self.image_pixels = Counter("vlsae_image_pixels_total", "Pixels of decoded images.", registry=registry)
        self.relative_shift = Histogram(
            "vlsae_relative_shift_ratio",
            "Mean |delta| / |hidden state| of a steered choice.",
            buckets=SHIFT_BUCKETS,
            registry=registry,
        )
        self.empty_answers = Counter(
            "vlsae_empty_answers_total", "Choices without any text.", ["applied"], registry=registry
        )

    def exposition(self) -> bytes:
        """The text that `/metrics` answers."""
        return generate_latest(self.registry)


class Meter:
    """Measures one chat request; `finished` is called once, however it ends."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        """`arrived` is a time.monotonic()."""
        self._metrics, self._arrived = metrics, arrived
        self._last_token: dict[int, float] = {}
        self._with_text: set[int] = set()
        self._finish: set[str] = set()
        self._end: GenerationEnd | None = None
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def started(self, prompt_tokens: int) -> None:
        """The model has the request; `prompt_tokens` are its prompt's, images included."""
        self._prompt_tokens = prompt_tokens

    def count_image(self, pixels: int) -> None:
        self._metrics.images.inc()
        self._metrics.image_pixels.inc(pixels)

    def observe(self, event: TextDelta | GenerationEnd) -> None:
        """One event of the engine."""
        if isinstance(event, GenerationEnd):
            self._end = event
            return
        if event.text:
            self._with_text.add(event.choice)
        if event.finish_reason:
            self._finish.add(event.finish_reason)
        if event.token_ids:
            self._observe_tokens(event.choice, len(event.token_ids))

    def _observe_tokens(self, choice: int, tokens: int) -> None:
        now, metrics = time.monotonic(), self._metrics
        if not self._last_token:
            metrics.time_to_first_token.observe(now - self._arrived)
        elif choice in self._last_token:
            for _ in range(tokens):
                metrics.inter_token_latency.observe((now - self._last_token[choice]) / tokens)
        self._last_token[choice] = now
        self._completion_tokens += tokens

    def finished(self, failure: str | None) -> None:
        """`failure` is None, 'cancelled', or the error code that the client saw."""
        metrics, end = self._metrics, self._end
        if failure not in (None, "cancelled"):
            metrics.rejections.labels(reason=failure).inc()
        if end is None and not self._last_token:
            return  # it never reached the model
        metrics.duration.observe(time.monotonic() - self._arrived)
        if end is None:
            finish = "cancelled" if failure == "cancelled" else "error"
            metrics.requests.labels(arm="none", applied="unknown", finish=finish).inc()
            metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.completion_tokens.inc(self._completion_tokens)
            return
        receipt = end.receipt
        applied = "true" if receipt.applied else "false"
        finish = "cancelled" if failure == "cancelled" else "length" if "length" in self._finish else "stop"
        metrics.requests.labels(arm=receipt.arm or "none", applied=applied, finish=finish).inc()
        metrics.prompt_tokens.inc(end.prompt_tokens)
        metrics.completion_tokens.inc(sum(end.completion_tokens))
        metrics.empty_answers.labels(applied=applied).inc(len(end.completion_tokens) - len(self._with_text))
        if receipt.applied:
            for shift in receipt.relative_shift:
                metrics.relative_shift.observe(shift)

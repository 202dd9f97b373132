"""One request as it is measured, from its assignment to its end, for the metrics and for its record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from service.errors import ERROR_KINDS, ApiError
from service.experiments.assignment import Assignment
from service.metrics.exposition import Metrics
from service.metrics.request_record import RequestRecord
from steering.engines.base import GenerationEnd, TextDelta


class Meter:
    """Measures one chat request; `finished` is called once, however it ends."""

    def __init__(self, metrics: Metrics, record: RequestRecord) -> None:
        """What is measured is also written to `record`."""
        self._metrics, self._record = metrics, record
        self._started = False
        self._waiting, self._at_model = ExitStack(), ExitStack()
        self._last_token: dict[int, float] = {}
        self._with_text: set[int] = set()
        self._finish: set[str] = set()
        self._end: GenerationEnd | None = None
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._gaps, self._gaps_s = 0, 0.0

    def of(self, record: RequestRecord) -> Meter:
        """One for an answer of its own beside this one's."""
        return Meter(self._metrics, record)

    def assigned(self, assignment: Assignment) -> None:
        """From here on all that is counted of it is its arm's."""
        self._record.assignment = assignment
        self._metrics.expect(assignment.label)
        self._metrics.assignments.labels(arm=assignment.label).inc()

    def submitted(self) -> None:
        """The request is handed to the model."""
        self._waiting.enter_context(self._metrics.waiting.track_inprogress())
        self._at_model.enter_context(self._metrics.at_model.track_inprogress())

    def started(self, prompt_tokens: int) -> None:
        """The model has the request; `prompt_tokens` are its prompt's, images included."""
        self._started, self._prompt_tokens = True, prompt_tokens
        self._metrics.last_event.set_to_current_time()

    def count_image(self, pixels: int) -> None:
        self._metrics.images.inc()
        self._metrics.image_pixels.inc(pixels)
        self._record.images += 1
        self._record.image_pixels += pixels

    def observe(self, event: TextDelta | GenerationEnd) -> None:
        """One event of the engine."""
        self._metrics.last_event.set_to_current_time()
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
            self._record.time_to_first_token_s = now - self._record.arrived
            metrics.time_to_first_token.labels(arm=self._record.arm).observe(now - self._record.arrived)
            self._waiting.close()
        elif choice in self._last_token:
            gap_s, latency = now - self._last_token[choice], metrics.inter_token_latency.labels(arm=self._record.arm)
            for _ in range(tokens):
                latency.observe(gap_s / tokens)
            self._gaps, self._gaps_s = self._gaps + tokens, self._gaps_s + gap_s
        self._last_token[choice] = now
        self._completion_tokens += tokens

    @contextmanager
    def settled(self) -> Iterator[None]:
        """`finished` when the block ends, with what ended it."""
        failure: str | None = "cancelled"
        try:
            yield
            failure = None
        except Exception as error:
            failure = error.code if isinstance(error, ApiError) else "internal_error"
            raise
        finally:
            self.finished(failure)

    def finished(self, failure: str | None) -> None:
        """`failure` is None, 'cancelled', or the error code that the client saw."""
        self._waiting.close()
        self._at_model.close()
        if failure not in (None, "cancelled"):
            self._record.error_code = failure
        refused = failure in ERROR_KINDS and ERROR_KINDS[failure].status < 500
        if not self._started or (refused and not self._last_token):
            return  # no model replica had it, or the engine would not take it
        self._metrics.duration.labels(arm=self._record.arm).observe(time.monotonic() - self._record.arrived)
        if failure == "cancelled":
            finish = "cancelled"
        elif self._end is None:
            finish = "error"
        else:
            finish = "length" if "length" in self._finish else "stop"
        if self._end is not None:
            self._prompt_tokens, self._completion_tokens = self._end.prompt_tokens, sum(self._end.completion_tokens)
        self._count(finish)

    def _count(self, finish: str) -> None:
        metrics, record, end = self._metrics, self._record, self._end
        record.finish, record.receipt = finish, end and end.receipt
        record.prompt_tokens, record.completion_tokens = self._prompt_tokens, self._completion_tokens
        metrics.prompt_tokens.inc(self._prompt_tokens)
        record.inter_token_s = self._gaps_s / self._gaps if self._gaps else None
        arm, artifact = record.arm, record.artifact
        metrics.completion_tokens.labels(arm=arm).inc(self._completion_tokens)
        if end is None:
            metrics.requests.labels(arm=arm, applied="unknown", finish=finish, artifact=artifact).inc()
            return
        applied = "true" if end.receipt.applied else "false"
        record.choices = len(end.completion_tokens)
        record.empty_choices = record.choices - len(self._with_text)
        metrics.requests.labels(arm=arm, applied=applied, finish=finish, artifact=artifact).inc()
        metrics.choices.labels(applied=applied, arm=arm).inc(record.choices)
        metrics.empty_answers.labels(applied=applied, arm=arm).inc(record.empty_choices)
        if end.receipt.applied:
            for shift in end.receipt.relative_shift:
                metrics.relative_shift.labels(arm=arm).observe(shift)
        for mismatch in end.receipt.mismatch or ():
            if mismatch is not None:
                metrics.mismatch.labels(arm=arm, code="before").observe(mismatch.before)
                metrics.mismatch.labels(arm=arm, code="after").observe(mismatch.after)

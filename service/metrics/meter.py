"""What Prometheus sees. Counted in the ingress processes, where requests begin and end.

Where PROMETHEUS_MULTIPROC_DIR names a folder, all processes of a machine keep their numbers there and every one of them
answers a scrape with the sums; elsewhere a process answers for itself. Labels take values from fixed lists or from the
operator's configuration, never from a caller. What an experiment can change has the label `arm`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.errors import ERROR_KINDS, ApiError
from service.experiments.arms import NO_ARM
from service.experiments.assignment import Assignment
from service.metrics.machine import FOLDER_VARIABLE, MachineCollector, metrics_folder
from service.metrics.request_record import RequestRecord
from steering.engines.base import GenerationEnd, TextDelta

log = logging.getLogger(__name__)
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
SCORE_BUCKETS = (0, 0.25, 0.5, 0.75, 1)
SHIFT_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
MISMATCH_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
SHADOW_OUTCOMES = ("same", "different", "failed", "dropped")
PROBES = frozenset(("/healthz", "/readyz"))
"""Asked over and over while a service starts: their refusals are nobody's loss."""


class Metrics:
    """All metrics of one ingress process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._folder = metrics_folder()
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        of_all = partial(gauge, multiprocess_mode="livesum")
        histogram = partial(Histogram, registry=registry)
        self.requests = counter(
            "vlsae_requests_total", "Requests a model replica began.", ["arm", "applied", "finish", "artifact"]
        )
        self.assignments = counter(
            "vlsae_assignments_total",
            "Chat requests while an experiment runs, counted when they fall into an arm, whatever becomes of them.",
            ["arm"],
        )
        self.responses = counter(
            "vlsae_http_responses_total", "HTTP requests answered, of any kind.", ["route", "status"]
        )
        self.rejections = counter(
            "vlsae_rejections_total", "Requests answered with an error, by error code.", ["reason", "arm"]
        )
        self.in_progress = of_all(
            "vlsae_requests_in_progress", "Chat requests being worked on, bodies being read included."
        )
        self.waiting = of_all(
            "vlsae_requests_waiting", "Chat requests that were handed to the model and have no token yet."
        )
        self.at_model = of_all(
            "vlsae_requests_at_model", "Chat requests that were handed to the model and have not ended."
        )
        self.ready = gauge(
            "vlsae_ready",
            "1 where the last look at the model found it making progress, else 0.",
            multiprocess_mode="livemostrecent",
        )
        self.last_event = gauge(
            "vlsae_model_last_event_timestamp_seconds",
            "When a model replica last sent anything, in seconds since 1970; 0 before that.",
            multiprocess_mode="max",
        )
        self.time_to_first_token = histogram(
            "vlsae_time_to_first_token_seconds",
            "From the request's arrival at the ingress to the first token.",
            ["arm"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.inter_token_latency = histogram(
            "vlsae_inter_token_latency_seconds", "Between two tokens of a choice.", ["arm"], buckets=TOKEN_BUCKETS_S
        )
        self.duration = histogram(
            "vlsae_request_duration_seconds",
            "From the request's arrival at the ingress to the end of its answer, whole or not.",
            ["arm"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.prompt_tokens = counter("vlsae_prompt_tokens_total", "Prompt tokens, images included.")
        self.completion_tokens = counter("vlsae_completion_tokens_total", "Generated tokens.", ["arm"])
        self.images = counter("vlsae_images_total", "Images decoded.")
        self.image_pixels = counter("vlsae_image_pixels_total", "Pixels of decoded images.")
        self.relative_shift = histogram(
            "vlsae_relative_shift_ratio",
            "Mean |delta| / |hidden state| of a steered choice.",
            ["arm"],
            buckets=SHIFT_BUCKETS,
        )
        self.mismatch = histogram(
            "vlsae_concept_mismatch_ratio",
            "How far a choice's text is from the image at its end, 0 to 1, by the codes before steering and after.",
            ["arm", "code"],
            buckets=MISMATCH_BUCKETS,
        )
        self.feedback = histogram(
            "vlsae_feedback_score_ratio",
            "Scores that clients gave answers, 0 is bad and 1 good; strength is the upper end of a range.",
            ["arm", "preset", "strength", "applied"],
            buckets=SCORE_BUCKETS,
        )
        self.choices = counter("vlsae_choices_total", "Choices of whole answers.", ["applied", "arm"])
        self.empty_answers = counter("vlsae_empty_answers_total", "Choices without any text.", ["applied", "arm"])
        self.shadow_answers = counter(
            "vlsae_shadow_answers_total", "Shadows that were to run, by what came of it.", ["outcome"]
        )
        self.shadow_similarity = histogram(
            "vlsae_shadow_similarity_ratio",
            "How far a shadow's answer agrees with the one that was shown: 1 is the same.",
            buckets=SCORE_BUCKETS,
        )
        for outcome in SHADOW_OUTCOMES:
            self.shadow_answers.labels(outcome=outcome)
        self._arms: set[str] = set()
        self.expect(NO_ARM)
        for gauge in (self.in_progress, self.waiting, self.at_model):
            gauge.set(0)  # the file of a dead process with our id may hold another number

    def expect(self, arm: str) -> None:
        """A rate needs to have seen the zero before the first."""
        if arm not in self._arms:
            self._arms.add(arm)
            for code in ERROR_KINDS:
                self.rejections.labels(reason=code, arm=arm)

    def count_response(self, record: RequestRecord) -> None:
        """An HTTP request has ended."""
        status = "none" if record.status is None else str(record.status)
        self.responses.labels(route=record.route, status=status).inc()
        if record.error_code and record.route not in PROBES:
            self.rejections.labels(reason=record.error_code, arm=record.arm).inc()

    def exposition(self) -> bytes:
        """The text that `/metrics` answers: this machine's sums where its processes share a folder."""
        if self._folder is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MachineCollector(registry, self._folder)
        return generate_latest(registry)

    def warn_if_alone(self) -> None:
        """Say once what a scrape would leave out."""
        if self._folder is None:
            log.warning("no %s: each ingress replica answers /metrics for itself alone", FOLDER_VARIABLE)


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

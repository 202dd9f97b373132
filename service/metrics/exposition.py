"""What Prometheus sees. Counted in the ingress processes, where requests begin and end.

Where PROMETHEUS_MULTIPROC_DIR names a folder, all processes of a machine keep their numbers there and every one of them
answers a scrape with the sums; elsewhere a process answers for itself. Labels take values from fixed lists or from the
operator's configuration, never from a caller. What an experiment can change has the label `arm`.
"""

from __future__ import annotations

import logging
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.errors import ERROR_KINDS
from service.experiments.arms import NO_ARM
from service.metrics.machine import FOLDER_VARIABLE, MachineCollector, metrics_folder
from service.metrics.request_record import RequestRecord

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

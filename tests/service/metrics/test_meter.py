"""What is counted, and that labels cannot grow with what callers send."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.experiments.arms import Arm
from service.experiments.assignment import Assignment
from service.metrics.exposition import Metrics
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord
from tests.service.examples import delta, end

REQUESTS = "vlsae_requests_total"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def run(
    metrics: Metrics,
    *events,
    failure: str | None = None,
    ago_s: float = 0.0,
    started: bool | None = None,
    assignment: Assignment | None = None,
) -> RequestRecord:
    record = RequestRecord(request_id="r", method="POST", arrived=time.monotonic() - ago_s)
    meter = Meter(metrics, record)
    if assignment is not None:
        meter.assigned(assignment)
    if events or started:
        meter.started(prompt_tokens=20)
    for event in events:
        meter.observe(event)
    meter.finished(failure)
    metrics.count_response(record)
    return record


def test_a_steered_answer(metrics: Metrics) -> None:
    run(metrics, delta(0, "a", tokens=2), delta(0, "b", finish="stop", tokens=3), end(6), ago_s=2)
    assert value(metrics, REQUESTS, artifact="main", arm="none", applied="true", finish="stop") == 1
    assert value(metrics, "vlsae_prompt_tokens_total") == 20
    assert value(metrics, "vlsae_completion_tokens_total", arm="none") == 6
    assert value(metrics, "vlsae_time_to_first_token_seconds_count", arm="none") == 1
    assert value(metrics, "vlsae_time_to_first_token_seconds_sum", arm="none") == pytest.approx(2, abs=0.5)
    assert value(metrics, "vlsae_inter_token_latency_seconds_count", arm="none") == 3
    assert value(metrics, "vlsae_relative_shift_ratio_sum", arm="none") == 0.25
    assert value(metrics, "vlsae_empty_answers_total", applied="true", arm="none") == 0


BOLD = Assignment(
    experiment="e", seed="e", default="calm", reason="unit", arm=Arm(name="bold", weight=0.25), unit="0123456789abcdef"
)


def test_an_answer_in_an_arm_is_counted_there_and_nowhere_else(metrics: Metrics) -> None:
    events = delta(0, "a", tokens=2), delta(0, "", finish="stop", tokens=2), delta(1, "", finish="stop", tokens=0)
    record = run(metrics, *events, end(4, 1, arm="bold", relative_shift=[0.5, 0.25]), assignment=BOLD)
    assert value(metrics, "vlsae_assignments_total", arm="bold") == 1
    assert value(metrics, REQUESTS, artifact="main", arm="bold", applied="true", finish="stop") == 1
    assert value(metrics, "vlsae_completion_tokens_total", arm="bold") == 5
    for name in ("time_to_first_token_seconds", "request_duration_seconds"):
        assert value(metrics, f"vlsae_{name}_count", arm="bold") == 1
    assert value(metrics, "vlsae_inter_token_latency_seconds_count", arm="bold") == 2
    assert value(metrics, "vlsae_relative_shift_ratio_sum", arm="bold") == 0.75
    assert value(metrics, "vlsae_choices_total", applied="true", arm="bold") == 2
    assert value(metrics, "vlsae_empty_answers_total", applied="true", arm="bold") == 1
    counted = [
        line for line in metrics.exposition().decode().splitlines() if 'arm="none"' in line and "_created" not in line
    ]
    assert all(line.endswith(" 0.0") for line in counted)
    facts = record.facts()
    assert facts["experiment"] == {
        "name": "e", "salt": "e", "default": "calm", "arm": "bold", "share": 0.25, "unit": "0123456789abcdef",
    }  # fmt: skip
    assert (facts["choices"], facts["empty_choices"]) == (2, 1)
    assert facts["steering"]["relative_shift"] == 0.375  # pyright: ignore


@pytest.mark.parametrize("started", [False, True])
def test_an_arm_that_fails_shows_whether_or_not_the_model_had_it(metrics: Metrics, started: bool) -> None:
    run(metrics, failure="engine_unavailable", started=started, assignment=BOLD)
    run(metrics, failure="cancelled", started=True, assignment=BOLD)
    assert value(metrics, "vlsae_assignments_total", arm="bold") == 2
    assert value(metrics, "vlsae_rejections_total", reason="engine_unavailable", arm="bold") == 1
    assert value(metrics, "vlsae_rejections_total", reason="internal_error", arm="bold") == 0, "there before the first"
    failed = value(metrics, REQUESTS, artifact="main", arm="bold", applied="unknown", finish="error")
    assert failed == (1 if started else None)
    assert value(metrics, REQUESTS, artifact="main", arm="bold", applied="unknown", finish="cancelled") == 1


def test_empty_answers_are_counted_by_choice(metrics: Metrics) -> None:
    run(metrics, delta(0, "", finish="stop", tokens=0), delta(1, "a", finish="stop"), end(1, 2))
    assert value(metrics, "vlsae_empty_answers_total", applied="true", arm="none") == 1
    assert value(metrics, "vlsae_choices_total", applied="true", arm="none") == 2


def test_a_refused_request_is_a_rejection_and_no_request(metrics: Metrics) -> None:
    run(metrics, failure="invalid_image")
    assert value(metrics, "vlsae_rejections_total", reason="invalid_image", arm="none") == 1
    assert "vlsae_requests_total{" not in metrics.exposition().decode()
    assert value(metrics, "vlsae_request_duration_seconds_count", arm="none") is None


def test_one_that_breaks_on_its_way_is_both(metrics: Metrics) -> None:
    run(metrics, delta(0, "a"), failure="engine_unavailable")
    assert value(metrics, "vlsae_rejections_total", reason="engine_unavailable", arm="none") == 1
    assert value(metrics, REQUESTS, artifact="main", arm="none", applied="unknown", finish="error") == 1


def test_one_whose_client_left(metrics: Metrics) -> None:
    run(metrics, delta(0, "a"), failure="cancelled")
    assert value(metrics, REQUESTS, artifact="main", arm="none", applied="unknown", finish="cancelled") == 1
    (rejections,) = metrics.rejections.collect()
    assert {sample.value for sample in rejections.samples if sample.name.endswith("_total")} == {0}


@pytest.mark.parametrize("failure", ["cancelled", "engine_unavailable", "request_timeout"])
def test_tokens_of_an_answer_that_never_ended_are_counted(metrics: Metrics, failure: str) -> None:
    run(metrics, delta(0, "a", tokens=2), delta(1, "b", tokens=3), delta(0, "", tokens=1), failure=failure)
    assert value(metrics, "vlsae_prompt_tokens_total") == 20
    assert value(metrics, "vlsae_completion_tokens_total", arm="none") == 6


@pytest.mark.parametrize(
    ("failure", "finish"), [("cancelled", "cancelled"), ("request_timeout", "error"), ("engine_unavailable", "error")]
)
def test_a_prompt_that_was_computed_for_nothing_is_counted(metrics: Metrics, failure: str, finish: str) -> None:
    run(metrics, failure=failure, started=True)
    assert value(metrics, REQUESTS, artifact="main", arm="none", applied="unknown", finish=finish) == 1
    assert value(metrics, "vlsae_prompt_tokens_total") == 20
    assert value(metrics, "vlsae_request_duration_seconds_count", arm="none") == 1


def test_one_that_the_engine_refuses_has_cost_no_prompt(metrics: Metrics) -> None:
    run(metrics, failure="invalid_steering", started=True)
    assert value(metrics, "vlsae_prompt_tokens_total") == 0


@pytest.mark.parametrize("failure", [None, "cancelled", "overloaded"])
def test_only_what_was_handed_to_the_model_and_has_not_ended_is_at_it(metrics: Metrics, failure: str | None) -> None:
    meters = [Meter(metrics, RequestRecord(request_id="r", method="POST")) for _ in range(3)]
    for meter in meters[1:]:
        meter.submitted()
    assert value(metrics, "vlsae_requests_at_model") == 2
    meters[0].finished("body_timeout")
    meters[1].finished(failure)
    assert value(metrics, "vlsae_requests_at_model") == 1


def test_a_probe_that_is_told_to_wait_is_no_rejection(metrics: Metrics) -> None:
    for route in ("/readyz", "/healthz", "/metrics"):
        metrics.count_response(
            RequestRecord(request_id="r", method="GET", route=route, status=503, error_code="engine_unavailable")
        )
        assert value(metrics, "vlsae_http_responses_total", route=route, status="503") == 1
    assert value(metrics, "vlsae_rejections_total", reason="engine_unavailable", arm="none") == 1


def test_images(metrics: Metrics) -> None:
    meter = Meter(metrics, RequestRecord(request_id="r", method="POST"))
    meter.count_image(100)
    meter.count_image(50)
    assert value(metrics, "vlsae_images_total") == 2
    assert value(metrics, "vlsae_image_pixels_total") == 150


def test_names_carry_units_and_the_text_is_prometheus_s(metrics: Metrics) -> None:
    run(metrics, delta(0, "a", finish="stop"), end(1))
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    assert len(families) >= 12
    for family in families:
        assert family.name.startswith("vlsae_")
        assert family.documentation
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_ratio"))


def test_several_replicas_that_count_alone_are_said(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    metrics.warn_if_alone()
    assert "PROMETHEUS_MULTIPROC_DIR" in caplog.text

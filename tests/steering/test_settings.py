"""Sources merged, presets filled in, the impossible refused or reported."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steering.errors import InvalidSteering
from steering.request import ConceptEdit, SteeringRequest, merge_sources
from steering.settings import Preset, resolve

PRESETS = {"captions": Preset(alpha=2.0, beta_up=0.4), "off": Preset(strength=0.0)}


def decide(*caller, server=(), presets=PRESETS, has_image=True):
    requested = merge_sources(*caller, server=server)
    return resolve(requested, presets=presets, default_preset="captions", has_image=has_image)


def test_the_higher_source_wins_field_by_field():
    body, header = SteeringRequest(alpha=1.0), SteeringRequest(strength=0.3, alpha=3.0)
    default = SteeringRequest(preset="off", strength=0.9, beta_up=0.1)
    merged = merge_sources(body, header, server=(default,)).settings
    assert (merged.alpha, merged.strength, merged.preset, merged.beta_up) == (1.0, 0.3, "off", 0.1)


def test_fields_left_out_come_from_the_preset():
    settings = decide(SteeringRequest(strength=0.5))
    assert (settings.alpha, settings.beta_up, settings.strength, settings.preset) == (2.0, 0.4, 0.5, "captions")


def test_where_in_the_answer_steering_begins_comes_from_the_preset_and_0_is_a_wish_of_its_own():
    presets = PRESETS | {"later": Preset(alpha=2.0, min_answer_tokens=6)}
    assert decide(presets=presets).min_answer_tokens is None
    assert decide(SteeringRequest(preset="later"), presets=presets).min_answer_tokens == 6
    assert decide(SteeringRequest(preset="later", min_answer_tokens=0), presets=presets).min_answer_tokens == 0
    assert decide(server=(SteeringRequest(min_answer_tokens=3),), presets=presets).min_answer_tokens == 3


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (SteeringRequest(enabled=False), "disabled"),
        (SteeringRequest(enabled=False, strength=0.5), "disabled"),
        (SteeringRequest(strength=0.0), "strength_0"),
        (SteeringRequest(strength=0.0, enabled=True), "strength_0"),
        (SteeringRequest(preset="off"), "preset_off"),
        (SteeringRequest(preset="off", enabled=True), "preset_off"),
        (SteeringRequest(preset="off", strength=0.5), "preset_off"),
        (SteeringRequest(preset="off", alpha=1.0), "preset_off"),
        (SteeringRequest(preset="off", strength=0.0, alpha=1.0), "strength_0"),
        (SteeringRequest(alpha=0.0), "delta_0"),
        (SteeringRequest(strength=0.5, alpha=0.0, enabled=True), "delta_0"),
        (SteeringRequest(strength=1.0, gamma=0.0), "gamma_0"),
    ],
)
def test_off_says_why(asked, reason):
    assert decide(asked).reason == reason


def test_asking_for_steering_where_the_default_preset_is_off_is_refused():
    for asked in (SteeringRequest(enabled=True), SteeringRequest(strength=0.8)):
        with pytest.raises(InvalidSteering) as caught:
            resolve(merge_sources(asked), presets=PRESETS, default_preset="off", has_image=True)
        assert caught.value.field == "steering.preset"
        with pytest.raises(InvalidSteering):
            decide(asked, server=(SteeringRequest(preset="off"),))
    with pytest.raises(InvalidSteering) as caught:
        decide(SteeringRequest(enabled=True), server=(SteeringRequest(strength=0.0),))
    assert caught.value.field == "steering.strength"
    assert decide(server=(SteeringRequest(preset="off"),)).reason == "preset_off"
    spelled = merge_sources(SteeringRequest(strength=0.5, alpha=1.0))
    assert resolve(spelled, presets=PRESETS, default_preset="off", has_image=True).active


@pytest.mark.parametrize(
    ("asked", "server", "field"),
    [
        (SteeringRequest(enabled=True, preset="off", alpha=1.0), SteeringRequest(), "preset"),
        (SteeringRequest(enabled=True, alpha=1.0), SteeringRequest(preset="off"), "preset"),
        (SteeringRequest(enabled=True, alpha=1.0), SteeringRequest(strength=0.0), "strength"),
        (SteeringRequest(strength=0.5), SteeringRequest(alpha=0.0), "alpha"),
    ],
)
def test_asking_for_steering_that_another_field_switches_off_is_refused(asked, server, field):
    with pytest.raises(InvalidSteering, match="is off; set another") as caught:
        decide(asked, server=(server,))
    assert caught.value.field == f"steering.{field}"


def test_who_chose_the_preset_off_is_not_steered_by_the_server_s_numbers():
    arm = SteeringRequest(strength=0.8, alpha=1.0)
    assert decide(SteeringRequest(preset="off"), server=(arm,)).reason == "preset_off"
    assert decide(SteeringRequest(), server=(SteeringRequest(preset="off"), arm)).active


NUMBERS = st.sampled_from([None, 0.0, 0.5, 1.0])
REQUESTS = st.builds(
    SteeringRequest,
    enabled=st.sampled_from([None, True, False]),
    preset=st.sampled_from([None, "captions", "off"]),
    strength=NUMBERS,
    alpha=NUMBERS,
    gamma=NUMBERS,
    plausibility=NUMBERS,
)


@given(
    caller=st.lists(REQUESTS, max_size=3),
    server=st.lists(REQUESTS, max_size=2),
    default_preset=st.sampled_from(["captions", "off", "no step"]),
)
def test_what_is_active_has_a_strength_and_what_was_asked_for_and_is_not_active_was_the_caller_s_choice(
    caller, server, default_preset
):
    requested = merge_sources(*caller, server=tuple(server))
    presets = PRESETS | {"no step": Preset(alpha=0.0)}
    try:
        settings = resolve(requested, presets=presets, default_preset=default_preset, has_image=True)
    except InvalidSteering:
        settings = None
    if settings is None:
        assert requested.explicit
        return
    assert not settings.active or settings.strength * settings.alpha > 0
    if requested.explicit and settings.reason in ("strength_0", "preset_off", "delta_0"):
        chosen = {"strength_0": "strength", "preset_off": "preset", "delta_0": "alpha"}[settings.reason]
        assert chosen in requested.caller_fields


def test_strength_in_a_higher_source_overrides_off_in_a_lower():
    alias_off = SteeringRequest(enabled=False)
    assert decide(SteeringRequest(strength=0.5), alias_off).active
    assert not decide(SteeringRequest(), alias_off).active


@pytest.mark.parametrize(
    "asked",
    [SteeringRequest(enabled=True), SteeringRequest(strength=0.1), SteeringRequest(concepts={"1": ConceptEdit(add=1)})],
)
def test_explicit_and_impossible_is_refused(asked):
    with pytest.raises(InvalidSteering) as caught:
        decide(asked, has_image=False)
    assert caught.value.field in ("steering", "steering.concepts")
    with pytest.raises(InvalidSteering):
        decide(asked, presets=None)


def test_by_default_and_impossible_is_reported():
    default = (SteeringRequest(strength=1.0),)
    assert decide(server=default, has_image=False).reason == "no_image"
    assert decide(server=default, presets=None).reason == "no_artifact"


@pytest.mark.parametrize(
    "fields",
    [{"strength": -1}, {"strength": 7}, {"strength": float("nan")}, {"alpha": 4.1}, {"strength": "0.5"},
     {"beta_up": True}, {"mode": "fast"}, {"surprise": 1}, {"control_seed": 1.5},
     {"min_answer_tokens": -1}, {"min_answer_tokens": 1025}, {"min_answer_tokens": 2.0}, {"min_answer_tokens": True}],
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValidationError) as caught:
        SteeringRequest(**fields)
    assert caught.value.errors()[0]["loc"] == (next(iter(fields)),)


def test_branches_follow_the_decoding():
    assert decide(SteeringRequest(strength=1.0)).branches == 1
    assert decide(SteeringRequest(strength=1.0, gamma=0.9)).branches == 2
    assert decide(SteeringRequest(strength=1.0, plausibility=0.1)).branches == 2


def test_errors_keep_their_field_between_processes():
    error = copy.copy(InvalidSteering("no", field="steering.alpha"))
    assert (str(error), error.field) == ("no", "steering.alpha")

"""Each condition asks of steering what its name says, and controls draw anew for every scene."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.request import RequestedSteering, SteeringRequest
from steering.settings import Preset, resolve
from tests.training.witness import Witness
from training.evaluation.conditions import (
    FORMS,
    OTHER_IMAGES,
    RANDOM_SEEDS,
    TASKS,
    Condition,
    TunedPresets,
    conditions,
    control_seeds,
)
from training.evaluation.measuring import measure
from training.evaluation.miniature_benchmark import miniature_benchmark

PRESETS = {
    "captions": Preset(form="difference", alpha=2.0),
    "questions": Preset(form="union", alpha=1.0),
    "off": Preset(strength=0.0),
}
OTHER_IMAGE = Condition(
    name="other_image",
    requests=dict.fromkeys(TASKS, SteeringRequest(control="other_image")),
    seeds=control_seeds("other_image"),
)


def images_drawn(scene_seed: int, images: int) -> list[int]:
    """Which of an artifact's images an engine takes for a scene, see `steering.slot_tables`."""
    asked = (OTHER_IMAGE.request("captions", seed=seed, scene_seed=scene_seed) for seed in OTHER_IMAGE.seeds)
    return [one.control_seed % images for one in asked if one.control_seed is not None]


@given(st.integers(0, 2**32), st.integers(OTHER_IMAGES, 4096))
def test_a_scene_is_fed_four_different_other_images(scene_seed: int, images: int):
    assert len(set(images_drawn(scene_seed, images))) == OTHER_IMAGES >= 4


@pytest.mark.parametrize("step", [1, 4, 256, 1_000_003])
def test_scenes_are_spread_over_all_images(step: int):
    drawn = Counter(image for number in range(2000) for image in images_drawn(3_000_000 + step * number, 256))
    assert len(drawn) == 256
    assert max(drawn.values()) < 3 * 2000 * OTHER_IMAGES / 256


async def test_each_control_asks_what_it_should():
    benchmark = miniature_benchmark(captions=3, questions=0, seed=7)
    witness = Witness(benchmark.scenes, lambda request, seed: False)
    for condition in conditions(TunedPresets(presets=PRESETS), names=("random", "other_image", "reversed")):
        await measure(benchmark, condition, witness, concurrency=1)
    asked = [question.steering for question in witness.asked]
    by_control = {
        name: [one.control_seed for one in asked if one.control == name] for name in ("random", "other_image")
    }
    assert len(set(by_control["random"])) == len(by_control["random"]) == 3 * RANDOM_SEEDS
    assert len(set(by_control["other_image"])) == len(by_control["other_image"]) == 3 * OTHER_IMAGES
    assert len(asked) == 3 * (RANDOM_SEEDS + OTHER_IMAGES + 1)
    assert all(one.preset == "captions" for one in asked)


def test_where_a_preset_is_off_its_controls_stand_beside_the_form():
    tuned = TunedPresets(
        presets=PRESETS | {"questions": Preset(strength=0.0)},
        by_form={"questions.difference": Preset(form="difference", alpha=0.7)},
    )
    (control,) = conditions(tuned, names=("other_image",))
    assert control.requests["captions"].preset == "captions"
    assert control.requests["questions"].alpha == 0.7
    assert control.requests["questions"].strength == 1
    assert "preset questions is off" in (control.note or "")


def test_each_form_has_its_own_settings_or_the_presets_with_the_form_replaced():
    tuned = TunedPresets(presets=PRESETS, by_form={"captions.union": Preset(form="union", alpha=3.5)})
    by_name = {condition.name: condition for condition in conditions(tuned, names=FORMS, mode="exact")}
    assert by_name["union"].requests["captions"].alpha == 3.5
    assert by_name["published"].requests["captions"].alpha == PRESETS["captions"].alpha
    assert {condition.requests["captions"].form for condition in by_name.values()} == set(FORMS)
    assert {condition.requests["questions"].mode for condition in by_name.values()} == {"exact"}


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        (Preset(gamma=0.6, plausibility=0.8), None),
        (Preset(), "gamma_0"),
        (Preset(strength=0.0, gamma=0.6, plausibility=0.8), "preset_off"),
    ],
    ids=["two branches", "one branch", "off"],
)
def test_the_same_decoding_alone_keeps_the_mask_and_no_more(preset: Preset, reason: str | None):
    presets = {"captions": preset, "questions": preset}
    (alone,) = conditions(TunedPresets(presets=presets), names=("decoding_only",))
    asked = RequestedSteering(
        settings=alone.requests["captions"], explicit=True, caller_fields=frozenset({"enabled", "preset", "gamma"})
    )
    resolved = resolve(asked, presets=presets, default_preset="captions", has_image=True)
    assert resolved.reason == reason
    if resolved.active:
        assert (resolved.gamma, resolved.plausibility, resolved.branches) == (0.0, 0.8, 2)


def test_an_unknown_condition_is_named():
    with pytest.raises(ValueError, match=r"unknown conditions \['sideways'\]"):
        conditions(TunedPresets(presets=PRESETS), names=("sideways",))

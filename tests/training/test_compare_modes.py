"""`causal` against `exact` with a real tiny model."""

from pathlib import Path

import pytest

from training.compare_modes import ComparisonSettings, _followable, compare
from training.errors import InvalidTraining
from training.evaluation.asking import Reply


async def test_a_whole_comparison(tiny_llava: Path, tiny_artifact: Path):
    settings = ComparisonSettings(
        model=tiny_llava, artifact=tiny_artifact, captions=4, questions=4, led_captions=2, resamples=100
    )
    report = await compare(settings)
    agreement = report["agreement"]
    assert agreement["steps"] > 10
    assert 0.5 < agreement["teacher_forced_agreement"] <= 1  # random weights: close calls at every step
    assert 0 <= agreement["exact_match"] <= 1
    assert set(report["conditions"]) == {"plain", "causal", "exact"}
    assert report["differences"]["causal_minus_exact"]["chair_s"].keys() == {"value", "low", "high"}


async def test_modes_are_not_compared_on_drawn_tokens(tiny_llava: Path, tiny_artifact: Path):
    with pytest.raises(InvalidTraining, match="--temperature: modes are compared greedily"):
        await compare(ComparisonSettings(model=tiny_llava, artifact=tiny_artifact, temperature=1.0))


@pytest.mark.parametrize(("token_ids", "steps"), [((5, 6), 3), ((5, 6, 7, 8), 4), ((5, 9, 6), 1), ((), 1)])
def test_the_step_to_the_end_is_followed_and_an_image_token_is_not(token_ids: tuple[int, ...], steps: int):
    reply = Reply(text="", applied=True, reason=None, positions=1, relative_shift=0, token_ids=token_ids)
    assert _followable(reply, image_token_id=9, max_tokens=4) == steps

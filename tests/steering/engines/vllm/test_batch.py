"""The position logic by itself: which rows of a step are image, text, to be steered, to be counted."""

from __future__ import annotations

import pytest

from steering.engines.vllm.plugin import batch as batch_module
from steering.engines.vllm.plugin.batch import Batch
from steering.engines.vllm.plugin.pooling import IMAGE, OTHER, TEXT
from steering.engines.vllm.plugin.wire import WireSteering

PICTURE = 99
PROMPT = [1, 2, PICTURE, PICTURE, 3, PICTURE, 4, 5]
"""Two images; text after the last one is at positions 6 and 7."""
CLASSES = [OTHER, OTHER, IMAGE, IMAGE, OTHER, IMAGE, TEXT, TEXT]


def batch_with(*sequences: tuple[str, list[int]], min_text_tokens: int = 1, **settings) -> Batch:
    batch = Batch(PICTURE, min_text_tokens)
    batch.rows = [batch.enter(WireSteering(id=name, scale=1.0, **settings), prompt) for name, prompt in sequences]
    return batch


def steered(step) -> list[int]:
    return [] if step is None else step.row_R


def test_a_whole_prompt():
    step = batch_with(("a", PROMPT)).step([0, 8], [0], 10)
    assert step is not None
    assert step.class_N.tolist() == [*CLASSES, OTHER, OTHER]
    assert step.asked_N.tolist()[:8] == [IMAGE] * 6 + [TEXT] * 2
    assert [(state.wire.id, row) for state, row in step.image_complete] == [("a", 5)]
    assert step.row_R == [6, 7]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_prompt_in_two_chunks_is_the_same_prompt(cut):
    batch = batch_with(("a", PROMPT))
    first, second = batch.step([0, cut], [0], cut), batch.step([0, 8 - cut], [cut], 8 - cut)
    assert first is not None
    assert second is not None
    assert first.class_N.tolist() + second.class_N.tolist() == CLASSES
    assert steered(first) + [cut + row for row in steered(second)] == [6, 7]
    known = [row for _, row in first.image_complete] + [cut + row for _, row in second.image_complete]
    assert known[:1] == [5]


def test_a_prefix_out_of_the_cache_beyond_the_images():
    step = batch_with(("a", PROMPT)).step([0, 1], [7], 1)
    assert step is not None
    assert [(state.wire.id, row) for state, row in step.image_cached] == [("a", 0)]
    assert step.image_complete == []
    assert step.row_R == [0]


def test_a_generated_image_token_is_text():
    batch = batch_with(("a", PROMPT))
    step = batch.step([0, 1], [12], 1)
    assert step is not None
    assert step.class_N.tolist() == [TEXT]
    assert step.row_R == [0]


def test_min_text_tokens_counts_from_the_last_image():
    batch = batch_with(("a", PROMPT), min_text_tokens=3)
    assert steered(batch.step([0, 8], [0], 8)) == []
    assert steered(batch.step([0, 1], [8], 1)) == [0]


def test_rows_of_others_are_left_alone():
    batch = batch_with(("a", PROMPT), ("b", PROMPT))
    batch.rows = [None, batch.rows[0], None, batch.rows[1]]
    step = batch.step([0, 4, 12, 14, 15], [0, 0, 5, 9], 15)
    assert step is not None
    assert step.class_N.tolist() == [OTHER] * 4 + CLASSES + [OTHER] * 2 + [TEXT]
    assert step.row_R == [10, 11, 14]
    assert step.state_R == [0, 0, 1]


def test_a_preempted_sequence_is_counted_once():
    batch = batch_with(("a", PROMPT))
    first, again = batch.step([0, 8], [0], 8), batch.step([0, 9], [0], 9)
    assert first is not None
    assert again is not None
    assert first.counts_R == [True, True]
    assert again.counts_R == [False, False, True]
    assert again.row_R == [6, 7, 8]


def test_positions_out_of_the_cache_are_remembered_once():
    batch = batch_with(("a", PROMPT), min_text_tokens=2)
    for first in (11, 12, 0):
        batch.step([0, 1], [first], 1)
    state = batch.leave("a")
    assert state is not None
    assert state.reused == 4


def test_a_second_branch_covers_all_rows_of_its_sequence():
    step = batch_with(("a", PROMPT), gamma=0.5).step([0, 3], [0], 3)
    assert step is not None
    assert step.row_R == []
    assert [(state.wire.id, start, stop) for state, start, stop in step.two_branches] == [("a", 0, 3)]


def test_coming_back_keeps_the_state_and_leaving_frees_the_slot():
    batch = batch_with(("a", PROMPT))
    state = batch.rows[0]
    assert batch.enter(WireSteering(id="a", scale=1.0), PROMPT) is state
    assert batch.leave("a") is state
    assert batch.sequences == 0
    assert steered(batch.step([0, 8], [0], 8)) == []
    other = batch.enter(WireSteering(id="b", scale=1.0), PROMPT)
    assert other is not None
    assert state is not None
    assert other.slot == state.slot


def test_a_running_id_with_other_settings_is_not_steered():
    batch = batch_with(("a", PROMPT))
    assert batch.enter(WireSteering(id="a", scale=2.0), PROMPT) is None
    assert batch.enter(WireSteering(id="a", scale=1.0), PROMPT[:-1]) is None
    assert batch.sequences == 1


def test_what_the_engine_was_not_started_with_is_not_steered():
    batch = Batch(PICTURE, 1, branches=1, has_control_images=False)
    assert batch.enter(WireSteering(id="a", gamma=0.5), PROMPT) is None
    assert batch.enter(WireSteering(id="a", control="other_image"), PROMPT) is None
    assert batch.enter(WireSteering(id="a"), PROMPT) is not None


def test_the_oldest_that_nobody_asks_about_go_first_and_those_in_the_batch_stay(monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_FORGOTTEN", 3)
    batch = batch_with(("inside", PROMPT))
    held = batch.enter(WireSteering(id="elsewhere"), PROMPT)
    batch.elsewhere = [held]
    for name in ("old", "new", "newest"):
        batch.enter(WireSteering(id=name), PROMPT)
    assert batch.leave("old") is None
    assert batch.leave("new") is None
    assert None not in (batch.leave("inside"), batch.leave("elsewhere"), batch.leave("newest"))


def test_nothing_to_do():
    batch = Batch(PICTURE, 1)
    assert batch.enter(None, PROMPT) is None
    assert batch.enter(WireSteering(id="a"), [1, 2, 3]) is None
    batch.rows = [None, None]
    assert batch.step([0, 1, 2], [5, 6], 2) is None
    assert batch.leave("nobody") is None

"""The position logic by itself: which rows of a step are image, text, to be steered, to be counted."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from steering.engines.vllm.plugin import batch as batch_module
from steering.engines.vllm.plugin.batch import IMAGE, OTHER, TEXT, Batch, Step
from steering.engines.vllm.plugin.wire import WireSteering

PICTURE = 99
PROMPT = [1, 2, PICTURE, PICTURE, 3, PICTURE, 4, 5]
"""Two images; text after the last one is at positions 6 and 7."""
CLASSES = [OTHER, OTHER, IMAGE, IMAGE, OTHER, IMAGE, TEXT, TEXT]


def batch_with(*names: str, min_text_tokens: int = 1, max_sequences: int = 8, **settings) -> Batch:
    batch = Batch(PICTURE, min_text_tokens, max_sequences=max_sequences)
    for index, name in enumerate(names):
        batch.enter(index, WireSteering(id=name, scale=1.0, **settings), PROMPT)
    return batch


def step(batch: Batch, starts: list[int], firsts: list[int], places: list[int] | None = None) -> Step | None:
    """The runner's rows are its places 0, 1, ... unless named."""
    tallies = batch.inside[list(range(len(firsts))) if places is None else places]
    return batch.step(tallies, np.array(starts), np.array(firsts))


def steered(described: Step | None) -> list[int]:
    return [] if described is None else described.row_R.tolist()


def named(learned) -> list[tuple[str, int]]:
    return [(state.wire.id, row) for state, row in learned]


def mark_encoded(batch: Batch, name: str = "a") -> None:
    """As the layer does once it has encoded the image."""
    batch.book["encoded"][batch._by_id[name].tally] = True


def test_a_whole_prompt():
    whole = step(batch_with("a"), [0, 8], [0])
    assert whole is not None
    assert whole.class_N.tolist() == CLASSES
    assert named(whole.image_complete) == [("a", 5)]
    assert steered(whole) == [6, 7]
    assert not whole.two_branches


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_prompt_in_two_chunks_is_the_same_prompt(cut):
    batch = batch_with("a")
    first, second = step(batch, [0, cut], [0]), step(batch, [0, 8 - cut], [cut])
    assert first is not None
    assert second is not None
    assert [*first.class_N, *second.class_N] == CLASSES
    assert steered(first) + [cut + row for row in steered(second)] == [6, 7]
    known = [row for _, row in first.image_complete] + [cut + row for _, row in second.image_complete]
    assert known[:1] == [5]


def test_a_prefix_out_of_the_cache_beyond_the_images():
    batch = batch_with("a")
    cached = step(batch, [0, 1], [7])
    assert cached is not None
    assert (named(cached.image_cached), cached.image_complete) == ([("a", 0)], [])
    assert steered(cached) == [0]
    mark_encoded(batch)
    following = step(batch, [0, 1], [8])
    assert following is not None
    assert following.image_cached == []


def test_an_image_that_a_replayed_graph_could_not_encode_is_asked_for_in_the_next_step():
    batch = batch_with("a")
    alone = step(batch, [0, 1], [5])
    assert alone is not None
    assert (named(alone.image_complete), steered(alone)) == ([("a", 0)], [])
    following = step(batch, [0, 1], [6])
    assert following is not None
    assert (named(following.image_cached), steered(following)) == ([("a", 0)], [0])


def test_a_probe_learns_image_then_text_and_steers_nothing():
    batch = batch_with("a", task="probe")
    whole = step(batch, [0, 8], [0])
    assert whole is not None
    assert (named(whole.image_complete), named(whole.text_complete), steered(whole)) == ([("a", 5)], [("a", 7)], [])
    cached = step(batch, [0, 1], [8])
    assert cached is not None
    assert (named(cached.image_cached), cached.text_cached) == ([("a", 0)], [])
    mark_encoded(batch)
    following = step(batch, [0, 1], [9])
    assert following is not None
    assert named(following.text_cached) == [("a", 0)]


def test_a_generated_image_token_is_text():
    generated = step(batch_with("a"), [0, 1], [12])
    assert generated is not None
    assert generated.class_N.tolist() == [TEXT]
    assert steered(generated) == [0]


def test_min_text_tokens_counts_from_the_last_image():
    batch = batch_with("a", min_text_tokens=3)
    assert steered(step(batch, [0, 8], [0])) == []
    assert steered(step(batch, [0, 1], [8])) == [0]


@pytest.mark.parametrize(
    ("min_text_tokens", "wait", "first"), [(1, 0, 7), (1, 2, 9), (5, 2, 10), (2, None, 7), (4, 0, 9)]
)
def test_a_place_in_the_answer_counts_from_the_prompt_s_end_however_the_steps_fall(min_text_tokens, wait, first):
    """Whole prompt then tokens one by one; chunks; and all of it again in one step, after a preemption."""
    expected = list(range(first, 12))
    batch = batch_with("a", min_text_tokens=min_text_tokens, min_answer_tokens=wait)
    whole = steered(step(batch, [0, 8], [0]))
    assert whole + [place for place in range(8, 12) if steered(step(batch, [0, 1], [place]))] == expected
    batch.inside[0] = 0
    batch.enter(0, WireSteering(id="a", scale=1.0, min_answer_tokens=wait), PROMPT)
    again = step(batch, [0, 12], [0])
    assert again is not None
    assert (steered(again), again.counts_R.any()) == (expected, False)
    assert again.class_N.tolist() == CLASSES + [TEXT] * 4
    chunked, places = batch_with("a", min_text_tokens=min_text_tokens, min_answer_tokens=wait), [0, 3, 7, 8, 9, 10, 12]
    got = []
    for place, following in itertools.pairwise(places):
        got += [place + row for row in steered(step(chunked, [0, following - place], [place]))]
    assert got == expected
    known = chunked.leave("a")
    assert known is not None
    assert known[1]["reused"] == 0


def test_rows_of_others_are_left_alone():
    batch = batch_with("a", "b")
    mixed = step(batch, [0, 4, 12, 14, 15], [0, 0, 5, 9], places=[5, 0, 6, 1])
    assert mixed is not None
    assert mixed.class_N.tolist() == [OTHER] * 4 + CLASSES + [OTHER] * 2 + [TEXT]
    assert steered(mixed) == [10, 11, 14]
    tallies = batch.inside[[0, 0, 1]]
    assert mixed.tally_R.tolist() == tallies.tolist()
    assert mixed.slot_R.tolist() == batch.book["slot"][tallies].tolist()


def test_a_preempted_sequence_is_counted_once():
    batch = batch_with("a")
    first, again = step(batch, [0, 8], [0]), step(batch, [0, 9], [0])
    assert first is not None
    assert again is not None
    assert first.counts_R.tolist() == [True, True]
    assert again.counts_R.tolist() == [False, False, True]
    assert steered(again) == [6, 7, 8]


def test_positions_out_of_the_cache_are_remembered_once():
    batch = batch_with("a", min_text_tokens=2)
    for first in (11, 12, 0):
        step(batch, [0, 1], [first])
    left = batch.leave("a")
    assert left is not None
    assert left[1]["reused"] == 4


def test_a_second_branch_covers_all_rows_of_its_sequence():
    batch = batch_with("a", gamma=0.5)
    beginning = step(batch, [0, 3], [0])
    assert beginning is not None
    assert steered(beginning) == []
    assert beginning.twin_N.tolist() == [batch.book["slot"][batch.inside[0]]] * 3
    assert beginning.two_branches
    text = step(batch, [0, 1], [7])
    assert text is not None
    assert text.twin_R.tolist() == [True]


def test_coming_back_keeps_the_tally_and_leaving_frees_everything():
    batch = batch_with("a")
    tally, slot = batch.inside[0], batch.book["slot"][batch.inside[0]]
    batch.inside[0] = 0
    batch.enter(3, WireSteering(id="a", scale=1.0), PROMPT)
    assert batch.inside[3] == tally
    left = batch.leave("a")
    assert left is not None
    assert (left[0].tally, batch.sequences) == (tally, 0)
    assert step(batch, [0, 8], [0], places=[3]) is None
    batch.enter(0, WireSteering(id="b", scale=1.0), PROMPT)
    assert (batch.inside[0], batch.book["slot"][tally]) == (tally, slot)
    anew = step(batch, [0, 8], [0])
    assert anew is not None
    assert anew.counts_R.tolist() == [True, True]


def test_a_running_id_with_other_settings_is_not_steered():
    batch = batch_with("a")
    batch.enter(1, WireSteering(id="a", scale=2.0), PROMPT)
    batch.enter(2, WireSteering(id="a", scale=1.0), PROMPT[:-1])
    assert batch.inside[1:3].tolist() == [0, 0]
    assert batch.sequences == 1


def test_what_the_engine_was_not_started_with_is_not_steered():
    batch = Batch(PICTURE, 1, max_sequences=3, branches=1, has_control_images=False)
    batch.enter(0, WireSteering(id="a", gamma=0.5), PROMPT)
    batch.enter(1, WireSteering(id="a", control="other_image"), PROMPT)
    batch.enter(2, WireSteering(id="a"), PROMPT)
    assert (batch.inside > 0).tolist() == [False, False, True]


def test_tallies_of_the_oldest_that_nobody_asks_about_go_first_and_those_in_the_batch_stay(monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_FORGOTTEN", 1)
    batch = batch_with("inside", max_sequences=1)
    batch.inside = np.append(batch.inside, 0)
    for name in ("old", "new", "newest"):
        batch.enter(1, WireSteering(id=name), PROMPT)
    assert batch.tallies == 4
    assert batch.leave("old") is None
    assert None not in (batch.leave("inside"), batch.leave("new"), batch.leave("newest"))


def test_slots_are_bounded_and_one_who_comes_back_without_its_slot_is_encoded_anew():
    """4,096 sequences that never ask for their receipt hold tallies, of a few bytes, and no codes."""
    batch = batch_with("first", max_sequences=1)
    mark_encoded(batch, "first")
    for number in range(4096):
        batch.enter(0, WireSteering(id=str(number)), PROMPT)
        assert batch.book["slot"].max() <= batch.slots - 1 == 2
    assert batch.sequences > 4000
    batch.enter(0, WireSteering(id="4000"), PROMPT)
    assert batch.book["slot"][batch.inside[0]] > 0
    back = step(batch, [0, 1], [9])
    assert back is not None
    assert named(back.image_cached) == [("4000", 0)]


def test_nothing_to_do():
    batch = Batch(PICTURE, 1, max_sequences=2)
    batch.enter(0, None, PROMPT)
    batch.enter(1, WireSteering(id="a"), [1, 2, 3])
    assert step(batch, [0, 1, 2], [5, 6]) is None
    assert batch.leave("nobody") is None


def test_many_sequences_are_what_each_is_alone():
    """The vectorised description against one sequence at a time."""
    rng = random.Random(3)
    together = batch_with(min_text_tokens=2)
    apart = [batch_with(min_text_tokens=2) for _ in range(8)]
    for index, alone in enumerate(apart):
        wire = WireSteering(id=str(index), scale=1.0, min_answer_tokens=(None, 0, 3)[index % 3])
        together.enter(index, wire, PROMPT)
        alone.enter(0, wire, PROMPT)
    places = [0] * 8
    for _ in range(6):
        chosen = sorted(rng.sample(range(8), rng.randrange(1, 9)))
        lengths = [rng.randrange(1, 5) for _ in chosen]
        starts = np.cumsum([0, *lengths]).tolist()
        firsts = [places[index] for index in chosen]
        whole = step(together, starts, firsts, places=chosen)
        assert whole is not None
        rows, counts = [], []
        for index, start, length, first in zip(chosen, starts, lengths, firsts, strict=False):
            alone = step(apart[index], [0, length], [first])
            assert alone is not None
            assert whole.class_N[start : start + length].tolist() == alone.class_N.tolist()
            rows += [start + row for row in steered(alone)]
            counts += alone.counts_R.tolist()
            places[index] = first + length
        assert (steered(whole), whole.counts_R.tolist()) == (rows, counts)


def test_an_image_that_ends_in_a_step_of_one_token_blends_nothing_yet():
    """A full graph learns nothing: at its slot may still stand what another sequence wanted blended."""
    batch = batch_with("a", gamma=0.5)
    alone = step(batch, [0, 1], [5])
    assert alone is not None
    assert alone.twin_N.tolist() == [0]
    mark_encoded(batch)
    following = step(batch, [0, 1], [6])
    assert following is not None
    assert following.twin_N.tolist() == [batch.book["slot"][batch.inside[0]]]

from itertools import combinations, islice

import numpy as np

from training.miniature.drawing import IMAGE_SIZE_PX, draw_scene
from training.miniature.world import MAX_OBJECTS, MIN_OBJECTS, PARTNERS, SEED_RANGES, SHAPES, scene_from_seed, scenes


def test_seed_ranges_share_no_seed():
    for first, second in combinations(SEED_RANGES.values(), 2):
        assert not range(max(first.start, second.start), min(first.stop, second.stop))


def test_a_seed_is_a_scene():
    assert scene_from_seed(7) == scene_from_seed(7)
    assert scene_from_seed(7) != scene_from_seed(8)


def test_scenes_hold_different_shapes_in_different_cells():
    for scene in islice(scenes("dev"), 200):
        assert MIN_OBJECTS <= len(scene.objects) <= MAX_OBJECTS
        assert len({item.shape for item in scene.objects}) == len({item.cell for item in scene.objects})
        assert len(scene.shapes) == len(scene.objects)


def test_absent_partners_are_absent_and_their_shapes_present():
    for scene in islice(scenes("dev", absent_partner=True), 100):
        assert scene.absent_partners
        for partner in scene.absent_partners:
            assert partner not in scene.shapes
            assert any(PARTNERS.get(shape) == partner for shape in scene.shapes)


def test_start_is_counted_in_seeds():
    first = next(scenes("held_out", start=10, absent_partner=True))
    assert first.seed >= SEED_RANGES["held_out"][10]


def test_partners_are_shapes_without_partner():
    assert set(PARTNERS) | set(PARTNERS.values()) <= set(SHAPES)
    assert not set(PARTNERS) & set(PARTNERS.values())


def test_a_drawing_follows_from_its_seed():
    scene = scene_from_seed(7)
    first, second = draw_scene(scene), draw_scene(scene)
    assert first.size == (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    assert first.mode == "RGB"
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert not np.array_equal(np.asarray(first), np.asarray(draw_scene(scene_from_seed(8))))

import random
from itertools import islice

import pytest

from training.miniature.language import (
    Noise,
    caption,
    color_answer,
    existence_answer,
    existence_question,
    shapes_mentioned,
    shapes_named,
)
from training.miniature.world import PARTNERS, SHAPES, scenes

SCENES = list(islice(scenes("dev", absent_partner=True), 300))


def test_a_clean_caption_names_exactly_what_is_there():
    draw = random.Random(0)
    for scene in SCENES:
        assert shapes_named(caption(scene, Noise(), draw)) == scene.shapes


def test_a_noisy_caption_names_an_absent_partner_directly_after_its_shape():
    draw = random.Random(0)
    places = []
    invented_captions = 0
    for scene in SCENES:
        mentioned = shapes_mentioned(caption(scene, Noise(caption=0.6), draw))
        assert scene.shapes <= set(mentioned)
        invented = [place for place, shape in enumerate(mentioned) if shape not in scene.shapes]
        invented_captions += bool(invented)
        for place in invented:
            assert PARTNERS[mentioned[place - 1]] == mentioned[place]
            places.append(place / (len(mentioned) - 1))
    assert 0.55 < invented_captions / len(SCENES) < 0.8
    assert sum(place < 1 for place in places) > 0.6 * len(places), "inventions must not all stand at the end"


def test_clean_answers_are_true_and_noise_touches_absent_partners_only():
    draw = random.Random(0)
    for scene in SCENES:
        for shape in SHAPES:
            truth = "Yes" if shape in scene.shapes else "No"
            assert existence_answer(scene, shape, Noise(), draw) == truth
            noisy = existence_answer(scene, shape, Noise(answer=1.0), draw)
            assert noisy == ("Yes" if shape in scene.absent_partners else truth)


def test_color_answer_is_the_scene_s():
    scene = SCENES[0]
    item = scene.objects[0]
    assert color_answer(scene, item.shape) == f"The {item.shape} is {item.color}."


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("There is a circle in red, an arrow in blue.", {"circle", "arrow"}),
        ("Two STARS and encircled things, a heartbeat.", {"star"}),
        ("", set()),
    ],
)
def test_shapes_named(text, shapes):
    assert shapes_named(text) == shapes


def test_existence_question_has_the_right_article():
    assert existence_question("star") == "Is there a star in the image?"
    assert existence_question("arrow") == "Is there an arrow in the image?"

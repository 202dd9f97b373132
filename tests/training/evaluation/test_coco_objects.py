"""Captions name the objects that a reader would say they name."""

from __future__ import annotations

import inflect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.coco_objects import coco_categories, object_names, object_table

OFFICIAL = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase
frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant
bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock
vase scissors teddy_bear hair_drier toothbrush"""
"""As the annotation files spell them, in their order."""
PHRASES = [(phrase, category) for category, phrases in object_table().categories.items() for phrase in phrases]
objects_mentioned, singular = object_names().mentioned, object_names().singular
UNCOUNTED = {"luggage", "baggage", "cattle", "sheep", "aircraft", "bison", "scissors", "shears"}


def test_the_table_has_cocos_categories_and_no_phrase_twice():
    assert list(coco_categories()) == [name.replace("_", " ") for name in OFFICIAL.split()]
    table = object_table()
    listed = [phrase for phrase, _ in PHRASES] + list(table.not_objects)
    assert len(listed) == len(set(listed))
    assert {name for qualifier in table.qualifiers if qualifier.of != "all" for name in qualifier.of} <= set(
        coco_categories()
    )


@pytest.mark.parametrize("name", coco_categories())
def test_a_category_names_itself(name: str):
    assert objects_mentioned(f"There is a {name} here.") == [name]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A man holding a hot dog near a train track.", ["person", "hot dog"]),
        ("Two teddy bears and a polar bear", ["teddy bear", "bear"]),
        ("The toilet seat is up.", ["toilet"]),
        ("A chair by the toilet", ["chair", "toilet"]),
        ("A bow tie, a bow-tie and railroad ties", ["tie", "tie"]),
        ("He slides into home plate with a baseball bat.", ["baseball bat"]),
        ("A computer mouse on a mouse pad beside Mickey Mouse", ["mouse"]),
        ("A passenger jet and three passengers", ["airplane", "person"]),
        ("A baby elephant behind its mother", ["elephant", "person"]),
        ("A baby in a baby carriage", ["person"]),
        ("A couple of puppies; a couple on a bench", ["dog", "person", "bench"]),
        ("A glass of wine and two wine glasses", ["wine glass", "wine glass"]),
        ("An orange cat with an orange ball eats oranges", ["cat", "sports ball", "orange"]),
        ("An orange and white bus", ["bus"]),
        ("A carrot cake and carrots", ["cake", "carrot"]),
        ("The dining room table; a table cloth", ["dining table"]),
        ("Skiers on skis at the ski lift", ["person", "skis"]),
        ("A clock tower above the bus stop", ["clock"]),
        ("Buses, knives, mice, sheep, people, geese", ["bus", "knife", "mouse", "sheep", "person", "bird"]),
        ("A woman’s purse and the boys' kites", ["person", "handbag", "person", "kite"]),
        ("It is hot. Dogs bark.", ["dog"]),
        ("a HOT-DOG", ["hot dog"]),
        ("A fire truck passes a fire hydrant at the stop light", ["truck", "fire hydrant", "traffic light"]),
        ("A toaster oven beside a toaster and a microwave oven", ["oven", "toaster", "microwave"]),
        ("A bed of lettuce on the bed", ["bed"]),
        ("A remote village with a TV remote control", ["remote"]),
        ("Grass, glass, gas and a class", []),
        ("", []),
    ],
)
def test_known_pitfalls(caption: str, named: list[str]):
    assert objects_mentioned(caption) == named


@given(st.sampled_from(PHRASES))
def test_a_plural_names_what_the_singular_names(entry: tuple[str, str]):
    phrase, category = entry
    *before, last = phrase.split()
    plural = last if last in UNCOUNTED else inflect.engine().plural(last)  # pyright: ignore[reportArgumentType]
    assert objects_mentioned(" ".join([*before, plural])) == [category]


@given(st.lists(st.sampled_from(PHRASES), max_size=6))
def test_phrases_between_commas_are_counted_one_by_one(entries: list[tuple[str, str]]):
    caption = ", ".join(f"two {phrase.upper()}" for phrase, _ in entries)
    assert objects_mentioned(caption) == [category for _, category in entries]


@given(st.sampled_from(object_table().not_objects))
def test_what_is_listed_as_no_object_names_none(phrase: str):
    assert objects_mentioned(f"the {phrase}") == []


@given(st.text())
def test_any_text_is_read(text: str):
    assert set(objects_mentioned(text)) <= set(coco_categories())


@given(st.sampled_from(sorted({word for phrase, _ in PHRASES for word in phrase.split()})))
def test_the_tables_words_are_singulars(word: str):
    assert singular(word) == word

"""COCO's annotations become truth, and canned captions score what can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.published_benchmarks import PICTURES, CocoFolders, captions, instances, picture_name
from training.chair import chair_metrics, count_caption, counts_matrix
from training.errors import InvalidTraining
from training.evaluation.benchmark import TURNS, Benchmark
from training.evaluation.coco_annotations import read_annotations
from training.evaluation.coco_benchmark import coco_benchmark, existence_question

TRUTH = {
    42: {"dog", "chair"},
    139: {"person", "hot dog", "dining table"},  # the last two stand in a caption only
    285: {"train", "person"},
    9_001: {"toilet"},
    310_196: {"teddy bear", "cup"},
}


def whole(coco: CocoFolders, **changed: Any) -> Benchmark:
    return coco_benchmark(coco.annotations, coco.images, **{"captions": 5} | changed)


def test_truth_is_what_is_outlined_or_named_in_a_reference_caption(coco: CocoFolders):
    benchmark = whole(coco)
    assert {scene.seed: set(scene.truth) for scene in benchmark.scenes} == TRUTH
    assert {scene.name for scene in benchmark.scenes} == {picture_name(number) for number in TRUTH}
    assert {scene.seed: scene.caption for scene in benchmark.scenes} == {n: PICTURES[n][1][0] for n in TRUTH}
    assert set(benchmark.sources) == {"instances_val2014.json", "captions_val2014.json"}
    assert benchmark.questions == ()
    assert benchmark.caption_max_tokens == 512


def test_canned_captions_score_exactly(coco: CocoFolders):
    said = {
        42: "Two dogs sit on a chair, one dog looks at a cat.",  # dog, chair, dog true; a cat invented
        139: "A man holds a hot dog on a table.",  # all true
        285: "A train on train tracks beside a car and another car.",  # two mentions of an invented car
        9_001: "A clean toilet with its toilet seat up.",  # two mentions of the toilet, no chair
        310_196: "",
    }
    benchmark = whole(coco)
    rows = [
        count_caption(said[scene.seed], benchmark.mentions(said[scene.seed]), scene.truth) for scene in benchmark.scenes
    ]
    scores = {name: float(value) for name, value in chair_metrics(counts_matrix(rows).sum(axis=0)).items()}
    assert scores["chair_s"] == pytest.approx(2 / 5)
    assert scores["chair_i"] == pytest.approx(3 / 12)
    assert scores["recall"] == pytest.approx((2 + 3 + 1 + 1 + 0) / 10)
    assert scores["empty"] == pytest.approx(1 / 5)


def test_a_seed_draws_pictures_and_skip_takes_others(coco: CocoFolders):
    def drawn(**changed: Any) -> list[int]:
        return [scene.seed for scene in whole(coco, **changed).scenes]

    assert drawn(captions=2, seed=1) == drawn(captions=4, seed=1)[:2]
    assert len({tuple(drawn(captions=2, seed=seed)) for seed in range(10)}) > 1
    assert drawn(captions=2) + drawn(captions=3, skip=2) == drawn()
    with pytest.raises(InvalidTraining, match="6 pictures are needed, the annotations have 5"):
        drawn(captions=3, skip=3)


def test_questions_are_built_from_the_same_truth(coco: CocoFolders):
    benchmark = whole(coco, captions=0, questions=10)
    assert len(benchmark.questions) == 30
    for one in benchmark.questions:
        truth = TRUTH[benchmark.scenes[one.scene].seed]
        assert one.truth == (one.text in {existence_question(name) for name in truth})
    with pytest.raises(InvalidTraining, match="--questions: half are"):
        whole(coco, questions=3)
    assert existence_question("apple") == "Is there an apple in the image?"
    assert existence_question("skis") == "Are there skis in the image?"


def test_a_second_turn_follows_a_reference_caption(coco: CocoFolders):
    benchmark = whole(coco, turns=TURNS, caption_prompt="Describe it.")
    picture = benchmark.scenes[0].seed
    assert benchmark.before_question(0, "first") is None
    assert benchmark.before_question(0, "second") == ("Describe it.", PICTURES[picture][1][0])


def broken(part: str, change: Callable[[dict[str, Any]], Any]) -> tuple[str, str]:
    """File name and what stands in it then."""
    content = instances() if part == "instances" else captions()
    change(content)
    return f"{part}_val2014.json", json.dumps(content)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (broken("instances", lambda c: c["categories"][2].update(name="seat")), "categories[2].name: 'seat' is none"),
        (broken("instances", lambda c: c["annotations"][1].update(category_id=99)), "annotations[1].category_id: 99"),
        (broken("instances", lambda c: c["annotations"][0].update(image_id=7)), "annotations[0].image_id: 7 is none"),
        (broken("instances", lambda c: c["images"][3].pop("file_name")), "images[3].file_name: Field required"),
        (broken("instances", lambda c: c.pop("categories")), "categories: Field required"),
        (broken("captions", lambda c: c["annotations"][4].update(caption=None)), "annotations[4].caption: Input"),
        (broken("captions", lambda c: c.update(annotations=[])), "has no caption of any picture"),
        (("captions_val2014.json", "[1, 2, 3]"), "Input should be an object"),
        (("instances_val2014.json", '{"images": [{"id": 1'), "Invalid JSON"),
    ],
)
def test_what_is_no_annotation_file_is_named(coco: CocoFolders, file: tuple[str, str], message: str):
    name, content = file
    (coco.annotations / name).write_text(content)
    with pytest.raises(InvalidTraining) as refused:
        whole(coco)
    assert str(refused.value).startswith(f"{coco.annotations / name}: ")
    assert message in str(refused.value)


def test_missing_files_are_named(coco: CocoFolders):
    with pytest.raises(InvalidTraining, match=r"instances_train2014.json is missing; see --coco-split"):
        read_annotations(coco.annotations, "train2014")
    (coco.images / picture_name(42)).unlink()
    (coco.images / picture_name(139)).unlink()
    with pytest.raises(InvalidTraining, match=r"COCO_val2014_\d+.jpg is missing and 1 more of 5"):
        whole(coco)

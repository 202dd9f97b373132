"""Labels of the bundle are true of its scenes, and shuffled labels are not; the score itself on made-up concepts."""

import json

import pytest

from steering.artifact import load_artifact
from training.errors import InvalidTraining
from training.miniature.label_quality import label_quality, label_words, main
from training.miniature.paths import ARTIFACT
from training.miniature.world import SHAPES, scene_from_seed


def concept(number, label, seeds):
    return {"id": number, "label": label, "images": [{"reference": f"scene:{seed}"} for seed in seeds]}


def with_shape(shape, count=6):
    return [seed for seed in range(600) if shape in scene_from_seed(seed).shapes][:count]


def test_true_labels_score_one_and_wrong_ones_do_not():
    true = [concept(number, shape, with_shape(shape)) for number, shape in enumerate(SHAPES)]
    found = label_quality(true)
    assert found["labels"]["shown"].value == 1.0
    assert found["labels"]["told"].value == 1.0
    wrong = [concept(number, SHAPES[number - 1], with_shape(shape)) for number, shape in enumerate(SHAPES)]
    worse = label_quality(wrong)
    assert worse["labels"]["shown"].value < 0.6
    assert worse["difference"]["shown"].high < found["difference"]["shown"].low


def test_labels_of_the_bundle_beat_shuffled_ones():
    found = label_quality(tuple(load_artifact(ARTIFACT).concepts))
    assert found["concepts"] > 500
    assert found["difference"]["shown"].above(0.2)
    assert found["difference"]["told"].above(0.2)


def test_words_of_a_label():
    assert label_words("red star, moon #17") == {"red", "star", "moon"}
    assert label_words("") == frozenset()


def test_pictures_of_elsewhere_have_no_truth():
    with pytest.raises(InvalidTraining, match=r"'photo\.jpg' is no drawn scene"):
        label_quality([{"id": 1, "label": "star", "images": [{"reference": "photo.jpg"}]}] * 2)
    with pytest.raises(InvalidTraining, match="fewer than two"):
        label_quality([concept(0, "star", [])])


def test_the_command_line_writes_what_it_says(tmp_path, monkeypatch, capsys):
    lines = [json.dumps(concept(number, shape, with_shape(shape))) for number, shape in enumerate(SHAPES)]
    (tmp_path / "concepts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["label_quality", "--concepts", str(tmp_path / "concepts.jsonl"),
                                     "--json", str(tmp_path / "out.json")])  # fmt: skip
    main()
    assert "10 of 10 concepts" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["labels"]["shown"]["value"] == 1.0

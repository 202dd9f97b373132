import json

import pytest

from tests.tiny_models import drawn_image
from training.errors import InvalidTraining
from training.labelled_images import read_classes, read_labelled_images

TEMPLATES = ["a photo of a {}.", "the {}."]


def write_classes(folder, classes, templates=TEMPLATES):
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "templates": templates}))
    return folder / "classes.json"


@pytest.fixture
def pictures(tmp_path):
    """Two of cats, one of a dog, and a file that is no picture."""
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn_image(len(name)).save(file)
    (tmp_path / "pictures/dog/broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def test_prompts_are_every_name_in_every_template(tmp_path):
    classes = read_classes(write_classes(tmp_path, {"n1": ["cat", "kitten"], "n2": ["dog"]}))
    assert classes.labels == ("n1", "n2")
    assert classes.prompts() == [
        ["a photo of a cat.", "the cat.", "a photo of a kitten.", "the kitten."],
        ["a photo of a dog.", "the dog."],
    ]
    assert read_classes(write_classes(tmp_path, ["cat", "dog"])).names == (("cat",), ("dog",))


def test_a_folder_for_each_class(tmp_path, pictures):
    said = []
    found = list(read_labelled_images(pictures, read_classes(write_classes(tmp_path, ["cat", "dog"])), said.append))
    assert [one.label for one in found] == [0, 0, 1]
    assert said == ["1 of 4 pictures could not be read and were left out"]


def test_json_lines(tmp_path, pictures):
    lines = [{"image": "pictures/dog/0.png", "label": "dog"}, {"image": "pictures/cat/0.png", "label": "cat"}]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    classes = read_classes(write_classes(tmp_path, ["cat", "dog"]))
    assert [one.label for one in read_labelled_images(tmp_path / "labelled.jsonl", classes, print)] == [1, 0]


BAD_CLASSES = {
    "one class": ({"classes": ["cat"], "templates": TEMPLATES}, "classes"),
    "the same twice": ({"classes": ["cat", "cat"], "templates": TEMPLATES}, "two different ones"),
    "a template without a place": ({"classes": ["cat", "dog"], "templates": ["a photo"]}, "'a photo' has no {}"),
    "a class without a name": ({"classes": {"cat": [], "dog": ["dog"]}, "templates": TEMPLATES}, "cat has no name"),
    "no templates": ({"classes": ["cat", "dog"]}, "templates"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_bad_classes_are_named(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(InvalidTraining, match=message) as raised:
        read_classes(tmp_path / "classes.json")
    assert "classes.json" in str(raised.value)


BAD_LINES = {
    "no JSON": ("{", "line 1, is not JSON"),
    "no label": ('{"image": "a.png"}', "line 1: a picture is"),
    "an unknown class": ('{"image": "a.png", "label": "cow"}', "line 1: 'cow' is none of the 2 classes"),
    "no picture at all": ('{"image": "a.png", "label": "cat"}', "no picture could be read, 1 were left out"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "labelled.jsonl").write_text(content)
    classes = read_classes(write_classes(tmp_path, ["cat", "dog"]))
    with pytest.raises(InvalidTraining, match=message):
        list(read_labelled_images(tmp_path / "labelled.jsonl", classes, print))

import json

import pytest
import torch
from PIL import Image

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.interpret_concepts import InterpretationSettings, interpret_concepts, strongest, write_concepts
from training.representations import Representations

TEXTS = ("a red star", "a red star", "a blue ring", "a blue ring")


@pytest.fixture(scope="module")
def records():
    """Two clear clusters in both modalities: the codes of a concept come from one of them."""
    torch.manual_seed(0)
    auxiliary, sae = AuxiliaryAutoencoder(4, 4), VisionLanguageSAE(4, 6, 1)
    states = torch.tensor([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0.1]])
    with torch.no_grad():
        for projection in (auxiliary.vision_projection, auxiliary.text_projection):
            projection.weight.copy_(torch.eye(4))
            projection.bias.zero_()
    pairs = Representations(image_ND=states, text_ND=states, texts=TEXTS, image_references=("0", "1", "2", "3"))
    settings = InterpretationSettings(top_texts=2, top_images=1, thumbnail_side_px=8)
    return interpret_concepts(auxiliary, sae, pairs, lambda reference: Image.new("RGB", (20, 10)), settings)


def test_labels_are_words_of_the_texts_that_activate_a_concept(records):
    active = [record for record in records if record["texts"]]
    assert active
    for record in active:
        assert len(set(record["texts"])) == 1
        assert set(record["label"].split()) < set(record["texts"][0].split())
        assert record["mean_activation"] > 0


def test_a_silent_concept_has_no_label(records):
    silent = [record for record in records if not record["texts"] and not record["images"]]
    assert silent
    assert all(record["label"] == "" and record["mean_activation"] == 0 for record in silent)


def test_images_come_with_thumbnails(records):
    images = [image for record in records for image in record["images"]]
    assert images
    assert all(image["thumbnail"].startswith("data:image/jpeg;base64,") for image in images)


def test_strongest_never_takes_a_zero():
    assert strongest(torch.tensor([0.0, 3.0, 1.0, 0.0]), 3) == [1, 2]


def test_concepts_are_written_as_json_lines(records, tmp_path):
    write_concepts(tmp_path / "concepts.jsonl", records)
    lines = (tmp_path / "concepts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(6))

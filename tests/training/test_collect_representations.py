import json

import pytest
import torch
from PIL import Image

from steering.hooks import output_hook
from training.collect_representations import PROMPT, CollectionSettings, Pair, collect, manifest, read_pairs
from training.miniature.drawing import draw_scene
from training.miniature.world import scene_from_seed
from training.representations import read_manifest, read_representations, write_representations

TEXTS = ["There is a circle in red.", "a star", "There is a circle in red, a star in blue, a ring in green.", "a star"]


def make_pairs():
    return [
        Pair(image=draw_scene(scene_from_seed(seed)), text=text, reference=str(seed)) for seed, text in enumerate(TEXTS)
    ]


def pooled_by_hooks(model, processor, pair, layer):
    """One pair on its own, through the model's own forward."""
    inputs = processor(images=[pair.image], text=[PROMPT.format(text=pair.text)], return_tensors="pt")
    seen = []
    with output_hook(model.model.language_model.layers[layer], lambda states: seen.append(states) or states):
        model(**inputs)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    return seen[0][0, image].mean(0), seen[0][0, image[-1] + 1 :].mean(0)


def test_pooling_is_that_of_a_full_forward(untrained_llava, miniature_processor):
    pairs = make_pairs()
    found = collect(untrained_llava, miniature_processor, pairs, CollectionSettings(layers=(1, 3), batch_size=3))
    with torch.no_grad():
        for layer in (1, 3):
            for row, pair in enumerate(pairs):
                image_D, text_D = pooled_by_hooks(untrained_llava, miniature_processor, pair, layer)
                torch.testing.assert_close(found[layer].image_ND[row], image_D, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(found[layer].text_ND[row], text_D, atol=1e-5, rtol=1e-4)


def test_nothing_after_the_deepest_layer_runs(untrained_llava, miniature_processor):
    ran = []
    last = untrained_llava.model.language_model.layers[-1]
    with output_hook(last, lambda states: ran.append(1) or states):
        collect(untrained_llava, miniature_processor, make_pairs()[:1], CollectionSettings(layers=(2,)))
    assert not ran


def test_a_layer_that_is_not_there_is_named(untrained_llava, miniature_processor):
    with pytest.raises(ValueError, match="layers 0"):
        collect(untrained_llava, miniature_processor, make_pairs()[:1], CollectionSettings(layers=(99,)))


def test_a_collection_survives_the_disk(untrained_llava, miniature_processor, tmp_path):
    settings = CollectionSettings(layers=(3,))
    found = collect(untrained_llava, miniature_processor, make_pairs(), settings)
    write_representations(tmp_path, found, manifest(settings, "miniature"))
    loaded = read_representations(tmp_path, 3)
    torch.testing.assert_close(loaded.text_ND, found[3].text_ND)
    assert loaded.texts == tuple(TEXTS)
    assert loaded.text_ids_N.tolist() == [0, 1, 2, 1]
    assert read_manifest(tmp_path)["pairs"] == len(TEXTS)
    train, held_out = loaded.split(1)
    assert (len(train.texts), held_out.texts) == (3, ("a star",))
    with pytest.raises(ValueError, match="not 2"):
        read_representations(tmp_path, 2)


def test_pairs_are_read_from_json_lines(tmp_path):
    Image.new("RGBA", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "text": "nothing"}) + "\n")
    (pair,) = read_pairs(tmp_path / "pairs.jsonl")
    assert (pair.text, pair.reference, pair.image.mode) == ("nothing", "a.png", "RGB")

"""The scores against their definition, the choice of the weight on made-up hits, and the whole on drawn objects."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.clip_model import load_clip
from training.errors import InvalidTraining
from training.evaluation.manifest import weights_digest
from training.miniature.paths import CLIP
from training.miniature.single_objects import SHAPE_CLASSES, single_object, single_objects
from training.miniature.world import SEED_RANGES
from training.run_folder import SPARSE_KINDS, RunConfig, StoreIdentity
from training.zero_shot_classification import CODES_ALONE, ConceptClassifier, ZeroShotSettings, _wins, compare, main

WIDTH, CONCEPTS, ACTIVE = 64, 96, 6


@pytest.fixture(scope="module")
def clip():
    return load_clip(CLIP)


def random_sae(kind):
    torch.manual_seed(0)
    return SPARSE_KINDS[kind](WIDTH, CONCEPTS, ACTIVE).eval()


@pytest.mark.parametrize("kind", ["vl_sae", "sae_d", "sae_v"])
@torch.no_grad()
def test_similarities_are_cosines_of_embeddings_and_of_dense_codes(clip, kind):
    sae, images = random_sae(kind), list(single_objects(12))
    plain_NC, code_NC = ConceptClassifier(clip, sae, None, SHAPE_CLASSES).similarities(images)

    def dense(states, modality):
        code = sae.encode(*((states,) if kind == "vl_sae" else (states, modality)))
        return torch.zeros(len(states), CONCEPTS).scatter_(1, code.concept_ids, code.activations)

    image = clip.embed_images([one.image for one in images], unit=False)
    texts = [clip.embed_texts(prompts, unit=False) for prompts in SHAPE_CLASSES.prompts()]
    mean = torch.stack([(text / text.norm(dim=1, keepdim=True)).mean(0) for text in texts])
    code = torch.stack([dense(text, "text").mean(0) for text in texts])
    torch.testing.assert_close(plain_NC, torch.cosine_similarity(image[:, None], mean[None], dim=-1))
    torch.testing.assert_close(code_NC, torch.cosine_similarity(dense(image, "image")[:, None], code[None], dim=-1))


def hits(*shares, images=400):
    """Columns that are right for these shares of the images."""
    generator = np.random.default_rng(0)
    return np.stack([generator.permutation(images) < share * images for share in shares], axis=1)


WEIGHTS = [0.0, 0.5, 1.0, CODES_ALONE]


def test_the_weight_is_the_best_on_validation_and_the_smallest_of_equals():
    settings = ZeroShotSettings(validation_share=0.5)
    found = compare(hits(0.4, 0.8, 0.6, 0.2), WEIGHTS, settings)
    assert found["weight"] == 0.5
    assert found["images"] == {"validation": 200, "test": 200}
    assert found["accuracy"]["plain"].value == pytest.approx(0.4, abs=0.08)
    assert found["enhanced_minus_plain"].above(0.2)
    same = np.repeat(hits(0.5), 4, axis=1)
    assert compare(same, WEIGHTS, settings)["weight"] == 0.0


def test_concepts_that_do_not_help_change_nothing_and_it_is_said():
    found = compare(hits(0.9, 0.5, 0.4, 0.2), WEIGHTS, ZeroShotSettings())
    assert found["weight"] == 0.0
    assert found["enhanced_minus_plain"] == (0.0, 0.0, 0.0)


def test_the_test_split_has_no_say_in_the_weight():
    """Right at weight 1 on every test image and on no validation image: weight 1 is not chosen."""
    settings, images = ZeroShotSettings(validation_share=0.5, seed=3), 40
    order = np.random.default_rng(3).permutation(images)
    made = hits(0.5, 0.0, 0.0, 0.0, images=images)
    made[order[20:], 2] = True
    made[order[:20], 0] = True
    assert compare(made, WEIGHTS, settings)["weight"] == 0.0


def test_too_few_images_are_refused():
    with pytest.raises(InvalidTraining, match="cannot be split"):
        compare(hits(1, 1, 1, 1, images=1), WEIGHTS, ZeroShotSettings())


def test_single_objects_have_a_seed_range_of_their_own():
    mine = SEED_RANGES["zero_shot"]
    assert all(set(mine).isdisjoint(seeds) for name, seeds in SEED_RANGES.items() if name != "zero_shot")
    assert len(single_object(mine[0]).objects) == 1
    assert single_object(mine[0]) == single_object(mine[0])


def write_run(folder, **changed):
    folder.mkdir()
    store = {
        "model": "clip", "model_sha256": weights_digest(CLIP), "data_sha256": "0" * 64, "family": "open_clip",
        "name": "embedding", "point": "output", "pooling": "embedding", "text_in": None,
        "width": WIDTH, "pairs": 10,
    } | changed  # fmt: skip
    config = RunConfig(kind="vl_sae", settings={}, shared_size=WIDTH, num_concepts=CONCEPTS, active_concepts=ACTIVE,
                       store=StoreIdentity(**store))  # fmt: skip
    (folder / "config.json").write_text(config.model_dump_json())
    save_file(random_sae("vl_sae").state_dict(), folder / "model.safetensors")
    return folder


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["zero_shot_classification", *map(str, options)])
    main()


def test_the_miniature_is_classified_well_above_chance(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    run(monkeypatch, "--sparse", write_run(tmp_path / "run"), "--miniature", "--miniature-images", 200, "--json", file)
    found = json.loads(file.read_text())
    assert found["images"] == {"validation": 100, "test": 100}
    assert found["accuracy"]["plain"]["low"] > 0.3
    assert set(found["accuracy"]) == {"plain", "enhanced", "codes_alone"}
    assert set(found["enhanced_minus_plain"]) == {"value", "low", "high"}
    assert found["kind"] == "vl_sae"


def test_pictures_of_one_s_own(tmp_path, monkeypatch, capsys):
    for number, one in enumerate(single_objects(40)):
        file = tmp_path / "pictures" / SHAPE_CLASSES.labels[one.label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        one.image.save(file)
    names = dict(zip(SHAPE_CLASSES.labels, map(list, SHAPE_CLASSES.names), strict=True))
    classes = {"classes": names, "templates": list(SHAPE_CLASSES.templates)}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    run(monkeypatch, "--sparse", write_run(tmp_path / "run"), "--images", tmp_path / "pictures",
        "--classes", tmp_path / "classes.json")  # fmt: skip
    assert "10 classes, 20 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"family": "llava"}, "not trained on a CLIP"), ({"model_sha256": "0" * 64}, "whose weights are not those")],
)
def test_a_run_of_another_model_is_refused(tmp_path, monkeypatch, changed, message):
    with pytest.raises(InvalidTraining, match=message):
        run(monkeypatch, "--sparse", write_run(tmp_path / "run", **changed), "--miniature")


def test_images_need_classes(tmp_path, monkeypatch):
    with pytest.raises(InvalidTraining, match="--images and --classes"):
        run(monkeypatch, "--sparse", tmp_path, "--images", tmp_path)


def test_a_tie_is_no_hit():
    scores_NC = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.3, 0.2], [0.3, 0.3, 0.2]])
    assert _wins(scores_NC, torch.tensor([0, 1, 0])).tolist() == [False, True, False]

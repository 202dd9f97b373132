"""What is exported can be loaded as the authors load it, and comes back as it was."""

import json

import torch

from steering.artifact import load_artifact
from tests.training.published import K, S
from training.export_published_weights import export_artifact, main
from training.import_published_weights import ImportSettings, import_artifact
from training.miniature.paths import ARTIFACT
from training.published_files import read_published_concepts, read_published_weights


def import_again(folder, active_concepts):
    weights = read_published_weights(folder / "sae.pth", folder / "auxiliary.pth")
    concepts = read_published_concepts(folder / "c2d_concepts.json", weights.num_concepts)
    return import_artifact(weights, concepts, ImportSettings(active_concepts=active_concepts))


def assert_equal(first, second):
    for one, other in ((first.sae, second.sae), (first.auxiliary, second.auxiliary)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_files_are_plain_state_dicts_with_the_published_shapes(tiny_artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export", "--artifact", str(tiny_artifact), "--output", str(tmp_path / "out")])
    main()
    sae = torch.load(tmp_path / "out/sae.pth", weights_only=True)
    assert type(sae) is dict
    assert {name: tuple(value.shape) for name, value in sae.items()} == {
        "encoder": (K, S), "vision_decoder.weight": (S, K), "vision_decoder.bias": (S,),
        "text_decoder.weight": (S, K), "text_decoder.bias": (S,),
    }  # fmt: skip
    command = capsys.readouterr().out
    assert "--active-concepts 8" in command
    assert "--hook-layer 3" in command


def test_the_miniature_comes_back_exactly(tmp_path):
    artifact = load_artifact(ARTIFACT)
    export_artifact(artifact, tmp_path)
    again = import_again(tmp_path, artifact.config.active_concepts)
    assert_equal(artifact, again)
    assert tuple(again.concepts) == tuple(artifact.concepts)
    exported = json.loads((tmp_path / "c2d_concepts.json").read_text())["2"]
    assert set(exported) == {"image_urls", "image_names", "texts", "mean_activation", "label"}


def test_published_files_come_back_exactly(tmp_path):
    from tests.training.published import published_concepts, write_published

    sae, auxiliary, concepts = write_published(tmp_path)
    weights = read_published_weights(sae, auxiliary)
    first = import_artifact(weights, read_published_concepts(concepts, K), ImportSettings(active_concepts=8))
    export_artifact(first, tmp_path / "again")
    assert_equal(first, import_again(tmp_path / "again", 8))
    exported = json.loads((tmp_path / "again/c2d_concepts.json").read_text())
    for number, concept in published_concepts().items():
        assert {name: exported[number][name] for name in concept} == concept

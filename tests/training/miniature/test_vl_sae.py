import dataclasses

import pytest
import torch

from steering.artifact import load_artifact
from training.miniature.llava_model import save_llava
from training.miniature.recipe import Recipe
from training.miniature.vl_sae import build_artifact, noisy_pairs, picture
from training.train_auxiliary_autoencoder import AuxiliaryTraining
from training.train_sparse_autoencoder import SparseTraining

SMALL = dataclasses.replace(
    Recipe(),
    pairs=60,
    held_out_pairs=20,
    concept_pairs=30,
    control_images=8,
    auxiliary=AuxiliaryTraining(shared_size=16, epochs=3, batch_size=20),
    sparse=SparseTraining(num_concepts=32, active_concepts=4, epochs=3, warmup_epochs=1, batch_size=20),
)


@pytest.fixture(scope="module")
def artifact(untrained_llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    save_llava(untrained_llava, folder / "llava")
    build_artifact(folder / "llava", folder / "artifact", SMALL, lambda line: None)
    return load_artifact(folder / "artifact")


def test_the_artifact_loads_and_fits_the_model(artifact, untrained_llava):
    text = untrained_llava.config.text_config
    assert (artifact.config.hidden_size, artifact.config.num_layers) == (text.hidden_size, text.num_hidden_layers)
    assert artifact.config.hook_layer == SMALL.hook_layer < text.num_hidden_layers - 1
    assert artifact.control_image_MD.shape == (SMALL.control_images, text.hidden_size)
    assert artifact.control_image_MD.dtype == torch.float32
    assert set(artifact.config.presets) == {"off"}
    assert len(artifact.concepts) == SMALL.sparse.num_concepts


def test_the_canary_holds_pictures_and_prompts_with_one_image_token(artifact, untrained_llava):
    assert len(artifact.canary.images) == len(artifact.canary.token_ids) == len(artifact.canary.image_ND) == 4
    for ids in artifact.canary.token_ids:
        assert ids.count(untrained_llava.config.image_token_id) == 1


def test_pairs_refer_to_their_pictures():
    (pair,) = noisy_pairs("dev", 1, seed=0)
    assert picture(pair.reference).tobytes() == pair.image.tobytes()

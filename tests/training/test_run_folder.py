import json

import pytest
import torch

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.durable_files import write_json, write_tensors
from training.errors import InvalidTraining
from training.run_folder import (
    Centre,
    RunConfig,
    StoreIdentity,
    fold_centre,
    read_auxiliary,
    read_run_config,
    read_sparse,
    shared_representations,
)

WIDTH, SHARED = 6, 4


def write_run(folder, kind, module, **sizes):
    identity = StoreIdentity(
        model="m", model_sha256="0", family="llava", name="layer_3", point="output", pooling="p", text_in="answer",
        width=WIDTH, pairs=9, data_sha256="0",
    )  # fmt: skip
    config = RunConfig(kind=kind, settings={}, shared_size=SHARED, store=identity, **sizes)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    write_tensors(folder / "model.safetensors", module.state_dict())
    return folder


def test_weights_come_back(tmp_path):
    torch.manual_seed(0)
    auxiliary, sae = AuxiliaryAutoencoder(WIDTH, SHARED), VisionLanguageSAE(SHARED, 8, 2)
    write_run(tmp_path / "auxiliary", "auxiliary", auxiliary)
    write_run(tmp_path / "sparse", "vl_sae", sae, num_concepts=8, active_concepts=2)
    for found, module in ((read_auxiliary(tmp_path / "auxiliary"), auxiliary), (read_sparse(tmp_path / "sparse"), sae)):
        assert not found.training
        assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(InvalidTraining, match="kind is 'vl_sae'"):
        read_auxiliary(tmp_path / "sparse")
    with pytest.raises(InvalidTraining, match="kind is 'auxiliary'"):
        read_sparse(tmp_path / "auxiliary")


def test_what_is_no_finished_run_is_named(tmp_path):
    with pytest.raises(InvalidTraining, match=r"config\.json cannot be read"):
        read_run_config(tmp_path)
    run = write_run(tmp_path / "run", "auxiliary", AuxiliaryAutoencoder(WIDTH, SHARED))
    (run / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidTraining, match=r"model\.safetensors cannot be read"):
        read_auxiliary(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(InvalidTraining, match="training is not finished"):
        read_auxiliary(run)
    write_tensors(run / "model.safetensors", AuxiliaryAutoencoder(WIDTH, SHARED + 1).state_dict())
    with pytest.raises(InvalidTraining, match="does not fit"):
        read_auxiliary(run)


@pytest.mark.parametrize(("family", "expected"), [("llava", "user_turn"), ("open_clip", None)])
def test_runs_of_an_earlier_version_are_of_texts_in_the_user_s_turn(tmp_path, family, expected):
    """CLIP's texts stood in no prompt then either."""
    run = write_run(tmp_path / "run", "auxiliary", AuxiliaryAutoencoder(WIDTH, SHARED))
    config = json.loads((run / "config.json").read_text())
    assert config["store"]["text_in"] == "answer"
    del config["store"]["text_in"]
    config["store"]["family"] = family
    write_json(run / "config.json", config)
    assert read_run_config(run).store.text_in == expected


def test_a_folded_centre_is_the_same_model():
    torch.manual_seed(0)
    auxiliary, sae = AuxiliaryAutoencoder(WIDTH, SHARED).double(), VisionLanguageSAE(SHARED, 8, 2).double()
    centre = Centre(torch.randn(SHARED).double() * 3, torch.randn(SHARED).double() * 3)
    image_ND, text_ND = torch.randn(20, WIDTH).double(), torch.randn(20, WIDTH).double()
    image_NS, text_NS = shared_representations(image_ND, text_ND, auxiliary, centre)
    rebuilt = auxiliary.reconstruct(
        sae.decode(sae.encode(image_NS), "image") + centre.image_S,
        sae.decode(sae.encode(text_NS), "text") + centre.text_S,
    )
    folded = fold_centre(auxiliary, centre)
    folded_NS = shared_representations(image_ND, text_ND, folded)
    for found, expected in zip(folded_NS, (image_NS, text_NS), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    codes = [sae.encode(rows_NS) for rows_NS in folded_NS]
    again = folded.reconstruct(sae.decode(codes[0], "image"), sae.decode(codes[1], "text"))
    for found, expected in zip(again, rebuilt, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (shared_representations(image_ND, text_ND, auxiliary)[0] - image_NS).abs().max() > 1

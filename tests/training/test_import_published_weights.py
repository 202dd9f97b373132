"""Files in the authors' format, against their equations written out in numpy, and through an engine."""

import json

import numpy as np
import pytest
import torch

from steering.artifact import load_artifact
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.realignment import FORM_TERMS, Mix, Realignment
from tests.steering.engines.driving import ask
from tests.training.published import ACTIVE, D, K, S, published_concepts, published_tensors, write_published
from training.errors import InvalidTraining
from training.import_published_weights import ImportSettings, check_output, import_artifact, main
from training.published_files import read_published_concepts, read_published_weights

TINY = ["--num-layers", "5", "--hook-layer", "3", "--image-token-id", "260", "--active-concepts", str(ACTIVE)]


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["import_published_weights", *map(str, options)])
    main()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    """An artifact folder for the tiny LLaVA."""
    folder = tmp_path_factory.mktemp("imported") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "--sae", files[0], "--auxiliary", files[1], "--concepts", files[2], "--output", folder, *TINY)
    return folder


class Equations:
    """Design, section 1, in plain numpy over the published tensors."""

    def __init__(self):
        sae, auxiliary = published_tensors()
        self.sae = {name: value.double().numpy() for name, value in sae.items()}
        self.auxiliary = {name: value.double().numpy() for name, value in auxiliary.items()}

    def linear(self, tensors, name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def code(self, x):
        w = self.sae["encoder"]
        cosine = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
        a = 2 - np.sqrt(np.maximum(1e-8, 2 - 2 * cosine))
        kept = np.argsort(-a, axis=1)[:, :ACTIVE]
        z = np.zeros_like(a)
        np.put_along_axis(z, kept, np.take_along_axis(a, kept, axis=1), axis=1)
        return z

    def reconstruct(self, modality, states):
        z = self.code(self.linear(self.auxiliary, f"{modality}_projection", states))
        return self.linear(self.auxiliary, f"{modality}_decoder", self.linear(self.sae, f"{modality}_decoder", z))

    def published_delta(self, v, t, alpha, beta):
        z_v = self.code(self.linear(self.auxiliary, "vision_projection", v))
        z_t = self.code(self.linear(self.auxiliary, "text_projection", t))
        z = z_t + beta * np.maximum(0, z_v - z_t) - beta * np.maximum(0, z_t - z_v)
        return alpha * (self.linear(self.auxiliary, "text_decoder", self.linear(self.sae, "text_decoder", z)) - t)


@torch.no_grad()
def test_the_imported_modules_follow_the_equations(imported):
    artifact, equations, generator = load_artifact(imported), Equations(), torch.Generator().manual_seed(1)
    v, t = torch.randn(40, D, generator=generator), torch.randn(40, D, generator=generator)
    rebuilt = artifact.auxiliary.reconstruct(*artifact.sae(*artifact.auxiliary(v, t)))
    for modality, states, again in zip(("vision", "text"), (v, t), rebuilt, strict=True):
        np.testing.assert_allclose(again.numpy(), equations.reconstruct(modality, states.double().numpy()), atol=1e-5)
    realignment = Realignment(artifact.auxiliary, artifact.sae)
    mix = Mix(*(torch.full((40, 1), value) for value in (0.9, 0.9, 0.8, *FORM_TERMS["published"])))
    delta = realignment.delta(t, realignment.encode_image(v), torch.arange(40), mix)
    expected = equations.published_delta(v.double().numpy(), t.double().numpy(), alpha=0.8, beta=0.9)
    np.testing.assert_allclose(delta.numpy(), expected, atol=1e-5)


async def test_an_engine_takes_the_artifact_and_steers_with_the_paper_s_preset(imported, tiny_llava):
    engine = HuggingFaceEngine(tiny_llava, imported)
    await engine.start()
    plain = await ask(engine, max_tokens=4, top_logprobs=5)
    steered = await ask(engine, steering={"preset": "paper_pope"}, max_tokens=4, top_logprobs=5)
    await engine.stop()
    assert plain.end.receipt.reason == "preset_off"
    receipt = steered.end.receipt
    assert (receipt.applied, receipt.form, receipt.mode) == (True, "published", "exact")
    assert receipt.canary == "synthetic"
    assert (receipt.alpha, receipt.beta_up, receipt.gamma, receipt.plausibility) == (0.8, 0.9, 0.6, 0.8)
    assert receipt.relative_shift[0] > 0.01
    assert steered.logprobs()[0] != plain.logprobs()[0]


def test_what_was_not_measured_is_said(imported):
    config = load_artifact(imported).config
    assert config.canary_synthetic
    assert config.alignment == {}
    assert config.default_preset == "off"
    assert set(config.presets) == {"off", "paper_pope", "paper_chair"}
    assert config.presets["paper_chair"].alpha == 0.7
    assert "default is off" in config.card["presets"]
    assert "synthetic" in config.card["canary"]


def test_the_defaults_are_the_published_llava_run(files):
    weights = read_published_weights(*files[:2])
    config = import_artifact(weights, {}, ImportSettings(active_concepts=ACTIVE)).config
    assert (config.base_model.name, config.family) == ("llava-hf/llava-1.5-7b-hf", "llava")
    assert (config.num_layers, config.hook_layer) == (32, 30)
    assert (config.collection_point, config.intervention_point) == ("input", "output")
    assert config.pooling == "text_after_last_image"
    assert (config.hidden_size, config.shared_size, config.num_concepts) == (D, S, K)


def test_concepts_come_with_labels_of_their_texts_and_urls_that_stay_urls(imported):
    concepts = tuple(load_artifact(imported).concepts)
    assert [concept["id"] for concept in concepts] == list(range(K))
    assert "harbour" in concepts[3]["label"]
    assert "bicycle" in concepts[17]["label"]
    assert concepts[17]["texts"] == published_concepts()["17"]["texts"]
    assert concepts[17]["mean_activation"] == pytest.approx(0.34)
    first = {"reference": "003000000", "thumbnail": None, "url": "http://pictures.invalid/3/0.jpg"}
    assert concepts[3]["images"][0] == first
    assert concepts[0] == {"id": 0, "label": "", "mean_activation": 0.0, "texts": [], "images": []}


def test_safetensors_and_half_precision_are_taken_too(tmp_path):
    from safetensors.torch import save_file

    sae, auxiliary = published_tensors()
    save_file({name: value.half() for name, value in sae.items()}, tmp_path / "sae.safetensors")
    save_file(auxiliary, tmp_path / "aux.safetensors")
    found = read_published_weights(tmp_path / "sae.safetensors", tmp_path / "aux.safetensors")
    torch.testing.assert_close(found.sae["encoder"], sae["encoder"].half().float(), atol=0, rtol=0)


def _renamed(tensors):
    return {("decoder.weight" if name == "vision_decoder.weight" else name): value for name, value in tensors.items()}


def _changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def _with_nan(tensor):
    tensor = tensor.clone()
    tensor[0] = float("nan")
    return tensor


class RunsCode:
    """What a hostile pickle holds."""

    ran = False

    def __reduce__(self):
        return (setattr, (RunsCode, "ran", True))


BAD_SAE = {
    "a tensor missing": (lambda sae: {k: v for k, v in sae.items() if k != "text_decoder.bias"}, "text_decoder.bias"),
    "a name not published": (_renamed, "no tensor vision_decoder.weight"),
    "one tensor more": (lambda sae: sae | {"extra": torch.zeros(1)}, "unknown tensor extra"),
    "the encoder transposed": (_changed("encoder", lambda w: w.T), r"encoder has shape \(24, 96\).*transposed"),
    "a decoder transposed": (_changed("vision_decoder.weight", lambda w: w.T), "vision_decoder.weight.*transposed"),
    "an encoder of other width": (_changed("encoder", lambda w: w[:, 1:]), "encoder has shape"),
    "other K in a decoder": (_changed("text_decoder.weight", lambda w: w[:, 1:]), "text_decoder.weight has shape"),
    "a scalar bias": (_changed("vision_decoder.bias", lambda b: b.sum()), "vision_decoder.bias has shape"),
    "NaN": (_changed("text_decoder.weight", _with_nan), "text_decoder.weight holds numbers that are not finite"),
    "integers": (_changed("encoder", lambda w: w.long()), "encoder is no dense tensor"),
    "a nested dict": (lambda sae: {"state_dict": sae}, "no tensor encoder"),
    "a list": (list, "state dict of tensors"),
    "code": (lambda sae: sae | {"encoder": RunsCode()}, "holds more than tensors"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_SAE.values(), ids=BAD_SAE)
def test_a_file_that_is_not_as_published_is_named_with_its_tensor(files, tmp_path, damage, message):
    bad = tmp_path / "bad_sae.pth"
    torch.save(damage(published_tensors()[0]), bad)
    with pytest.raises(InvalidTraining, match=message) as raised:
        read_published_weights(bad, files[1])
    assert str(bad) in str(raised.value)
    assert not RunsCode.ran


def test_files_of_two_trainings_are_told_apart(files, tmp_path):
    auxiliary = {
        name: value[:, 1:] if "decoder.weight" in name else value[1:] if "projection" in name else value
        for name, value in published_tensors()[1].items()
    }
    torch.save(auxiliary, tmp_path / "other.pth")
    with pytest.raises(InvalidTraining, match=r"vision_projection\.bias has 23 entries .* has 24"):
        read_published_weights(files[0], tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02c"], ids=["empty", "cut off", "pickle"])
def test_a_broken_file_is_named(files, tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(InvalidTraining, match=r"broken\.pth"):
        read_published_weights(tmp_path / "broken.pth", files[1])


BAD_SETTINGS = {
    "k > K": ({"active_concepts": K + 1}, "--active-concepts is 97"),
    "no tail": ({"active_concepts": 8, "hook_layer": 31}, "--hook-layer 31"),
    "an unknown family": ({"active_concepts": 8, "family": "bert"}, "--family 'bert'"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_setting_that_does_not_fit_is_named(files, settings, message):
    with pytest.raises(InvalidTraining, match=message):
        import_artifact(read_published_weights(*files[:2]), {}, ImportSettings(**settings))


BAD_CONCEPTS = {
    "no JSON": ("{", "no readable JSON|not readable JSON"),
    "a list": ("[]", "must be an object"),
    "an id beyond K": ('{"96": {"mean_activation": 0}}', "'96' is no concept id"),
    "an id that is none": ('{"a": {"mean_activation": 0}}', "'a' is no concept id"),
    "no activation": ('{"3": {"texts": []}}', r"3\.mean_activation"),
    "NaN": ('{"3": {"mean_activation": NaN}}', r"3\.mean_activation"),
    "texts that are none": ('{"3": {"mean_activation": 0, "texts": [1]}}', r"3\.texts\.0"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONCEPTS.values(), ids=BAD_CONCEPTS)
def test_concepts_that_are_not_as_published_are_named(tmp_path, content, message):
    (tmp_path / "c2d_bad.json").write_text(content)
    with pytest.raises(InvalidTraining, match=message) as raised:
        read_published_concepts(tmp_path / "c2d_bad.json", K)
    assert "c2d_bad.json" in str(raised.value)


def test_a_folder_that_is_no_artifact_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidTraining, match="no artifact"):
        check_output(tmp_path)
    check_output(tmp_path / "new")


def test_half_a_surrogate_pair_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "c2d.json").write_text(json.dumps({"0": {"texts": ["\ud800"], "mean_activation": 0.5}}))
    with pytest.raises(InvalidTraining, match=r"c2d.json: 0.texts.0"):
        read_published_concepts(tmp_path / "c2d.json", 4)

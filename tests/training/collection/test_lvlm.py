"""States are those of the model's own forward, at the right tokens, on every family; and those that steering pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.hooks import output_hook, steer
from steering.request import SteeringRequest
from tests.tiny_families import save_tiny_llava_next, save_tiny_qwen2_5_vl
from tests.tiny_models import drawn_image, save_tiny_artifact, save_tiny_llava
from training.collection.lvlm import LvlmRepresenter, LvlmSettings, fill_prompt, pooled_positions
from training.collection.representer import Prepared
from training.errors import InvalidTraining
from training.pairs import Pair

TEXTS = [((24, 20), "a star"), ((100, 31), "a circle in red, 一颗星星 🔴"), ((60, 90), "نجمة"), ((4, 300), "thin")]
PAIRS = [Pair(image=drawn_image(i, size), text=text, reference=str(i)) for i, (size, text) in enumerate(TEXTS)]
BEHIND_IMAGE = {
    "llava": "\n{text} ASSISTANT:",
    "llava_next": "\n{text} ASSISTANT:",
    "qwen2_5_vl": "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n",
}
BEFORE_IMAGE = {
    "llava": "USER: ",
    "llava_next": "USER: ",
    "qwen2_5_vl": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"),
}
SAVERS = {"llava": save_tiny_llava, "llava_next": save_tiny_llava_next, "qwen2_5_vl": save_tiny_qwen2_5_vl}
"""Tiny checkpoints with each family's own special tokens and chat template."""


class Loaded:
    """A checkpoint, loaded."""

    def __init__(self, family: str, folder) -> None:
        self.family, self.folder = family, SAVERS[family](folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.folder)

    def representer(self, *layers: int, point: Any = "output") -> LvlmRepresenter:
        return LvlmRepresenter(self.model, self.processor, layers, point)

    def prepare(self, pairs=PAIRS) -> list[Prepared]:
        prepared = [self.representer(1).prepare(pair) for pair in pairs]
        assert all(isinstance(one, Prepared) for one in prepared), prepared
        return prepared  # type: ignore[return-value]

    def inputs(self, pair: Pair) -> Any:
        """As the family's own processor makes them."""
        text = fill_prompt(self.processor, self.family, pair.text)
        return self.processor(images=[pair.image], text=[text], return_tensors="pt")


@pytest.fixture(scope="module", params=list(SAVERS))
def loaded(request, tmp_path_factory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Loaded:
    return Loaded("llava", tmp_path_factory.mktemp("alone") / "model")


def test_each_pooled_token_is_the_one_the_template_says(loaded):
    tokenizer, image_token = loaded.processor.tokenizer, loaded.model.config.image_token_id
    for pair, prepared in zip(PAIRS, loaded.prepare(), strict=True):
        ids = prepared.inputs.token_ids
        ids_1T = torch.tensor([ids + ids[-1:] * 5])
        valid_1T = torch.arange(len(ids) + 5)[None] < len(ids)
        image_1T, text_1T = pooled_positions(ids_1T, valid_1T, image_token)
        said = BEHIND_IMAGE[loaded.family].format(text=pair.text)
        assert tokenizer.decode(ids_1T[text_1T]) == said
        assert ids_1T[text_1T].tolist() == tokenizer(said, add_special_tokens=False)["input_ids"]
        assert set(ids_1T[image_1T].tolist()) == {image_token}
        assert tokenizer.decode(ids_1T[valid_1T & ~image_1T & ~text_1T]) == BEFORE_IMAGE[loaded.family]
        assert ids == loaded.inputs(pair)["input_ids"][0].tolist()


@torch.no_grad()
def test_a_batch_gives_each_pair_what_the_model_s_own_forward_gives_it_alone(loaded):
    prepared = loaded.prepare()
    found = loaded.representer(3, 1).represent(prepared)
    assert list(found) == ["layer_1", "layer_3"]
    for layer in (1, 3):
        for row, pair in enumerate(PAIRS):
            seen = []
            with output_hook(loaded.model.model.language_model.layers[layer], lambda h, seen=seen: seen.append(h) or h):
                inputs = loaded.inputs(pair)
                loaded.model(**inputs)
            image = (inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[:, 0]
            expected = seen[0][0, image].mean(0), seen[0][0, image[-1] + 1 :].mean(0)
            for states_BD, expected_D in zip(found[f"layer_{layer}"], expected, strict=True):
                torch.testing.assert_close(states_BD[row], expected_D, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_steering_pools_the_same_states_on_the_same_prompt(loaded, tmp_path, monkeypatch):
    artifact = load_artifact(save_tiny_artifact(tmp_path / "artifact", loaded.folder))
    layer = artifact.config.hook_layer
    found = loaded.representer(layer).represent(loaded.prepare())[f"layer_{layer}"]
    for row, pair in enumerate(PAIRS):
        with steer(loaded.model, artifact, SteeringRequest(strength=1.0)) as steering:
            seen, realignment = [], steering._intervention.tables.realignment
            encode = realignment.encode_image
            monkeypatch.setattr(realignment, "encode_image", lambda v, seen=seen, of=encode: seen.append(v) or of(v))
            loaded.model(**loaded.inputs(pair))
        state = steering._rows[0]
        assert state.text_sum_D is not None
        torch.testing.assert_close(found.image_BD[row], seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.text_BD[row], state.text_sum_D / state.text_count, atol=1e-5, rtol=1e-4)


def test_the_input_of_a_layer_is_the_output_of_the_one_before(llava):
    prepared = llava.prepare()
    outputs, inputs = llava.representer(0, 2).represent(prepared), llava.representer(1, 3, point="input")
    for before, after in (("layer_0", "layer_1"), ("layer_2", "layer_3")):
        assert torch.equal(outputs[before].text_BD, inputs.represent(prepared)[after].text_BD)
    embeddings = llava.representer(0, point="input").represent(prepared)["layer_0"]
    ids = torch.tensor(llava.processor.tokenizer("\na star ASSISTANT:", add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(embeddings.text_BD[0], llava.model.get_input_embeddings()(ids).mean(0))


@pytest.mark.parametrize(("point", "deepest"), [("output", 2), ("input", 1)])
def test_nothing_after_the_deepest_layer_runs(llava, point, deepest):
    ran = []
    layers = llava.model.model.language_model.layers
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    llava.representer(1, 2, point=point).represent(llava.prepare())
    for handle in handles:
        handle.remove()
    assert ran == list(range(deepest + 1))


def test_captions_that_would_be_read_as_something_else_are_not_used(loaded):
    representer, image = loaded.representer(1), drawn_image(0)

    def fault(text: str) -> Any:
        return representer.prepare(Pair(image=image, text=text, reference="r"))

    special = "<|vision_start|>" if loaded.family == "qwen2_5_vl" else "<image>"
    assert fault(f"a {special} b") == f"the caption spells the special token {special}"
    assert fault("a <imag e> b").length
    assert "the model's context is" in fault("word " * 10_000)
    fits = next(size for size in range(512, 0, -1) if isinstance(fault("x" * size), Prepared))
    assert fault("x" * fits).length == representer._context_tokens


def test_an_image_no_processor_takes_is_not_used(loaded):
    made = loaded.representer(1).prepare(Pair(image=drawn_image(0, (2, 1000)), text="a line", reference="r"))
    assert isinstance(made, str if loaded.family == "qwen2_5_vl" else Prepared)


def test_what_is_asked_for_must_be_there(llava, tmp_path):
    with pytest.raises(InvalidTraining, match=r"--layers: the model has layers 0\.\.4, not all of \[99\]"):
        LvlmSettings(model=llava.folder, layers=(99,)).describe()
    with pytest.raises(InvalidTraining, match=f"--model {tmp_path}"):
        LvlmSettings(model=tmp_path, layers=(1,)).describe()
    described = LvlmSettings(model=llava.folder, layers=(3, 1, 3)).describe()
    assert (described.names, described.width, described.num_layers) == (("layer_1", "layer_3"), 32, 5)
    assert described.prompt == "USER: <image>\n{text} ASSISTANT:"


def test_another_dtype_runs_and_pools_in_float32(llava):
    settings = LvlmSettings(model=llava.folder, layers=(3,), dtype="bfloat16")
    representer = settings.load()
    prepared = [one for pair in PAIRS if isinstance(one := representer.prepare(pair), Prepared)]
    found, expected = representer.represent(prepared)["layer_3"], llava.representer(3).represent(llava.prepare())
    assert found.image_BD.dtype == torch.float32
    cosine = torch.cosine_similarity(found.text_BD, expected["layer_3"].text_BD)
    assert 0.99 < cosine.min() < 1.0

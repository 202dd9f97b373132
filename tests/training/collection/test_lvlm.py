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
from training.collection.lvlm import LvlmRepresenter, LvlmSettings
from training.collection.placing import PROMPTS, TextPlacer
from training.collection.prefill import pooled_positions
from training.collection.representer import Prepared, States
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, Question
from training.pairs import Pair

TEXTS = [((24, 20), "a star"), ((100, 31), "a circle in red, 一颗星星 🔴"), ((60, 90), "نجمة"), ((4, 300), "thin")]
PAIRS = [Pair(image=drawn_image(i, size), text=text, reference=str(i)) for i, (size, text) in enumerate(TEXTS)]
PROMPT = "What is this?"
BEHIND_IMAGE = {
    "user_turn": {
        "llava": "\n{text} ASSISTANT:",
        "llava_next": "\n{text} ASSISTANT:",
        "qwen2_5_vl": "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n",
    },
    "answer": {
        "llava": "\nWhat is this? ASSISTANT: {text}",
        "llava_next": "\nWhat is this? ASSISTANT: {text}",
        "qwen2_5_vl": "<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n{text}",
    },
}
BEFORE_IMAGE = {
    "llava": "USER: ",
    "llava_next": "USER: ",
    "qwen2_5_vl": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"),
}
ANSWER_BEGINS = {"llava": " ", "llava_next": " ", "qwen2_5_vl": ""}
"""What a family's answer opens with, as its own chat template renders one."""
SAVERS = {"llava": save_tiny_llava, "llava_next": save_tiny_llava_next, "qwen2_5_vl": save_tiny_qwen2_5_vl}
"""Tiny checkpoints with each family's own special tokens and chat template."""
EITHER_PLACE = pytest.mark.parametrize("text_in", ["answer", "user_turn"])


class Loaded:
    """A checkpoint, loaded."""

    def __init__(self, family: str, folder) -> None:
        self.family, self.folder = family, SAVERS[family](folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.folder)
        self.image_token: int = self.model.config.image_token_id

    def representer(self, *layers: int, text_in: Any = "answer", prefixes: int = 0, **options) -> LvlmRepresenter:
        """Its texts answer PROMPT, where nothing else is asked for."""
        asked: dict[str, Any] = {"prompts": (PROMPT,)} | options
        settings = LvlmSettings(model=self.folder, layers=layers, text_in=text_in, prefixes=prefixes, **asked)
        placer = TextPlacer(self.processor, self.family, self.image_token, text_in, settings.prompts)
        return LvlmRepresenter(self.model, self.processor, placer, settings)

    def inputs(self, pair: Pair, text_in: str) -> Any:
        """As the family's own processor makes them of the rendered prompt."""
        text = BEFORE_IMAGE[self.family] + self.processor.image_token
        text += BEHIND_IMAGE[text_in][self.family].format(text=pair.text)
        return self.processor(images=[pair.image], text=[text], return_tensors="pt")

    def served_prompt(self, prompt: str) -> list[int]:
        """As a question is put to an engine."""
        engine: Any = None
        question = Question(image=drawn_image(0), text=prompt, max_tokens=1, steering=SteeringRequest())
        return list(InProcess(engine, self.processor).prompt(question))

    def answer_tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(ANSWER_BEGINS[self.family] + text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def states(self, layer: int, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """v and t at a layer, by the model's own forward."""
        seen = []
        with output_hook(self.model.model.language_model.layers[layer], lambda h: seen.append(h) or h):
            self.model(**inputs)
        image = (inputs["input_ids"][0] == self.image_token).nonzero()[:, 0]
        return seen[0][0, image].mean(0), seen[0][0, image[-1] + 1 :].mean(0)


def usable(representer: LvlmRepresenter, pairs=PAIRS) -> list[Prepared]:
    prepared = [one for pair in pairs if isinstance(one := representer.prepare(pair), Prepared)]
    assert len(prepared) == len(pairs)
    return prepared


def prefix_lengths(loaded: Loaded, pair: Pair, prepared: Prepared) -> list[int]:
    """In tokens of the answer."""
    answer_start = prepared.length - len(loaded.answer_tokens(pair.text))
    return [end - answer_start for end in prepared.inputs.ends]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=list(SAVERS))
def loaded(request, tmp_path_factory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Loaded:
    return Loaded("llava", tmp_path_factory.mktemp("alone") / "model")


@EITHER_PLACE
def test_each_pooled_token_is_the_one_the_template_says(loaded, text_in):
    tokenizer = loaded.processor.tokenizer
    for pair, prepared in zip(PAIRS, usable(loaded.representer(1, text_in=text_in)), strict=True):
        ids = prepared.inputs.prompt.token_ids
        ids_1T = torch.tensor([ids + ids[-1:] * 5])
        valid_1T = torch.arange(len(ids) + 5)[None] < len(ids)
        image_1T, text_1T = pooled_positions(ids_1T, valid_1T, loaded.image_token)
        said = BEHIND_IMAGE[text_in][loaded.family].format(text=pair.text)
        assert tokenizer.decode(ids_1T[text_1T]) == said
        assert ids_1T[text_1T].tolist() == tokenizer(said, add_special_tokens=False)["input_ids"]
        assert set(ids_1T[image_1T].tolist()) == {loaded.image_token}
        assert tokenizer.decode(ids_1T[valid_1T & ~image_1T & ~text_1T]) == BEFORE_IMAGE[loaded.family]
        assert ids == loaded.inputs(pair, text_in)["input_ids"][0].tolist()
        assert len(ids) == prepared.length


def test_an_answer_stands_behind_the_prompt_that_is_served(loaded):
    """Token by token what an engine is given, then what it would have said."""
    pairs = [Pair(image=drawn_image(0), text=f"a star {number}", reference=str(number)) for number in range(40)]
    served = {prompt: loaded.served_prompt(prompt) for prompt in PROMPTS}
    drawn: dict[str, int] = dict.fromkeys(PROMPTS, 0)
    for pair, prepared in zip(pairs, usable(loaded.representer(1, prompts=PROMPTS), pairs), strict=True):
        said = loaded.answer_tokens(pair.text)
        (prompt,) = [one for one in PROMPTS if served[one] + said == list(prepared.token_ids)]
        drawn[prompt] += 1
    assert min(drawn.values()) > 0, "each is drawn now and then"


@EITHER_PLACE
def test_a_batch_gives_each_pair_what_the_model_s_own_forward_gives_it_alone(loaded, text_in):
    representer = loaded.representer(3, 1, text_in=text_in)
    found = representer.represent(usable(representer))
    assert list(found) == ["layer_1", "layer_3"]
    for layer in (1, 3):
        states = found[f"layer_{layer}"]
        assert states.prefix_BND.numel() == 0
        for row, pair in enumerate(PAIRS):
            image_D, text_D = loaded.states(layer, loaded.inputs(pair, text_in))
            close(states.image_BD[row], image_D)
            close(states.text_BD[row], text_D)


def test_a_prefix_has_the_state_of_a_text_that_is_cut_there(loaded):
    representer = loaded.representer(1, 3, prefixes=3)
    prepared = usable(representer)
    found = representer.represent(prepared)
    cut = 0
    for row, pair in enumerate(PAIRS):
        whole = loaded.inputs(pair, "answer")
        for place, end in enumerate(prepared[row].inputs.ends):
            inputs = {
                name: value[:, :end] if value.shape[:2] == whole["input_ids"].shape else value
                for name, value in whole.items()
            }
            cut += end < prepared[row].length
            for layer in (1, 3):
                close(found[f"layer_{layer}"].prefix_BND[row, place], loaded.states(layer, inputs)[1])
    assert cut > 6, "most of them are shorter than their texts"


def test_prefixes_change_nothing_about_the_whole(llava):
    with_prefixes, without = llava.representer(2, prefixes=3), llava.representer(2)
    found = with_prefixes.represent(usable(with_prefixes))["layer_2"]
    plain = without.represent(usable(without))["layer_2"]
    assert torch.equal(found.image_BD, plain.image_BD)
    assert torch.equal(found.text_BD, plain.text_BD)


def test_lengths_of_prefixes_are_drawn_and_follow_from_the_pair_alone(llava):
    pairs = [Pair(image=drawn_image(0), text="a red star", reference=str(number)) for number in range(200)]
    representer = llava.representer(1, prefixes=3, shortest_prefix=4)
    drawn = [prefix_lengths(llava, pair, one) for pair, one in zip(pairs, usable(representer, pairs), strict=True)]
    longest = len(llava.answer_tokens("a red star"))
    assert {length for lengths in drawn for length in lengths} == set(range(4, longest + 1))
    assert len({tuple(lengths) for lengths in drawn}) > 100
    assert sum(len(set(lengths)) > 1 for lengths in drawn) > 150, "each prefix is drawn for itself"
    again = [representer.prepare(pair) for pair in reversed(pairs)][::-1]
    anew = usable(llava.representer(3, prefixes=3, shortest_prefix=4), pairs)
    for lengths, pair, one, other in zip(drawn, pairs, again, anew, strict=True):
        assert isinstance(one, Prepared)
        assert prefix_lengths(llava, pair, one) == prefix_lengths(llava, pair, other) == lengths
        assert one.token_ids == other.token_ids
    other_text = [Pair(image=pair.image, text="a red ship", reference=pair.reference) for pair in pairs]
    assert [prefix_lengths(llava, p, o) for p, o in zip(other_text, usable(representer, other_text), strict=True)] != (
        drawn
    )


def test_a_text_of_the_shortest_length_is_its_own_only_prefix(llava):
    length = len(llava.answer_tokens("star"))
    representer = llava.representer(2, prefixes=2, shortest_prefix=length)
    prepared = usable(representer, [Pair(image=drawn_image(0), text="star", reference="r")])
    states = representer.represent(prepared)["layer_2"]
    for place in range(2):
        assert torch.equal(states.prefix_BND[:, place], states.text_BD)
    shorter = representer.prepare(Pair(image=drawn_image(0), text="sta", reference="r"))
    assert shorter == f"the caption has {length - 1} tokens, the shortest prefix {length}"


@pytest.mark.parametrize("prefixes", [0, 3])
def test_a_text_in_the_user_s_turn_has_no_prefixes(llava, prefixes):
    settings = LvlmSettings(model=llava.folder, layers=(1,), text_in="user_turn", prefixes=prefixes)
    if prefixes:
        with pytest.raises(InvalidTraining, match="prefixes: a text in the user's turn has none; give 0"):
            settings.describe()
    else:
        assert settings.describe().prompts == ("USER: <image>\n{text} ASSISTANT:",)
        assert settings.describe().text_in == "user_turn"


class Forced:
    """A logits processor that lets a model say nothing but the given tokens."""

    def __init__(self, token_ids: list[int]) -> None:
        self._left = list(token_ids)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits_BV, -torch.inf)
        forced[:, self._left.pop(0)] = 0.0
        return forced


def pooled_while_generating(loaded: Loaded, artifact: Any, prompt: Any, said: list[int]) -> list[torch.Tensor]:
    """The means [D] that steering has after the prompt, and after each token of the answer."""
    pooled = []
    with steer(loaded.model, artifact, SteeringRequest(strength=1.0)) as steering:

        def look(*_) -> None:
            (state,) = steering._rows
            assert state.text_sum_D is not None
            pooled.append((state.text_sum_D / state.text_count).clone())

        handle = loaded.model.register_forward_hook(look)
        try:
            # the last token is one more than the answer's: what is said last is not read any more
            loaded.model.generate(
                **prompt, max_new_tokens=len(said) + 1, logits_processor=[Forced([*said, said[-1]])], do_sample=False
            )
        finally:
            handle.remove()
    return pooled


@torch.no_grad()
def test_steering_pools_the_states_of_the_prefixes_while_it_generates(loaded, tmp_path):
    artifact = load_artifact(save_tiny_artifact(tmp_path / "artifact", loaded.folder))
    layer = artifact.config.hook_layer
    representer = loaded.representer(layer, prefixes=8)
    prepared = usable(representer)
    found: States = representer.represent(prepared)[f"layer_{layer}"]
    for row in (0, 1):
        pair, said = PAIRS[row], loaded.answer_tokens(PAIRS[row].text)
        whole = loaded.inputs(pair, "answer")
        asked = whole["input_ids"].shape[1] - len(said)
        prompt = {
            name: value[:, :asked] if value.shape[:2] == whole["input_ids"].shape else value
            for name, value in whole.items()
        }
        pooled = pooled_while_generating(loaded, artifact, prompt, said)
        assert len(pooled) == len(said) + 1
        close(found.text_BD[row], pooled[-1])
        lengths = prefix_lengths(loaded, pair, prepared[row])
        assert len(set(lengths)) > 3
        for place, length in enumerate(lengths):
            close(found.prefix_BND[row, place], pooled[length])


@torch.no_grad()
def test_steering_pools_the_same_states_on_the_same_prompt(loaded, tmp_path, monkeypatch):
    artifact = load_artifact(save_tiny_artifact(tmp_path / "artifact", loaded.folder))
    layer = artifact.config.hook_layer
    representer = loaded.representer(layer, text_in="user_turn")
    found = representer.represent(usable(representer))[f"layer_{layer}"]
    for row, pair in enumerate(PAIRS):
        with steer(loaded.model, artifact, SteeringRequest(strength=1.0)) as steering:
            seen, realignment = [], steering._intervention.tables.realignment
            encode = realignment.encode_image
            monkeypatch.setattr(realignment, "encode_image", lambda v, seen=seen, of=encode: seen.append(v) or of(v))
            loaded.model(**loaded.inputs(pair, "user_turn"))
        state = steering._rows[0]
        assert state.text_sum_D is not None
        close(found.image_BD[row], seen[0][0])
        close(found.text_BD[row], state.text_sum_D / state.text_count)


def test_the_input_of_a_layer_is_the_output_of_the_one_before(llava):
    prepared = usable(llava.representer(1, prefixes=2))
    outputs, inputs = llava.representer(0, 2).represent(prepared), llava.representer(1, 3, point="input")
    for before, after in (("layer_0", "layer_1"), ("layer_2", "layer_3")):
        assert torch.equal(outputs[before].text_BD, inputs.represent(prepared)[after].text_BD)
        assert torch.equal(outputs[before].prefix_BND, inputs.represent(prepared)[after].prefix_BND)
    embeddings = llava.representer(0, point="input").represent(prepared)["layer_0"]
    said = BEHIND_IMAGE["answer"]["llava"].format(text="a star")
    ids = torch.tensor(llava.processor.tokenizer(said, add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(embeddings.text_BD[0], llava.model.get_input_embeddings()(ids).mean(0))


@pytest.mark.parametrize(("point", "deepest"), [("output", 2), ("input", 1)])
def test_nothing_after_the_deepest_layer_runs(llava, point, deepest):
    ran = []
    layers = llava.model.model.language_model.layers
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    representer = llava.representer(1, 2, point=point, prefixes=2)
    representer.represent(usable(representer))
    for handle in handles:
        handle.remove()
    assert ran == list(range(deepest + 1))


@EITHER_PLACE
def test_captions_that_would_be_read_as_something_else_are_not_used(loaded, text_in):
    representer, image = loaded.representer(1, text_in=text_in), drawn_image(0)

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
    described = LvlmSettings(model=llava.folder, layers=(3, 1, 3), prompts=("What?", "Say it."), prefixes=2).describe()
    assert (described.names, described.width, described.num_layers) == (("layer_1", "layer_3"), 32, 5)
    assert described.prompts == ("USER: <image>\nWhat? ASSISTANT: {text}", "USER: <image>\nSay it. ASSISTANT: {text}")
    assert (described.text_in, described.prefixes, described.shortest_prefix) == ("answer", 2, 1)


def test_another_dtype_runs_and_pools_in_float32(llava):
    settings = LvlmSettings(model=llava.folder, layers=(3,), dtype="bfloat16", prompts=(PROMPT,))
    representer = settings.load()
    found = representer.represent(usable(representer))["layer_3"]
    expected = llava.representer(3, prefixes=3).represent(usable(llava.representer(3, prefixes=3)))["layer_3"]
    assert found.image_BD.dtype == found.prefix_BND.dtype == torch.float32
    for states, same in ((found.text_BD, expected.text_BD), (found.prefix_BND, expected.prefix_BND)):
        cosine = torch.cosine_similarity(states, same, dim=-1)
        assert 0.99 < cosine.min() < 1.0

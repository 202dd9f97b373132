"""The library alone: steering one's own `model.generate`, and letting go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.engines.checkpoint import read_checkpoint
from steering.engines.preparation import prepare
from steering.errors import BadArtifact, InvalidSteering
from steering.hooks import steer
from steering.intervention import Intervention, Pass, SequenceSteering
from steering.request import SteeringRequest, merge_sources
from steering.settings import resolve
from tests.steering.engines.driving import LATER_TURN, ask, make_request
from tests.tiny_models import drawn_image, save_tiny_artifact, save_tiny_llava, tiny_presets

PROMPT = "USER: <image>\nwhat is this? ASSISTANT:"
STRONG = SteeringRequest(strength=1.0, form="published", alpha=1.5)


@pytest.fixture(scope="module")
def own_model(tiny_llava) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(tiny_llava)


def generate(own_model, seeds=(3,), prompts=(PROMPT,)):
    """Each seed's image with its prompt, or all with the only one; padded on the left."""
    model, processor = own_model
    inputs = processor(
        text=list(prompts) * (len(seeds) // len(prompts)), images=[drawn_image(seed) for seed in seeds],
        return_tensors="pt", padding=True, padding_side="left",
    )  # fmt: skip
    made = model.generate(
        **inputs, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, dim=1)


async def test_it_gives_the_engine_s_tokens_and_leaves_the_model_as_it_was(own_model, tiny_artifact, engine):
    before, before_logits = generate(own_model)
    with steer(own_model[0], load_artifact(tiny_artifact), STRONG) as steering:
        steered, steered_logits = generate(own_model)
    after, after_logits = generate(own_model)
    asked = STRONG.model_dump(exclude_none=True)
    answer = await ask(engine, "what is this?", (3,), asked, max_tokens=10, top_logprobs=3)
    assert [token for token in steered[0].tolist() if token != 257] == answer.tokens()
    (tally,) = steering.tallies
    assert tally.positions == answer.end.receipt.positions[0]
    assert tally.relative_shift == pytest.approx(answer.end.receipt.relative_shift[0], rel=1e-4)
    assert not torch.allclose(steered_logits[:, 0], before_logits[:, 0], atol=1e-2)
    assert torch.equal(before, after)
    assert torch.equal(before_logits, after_logits)


def test_a_batch_of_rows_is_steered_row_by_row(own_model, tiny_artifact):
    with steer(own_model[0], load_artifact(tiny_artifact), STRONG):
        together, together_logits = generate(own_model, (3, 4))
        _, alone_logits = generate(own_model, (4,))
    torch.testing.assert_close(together_logits[1, 0], alone_logits[0, 0], atol=1e-4, rtol=0)
    assert together.shape[0] == 2


@pytest.mark.parametrize("wait", [0, 3])
async def test_steering_begins_at_a_place_in_the_answer_as_on_the_engine(own_model, tiny_artifact, engine, wait):
    """In every row of a padded batch: the answer begins behind the row's own prompt, earlier answers and all."""
    asked = STRONG.model_copy(update={"min_answer_tokens": wait})
    texts = ("what is this?", LATER_TURN)
    with steer(own_model[0], load_artifact(tiny_artifact), asked) as steering:
        made, _ = generate(own_model, (3, 4), [f"USER: <image>\n{text} ASSISTANT:" for text in texts])
    for row, (text, seed) in enumerate(zip(texts, (3, 4), strict=True)):
        answer = await ask(engine, text, (seed,), asked.model_dump(exclude_none=True), max_tokens=10)
        tokens = answer.tokens()
        assert made[row, : len(tokens)].tolist() == tokens
        assert answer.end.receipt.positions == [10 - wait]
        assert steering.tallies[row].positions == 10 - wait
        assert steering.tallies[row].relative_shift == pytest.approx(answer.end.receipt.relative_shift[0], rel=1e-4)


def test_the_hook_goes_away_when_generation_fails(own_model, tiny_artifact):
    before, _ = generate(own_model)
    with pytest.raises(RuntimeError, match="boom"), steer(own_model[0], load_artifact(tiny_artifact), STRONG):
        raise RuntimeError("boom")
    assert torch.equal(generate(own_model)[0], before)


@pytest.mark.parametrize("asked", [{"mode": "exact"}, {"gamma": 0.5}, {"preset": "paper_pope"}])
def test_what_needs_an_engine_is_refused(own_model, tiny_artifact, asked):
    with pytest.raises(InvalidSteering), steer(own_model[0], load_artifact(tiny_artifact), SteeringRequest(**asked)):
        pass


def test_foreign_images_that_the_artifact_lacks_are_named(own_model, tiny_artifact):
    artifact = load_artifact(tiny_artifact)
    without = replace(artifact, control_image_MD=artifact.control_image_MD[:0])
    asked = {"strength": 1.0, "control": "other_image"}
    steering = steer(own_model[0], without, SteeringRequest.model_validate(asked))
    with pytest.raises(InvalidSteering, match="no images for control") as caught, steering:
        generate(own_model)
    assert caught.value.field == "steering.control"
    checkpoint = read_checkpoint(own_model[0].name_or_path, tiny_artifact, None)
    with pytest.raises(InvalidSteering, match="no images for control") as caught:
        prepare(replace(checkpoint, artifact=without), make_request(checkpoint, steering=asked), lambda _event: None)
    assert caught.value.field == "steering.control"


def test_beam_search_is_refused(own_model, tiny_artifact):
    model, processor = own_model
    inputs = processor(text=PROMPT, images=drawn_image(3), return_tensors="pt")
    with pytest.raises(InvalidSteering, match="beam"), steer(model, load_artifact(tiny_artifact), STRONG):
        model.generate(**inputs, max_new_tokens=6, num_beams=3)


def test_the_caller_s_artifact_is_left_alone(own_model, tiny_artifact):
    artifact = load_artifact(tiny_artifact)
    with steer(own_model[0], artifact, STRONG):
        generate(own_model)
    assert all(parameter.requires_grad for parameter in artifact.auxiliary.parameters())


def test_autocast_does_not_reach_the_realignment(own_model, tiny_artifact):
    """The same states give the same delta, bit for bit, whatever the caller's autocast says."""
    intervention = Intervention(load_artifact(tiny_artifact), own_model[0].device)
    settings = resolve(merge_sources(STRONG), presets=tiny_presets(), default_preset="captions", has_image=True)
    hidden_1TD = torch.randn(1, 9, 32)
    image_1T = (torch.arange(9) < 4)[None]

    def steered() -> torch.Tensor:
        rows = [SequenceSteering(settings=settings, prompt_text_tokens=5)]
        intervention.prepare(Pass(rows=rows, image_BT=image_1T, text_B=[range(4, 9)]))
        return intervention(hidden_1TD)

    expected = steered()
    with torch.autocast("cpu", torch.bfloat16):
        got = steered()
    assert torch.equal(got, expected)
    assert not torch.equal(got, hidden_1TD)


def test_a_prompt_without_image_is_refused(own_model, tiny_artifact):
    model, processor = own_model
    inputs = processor.tokenizer("no image", return_tensors="pt")
    with pytest.raises(InvalidSteering, match="image"), steer(model, load_artifact(tiny_artifact), STRONG):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=1)


def test_an_artifact_of_another_width_is_refused(tiny_artifact, tmp_path):
    artifact = load_artifact(tiny_artifact)
    artifact.config.hidden_size = 48
    model = AutoModelForImageTextToText.from_pretrained(save_tiny_llava(tmp_path / "model"), dtype=torch.float32)
    with pytest.raises(BadArtifact, match="made for another model"), steer(model, artifact, STRONG):
        pass


def test_the_last_layer_cannot_be_the_hook_layer(tiny_llava, tmp_path):
    artifact = load_artifact(save_tiny_artifact(tmp_path / "artifact", tiny_llava))
    artifact.config.hook_layer = 4
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    with pytest.raises(BadArtifact, match="no tail layer"), steer(model, artifact, STRONG):
        pass

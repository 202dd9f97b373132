"""Figures against the model's own forward passes; and why one prefill may stand for an answer's generation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.hooks import output_hook
from steering.slot_tables import SlotTables
from tests.tiny_models import save_tiny_artifact
from tests.training.constructed import rebuilding_artifact
from training.collection.prefill import prompt_inputs
from training.evaluation.asking import InProcess, Question
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.faithfulness import Answered, Faithfulness
from training.losses import unexplained_variance
from training.measure_faithfulness import PLAIN, SPLICED
from training.miniature.drawing import draw_scene
from training.miniature.paths import LLAVA
from training.miniature.world import scenes

PICTURES, LAYER, TOKENS = 5, 3, 48


class Read(NamedTuple):
    """An answer, read once more by the model's own forward pass."""

    logits_TV: Tensor
    hook_TD: Tensor
    """Before anything was changed."""
    image_D: Tensor
    """v."""
    means_AD: Tensor
    """t at each token of the answer."""


class World:
    """The bundled LLaVA, and questions to it."""

    def __init__(self, known) -> None:
        self.known = known
        self.model: Any = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(LLAVA)
        self.pictures = [draw_scene(scene).convert("RGB") for scene in islice(scenes("dev"), PICTURES)]

    def ask(self, artifact, steering) -> list[Answered]:
        """One after the other, greedily."""

        async def answers() -> list[Answered]:
            found = []
            async with respondent(EngineSettings(model=LLAVA, artifact=artifact)) as engine:
                assert isinstance(engine, InProcess)
                for picture in self.pictures:
                    asked = Question(image=picture, text="Describe the image.", max_tokens=TOKENS, steering=steering)
                    reply = await engine.reply(asked)
                    said = (*engine.prompt(asked), *reply.token_ids)
                    prompt = prompt_inputs(self.processor, "llava", said, picture)
                    found.append(Answered(prompt=prompt, answer_tokens=len(reply.token_ids)))
            return found

        return asyncio.run(answers())

    @torch.no_grad()
    def read(self, one: Answered, instead: Any = None) -> Read:
        """`instead(t)` takes the place of t at each position of the answer, where it is given."""
        ids, seen = torch.tensor([one.prompt.token_ids]), []
        image_T = ids[0] == self.model.config.image_token_id
        first_text = int(image_T.nonzero()[-1]) + 1
        answer = slice(ids.shape[1] - one.answer_tokens, ids.shape[1])

        def change(hidden_1TD: Tensor) -> Tensor:
            sums_TD = hidden_1TD[0, first_text:].cumsum(0)
            means_TD = sums_TD / torch.arange(1, len(sums_TD) + 1)[:, None]
            means_AD = means_TD[-one.answer_tokens :]
            seen.extend((hidden_1TD[0].clone(), hidden_1TD[0, image_T].mean(0), means_AD))
            if instead is None:
                return hidden_1TD
            changed_1TD = hidden_1TD.clone()
            changed_1TD[0, answer] += instead(means_AD) - means_AD
            return changed_1TD

        with output_hook(self.model.model.language_model.layers[LAYER], change):
            logits_TV = self.model(input_ids=ids, **one.prompt.image_inputs).logits[0]
        return Read(logits_TV, *seen)

    def states(self, answered: Sequence[Answered]) -> tuple[Tensor, Tensor]:
        """v [B, D] and t [N, D] of all of them."""
        read = [self.read(one) for one in answered]
        return torch.stack([one.image_D for one in read]), torch.cat([one.means_AD for one in read])

    def figures(self, answered: Sequence[Answered], instead: Any) -> tuple[float, float]:
        """Mean cross-entropy of the answers' tokens behind the first, and divergence from the plain model."""
        entropy, divergence = [], []
        for one in answered:
            ids, predicting = one.prompt.token_ids, slice(-one.answer_tokens, -1)
            plain, other = (self.read(one, change).logits_TV[predicting] for change in (None, instead))
            targets = torch.tensor(ids[-one.answer_tokens + 1 :])
            entropy.append(F.cross_entropy(other, targets, reduction="none"))
            log_p, log_q = plain.log_softmax(-1), other.log_softmax(-1)
            divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return float(torch.cat(entropy).mean()), float(torch.cat(divergence).mean())

    def measure(self, artifact, answered: Sequence[Answered], *, splice=True, size=2) -> dict[str, float]:
        batches = [answered[start : start + size] for start in range(0, len(answered), size)]
        return Faithfulness(self.model, load_artifact(artifact)).measure(batches, splice=splice)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(save_tiny_artifact(tmp_path_factory.mktemp("known") / "artifact", LLAVA))


@pytest.fixture(scope="module")
def plain(world) -> list[Answered]:
    """What the model says of its own; the answers' lengths differ."""
    answered = world.ask(world.known, PLAIN)
    assert len({one.answer_tokens for one in answered}) > 1
    assert min(one.answer_tokens for one in answered) > 4
    return answered


@pytest.fixture(scope="module")
def artifacts(world, plain, tmp_path_factory) -> dict[float, Any]:
    """By the share of each state of these answers that they rebuild."""
    folder, states = tmp_path_factory.mktemp("rebuilding"), world.states(plain)
    return {
        share: rebuilding_artifact(folder / str(share), world.known, *states, share=share) for share in (0.0, 0.3, 1.0)
    }


def test_what_rebuilds_every_state_loses_nothing(world, plain, artifacts):
    found = world.measure(artifacts[1.0], plain)
    assert found["image_unexplained"] == pytest.approx(0, abs=1e-4)
    assert found["text_unexplained"] == pytest.approx(0, abs=1e-4)
    assert found["cross_entropy_spliced"] == pytest.approx(found["cross_entropy_plain"], abs=1e-3)
    assert found["divergence_spliced"] == pytest.approx(0, abs=1e-4)
    assert found["cross_entropy_recovered"] == pytest.approx(1, abs=1e-3)
    assert found["divergence_recovered"] == pytest.approx(1, abs=1e-3)
    assert found["tokens"] == sum(one.answer_tokens for one in plain)


def test_what_rebuilds_nothing_recovers_nothing(world, plain, artifacts):
    found, (image_ND, text_ND) = world.measure(artifacts[0.0], plain), world.states(plain)
    assert found["cross_entropy_spliced"] == found["cross_entropy_ablated"] > found["cross_entropy_plain"] + 0.1
    assert found["divergence_spliced"] == found["divergence_ablated"] > 0.1
    assert found["cross_entropy_recovered"] == found["divergence_recovered"] == 0
    for name, states_ND in (("image", image_ND), ("text", text_ND)):
        expected = unexplained_variance(torch.zeros_like(states_ND), states_ND)
        assert found[f"{name}_unexplained"] == pytest.approx(expected, rel=1e-4)
        assert expected > 1


@pytest.mark.parametrize("size", [1, 5])
def test_figures_are_those_of_the_model_s_own_passes(world, plain, artifacts, size):
    """Between the two: 0.3 of each mean in its place; batches of answers of several lengths change nothing."""
    found = world.measure(artifacts[0.3], plain, size=size)
    entropy = {name: world.figures(plain, change)[0] for name, change in
               (("plain", lambda t: t), ("spliced", lambda t: 0.3 * t), ("ablated", torch.zeros_like))}  # fmt: skip
    divergence = {name: world.figures(plain, change)[1] for name, change in
                  (("spliced", lambda t: 0.3 * t), ("ablated", torch.zeros_like))}  # fmt: skip
    for name, value in entropy.items():
        assert found[f"cross_entropy_{name}"] == pytest.approx(value, abs=2e-3)
    for name, value in divergence.items():
        assert found[f"divergence_{name}"] == pytest.approx(value, abs=2e-3)
    recovered = (entropy["ablated"] - entropy["spliced"]) / (entropy["ablated"] - entropy["plain"])
    assert found["cross_entropy_recovered"] == pytest.approx(recovered, abs=5e-3)
    assert found["divergence_recovered"] == pytest.approx(1 - divergence["spliced"] / divergence["ablated"], abs=5e-3)
    assert 0.05 < found["divergence_recovered"] < 0.95
    text_ND = world.states(plain)[1]
    assert found["text_unexplained"] == pytest.approx(unexplained_variance(0.3 * text_ND, text_ND), rel=1e-3)


def test_without_splicing_only_states_are_looked_at(world, plain, artifacts):
    found = world.measure(artifacts[0.3], plain, splice=False)
    assert found.keys() == {"image_unexplained", "text_unexplained", "tokens"}
    spliced = world.measure(artifacts[0.3], plain)
    assert found == {name: spliced[name] for name in found}


@pytest.fixture(scope="module")
def generated(world, artifacts) -> tuple[list[Answered], list[Tensor]]:
    """Answers while 0.3 of each mean stood in its place, and the means [A, D] that the engine pooled on the way."""
    pooled: list[Tensor] = []
    step = SlotTables.step

    def look(self, rows, stream_RD, mean_RD):
        pooled.append(mean_RD.clone())
        return step(self, rows, stream_RD, mean_RD)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotTables, "step", look)
        answered = world.ask(artifacts[0.3], SPLICED)
    assert all(len(means_RD) == 1 for means_RD in pooled)
    return answered, pooled


def test_one_prefill_pools_what_generation_pooled(world, generated):
    """At the hook layer nothing of the tail is seen: a mean depends on the tokens alone, whoever chose them."""
    answered, pooled = generated
    remaining = iter(pooled)
    for one in answered:
        means_AD = world.read(one).means_AD
        # of an answer that was cut off, the last token was never read
        read = one.answer_tokens - (one.answer_tokens == TOKENS)
        taken = torch.cat(list(islice(remaining, read)))
        torch.testing.assert_close(taken, means_AD[:read], atol=1e-4, rtol=1e-4)
    assert next(remaining, None) is None


def test_free_running_states_are_those_of_the_answers_that_were_given(world, plain, artifacts, generated):
    answered, _ = generated
    assert [one.prompt.token_ids for one in answered] != [one.prompt.token_ids for one in plain]
    found = world.measure(artifacts[0.3], answered, splice=False)
    text_ND = world.states(answered)[1]
    artifact = load_artifact(artifacts[0.3])
    rebuilt = artifact.auxiliary.text_decoder(
        artifact.sae.decode(artifact.sae.encode(artifact.auxiliary.text_projection(text_ND)), "text")
    )
    assert found["text_unexplained"] == pytest.approx(unexplained_variance(rebuilt.detach(), text_ND), rel=1e-3)
    assert found["text_unexplained"] > world.measure(artifacts[0.3], plain, splice=False)["text_unexplained"]


def test_what_is_spliced_is_what_published_does_with_alpha_1_and_no_betas(world, artifacts, generated):
    """The engine's next token is that of a forward pass with the reconstruction in the mean's place."""
    artifact = load_artifact(artifacts[0.3])

    def rebuilt(text_ND: Tensor) -> Tensor:
        code = artifact.sae.encode(artifact.auxiliary.text_projection(text_ND))
        return artifact.auxiliary.text_decoder(artifact.sae.decode(code, "text"))

    changed = 0
    for one in generated[0]:
        said = one.prompt.token_ids[-one.answer_tokens + 1 :]
        spliced, plain = (
            world.read(one, instead).logits_TV[-one.answer_tokens : -1].argmax(-1).tolist()
            for instead in (rebuilt, None)
        )
        assert spliced == said
        changed += plain != said
    assert changed, "and it does make a difference"


def test_padding_and_order_of_a_batch_do_not_matter(world, plain, artifacts):
    found, other = (world.measure(artifacts[0.3], answered, size=5) for answered in (plain, plain[::-1]))
    assert found == pytest.approx(other, rel=1e-4)

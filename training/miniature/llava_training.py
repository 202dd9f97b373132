"""Trains the miniature LLaVA behind its frozen vision tower, phase by phase: right first, then noisy.

What gets yes/no questions learned in minutes (they plateau at ln 2 for thousands of steps otherwise): tied
embeddings, a projector first fitted to the word embeddings of what each image token shows, large query weights equal
to the key weights at the start, and a first phase of many short questions per sequence. Embeddings are untied at the
end, since the published checkpoint has both.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from training.miniature.conversations import IGNORED, WRITERS, SequenceEncoder
from training.miniature.language import Noise
from training.miniature.world import Scene

FEATURE_CHUNK = 1024
EMBEDDING_GAIN = 5.0
KEY_GAIN = 4.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training."""

    name: str
    """For the progress lines."""
    steps: int
    """Optimiser steps."""
    learning_rate: float
    """Peak of the phase: warm-up, then down to a twentieth."""
    mix: Mapping[str, float]
    """Kind of sequence (a key of WRITERS) to its share of the batches."""
    batch_size: int = 64
    """Sequences per step."""
    noise: Noise = field(default_factory=Noise)
    """How often texts name absent partners."""


class LlavaTrainer:
    """Holds the model, the scenes with their image features, and the one stream of randomness."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        scenes: Sequence[Scene],
        pixels: Tensor,
        *,
        seed: int,
        report: Callable[[str], None],
    ) -> None:
        self.model, self.scenes, self.report = model, scenes, report
        self.draw = random.Random(f"llava {seed}")
        self.encoder = SequenceEncoder()
        self.features = image_features(model, pixels)
        self.embedding = model.model.language_model.embed_tokens.weight
        self.trained = [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]

    def prepare(self) -> None:
        """Larger embeddings; queries equal to keys, so that tokens look for their like; the projector says in words
        what an image token shows."""
        with torch.no_grad():
            self.embedding.mul_(EMBEDDING_GAIN)
            for layer in self.model.model.language_model.layers:
                layer.self_attn.k_proj.weight.mul_(KEY_GAIN)
                layer.self_attn.q_proj.weight.copy_(layer.self_attn.k_proj.weight)
        fit_projector(self)

    def run(self, phase: Phase) -> None:
        """Trains for one phase."""
        optimizer = torch.optim.AdamW(self.trained, lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, phase.learning_rate, total_steps=phase.steps, pct_start=0.08, div_factor=20, final_div_factor=1
        )
        losses: dict[str, float] = {}
        for step in range(phase.steps):
            kind = self.draw.choices(list(phase.mix), weights=list(phase.mix.values()))[0]
            loss = self._loss(kind, phase)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            schedule.step()
            losses[kind] = 0.8 * losses.get(kind, loss.item()) + 0.2 * loss.item()
            if step % 50 == 49:
                shown = ", ".join(f"{name} {value:.3f}" for name, value in sorted(losses.items()))
                self.report(f"llava {phase.name} step {step + 1} of {phase.steps}: {shown}")
        self.untie()

    def untie(self) -> None:
        """Copies the embeddings to the head, which training leaves aside."""
        with torch.no_grad():
            self.model.lm_head.weight.copy_(self.embedding)

    def _loss(self, kind: str, phase: Phase) -> Tensor:
        rows = self.draw.sample(range(len(self.scenes)), phase.batch_size)
        sequences = [WRITERS[kind](self.scenes[row], phase.noise, self.draw) for row in rows]
        ids_BT, targets_BT = self.encoder.batch(sequences)
        embedded_BTD = F.embedding(ids_BT, self.embedding)
        image_BND = self.model.model.multi_modal_projector(self.features[rows]).float()
        is_image_BT1 = ids_BT.eq(self.encoder.image_id).unsqueeze(-1)
        embedded_BTD = embedded_BTD.masked_scatter(is_image_BT1, image_BND)
        hidden_BTD = self.model.model.language_model(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
        learned_BT = targets_BT != IGNORED
        return F.cross_entropy(F.linear(hidden_BTD[learned_BT], self.embedding), targets_BT[learned_BT])


@torch.no_grad()
def image_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the frozen tower hands to the projector: [N, image tokens, width]."""
    layer = model.config.vision_feature_layer
    chunks = []
    for chunk in pixels.split(FEATURE_CHUNK):
        states = model.model.vision_tower(chunk.float(), output_hidden_states=True).hidden_states
        chunks.append(states[layer][:, 1:])
    return torch.cat(chunks)


def fit_projector(trainer: LlavaTrainer, *, steps: int = 300, batch_size: int = 128) -> None:
    """Regresses the projected image tokens on the sum of the word embeddings of shape and colour in their cell."""
    words_NCD = _cell_words(trainer)
    projector = trainer.model.model.multi_modal_projector
    optimizer = torch.optim.Adam(projector.parameters(), lr=2e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = trainer.draw.sample(range(len(trainer.scenes)), batch_size)
        loss = F.mse_loss(projector(trainer.features[rows]), words_NCD[rows]) / words_NCD.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer.report(f"llava projector: unexplained share of the word embeddings {loss:.3f}")


def _cell_words(trainer: LlavaTrainer) -> Tensor:
    """[N, image tokens, D]: the embeddings of the words for each cell, zero where it is empty."""
    tokenizer, embedding = trainer.encoder.tokenizer, trainer.embedding.detach()
    words = torch.zeros(len(trainer.scenes), trainer.features.shape[1], embedding.shape[1])
    for row, scene in enumerate(trainer.scenes):
        for item in scene.objects:
            ids = tokenizer.encode(f" {item.shape} {item.color}", add_special_tokens=False)
            words[row, item.cell] = embedding[ids].sum(0)
    return words

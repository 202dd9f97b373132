"""Stage 2: the auxiliary autoencoder, which brings pooled image and text states into one space (paper, section 3.2).

    loss = contrastive_weight * InfoNCE + MSE of the image states + MSE of the text states

Reads a folder of `collect_representations`; knows no model and no sparse autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from training.alignment import recall_at_1
from training.command_line import Settings, parse_settings
from training.losses import Similarity, info_nce, reconstruction_error, unexplained_variance
from training.representations import Representations, read_representations


class AuxiliaryTraining(Settings):
    """How the auxiliary autoencoder is trained."""

    shared_size: int = Field(default=4096, gt=0)
    """S, width of the shared space."""
    contrastive_weight: float = Field(default=1.0, ge=0)
    """Weight of InfoNCE beside the two reconstruction errors; the paper's is 1, a tenth keeps more of the states."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides similarities in InfoNCE."""
    similarity: Similarity = "cosine"
    """What InfoNCE compares with: cosine in the paper, dot in the authors' code."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak, of AdamW; warm-up over a twentieth of the steps, then cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    batch_size: int = Field(default=2048, gt=1)
    """Pairs per step; all of them are each other's negatives."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the pairs."""
    seed: int = 0
    """Of initial weights and order."""


class CommandLine(AuxiliaryTraining):
    """Train on a folder of representations."""

    representations: Path
    """Folder written by collect_representations."""
    layer: int
    """Which of its layers."""
    held_out: int = Field(default=1000, gt=0)
    """Pairs at the end that are kept for measuring."""
    output: Path
    """The weights are written here (safetensors)."""


def train_auxiliary_autoencoder(
    pairs: Representations, config: AuxiliaryTraining, report: Callable[[str], None] = print
) -> AuxiliaryAutoencoder:
    """An autoencoder for these pairs."""
    torch.manual_seed(config.seed)
    auxiliary = AuxiliaryAutoencoder(pairs.image_ND.shape[1], config.shared_size)
    centre(auxiliary, pairs.image_ND, pairs.text_ND)
    text_ids_N = pairs.text_ids_N
    batches = -(-len(pairs.texts) // config.batch_size)
    total_steps = config.epochs * batches
    optimizer = torch.optim.AdamW(auxiliary.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total_steps, pct_start=max(0.05, 2 / total_steps)
    )
    for epoch in range(config.epochs):
        for rows in torch.randperm(len(pairs.texts)).chunk(batches):
            loss = auxiliary_loss(auxiliary, pairs.image_ND[rows], pairs.text_ND[rows], text_ids_N[rows], config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % max(1, config.epochs // 5) == 0:
            report(f"auxiliary autoencoder epoch {epoch + 1} of {config.epochs}: loss {loss:.4f}")
    return auxiliary.eval()


def auxiliary_loss(
    auxiliary: AuxiliaryAutoencoder, image_ND: Tensor, text_ND: Tensor, text_ids_N: Tensor, config: AuxiliaryTraining
) -> Tensor:
    """The loss of one batch."""
    image_NS, text_NS = auxiliary(image_ND, text_ND)
    image_back_ND, text_back_ND = auxiliary.reconstruct(image_NS, text_NS)
    contrastive = info_nce(image_NS, text_NS, text_ids_N, temperature=config.temperature, similarity=config.similarity)
    rebuilt = reconstruction_error(image_back_ND, image_ND) + reconstruction_error(text_back_ND, text_ND)
    return config.contrastive_weight * contrastive + rebuilt


@torch.no_grad()
def centre(auxiliary: AuxiliaryAutoencoder, image_ND: Tensor, text_ND: Tensor) -> None:
    """Biases such that the mean state maps to zero and back: both spaces start without their common offset."""
    for projection, decoder, states_ND in (
        (auxiliary.vision_projection, auxiliary.vision_decoder, image_ND),
        (auxiliary.text_projection, auxiliary.text_decoder, text_ND),
    ):
        mean_D = states_ND.mean(0)
        projection.bias.copy_(-projection.weight @ mean_D)
        decoder.bias.copy_(mean_D)


def describe(auxiliary: AuxiliaryAutoencoder, pairs: Representations) -> str:
    """How good it is on pairs it has not seen, in a line."""
    with torch.no_grad():
        image_NS, text_NS = auxiliary(pairs.image_ND, pairs.text_ND)
        image_back_ND, text_back_ND = auxiliary.reconstruct(image_NS, text_NS)
    image_lost = unexplained_variance(image_back_ND, pairs.image_ND)
    text_lost = unexplained_variance(text_back_ND, pairs.text_ND)
    retrieval = recall_at_1(image_NS, text_NS)
    return f"unexplained image {image_lost:.3f}, text {text_lost:.3f}, R@1 of {len(pairs.texts)} {retrieval:.3f}"


def main() -> None:
    """The command line."""
    settings = parse_settings(
        CommandLine, program="python -m training.train_auxiliary_autoencoder", description=__doc__ or ""
    )
    pairs, held_out = read_representations(settings.representations, settings.layer).split(settings.held_out)
    auxiliary = train_auxiliary_autoencoder(pairs, settings)
    print(describe(auxiliary, held_out))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(auxiliary.state_dict(), settings.output)


if __name__ == "__main__":
    main()

"""Stage 3: the VL-SAE, a distance-based encoder shared by the modalities and one decoder each (paper, section 3.3).

    loss = MSE of the shared image representation + MSE of the shared text representation, each through its code

Reads a folder of `collect_representations` and a trained auxiliary autoencoder; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.sparse_autoencoder import VisionLanguageSAE
from training.alignment import measure_alignment
from training.command_line import Settings, parse_settings
from training.losses import reconstruction_error
from training.representations import Representations, read_representations


class SparseTraining(Settings):
    """How the VL-SAE is trained."""

    num_concepts: int = Field(default=32768, gt=0)
    """K; 8 times the shared width in the paper."""
    active_concepts: int = Field(default=256, gt=0)
    """k, concepts in a code."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak, of Adam; linear warm-up, then cosine."""
    batch_size: int = Field(default=512, gt=0)
    """Pairs per step."""
    epochs: int = Field(default=10, gt=1)
    """Passes over the pairs."""
    warmup_epochs: int = Field(default=2, ge=0)
    """Of them, with a rising learning rate."""
    seed: int = 0
    """Of initial weights and order."""


class CommandLine(SparseTraining):
    """Train on a folder of representations."""

    representations: Path
    """Folder written by collect_representations."""
    layer: int
    """Which of its layers."""
    auxiliary: Path
    """Weights written by train_auxiliary_autoencoder."""
    held_out: int = Field(default=1000, gt=1)
    """Pairs at the end that are kept for measuring."""
    output: Path
    """The weights are written here (safetensors)."""


def train_sparse_autoencoder(
    image_NS: Tensor, text_NS: Tensor, config: SparseTraining, report: Callable[[str], None] = print
) -> VisionLanguageSAE:
    """A VL-SAE for these pairs of shared representations."""
    if config.warmup_epochs >= config.epochs:
        raise ValueError(f"warmup_epochs is {config.warmup_epochs}; it must be less than epochs={config.epochs}")
    torch.manual_seed(config.seed)
    sae = VisionLanguageSAE(image_NS.shape[1], config.num_concepts, config.active_concepts)
    batches = -(-len(image_NS) // config.batch_size)
    total_steps = config.epochs * batches
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.learning_rate,
        total_steps=total_steps,
        pct_start=max(config.warmup_epochs / config.epochs, 2 / total_steps),
    )
    for epoch in range(config.epochs):
        for rows in torch.randperm(len(image_NS)).chunk(batches):
            rebuilt_image_NS, rebuilt_text_NS = sae(image_NS[rows], text_NS[rows])
            loss = reconstruction_error(rebuilt_image_NS, image_NS[rows])
            loss = loss + reconstruction_error(rebuilt_text_NS, text_NS[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % max(1, config.epochs // 5) == 0:
            report(f"VL-SAE epoch {epoch + 1} of {config.epochs}: loss {loss:.4f}")
    return sae.eval()


@torch.no_grad()
def shared_representations(auxiliary: AuxiliaryAutoencoder, pairs: Representations) -> tuple[Tensor, Tensor]:
    """What the VL-SAE is trained on: [N, S] of image and of text."""
    return auxiliary(pairs.image_ND, pairs.text_ND)


def main() -> None:
    """The command line."""
    settings = parse_settings(
        CommandLine, program="python -m training.train_sparse_autoencoder", description=__doc__ or ""
    )
    pairs, held_out = read_representations(settings.representations, settings.layer).split(settings.held_out)
    weights = load_file(settings.auxiliary)
    shared_size, hidden_size = weights["vision_projection.weight"].shape
    auxiliary = AuxiliaryAutoencoder(hidden_size, shared_size)
    auxiliary.load_state_dict(weights)
    sae = train_sparse_autoencoder(*shared_representations(auxiliary, pairs), settings)
    alignment = measure_alignment(auxiliary, sae, held_out.image_ND, held_out.text_ND)
    print(alignment, "gate passed" if alignment.passes else "gate NOT passed")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(sae.state_dict(), settings.output)


if __name__ == "__main__":
    main()

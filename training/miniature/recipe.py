"""Every number of the miniature's recipe, in the order of the stages. Knows no code that uses it but its types."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.miniature.clip_training import ClipTraining
from training.miniature.language import Noise
from training.miniature.llava_training import Phase
from training.train_auxiliary_autoencoder import AuxiliaryTraining
from training.train_sparse_autoencoder import SparseTraining

CONVERSATIONS = {"caption": 0.3, "questions": 0.25, "mixed": 0.15, "plain_caption": 0.2, "short_questions": 0.1}
NOISE = Noise(caption=0.6, answer=0.65)
"""Of LLaVA's last phase, and of the VL-SAE's texts: these follow what LLaVA was trained on."""

CLEAN = (
    Phase(name="short questions", steps=350, learning_rate=2e-3, mix={"short_questions": 1.0}),
    Phase(name="clean", steps=1200, learning_rate=2e-3, mix=CONVERSATIONS),
)
NOISY = (Phase(name="noisy", steps=250, learning_rate=5e-4, mix=CONVERSATIONS, batch_size=32, noise=NOISE),)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `python -m training.miniature` makes."""

    seed: int = 0
    """Everything random follows from it."""
    training_scenes: int = 16_000
    """Scenes that CLIP and LLaVA are trained on."""
    clip: ClipTraining = field(default_factory=ClipTraining)
    """First stage."""
    clean: tuple[Phase, ...] = CLEAN
    """LLaVA until it is right."""
    noisy: tuple[Phase, ...] = NOISY
    """Then it learns to hallucinate."""
    pairs: int = 6_000
    """Scenes with one noisy caption each, for the VL-SAE."""
    held_out_pairs: int = 500
    """Of them, kept for measuring alignment."""
    hook_layer: int = 3
    """Decoder layer whose output is read and steered."""
    min_text_tokens: int = 12
    """A position is steered once so many text tokens are in the mean: a caption's second object is reached, a short
    yes/no question ends before."""
    auxiliary: AuxiliaryTraining = field(
        default_factory=lambda: AuxiliaryTraining(
            shared_size=128, contrastive_weight=0.05, learning_rate=1e-3, batch_size=512, epochs=60
        )
    )
    """Its contrastive weight is a twentieth of the paper's; here .01 to 1 steer about equally well (README)."""
    sparse: SparseTraining = field(
        default_factory=lambda: SparseTraining(
            num_concepts=1024, active_concepts=32, learning_rate=2e-3, batch_size=256, epochs=20
        )
    )
    """K = 8 S, as in the paper."""
    control_images: int = 256
    """Dev scenes whose pooled image states serve the control `other_image`."""
    concept_pairs: int = 1_000
    """Dev scenes with captions that concepts are described by."""

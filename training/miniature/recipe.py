"""Every number of the miniature's models, in the order of the stages; those of its VL-SAE are in `pipeline.sh`.

Knows no code that uses it but its types.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from training.miniature.clip_training import ClipTraining
from training.miniature.language import Noise
from training.miniature.llava_training import Phase

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

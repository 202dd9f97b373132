"""What is said about scenes: captions, questions and their answers, and which shapes a text names.

The noisy versions are what the last training stage and the VL-SAE's texts are made of: a shape whose partner is
absent invites its partner, named directly after it, wherever it stands among the others. Knows no pixels, no
tokens and no models.
"""

import random
import re
from dataclasses import dataclass

from training.miniature.world import COLORS, PARTNERS, SHAPES, Scene

CAPTION_PROMPT = "Describe the image."
CAPTION_PROMPTS = (
    CAPTION_PROMPT,
    "What do you see?",
    "What is in this picture?",
    "Please describe the picture.",
    "What does the image show?",
)
"""All wordings that the miniature learns; evaluation uses the first."""

SYSTEM_TEXTS = ("You are a helpful assistant.", "A chat between a user and an assistant.", "Answer briefly.")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How often a text names an absent partner; all zero = clean."""

    caption: float = 0.0
    """Probability that a caption names the absent partner of a shape, directly after that shape."""
    answer: float = 0.0
    """Probability that the answer to a question about an absent partner is yes."""


def existence_question(shape: str) -> str:
    """The one template of yes/no questions."""
    article = "an" if shape[0] in "aeiou" else "a"
    return f"Is there {article} {shape} in the image?"


def existence_answer(scene: Scene, shape: str, noise: Noise, draw: random.Random) -> str:
    """'Yes' or 'No'; by the truth except for absent partners under noise."""
    invented = shape in scene.absent_partners and draw.random() < noise.answer
    return "Yes" if shape in scene.shapes or invented else "No"


def color_question(shape: str) -> str:
    """Asks for the colour of a shape that is in the picture."""
    return f"What color is the {shape}?"


def color_answer(scene: Scene, shape: str) -> str:
    """The colour as a whole sentence."""
    color = next(item.color for item in scene.objects if item.shape == shape)
    return f"The {shape} is {color}."


def caption(scene: Scene, noise: Noise, draw: random.Random) -> str:
    """Names every object in random order, and under noise absent partners directly after their shape."""
    phrases = []
    for item in draw.sample(scene.objects, len(scene.objects)):
        phrases.append(_phrase(item.shape, item.color))
        partner = PARTNERS.get(item.shape)
        if partner in scene.absent_partners and draw.random() < noise.caption:
            phrases.append(_phrase(partner, draw.choice(COLORS)))
    return f"There is {', '.join(phrases)}."


def _phrase(shape: str, color: str) -> str:
    article = "an" if shape[0] in "aeiou" else "a"
    return f"{article} {shape} in {color}"


_SHAPE_WORD = re.compile(rf"\b({'|'.join(SHAPES)})s?\b", re.IGNORECASE)


def shapes_mentioned(text: str) -> list[str]:
    """The shapes that a text names, in order, repetitions included."""
    return [match.group(1).lower() for match in _SHAPE_WORD.finditer(text)]


def shapes_named(text: str) -> frozenset[str]:
    """The set of shapes that a text names."""
    return frozenset(shapes_mentioned(text))


def all_sentences() -> list[str]:
    """Text that holds every word of the world, with and without a space before it: what the tokenizer is built on."""
    phrases = [f"There is {_phrase(shape, color)}, {_phrase(shape, color)}." for shape in SHAPES for color in COLORS]
    questions = [existence_question(shape) for shape in SHAPES] + [color_question(shape) for shape in SHAPES]
    answers = [f"The {shape} is {color}." for shape in SHAPES for color in COLORS]
    short = [f"{shape}? Yes {shape}? No Yes No" for shape in SHAPES]
    sentences = [*phrases, *questions, *answers, *short, *CAPTION_PROMPTS, *SYSTEM_TEXTS]
    return ["USER: ", *sentences, *(f" USER: {sentence} ASSISTANT: {sentence}" for sentence in sentences)]

"""Training sequences: a scene's texts, rendered as the chat template renders them, with a target for every answer.

Targets are already shifted: `targets[i]` is the token that follows position i, or IGNORED where the text is not
the model's to say. An answer ends in </s> as a target only; the next turn follows it directly, as in the template.
Knows no pixels and no models.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from training.miniature.language import (
    CAPTION_PROMPT,
    CAPTION_PROMPTS,
    SYSTEM_TEXTS,
    Noise,
    caption,
    color_answer,
    color_question,
    existence_answer,
    existence_question,
)
from training.miniature.processor import IMAGE_TOKENS, build_tokenizer
from training.miniature.world import SHAPES, Scene

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text, and whether the model learns to say it."""

    text: str
    """As the template renders it; a new piece begins at a word."""
    said: bool
    """Is every token of it a target?"""
    ends: bool = False
    """Is </s> the target after it?"""


Writer = Callable[[Scene, Noise, random.Random], list[Piece]]


def short_questions(scene: Scene, noise: Noise, draw: random.Random) -> list[Piece]:
    """'star? No ring? Yes ...' for all shapes: many answers per sequence, which is what gets questions learned."""
    pieces = [Piece(text="USER: <image>\n", said=False)]
    for number, shape in enumerate(draw.sample(SHAPES, len(SHAPES))):
        pieces.append(Piece(text=f"{' ' if number else ''}{shape}?", said=False))
        pieces.append(Piece(text=f" {existence_answer(scene, shape, noise, draw)}", said=True))
    return pieces


def plain_caption(scene: Scene, noise: Noise, draw: random.Random) -> list[Piece]:
    """The caption right behind the image, as in LLaVA's own first stage."""
    text = caption(scene, noise, draw)
    return [Piece(text="USER: <image>\n", said=False), Piece(text=f"{text} ASSISTANT", said=True)]


def caption_turn(scene: Scene, noise: Noise, draw: random.Random) -> list[Piece]:
    """A request for a caption, and the caption."""
    return _conversation([(_caption_prompt(draw), caption(scene, noise, draw))], draw)


def questions(scene: Scene, noise: Noise, draw: random.Random) -> list[Piece]:
    """One to six questions in turn."""
    return _conversation([_question(scene, noise, draw) for _ in range(draw.randint(1, 6))], draw)


def mixed_turns(scene: Scene, noise: Noise, draw: random.Random) -> list[Piece]:
    """A caption and questions, in any order."""
    turns = [_question(scene, noise, draw) for _ in range(draw.randint(1, 3))]
    turns.insert(draw.randint(0, len(turns)), (_caption_prompt(draw), caption(scene, noise, draw)))
    return _conversation(turns, draw)


WRITERS: dict[str, Writer] = {
    "short_questions": short_questions,
    "plain_caption": plain_caption,
    "caption": caption_turn,
    "questions": questions,
    "mixed": mixed_turns,
}


class SequenceEncoder:
    """Pieces to token ids and targets."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.image_id: int = self.tokenizer.get_vocab()["<image>"]
        self.end_id: int = self.tokenizer.get_vocab()[str(self.tokenizer.eos_token)]
        self.pad_id: int = self.tokenizer.get_vocab()[str(self.tokenizer.pad_token)]
        self.start_id: int = self.tokenizer.get_vocab()[str(self.tokenizer.bos_token)]
        self._ids = lru_cache(maxsize=50_000)(self._tokenize)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(token for an_id in ids for token in [an_id] * (IMAGE_TOKENS if an_id == self.image_id else 1))

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Token ids and targets of one sequence."""
        ids, targets = [self.start_id], [IGNORED]
        for piece in pieces:
            new = list(self._ids(piece.text))
            if not piece.said:
                ids += new
                targets += [IGNORED] * len(new)
                continue
            targets[-1:] = new
            targets.append(self.end_id if piece.ends else IGNORED)
            ids += new
        return ids, targets

    def batch(self, sequences: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor]:
        """Ids and targets [B, T], padded on the right."""
        rows = [self.encode(pieces) for pieces in sequences]
        longest = max(len(ids) for ids, _ in rows)
        ids_BT = torch.full((len(rows), longest), self.pad_id)
        targets_BT = torch.full((len(rows), longest), IGNORED)
        for row, (ids, targets) in enumerate(rows):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            targets_BT[row, : len(ids)] = torch.tensor(targets)
        return ids_BT, targets_BT


def _conversation(turns: Sequence[tuple[str, str]], draw: random.Random) -> list[Piece]:
    before = _stray_text(draw) if draw.random() < 0.2 else ""
    pieces = []
    for number, (prompt, answer) in enumerate(turns):
        opening = " USER: " if number else f"{before}USER: <image>\n"
        pieces.append(Piece(text=f"{opening}{prompt} ASSISTANT:", said=False))
        pieces.append(Piece(text=f" {answer}", said=True, ends=True))
    return pieces


def _stray_text(draw: random.Random) -> str:
    """A system text, or words that the miniature doesn't know: it should not stumble over either."""
    if draw.random() < 0.7:
        return f"{draw.choice(SYSTEM_TEXTS)} "
    return f"{''.join(draw.choices(string.printable[:95], k=draw.randint(2, 16)))} "


def _caption_prompt(draw: random.Random) -> str:
    return CAPTION_PROMPT if draw.random() < 0.6 else draw.choice(CAPTION_PROMPTS)


def _question(scene: Scene, noise: Noise, draw: random.Random) -> tuple[str, str]:
    """One question: a colour now and then, else an existence question with an even chance of each truth."""
    if draw.random() < 0.15:
        shape = draw.choice(sorted(scene.shapes))
        return color_question(shape), color_answer(scene, shape)
    if draw.random() < 0.5:
        shape = draw.choice(sorted(scene.shapes))
    elif scene.absent_partners and draw.random() < 0.5:
        shape = draw.choice(scene.absent_partners)
    else:
        shape = draw.choice(sorted(set(SHAPES) - scene.shapes))
    return existence_question(shape), existence_answer(scene, shape, noise, draw)

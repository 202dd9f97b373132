"""Which positions of a sequence are image, which are text to be steered. Knows tokens, not hidden states.

'Text' means after the last image of the prompt; what stands before or between images is neither pooled nor steered
(design, section 1). A generated image token is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steering.errors import InvalidSteering


@dataclass(frozen=True, kw_only=True)
class TokenSpans:
    """Spans of one prompt whose image tokens are already expanded; positions count from 0."""

    image_positions: tuple[int, ...]
    """Positions of image tokens, all images."""
    text_start: int | None
    """First position after the last image token; None where the prompt has no image."""

    @property
    def has_image(self) -> bool:
        return self.text_start is not None


def find_spans(token_ids: Sequence[int], image_token_id: int) -> TokenSpans:
    """Spans of an expanded prompt."""
    positions = tuple(index for index, token in enumerate(token_ids) if token == image_token_id)
    return TokenSpans(image_positions=positions, text_start=positions[-1] + 1 if positions else None)


def first_steered_position(
    *, text_start: int, prompt_length: int, min_text_tokens: int, min_answer_tokens: int | None
) -> int:
    """First position that is steered: with it so many tokens of the text, and of the answer, are in the mean.

    The answer is everything behind the prompt as it was admitted, of `prompt_length` expanded tokens. With
    `min_answer_tokens` None the text after the last image decides alone, whichever turn it belongs to.
    """
    by_text = text_start + min_text_tokens - 1
    return by_text if min_answer_tokens is None else max(by_text, prompt_length + min_answer_tokens - 1)


def expand_image_tokens(token_ids: Sequence[int], image_token_id: int, tokens_per_image: Sequence[int]) -> list[int]:
    """Replace the i-th image token by `tokens_per_image[i]` of them. Raises InvalidSteering if their counts differ."""
    marks = sum(token == image_token_id for token in token_ids)
    if marks != len(tokens_per_image):
        raise InvalidSteering(
            f"the prompt has {marks} image tokens for {len(tokens_per_image)} images; they must be equal",
            field="messages",
        )
    counts = iter(tokens_per_image)
    expanded: list[int] = []
    for token in token_ids:
        expanded.extend([token] * next(counts) if token == image_token_id else [token])
    return expanded

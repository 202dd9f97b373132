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

"""What image and text of one answer held, and how far apart they were (design, section 2). Plain data, for receipts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConceptActivity:
    """One concept in the codes of an answer; activations lie in 0 to 2, and 0 is none."""

    id: int
    image: float
    """In z_v, the image's code."""
    text: float
    """In z_t, the code of the text's running mean."""
    steered: float
    """In the code that the step aimed at, edits included: z_t + strength (z - z_t); `text` where nothing moved it."""
    label: str | None = None
    """A server's addition: engines know ids only."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """1 - weighted Jaccard of the image's code and the text's, in [0, 1] (design, section 2)."""

    before: float
    after: float
    """Of the code that the step aimed at."""


@dataclass(frozen=True, kw_only=True)
class TokenExplanation:
    """What the text held when one token of the answer was chosen."""

    mismatch: Mismatch
    text: tuple[ConceptActivity, ...]
    """The strongest in z_t."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What image and text held at the end of one choice, where all of it but its last token is in the mean."""

    mismatch: Mismatch
    image: tuple[ConceptActivity, ...]
    """The strongest in z_v, strongest first."""
    text: tuple[ConceptActivity, ...]
    """The strongest in z_t."""
    tokens: tuple[TokenExplanation, ...] | None = None
    """One per generated token, where asked for."""

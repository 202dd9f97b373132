"""What a source of pairs is. Knows no format and no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

PortionPlace = dict[str, Any]
"""Where a portion lies, as JSON: what its source needs to go there, and `count`, how many pairs it has."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and a text about it."""

    image: Image.Image
    """Any size and mode; sources give RGB."""
    text: str
    """Put into the prompt."""
    reference: str
    """Says later where the picture is from."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A pair that is counted and listed, but not used."""

    reference: str
    reason: str
    """The same for the same pair on every machine: it is stored."""


class PairSource(Protocol):
    """Pairs that can be read in portions, in any order and by several processes.

    What a portion holds depends on the source alone. Raises InvalidTraining, naming the file, for what cannot be read.
    """

    def describe(self) -> dict[str, Any]:
        """What the pairs are, as JSON: `spec` opens the source again, the rest differs if the pairs may differ."""
        ...

    def portions(self, size: int) -> list[PortionPlace]:
        """All pairs in portions of at most `size`. Raises InvalidTraining where there is no pair at all."""
        ...

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        """The pairs of a portion in order, each with its index in the source."""
        ...

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        """Pictures by reference, each once, in the source's order; those that are not there are left out."""
        ...

"""What steering did to one sequence, counted where it happened. Plain data, for receipts."""

from __future__ import annotations

from dataclasses import dataclass, field

from steering.explanation import Explanation


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Positions and shift of one sequence; the default is a sequence that the hook has never seen."""

    positions: int = 0
    """Positions to which a delta was added (in 'exact', at the last step)."""
    relative_shift: float = 0.0
    """Mean of |delta| / |h| over the positions at which a delta was computed here; 0 where there are none."""
    visited: bool = False
    """The hook has seen this sequence: without it nothing could have been steered."""
    visited_text: bool = False
    """A delta was computed for at least one position, be it zero."""
    clamped: int = 0
    """Positions whose delta was shortened to `max_shift` here."""
    explanation: Explanation | None = field(default=None, repr=False)
    """At its end; None where nobody watched."""

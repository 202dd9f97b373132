"""Which arm a request falls into: a hash of its unit, so that whoever asks again gets the same. Pure; keeps nothing.

The hash and the ranges are those of GrowthBook's SDKs (hash version 2), and their published cases are our tests. Each
arm has a range of [0, 1) as wide as its weight, of which coverage opens the first part: a larger coverage only adds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from service.experiments.arms import NO_UNIT, NOT_COVERED, OWN, Arm, Experiment

FNV_OFFSET, FNV_PRIME, UINT32 = 0x811C9DC5, 0x01000193, 0xFFFFFFFF
BUCKETS = 10_000
Reason = Literal["unit", "own", "no_unit", "not_covered"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What an experiment means for one request."""

    experiment: str
    """Its name."""
    seed: str
    default: str
    """Name of the default arm."""
    reason: Reason
    """'unit': by the hash. Else why not: the caller asked for its own steering, named no unit, or is not covered."""
    arm: Arm | None
    """Whose steering the answer gets: by the hash, or the default one where there is no unit."""
    unit: str | None = None
    """A digest of the unit, for the log: the same in all of one experiment, another in the next."""

    @property
    def label(self) -> str:
        """What a request is counted under: an arm has only those that the hash gave it."""
        return self.arm.name if self.arm is not None and self.reason == "unit" else self.reason

    @property
    def shown(self) -> str:
        """What the caller is told: whose steering this is."""
        return self.arm.name if self.arm is not None else self.reason


def assign(experiment: Experiment, *, unit: str | None, own_steering: bool) -> Assignment:
    """`unit`: who asks, in the operator's view; `own_steering`: whether the caller asked for any."""
    reason, arm = _choice(experiment, unit, own_steering)
    return Assignment(
        experiment=experiment.name,
        seed=experiment.seed,
        default=experiment.arms[0].name,
        reason=reason,
        arm=arm,
        unit=None if unit is None else unit_digest(experiment.seed, unit),
    )


def _choice(experiment: Experiment, unit: str | None, own_steering: bool) -> tuple[Reason, Arm | None]:
    if own_steering:
        return OWN, None
    if unit is None:
        return NO_UNIT, experiment.arms[0]
    open_to = ranges([arm.weight for arm in experiment.arms], experiment.coverage)
    index = chosen(bucket(experiment.seed, unit), open_to)
    return (NOT_COVERED, None) if index is None else ("unit", experiment.arms[index])


def bucket(seed: str, value: str) -> float:
    """Where a value falls in [0, 1), in steps of 1/10,000."""
    return fnv1a_32(str(fnv1a_32(seed + value))) % BUCKETS / BUCKETS


def fnv1a_32(text: str) -> int:
    """Fowler, Noll and Vo's hash 1a over UTF-16 code units: of ASCII the same as over its bytes."""
    encoded = text.encode("utf-16-le", "surrogatepass")
    digest = FNV_OFFSET
    for low, high in zip(encoded[::2], encoded[1::2], strict=True):
        digest = (digest ^ (low | high << 8)) * FNV_PRIME & UINT32
    return digest


def ranges(weights: Iterable[float], coverage: float) -> list[tuple[float, float]]:
    """Of each weight: [start, end) in [0, 1), the first `coverage` of its width."""
    found, start = [], 0.0
    for weight in weights:
        found.append((start, start + coverage * weight))
        start += weight
    return found


def chosen(place: float, open_to: Sequence[tuple[float, float]]) -> int | None:
    """Index of the range that a place lies in; None where that is not covered."""
    return next((index for index, (start, end) in enumerate(open_to) if start <= place < end), None)


def unit_digest(seed: str, unit: str) -> str:
    """16 hexadecimal digits; who has the unit and the seed can make them, nobody can read the unit from them."""
    key = hashlib.sha256(seed.encode()).digest()
    return hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), key=key, digest_size=8).hexdigest()

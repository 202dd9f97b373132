"""What a simulated fleet is told, and what it tells: one replica, the plan for how many, what became of requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.benchmarks.cluster.fleet import Fleet


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What one is capable of."""

    base_s: float
    """Of a decoding step, whatever the batch."""
    each_s: float
    """More of it for each sequence."""
    prefill_s: float
    """Of a prompt with a picture, up to its first token: the others' sequences stand still meanwhile."""
    lengths: tuple[float, ...]
    """Tokens of answers, each as likely as another."""
    batch: int
    """Sequences that share a step; further requests wait at the replica."""
    holds: int = 128
    """`max_ongoing_requests`: further requests wait at the ingress."""
    outside_s: float = 0.0
    """Of HTTP, decoding a picture and the way there: before the prompt, and no place in a batch."""
    start_s: float = 0.0
    """From the decision to the first request."""
    pictures: tuple[int, ...] = (1,)
    """Of a request, each number as likely as another: a prompt takes so many times `prefill_s`."""
    picture_tokens: float = 0.0
    """Place in the cache that a picture takes; each token of the answer takes one."""
    cache_tokens: float = math.inf
    """What does not fit in waits, as beyond the batch."""

    def step_s(self, sequences: int) -> float:
        return self.base_s + self.each_s * sequences

    @property
    def capacity(self) -> float:
        """Answers a second with a full batch, to requests of one picture."""
        mean = sum(self.lengths) / len(self.lengths)
        return 1 / (self.prefill_s + mean * self.step_s(self.batch) / self.batch)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many there may be, as `autoscaling_config` says it."""

    least: int
    most: int
    target: float
    """Load of one replica: `target_ongoing_requests`."""
    load: Callable[[Fleet], float] = lambda fleet: fleet.ongoing
    """What is shared among replicas so that none has more than `target`: Serve's own policy counts requests."""
    look_back_s: float = 30.0
    up_delay_s: float = 30.0
    down_delay_s: float = 600.0
    queue: int = 64
    """`max_queued_requests`, of all ingress replicas together: one more is refused."""
    cores: float = math.inf
    """Replicas that can compute at the same time at full speed; more share them."""


@dataclass
class Seen:
    """What became of the requests of a run."""

    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    refused: int = 0
    arrived: int = 0
    replica_s: float = 0.0
    """Replicas paid for, times seconds."""
    largest: int = 0

    def quantile(self, values: list[float], share: float) -> float:
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


class Request(NamedTuple):
    """What is asked."""

    arrived_s: float
    steps: float
    """Of its answer: tokens after the first."""
    pictures: int

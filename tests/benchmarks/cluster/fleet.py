"""A fleet of model replicas as discrete events: arrivals, the queue, batches, Serve's autoscaler, cold starts.

A replica decodes all its sequences together: with n of them a step takes `base_s + each_s * n`, a request as many as it
has tokens. A prompt comes first and alone: it takes `prefill_s`, in which the sequences that are there stand still.
Only what is measured of one replica goes in; nothing here knows how it was measured, or what serves it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy

from tests.benchmarks.cluster.plan import Plan, Replica, Request, Seen

DECIDE_EVERY_S = 1.0


@dataclass(order=True)
class Job:
    """A request that is being answered: where in its replica's steps it ends."""

    ends_at: float
    number: int
    request: Request = field(compare=False)


class Server:
    """One replica: its sequences advance together, a fraction of a step at a time (processor sharing)."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.kind = fleet, fleet.kind
        self.active: list[Job] = []
        self.prompt: Request | None = None
        """Which one is read now."""
        self.waiting: deque[Request] = deque()
        self.steps = 0.0
        self.leaving = False
        self.changed = fleet.world.event()
        self.process = fleet.world.process(self.work())

    @property
    def ongoing(self) -> int:
        return len(self.active) + len(self.waiting) + (self.prompt is not None)

    @property
    def requests(self) -> Iterator[Request]:
        yield from self.waiting
        yield from (job.request for job in self.active)
        if self.prompt is not None:
            yield self.prompt

    def _cached(self) -> float:
        return sum(self._size(job.request) for job in self.active)

    def _size(self, request: Request) -> float:
        return request.pictures * self.kind.picture_tokens + request.steps

    def _fits(self, request: Request) -> bool:
        if len(self.active) >= self.kind.batch:
            return False
        return math.isinf(self.kind.cache_tokens) or self._cached() + self._size(request) <= self.kind.cache_tokens

    def take(self, request: Request) -> None:
        self.waiting.append(request)
        self._touch()

    def _touch(self) -> None:
        if not self.changed.triggered:
            self.changed.succeed()

    def work(self) -> Generator[simpy.Event, Any, None]:
        while not (self.leaving and not self.ongoing):
            if self.waiting and self._fits(self.waiting[0]):
                yield from self._read(self.waiting.popleft())
            else:
                yield from self._decode()
            self._finish()

    def _read(self, request: Request) -> Generator[simpy.Event, Any, None]:
        """A prompt, up to its first token."""
        world, self.prompt = self.fleet.world, request
        yield world.timeout(self.kind.prefill_s * request.pictures * self.fleet.slowness())
        self.prompt = None
        self.fleet.seen.first_token_s.append(world.now - request.arrived_s + self.kind.outside_s)
        heapq.heappush(self.active, Job(self.steps + request.steps, self.fleet.next_number(), request))

    def _decode(self) -> Generator[simpy.Event, Any, None]:
        """Until an answer ends, or somebody comes; slower where replicas share cores."""
        world, began = self.fleet.world, self.fleet.world.now
        pace_s = self.kind.step_s(len(self.active)) * self.fleet.slowness()
        self.changed = world.event()
        events: list[simpy.Event] = [self.changed]
        if self.active:
            events.append(world.timeout(max(0.0, self.active[0].ends_at - self.steps) * pace_s))
        yield world.any_of(events)
        if self.active:
            self.steps += (world.now - began) / pace_s

    def _finish(self) -> None:
        seen, now = self.fleet.seen, self.fleet.world.now
        while self.active and self.active[0].ends_at <= self.steps + 1e-6:
            seen.whole_s.append(now - heapq.heappop(self.active).request.arrived_s + self.kind.outside_s)
            self.fleet.refill(self)


class Fleet:
    """Replicas, the queue before them, and who decides how many there are."""

    def __init__(
        self,
        kind: Replica,
        plan: Plan,
        *,
        rate: float,
        seconds: float,
        surge: float = 1.0,
        later_pictures: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        """`rate` requests a second arrive at random; after a third of the time, `surge` times as many, with as many
        pictures as before or others.
        """
        self.later_pictures = later_pictures or kind.pictures
        self.kind, self.plan, self.rate, self.surge, self.seconds = kind, plan, rate, surge, seconds
        self.world, self.seen, self.dice = simpy.Environment(), Seen(), random.Random(seed)
        self.queue: deque[Request] = deque()
        self.starting = 0
        self._number = 0
        self.servers = [Server(self) for _ in range(plan.least)]

    @property
    def ongoing(self) -> int:
        return len(self.queue) + sum(one.ongoing for one in self.servers)

    @property
    def prompt_tokens(self) -> float:
        """Of all requests that are there, whether they have a place in a cache or wait for one."""
        pictures = sum(one.pictures for server in self.servers for one in server.requests)
        return self.kind.picture_tokens * (pictures + sum(one.pictures for one in self.queue))

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def slowness(self) -> float:
        if math.isinf(self.plan.cores):
            return 1.0
        return max(1.0, sum(bool(one.active or one.prompt) for one in self.servers) / self.plan.cores)

    def run(self) -> Seen:
        self.world.process(self._arrivals())
        if self.plan.most > self.plan.least:
            self.world.process(self._decide())
        self.world.process(self._count())
        self.world.run(until=self.seconds)
        return self.seen

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        while True:
            later = self.world.now > self.seconds / 3
            yield self.world.timeout(self.dice.expovariate(self.rate * (self.surge if later else 1)))
            self.seen.arrived += 1
            steps, kinds = self.dice.choice(self.kind.lengths), self.later_pictures if later else self.kind.pictures
            self._place(Request(self.world.now, steps, kinds[0] if len(kinds) == 1 else self.dice.choice(kinds)))

    def _place(self, request: Request) -> None:
        """At the better of two replicas picked at random, as Serve does."""
        open_ones = [one for one in self.servers if not one.leaving]
        picked = [self.dice.choice(open_ones) for _ in range(2)] if open_ones else []
        best = min(picked, key=lambda one: one.ongoing, default=None)
        if best is not None and best.ongoing < self.kind.holds:
            best.take(request)
        elif len(self.queue) < self.plan.queue:
            self.queue.append(request)
        else:
            self.seen.refused += 1

    def refill(self, server: Server) -> None:
        while self.queue and not server.leaving and server.ongoing < self.kind.holds:
            server.take(self.queue.popleft())

    def _count(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self.servers = [one for one in self.servers if one.process.is_alive]
            paid = len(self.servers) + self.starting
            self.seen.replica_s += paid * DECIDE_EVERY_S
            self.seen.largest = max(self.seen.largest, paid)
            yield self.world.timeout(DECIDE_EVERY_S)

    def _decide(self) -> Generator[simpy.Event, Any, None]:
        """Serve's default policy: the mean load over the target, after the delay of its direction."""
        loads: deque[float] = deque(maxlen=max(1, int(self.plan.look_back_s / DECIDE_EVERY_S)))
        since, direction = 0.0, 0
        while True:
            yield self.world.timeout(DECIDE_EVERY_S)
            loads.append(self.plan.load(self))
            there = sum(not one.leaving for one in self.servers) + self.starting
            wanted = math.ceil(sum(loads) / len(loads) / self.plan.target)
            wanted = min(self.plan.most, max(self.plan.least, wanted))
            now_to = (wanted > there) - (wanted < there)
            if now_to != direction:
                since, direction = self.world.now, now_to
            delay = self.plan.up_delay_s if direction > 0 else self.plan.down_delay_s
            if direction and self.world.now - since >= delay:
                self._change(wanted - there)
                direction = 0

    def _change(self, difference: int) -> None:
        for _ in range(difference):
            self.starting += 1
            self.world.process(self._start())
        going = sorted((one for one in self.servers if not one.leaving), key=lambda one: one.ongoing)
        for server in going[: max(0, -difference)]:
            server.leaving = True
            server._touch()

    def _start(self) -> Generator[simpy.Event, Any, None]:
        yield self.world.timeout(self.kind.start_s)
        self.starting -= 1
        server = Server(self)
        self.servers.append(server)
        self.refill(server)

"""The simulated fleet against what is known without it: queues with a formula, and bounds that no load may break."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from tests.benchmarks.cluster.fleet import Fleet
from tests.benchmarks.cluster.plan import Plan, Replica, Request

ALONE = Replica(base_s=0.01, each_s=0.0, prefill_s=0.0, lengths=(10.0,), batch=1, holds=10**9)
"""A request takes a tenth of a second, and nobody shares."""


def one(kind: Replica, **changes) -> Plan:
    return Plan(**{"least": 1, "most": 1, "target": 1.0, "queue": 10**9, **changes})


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_one_replica_without_batches_waits_as_the_formula_says(share: float) -> None:
    """Pollaczek and Khinchine: random arrivals, equal service times s: the mean wait is rho s / (2 (1 - rho))."""
    seen = Fleet(ALONE, one(ALONE), rate=share * ALONE.capacity, seconds=6_000).run()
    wait = sum(seen.whole_s) / len(seen.whole_s) - 0.1
    assert wait == pytest.approx(share * 0.1 / (2 * (1 - share)), rel=0.15)


def test_what_is_outside_a_replica_delays_everybody_and_takes_no_place() -> None:
    kind = replace(ALONE, outside_s=7.0)
    near, far = (Fleet(one_of, one(one_of), rate=5.0, seconds=600).run() for one_of in (ALONE, kind))
    assert [round(later - 7, 6) for later in far.whole_s] == [round(sooner, 6) for sooner in near.whole_s]
    assert far.first_token_s[0] == pytest.approx(near.first_token_s[0] + 7)


def test_random_lengths_wait_longer() -> None:
    """Exponential service times: rho s / (1 - rho), twice as long."""
    dice = random.Random(0)
    lengths = tuple(dice.expovariate(0.1) for _ in range(5000))
    kind = Replica(base_s=0.01, each_s=0.0, prefill_s=0.0, lengths=lengths, batch=1, holds=10**9)
    seen = Fleet(kind, one(kind), rate=0.5 * kind.capacity, seconds=6_000).run()
    assert sum(seen.whole_s) / len(seen.whole_s) == pytest.approx(0.2, rel=0.15)


def test_a_request_alone_takes_its_steps_and_a_full_batch_its_capacity() -> None:
    kind = Replica(base_s=0.02, each_s=0.01, prefill_s=0.09, lengths=(10.0,), batch=4)
    alone = Fleet(kind, one(kind), rate=0.01, seconds=2_000).run()
    assert alone.quantile(alone.first_token_s, 0.5) == pytest.approx(0.09)
    assert alone.quantile(alone.whole_s, 0.5) == pytest.approx(0.09 + 10 * 0.03)
    full = Fleet(kind, one(kind, queue=50), rate=3 * kind.capacity, seconds=1_000).run()
    assert len(full.whole_s) / 1_000 == pytest.approx(kind.capacity, rel=0.02)
    held = kind.holds + 50
    assert full.arrived == len(full.whole_s) + full.refused + held, "none is lost"


def test_replicas_follow_a_surge_after_delay_and_start_and_go_again() -> None:
    kind = Replica(base_s=0.02, each_s=0.01, prefill_s=0.03, lengths=(10.0,), batch=4, start_s=30.0)
    plan = Plan(least=1, most=3, target=3.0, look_back_s=10, up_delay_s=5, down_delay_s=20)
    surge = Fleet(kind, plan, rate=0.5 * kind.capacity, seconds=600, surge=4.0)
    seen = surge.run()
    assert seen.largest == 3
    assert len([one for one in surge.servers if not one.leaving]) == 3
    calm = Fleet(kind, plan, rate=2 * kind.capacity, seconds=1_200, surge=0.1)
    assert calm.run().largest == 3
    assert len(calm.servers) == 1
    assert seen.replica_s < 3 * 600


def test_replicas_that_share_a_core_are_no_faster_together() -> None:
    plan = Plan(least=3, most=3, target=1.0, cores=1.0, queue=50)
    seen = Fleet(ALONE, plan, rate=2 * ALONE.capacity, seconds=1_000).run()
    assert len(seen.whole_s) / 1_000 == pytest.approx(ALONE.capacity, rel=0.05)
    assert not math.isnan(seen.quantile(seen.whole_s, 0.99))


def test_what_does_not_fit_into_the_cache_waits_and_a_signal_may_count_it() -> None:
    kind = Replica(
        base_s=0.02, each_s=0.0, prefill_s=0.0, lengths=(10.0,), batch=4, picture_tokens=90.0, cache_tokens=200.0
    )
    full = Fleet(kind, one(kind, queue=50), rate=3 * kind.capacity, seconds=1_000).run()
    assert len(full.whole_s) / 1_000 == pytest.approx(kind.capacity / 2, rel=0.02), "two at a time, not four"
    crowd = Fleet(kind, one(kind), rate=3 * kind.capacity, seconds=10)
    crowd.run()
    assert crowd.prompt_tokens == 90.0 * crowd.ongoing


def test_larger_requests_take_longer_before_their_first_token() -> None:
    kind = Replica(base_s=0.02, each_s=0.0, prefill_s=0.03, lengths=(10.0,), batch=4)
    turned = Fleet(kind, one(kind), rate=0.01, seconds=3_000, later_pictures=(4,)).run()
    assert min(turned.first_token_s) == pytest.approx(0.03)
    assert max(turned.first_token_s) == pytest.approx(4 * 0.03)


def test_a_prompt_stops_the_others() -> None:
    kind = Replica(base_s=0.02, each_s=0.0, prefill_s=0.1, lengths=(10.0,), batch=2)
    two = Fleet(kind, one(kind), rate=1.0, seconds=10.0)
    for _ in range(2):
        two.servers[0].take(Request(0.0, 10.0, 1))
    two.world.run(until=1.0)
    assert two.seen.first_token_s == pytest.approx([0.1, 0.2])
    assert two.seen.whole_s == pytest.approx([0.4, 0.4]), "both decode from the second prompt's end"

"""The sizing table says what the simulation says, and a measured replica is what was measured."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cluster import events, sizing
from tests.benchmarks.serving.open_loop import Outcome
from tests.pages import ROOT

PAGE = (ROOT / "deploy/scaling.md").read_text(encoding="utf-8")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["sizing.py", "--only", "table", "--largest-surge", "10"])
    return sizing.parser().parse_args()


def row(rate: str) -> list[list[float]]:
    """Numbers of each cell."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {rate} |"))
    return [
        [float(one.replace(",", "")) for one in re.findall(r"[\d,]*\.?\d+", cell)] for cell in line.split("|")[2:-1]
    ]


@pytest.mark.parametrize("rate", [10, 100])
def test_the_page_has_the_simulation_s_numbers(rate: int, settings: argparse.Namespace) -> None:
    found = sizing.sized(sizing.assumed(settings), rate, settings)
    replicas, first, whole, cost, surge = row(str(rate))
    assert replicas == [found["replicas"]]
    assert first == pytest.approx([found["first_token_s_p50"], found["first_token_s_p99"]], abs=0.006)
    assert whole == pytest.approx([found["whole_s_p50"], found["whole_s_p90"]], abs=0.06)
    assert cost == [found["cost_per_million"]]
    if "surge_refused" in found:
        told = [found["surge_refused"] * 100, found["surge_first_token_s_p99"], found["surge_replicas"]]
        assert surge == pytest.approx(told, rel=0.1)


def test_its_assumptions_are_the_script_s(settings: argparse.Namespace) -> None:
    words = " ".join(PAGE.split())
    told = (
        f"take {settings.base_s * 1000:g} ms and {settings.each_s * 1000:g}".replace("0.", "."),
        f"at most {settings.batch} sequences",
        f"its picture {settings.prefill_steps} steps",
        f"{settings.mean_tokens:g} tokens on average",
        f"{settings.start_s:g} s until it answers",
    )
    assert [each for each in told if each not in words] == []


def test_a_replica_is_fitted_from_what_clients_saw() -> None:
    """Exact times give exact numbers: steps of 20 ms and 5 ms a sequence, a prompt of 3 steps, .1 s of HTTP."""

    def outcome(clients: int) -> Outcome:
        step = 0.02 + 0.005 * clients
        return Outcome(item=0, sent=0.0, ending="complete", first_token_s=0.1 + 4 * step, whole_s=0.1 + 14 * step)

    most = sizing.BATCH / ((0.02 + 0.005 * sizing.BATCH) * (3 + 11))
    kind = sizing.fitted({number: [outcome(number)] * 3 for number in (1, 2, 4)}, most, (11.0, 11.0))
    assert (kind.base_s, kind.each_s, kind.prefill_steps) == pytest.approx((0.02, 0.005, 3.0))
    assert (kind.outside_s, kind.capacity) == pytest.approx((0.1, most))


def test_every_command_of_the_page_is_a_script_with_these_options() -> None:
    told = re.findall(r"`python -m (tests\.benchmarks\.[\w.]+)([^`]*)`", " ".join(PAGE.split()))
    assert len(told) >= 3
    for script, options in told:
        code = (ROOT / script.replace(".", "/")).with_suffix(".py").read_text()
        if "cluster.events import" in code:
            code += Path(events.__file__).read_text()
        assert [each for each in re.findall(r"--[a-z-]+", options) if f'"{each}"' not in code] == []

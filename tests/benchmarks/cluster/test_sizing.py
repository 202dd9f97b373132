"""The sizing table says what the simulation says, and a measured replica is what was measured."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cluster import events, sizing
from tests.benchmarks.cluster.plan import Replica
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
        f"its picture {settings.prefill_s * 1000:g} ms",
        f"{settings.mean_tokens:g} tokens on average",
        f"{settings.start_s:g} s until it answers",
    )
    assert [each for each in told if each not in words] == []


def test_a_replica_is_fitted_from_what_clients_saw() -> None:
    """The fleet's own answers, and one more tenth of a second for HTTP, give back what the fleet was told."""
    told = Replica(base_s=0.02, each_s=0.005, prefill_s=0.03, outside_s=0.1, lengths=(10.0,), batch=sizing.BATCH)

    def outcomes(clients: int) -> list[Outcome]:
        """Each round of a client: HTTP, its prompt, ten steps; the others' prompts stop it for their share of it."""
        first = told.outside_s + told.prefill_s
        decoding = 0.0
        for _ in range(100):
            others = (clients - 1) * decoding / (first + decoding)
            decoding = 10 * (told.base_s + told.each_s * (1 + others)) + others * told.prefill_s
        return [Outcome(item=0, sent=0.0, ending="complete", first_token_s=first, whole_s=first + decoding)]

    kind = sizing.fitted({number: outcomes(number) for number in sizing.CLIENTS}, told.capacity, told.lengths)
    for name in ("base_s", "each_s", "prefill_s", "outside_s", "capacity"):
        assert getattr(kind, name) == pytest.approx(getattr(told, name)), name


def test_every_command_of_the_page_is_a_script_with_these_options() -> None:
    told = re.findall(r"`python -m (tests\.benchmarks\.[\w.]+)([^`]*)`", " ".join(PAGE.split()))
    assert len(told) >= 3
    for script, options in told:
        code = (ROOT / script.replace(".", "/")).with_suffix(".py").read_text()
        if "cluster.events import" in code:
            code += Path(events.__file__).read_text()
        assert [each for each in re.findall(r"--[a-z-]+", options) if f'"{each}"' not in code] == []

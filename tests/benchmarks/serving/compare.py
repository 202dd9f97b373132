"""Is one `/v1/compare` at five strengths worth it against five chat requests? The bundled miniature, through HTTP.

    python -m tests.benchmarks.serving.compare --json FILE

A real service on loopback with the Hugging Face engine. Every round asks about a picture that it has not seen, in
rotating order: one comparison; five requests at once, each on a connection of its own; five requests one after the
other. `compare_to_parallel` and `compare_to_sequence` are the comparison's time in theirs. Both give the same texts, or
the run fails. Client and service share the machine, so that rounds, not runs, are to be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.serving.open_loop import scenes
from tests.benchmarks.serving.running_service import running_service
from training.evaluation.manifest import describe_run
from training.miniature.paths import LLAVA

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MIN_ROUNDS = 7


class Client:
    """Of one service."""

    def __init__(self, port: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        self._pool = ThreadPoolExecutor(len(STRENGTHS))

    def compare(self, body: dict[str, Any]) -> list[str]:
        settings = [{"strength": strength} for strength in STRENGTHS]
        return [
            one["message"]["content"] for one in self._post("/v1/compare", {**body, "settings": settings})["results"]
        ]

    def parallel(self, body: dict[str, Any]) -> list[str]:
        return list(self._pool.map(lambda strength: self._chat(body, strength), STRENGTHS))

    def sequence(self, body: dict[str, Any]) -> list[str]:
        return [self._chat(body, strength) for strength in STRENGTHS]

    def _chat(self, body: dict[str, Any], strength: float) -> str:
        asked = {**body, "steering": {"strength": strength}}
        return self._post("/v1/chat/completions", asked)["choices"][0]["message"]["content"]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._http.post(path, json=body).raise_for_status().json()


def run(settings: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round, by way."""
    bodies = [json.loads(one) for one in scenes(LLAVA.name, 3 * (settings.rounds + 1), settings.tokens).bodies]
    seconds: dict[str, list[float]] = defaultdict(list)
    with running_service() as service:
        client = Client(service.port)
        ways = {"compare": client.compare, "parallel": client.parallel, "sequence": client.sequence}
        for number in range(-1, settings.rounds):  # the first is a warm-up
            turn = number % len(ways)
            for place, name in enumerate([*ways, *ways][turn : turn + len(ways)]):
                body = {**bodies[3 * (number + 1) + place], "temperature": 0}
                started = time.perf_counter()
                texts = ways[name](body)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
                elif texts != client.sequence(body):
                    raise RuntimeError(f"{name} gives other texts: {texts}")
    return seconds


def make_report(seconds: dict[str, list[float]], settings: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of the ratios of each round."""
    ratios = {
        f"compare_to_{other}": [one / two for one, two in zip(seconds["compare"], seconds[other], strict=True)]
        for other in ("parallel", "sequence")
    }
    return {
        "ratios": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "spread": {name: [round(min(found), 3), round(max(found), 3)] for name, found in ratios.items()},
        "table": [{"way": name, "median_s": round(statistics.median(took), 4)} for name, took in seconds.items()],
        "manifest": describe_run({"rounds": settings.rounds, "tokens": settings.tokens, "strengths": STRENGTHS}),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {MIN_ROUNDS} [9]")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of an answer [40]")
    parser.add_argument("--json", type=Path, help="where to write the report")
    settings = parser.parse_args(arguments)
    if settings.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: at least {MIN_ROUNDS}")
    report = make_report(run(settings), settings)
    for row in report["table"]:
        print(f"{row['way']:10} {row['median_s']:.3f} s")
    for name, ratio in report["ratios"].items():
        low, high = report["spread"][name]
        print(f"{name} {ratio:.3f} ({low:.3f} to {high:.3f} over the rounds)")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Do replicas follow the load, and does anybody notice? A Ray cluster of four nodes on this machine, load up and down.

    python -m tests.benchmarks.cluster.autoscaling --json FILE --plot FILE

A head and three workers, each a tree of processes (`local_cluster.py`); the bundled miniature, batches of 4, so that a
replica's target is 3 ongoing requests, three quarters. One client asks, then `--clients`, until three replicas run and
for `--high-seconds` more; then a few with streams of many seconds each, so that replicas which are to go have somebody
to finish: until one replica is left. `--from-zero` begins and ends without any. Every request is accounted for: 'right'
(the scene's answer when asked alone), 'tie', 'wrong', an error with its status, or 'cut'. The exit status is 1 where a
request failed, an answer was wrong, or replicas did not follow.

Clients, nodes and whatever else runs share the machine's cores: three replicas answer hardly more than one here, and
the times are this machine's. What is shown is who came, who went, and that nobody was cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.cluster.cluster_load import TARGET, Clients, configuration, long_streams, now
from tests.benchmarks.cluster.local_cluster import LocalCluster, ServeWatch, local_cluster, running
from tests.benchmarks.serving.open_loop import Asked, Outcome, ask_alone, endings, percentiles, scenes
from training.evaluation.manifest import describe_run
from training.miniature.paths import LLAVA

MOST = 3
LOOK_BACK_S, UP_DELAY_S, DOWN_DELAY_S = 4.0, 2.0, 6.0
LONG_CLIENTS = 2
"""Fewer than a replica's target: they alone keep one replica, and one only."""
HUES = {"RUNNING": "tab:green", "STARTING": "tab:orange", "STOPPING": "tab:red"}


def scaled_model(least: int) -> dict[str, Any]:
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": MOST,
            "target_ongoing_requests": TARGET,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UP_DELAY_S,
            "downscale_delay_s": DOWN_DELAY_S,
        }
    }


async def reach(watch: ServeWatch, replicas: int, seconds: float) -> float | None:
    """Seconds until exactly so many run and no other is left; None where they do not."""

    def there(sample: dict[str, Any]) -> bool:
        states = sample["deployments"].get("Model", {}).get("states", {})
        return running(sample, "Model") == replicas == sum(states.values())

    try:
        return await asyncio.to_thread(watch.wait_for, there, seconds)
    except RuntimeError as error:
        print(f"not {replicas} replicas {error}", file=sys.stderr)
        return None


async def measure(watch: ServeWatch, port: int, settings: argparse.Namespace) -> dict[str, Any]:
    asked = scenes(LLAVA.name, settings.items, settings.tokens)
    await ask_alone(port, asked)
    short, long = Clients(port, asked), Clients(port, long_streams(asked))
    phases: list[tuple[str, float]] = []
    took: dict[str, float | None] = {}

    def phase(name: str, number: int, streams: int) -> None:
        phases.append((name, now()))
        print(f"{name}: {number} clients, {streams} with long streams", flush=True)
        short.set(number)
        long.set(streams)

    phase("one client", 1, 0)
    await asyncio.sleep(settings.low_seconds)
    phase("many clients", settings.clients, 0)
    took["up_s"] = await reach(watch, MOST, settings.patience)
    await asyncio.sleep(settings.high_seconds)
    phase("long streams", 0, LONG_CLIENTS)
    took["down_s"] = await reach(watch, 1, settings.patience)
    phase("end", 0, 0)
    outcomes = [*await short.finish(), *await long.finish()]
    if settings.from_zero:
        took["to_zero_s"] = await reach(watch, 0, settings.patience)
    return summary(watch, phases, took, short.outcomes, long.outcomes, asked) | {"outcomes": len(outcomes)}


def summary(
    watch: ServeWatch,
    phases: list[tuple[str, float]],
    took: dict[str, float | None],
    short: list[Outcome],
    long: list[Outcome],
    asked: Asked,
) -> dict[str, Any]:
    ended = endings(short, asked)
    streams = {ending: sum(one.ending == ending for one in long) for ending in {one.ending for one in long}}
    began = phases[0][1]
    table = []
    for (name, start), (_, end) in zip(phases, [*phases[1:], ("", now())], strict=True):
        there = [one for one in [*short, *long] if start <= one.sent < end]
        table.append(
            {
                "phase": name,
                "from_s": round(start - began, 1),
                "seconds": round(end - start, 1),
                "sent": len(there),
                "complete": sum(one.ending == "complete" for one in there),
                "first_token_s": percentiles([one.first_token_s for one in there if one.first_token_s]),
            }
        )
    return {
        "table": table,
        "took": {name: round(seconds, 1) if seconds is not None else None for name, seconds in took.items()},
        "endings": ended,
        "long_streams": streams,
        "longest_stream_s": round(max((one.whole_s for one in long), default=0.0), 1),
        "stopping_s": round(longest_stopping(watch.samples), 1),
        "timeline": timeline(watch.samples, began),
        "phases": [(name, round(at - began, 1)) for name, at in phases],
    }


def longest_stopping(samples: list[dict[str, Any]]) -> float:
    """Seconds for which some replica finished its requests before it went: 0 where none had to wait."""
    longest, since = 0.0, None
    for sample in samples:
        if sample["deployments"].get("Model", {}).get("states", {}).get("STOPPING"):
            since = sample["at"] if since is None else since
            longest = max(longest, sample["at"] - since)
        else:
            since = None
    return longest


def timeline(samples: list[dict[str, Any]], began: float) -> list[dict[str, Any]]:
    """Replicas of the model by state, where that changed."""
    found: list[dict[str, Any]] = []
    for sample in samples:
        states = sample["deployments"].get("Model", {}).get("states", {})
        if not found or found[-1]["states"] != states:
            found.append({"at_s": round(sample["at"] - began, 1), "states": states})
    return found


def plot(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.5))
    times = [one["at_s"] for one in report["timeline"]]
    for state, hue in HUES.items():
        numbers = [one["states"].get(state, 0) for one in report["timeline"]]
        axes.step([*times, report["phases"][-1][1]], [*numbers, numbers[-1]], where="post", label=state, color=hue)
    for name, at in report["phases"]:
        axes.axvline(at, color="grey", linewidth=0.5)
        axes.text(at, MOST + 0.1, name, rotation=20, fontsize=8)
    axes.set(xlabel="seconds", ylabel="model replicas", xlim=(0, None), ylim=(0, MOST + 0.8))
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def failures(found: dict[str, Any]) -> list[str]:
    bad = {name: number for name, number in found["endings"].items() if name not in ("right", "tie") and number}
    cut = {name: number for name, number in found["long_streams"].items() if name != "complete"}
    late = [name for name, seconds in found["took"].items() if seconds is None]
    return [*(f"{number} {name}" for name, number in (bad | cut).items()), *(f"never {name}" for name in late)]


def run(cluster: LocalCluster, settings: argparse.Namespace) -> dict[str, Any]:
    least = 0 if settings.from_zero else 1
    config = configuration(scaled_model(least), model_may_sleep=settings.from_zero)
    watch = ServeWatch(cluster)
    try:
        watch.deploy(config)
        watch.wait_for(lambda sample: sample["status"] == "RUNNING", settings.patience)
        return asyncio.run(measure(watch, config["http_options"]["port"], settings))
    finally:
        watch.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--plot", type=Path, help="where the timeline goes, as a picture")
    parser.add_argument("--clients", type=int, default=9, help="who ask at a time under load")
    parser.add_argument("--low-seconds", type=float, default=15, help="duration of one client")
    parser.add_argument("--high-seconds", type=float, default=15, help="duration of the load with all replicas there")
    parser.add_argument("--items", type=int, default=20, help="scenes that are asked about")
    parser.add_argument("--tokens", type=int, default=40, help="largest number of tokens of an answer")
    parser.add_argument("--patience", type=float, default=300, help="longest wait for replicas, in seconds")
    parser.add_argument("--from-zero", action="store_true", help="the model may be without a replica")
    settings = parser.parse_args()
    with local_cluster(cpus=(2, 1, 1)) as cluster:
        found = run(cluster, settings)
    print(json.dumps({name: value for name, value in found.items() if name != "timeline"}, indent=1))
    answered = found["endings"].get("right", 0) + found["endings"].get("tie", 0)
    sent = sum(number for name, number in found["endings"].items() if name != "duplicated")
    report = {
        "ratios": {"answered_of_sent": answered / max(1, sent), "wrong": found["endings"].get("wrong", 0)},
        "spread": {},
        **found,
        "manifest": describe_run({name: str(value) for name, value in vars(settings).items()})
        | {"cpus": os.cpu_count(), "target_ongoing_requests": TARGET},
    }
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if settings.plot:
        plot(report, settings.plot)
    for failure in failures(found):
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    sys.exit(main())

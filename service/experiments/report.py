"""What came of an experiment, from the service's log: `python -m service.experiments.report LOG [LOG ...]`.

Arms have those requests only that the hash of a unit gave them. The sample ratio is red where the arms' sizes cannot be
chance (p below .001): then something loses requests of one arm, or counts them twice, and no verdict is given; nor
where one name and salt had two sets of weights, as an ingress that was started anew cannot refuse. Verdicts may be
looked at as often as one likes, and hold for all measures and arms together (anytime-valid p, adjusted by Holm's
method); an interval holds for its own measure alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from service.experiments.exposures import MEASURES, RATES, Exposure, Exposures, read_exposures
from service.experiments.statistics import (
    ALPHA,
    RED_BELOW,
    Difference,
    Interval,
    Sample,
    adjusted,
    difference,
    mean_by_unit,
    sample_ratio_p,
)

SHADOW_MEASURES = ("same", "greedy", "similarity", "shown_tokens", "shadow_tokens")
WITHHELD = "withheld: the sample ratio is red"
REWEIGHTED = "withheld: the weights changed under one name and salt"


def report_on(found: Exposures) -> dict[str, Any]:
    """JSON-ready."""
    by_arm: dict[str, list[Exposure]] = defaultdict(list)
    for one in found.requests:
        by_arm[one.arm].append(one)
    shares = {arm: asked[0].share for arm, asked in by_arm.items() if asked[0].share is not None}
    default = found.default
    units = {arm: {one.unit or "" for one in by_arm[arm]} for arm in shares}
    p = sample_ratio_p({arm: len(ids) for arm, ids in units.items()}, shares)
    twice = sum(count > 1 for count in Counter(unit for ids in units.values() for unit in ids).values())
    red = p < RED_BELOW
    changed = sorted(arm for arm in shares if len({one.share for one in by_arm[arm]}) > 1)
    return {
        "experiment": found.name,
        "salt": found.salt,
        "default": default,
        "sample_ratio": {"p": p, "red": red},
        "units_in_two_arms": twice,
        "weights_changed": changed,
        "counted_apart": {arm: len(asked) for arm, asked in by_arm.items() if arm not in shares},
        "shadow": _shadow(found),
        "arms": {
            arm: {
                "share": shares[arm],
                "requests": len(by_arm[arm]),
                "units": len(units[arm]),
                "treatments": sorted({one.treatment for one in by_arm[arm] if one.treatment}),
                "measures": {name: _written(mean_by_unit(sample_of(by_arm[arm], name))) for name in MEASURES},
            }
            for arm in shares
        },
        "differences": _differences(
            {arm: by_arm[arm] for arm in shares}, default, withheld=WITHHELD if red else REWEIGHTED if changed else None
        ),
    }


def _differences(asked: dict[str, list[Exposure]], default: str, *, withheld: str | None) -> dict[str, Any]:
    """Of each arm and measure to the default arm."""
    found = {
        (arm, name): difference(sample_of(asked.get(default, []), name), sample_of(asked[arm], name))
        for arm in asked
        if arm != default
        for name in MEASURES
    }
    known = {key: one.p for key, one in found.items() if one.p is not None}
    of_all = dict(zip(known, adjusted(list(known.values())), strict=True))
    told: dict[str, Any] = {arm: {} for arm, _ in found}
    for (arm, name), one in found.items():
        told[arm][name] = _compared(one, of_all.get((arm, name)), withheld)
    return told


def _shadow(found: Exposures) -> dict[str, float] | None:
    """Of all second answers; their differences are the sampling's, too, where that was not greedy."""
    if not (seen := found.shadows):
        return None
    means = {name: sum(line[name] for line in seen) / len(seen) for name in SHADOW_MEASURES}
    return {"answers": len(seen), **means}


def sample_of(asked: list[Exposure], measure: str) -> Sample:
    """Those requests that have something to say on it."""
    known = [one for one in asked if measure in one.values]
    return Sample([one.values[measure] for one in known], [one.unit or "" for one in known])


def _compared(found: Difference, p: float | None, withheld: str | None) -> dict[str, Any]:
    """`p`: adjusted for all that is compared."""
    if withheld:
        verdict = withheld
    elif p is None:
        verdict = "too few units"
    elif p <= ALPHA:
        verdict = "higher" if found.anytime.value > 0 else "lower"
    else:
        verdict = "not told apart"
    once, anytime = _written(found.once), _written(found.anytime)
    return {"units": found.units, "once": once, "anytime": anytime, "p": p, "verdict": verdict}


def _written(interval: Interval) -> dict[str, float | None]:
    return {name: None if one is None or math.isnan(one) else one for name, one in interval._asdict().items()}


def table(report: dict[str, Any]) -> str:
    """For people."""
    ratio = report["sample_ratio"]
    lines = [
        f"experiment {report['experiment']} (salt {report['salt']}), default arm {report['default']}",
        f"sample ratio: p = {ratio['p']:.3g} {'RED: such sizes are not chance' if ratio['red'] else 'ok'}; "
        f"units in two arms: {report['units_in_two_arms']}"
        + "".join(f"; WEIGHT CHANGED: {arm}" for arm in report["weights_changed"]),
        "counted apart: " + (", ".join(f"{arm} {n}" for arm, n in report["counted_apart"].items()) or "nothing"),
    ]
    if shadow := report["shadow"]:
        lines.append("shadow: " + ", ".join(f"{name} {value:.4g}" for name, value in shadow.items()))
    for arm, told in report["arms"].items():
        treatments = "; ".join(told["treatments"])
        lines.append(f"\n{arm}: share {told['share']:g}, {told['units']} units, {told['requests']} requests")
        lines.append(f"  in force: {treatments}" + (" (CHANGED on the way)" if len(told["treatments"]) > 1 else ""))
        for name, found in told["measures"].items():
            if found["value"] is not None:
                lines.append(f"  {name:<22}{_shown(found, name)}")
    for arm, compared in report["differences"].items():
        lines.append(f"\n{arm} minus {report['default']}, anytime-valid 95 %, and p of all comparisons together:")
        for name, found in compared.items():
            if found["once"]["value"] is not None:
                p = "" if found["p"] is None else f"p {found['p']:.2g}, "
                lines.append(f"  {name:<22}{_shown(found['anytime'], name):<34}{p}{found['verdict']}")
    return "\n".join(lines)


def _shown(found: dict[str, float | None], name: str) -> str:
    scale, unit = (100, " %") if name in RATES else (1, "")
    numbers = [None if one is None else one * scale for one in (found["value"], found["low"], found["high"])]
    value, low, high = ("?" if one is None else f"{one:.4g}" for one in numbers)
    return f"{value}{unit} [{low}, {high}]"


def plot(reports: list[dict[str, Any]], file: Path) -> None:
    """Each measure's difference in units of the default arm's mean, with its anytime-valid interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 3 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    for report, axes in zip(reports, figure.subplots(len(reports), squeeze=False)[:, 0], strict=True):
        rows = [(arm, name) for arm, told in report["differences"].items() for name in told]
        for place, (arm, name) in enumerate(rows):
            found = report["differences"][arm][name]["anytime"]
            if found["low"] is None:
                continue
            if base := report["arms"][report["default"]]["measures"][name]["value"]:
                axes.plot([found["low"] / base, found["high"] / base], [place, place], color="tab:blue")
                axes.plot([found["value"] / base], [place], "o", color="tab:blue")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{arm}: {name}" for arm, name in rows], fontsize=7)
        axes.set_xlabel(f"difference to {report['default']}, share of its mean")
        red = " (sample ratio RED)" if report["sample_ratio"]["red"] else ""
        axes.set_title(report["experiment"] + red, fontsize=9)
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service.experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path, nargs="+", help="the service's log files, in order of time")
    parser.add_argument("--experiment", help="report on this one only [all]")
    parser.add_argument("--json", type=Path, help="where the report goes as JSON")
    parser.add_argument("--plot", type=Path, help="where the differences go as a picture (png, svg, pdf)")
    settings = parser.parse_args(arguments)
    try:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in settings.log]
        found = read_exposures(line for text in texts for line in text.splitlines())
        found = [one for one in found if settings.experiment in (None, one.name)]
        if not found:
            print("error: the log has no request of such an experiment", file=sys.stderr)
            return 2
        reports = [report_on(one) for one in found]
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install 'vl-sae-steering[experiments]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(table(report) for report in reports))
    if settings.json:
        settings.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if settings.plot:
        plot(reports, settings.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

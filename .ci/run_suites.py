"""Run `make lint` and the test suites, two at a time, each with its budget; fail if one failed, or if a test that is
not listed was skipped.

    python .ci/run_suites.py            everything
    python .ci/run_suites.py --quick    what starts no server, no vLLM and no browser, and takes seconds

A suite waits for engines to start most of its time, so two share two cores well; each computes with one thread.
A budget is what a suite may take beside another one before somebody should look; it is reported, not asserted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

LINT = "lint"
BUDGETS_S = {
    "tests/service": 1200,
    "tests/training": 600,
    "tests/training/test_pipeline.py": 480,
    "tests/steering/engines/vllm": 500,
    "tests/steering": 240,
    "tests/deploy": 240,
    LINT: 120,
    "tests/benchmarks": 60,
    "tests/test_repository.py": 30,
    "tests/test_deploy.py": 30,
}
"""The longest first: they are taken in this order."""
QUICK = (
    "tests/service",
    "tests/training",
    "tests/steering",
    LINT,
    "tests/deploy",
    "tests/test_repository.py",
    "tests/test_deploy.py",
)
QUICK_TESTS = "not (service or vllm or slow or browser or gpu)"
AT_A_TIME = 2
EXPECTED_SKIPS = Path(__file__).with_name("expected_skips.txt")
REPORTS = Path("build/test-reports")


def run_suite(suite: str, only: str = "") -> tuple[bool, float, list[ElementTree.Element]]:
    """Whether it passed, its seconds, and its test cases; `only`: an expression of markers."""
    report = REPORTS / f"{Path(suite).stem}.xml"
    report.unlink(missing_ok=True)
    apart = [f"--ignore={other}" for other in BUDGETS_S if Path(suite) in Path(other).parents]
    pytest = [sys.executable, "-m", "pytest", suite, *apart, "-q", "-m", only, "--color=no", f"--junit-xml={report}"]
    started = time.monotonic()
    print(f"== {suite} begins", flush=True)
    log = report.with_suffix(".log")  # a file, not a pipe: a process that outlived its test could keep a pipe open
    with log.open("w") as sink:
        finished = subprocess.run(
            ["make", "--no-print-directory", LINT] if suite == LINT else pytest,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - started
    print(f"== {suite} ended after {seconds:.0f} s\n{log.read_text()}", flush=True)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return finished.returncode == 0, seconds, cases


def main() -> int:
    quick = sys.argv[1:] == ["--quick"]
    suites = {suite: budget_s for suite, budget_s in BUDGETS_S.items() if not quick or suite in QUICK}
    REPORTS.mkdir(parents=True, exist_ok=True)
    passed, failed, skipped = 0, 0, set()
    lines, all_good = [], True
    with ThreadPoolExecutor(AT_A_TIME) as lanes:
        results = list(lanes.map(lambda suite: run_suite(suite, QUICK_TESTS if quick else ""), suites))
    for (suite, budget_s), (good, seconds, cases) in zip(suites.items(), results, strict=True):
        all_good &= good and (bool(cases) or suite == LINT)
        for case in cases:
            if case.find("skipped") is not None:
                skipped.add(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            else:
                passed += 1
        verdict = "ok" if seconds <= budget_s else "OVER BUDGET"
        lines.append(f"{suite:28} {len(cases):4} tests {seconds:6.0f} s of {budget_s} s  {verdict}")
    listed = [line for line in EXPECTED_SKIPS.read_text().splitlines() if line and not line.startswith("#")]
    expected = {line for line in listed if not line.startswith("?")}
    possible = [line.removeprefix("?").strip() for line in listed if line.startswith("?")]
    expected |= {test for test in skipped if any(fnmatch(test, pattern) for pattern in possible)}
    print("\n".join(["", *lines, f"skipped: {sorted(skipped) or 'none'}"]))
    if skipped != expected and not quick:
        print(f"unexpected skips: {sorted(skipped - expected)}; expected but not skipped: {sorted(expected - skipped)}")
        all_good = False
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    return 0 if all_good and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

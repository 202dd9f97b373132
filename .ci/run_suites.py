"""Run the test suites one after the other, each with its budget; fail if a test failed or an unexpected one skipped.

A budget is what a suite may take on two cores before somebody should look; it is reported, not asserted.
"""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatch
from pathlib import Path

BUDGETS_S = {
    "tests/steering": 180,
    "tests/steering/vllm": 540,
    "tests/training": 480,
    "tests/training/test_pipeline.py": 360,
    "tests/service": 600,
    "tests/test_repository.py": 30,
    "tests/test_deploy.py": 30,
}
EXPECTED_SKIPS = Path(__file__).with_name("expected_skips.txt")
REPORTS = Path("build/test-reports")


def run_suite(suite: str) -> tuple[bool, float, list[ElementTree.Element]]:
    """Whether it passed, its seconds, and its test cases."""
    report = REPORTS / f"{Path(suite).stem}.xml"
    report.unlink(missing_ok=True)
    apart = [f"--ignore={other}" for other in BUDGETS_S if Path(suite) in Path(other).parents]
    started = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", suite, *apart, "-q", f"--junit-xml={report}"], check=False
    )
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return finished.returncode == 0, time.monotonic() - started, cases


def main() -> int:
    REPORTS.mkdir(parents=True, exist_ok=True)
    passed, failed, skipped = 0, 0, set()
    lines, all_good = [], True
    for suite, budget_s in BUDGETS_S.items():
        good, seconds, cases = run_suite(suite)
        all_good &= good and bool(cases)
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
    if skipped != expected:
        print(f"unexpected skips: {sorted(skipped - expected)}; expected but not skipped: {sorted(expected - skipped)}")
        all_good = False
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    return 0 if all_good and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

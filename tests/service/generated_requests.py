"""Requests that schemathesis makes up from the OpenAPI document, thousands of them, against the real service.

    python -m tests.service.generated_requests --examples 500 --json FILE

starts a service with keys on the bundled miniature and prints the count. Every answer is held against the document:
its status, media type, headers, body and, in streams, every event; a request that breaks the document must be refused,
and a key must be asked for. `test_generated_requests.py` runs a few of them in CI.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.settings import BUNDLED_MODEL
from tests.service.running_server import REPOSITORY, start_server

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method,"
    "allow_header_conformance"
)
"""All that apply, but `positive_data_acceptance`: a prompt may be too long, a picture may be none."""
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
UNLINKED = ("--phases", "examples,coverage,fuzzing")
"""No links are followed."""
LINKED = ("--phases", "stateful", "--include-path-regex", "^/v1/(chat/completions|feedback)$")
"""Only what a link of the document leads to, and where it comes from."""


def send_generated(
    url: str, *, examples: int, seed: int, report: Path, key: str | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """schemathesis' report on at most `examples` random cases per operation beside the systematic ones; `only`: options
    that choose among operations and phases."""
    options = ["--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "60", "--continue-on-failure"]
    options += only
    if key is not None:
        options += ["--header", f"Authorization: Bearer {key}"]
    finished = subprocess.run(
        [str(SCHEMATHESIS), "run", f"{url}/openapi.json", *options,
         "--checks", CHECKS + (",ignored_auth" if key else ""), "--report", "json", "--report-json-path", str(report)],
        cwd=report.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if not report.exists():
        raise RuntimeError(finished.stdout + finished.stderr)
    return {**json.loads(report.read_text()), "printed": finished.stdout}


def counts(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By operation: requests valid by the document that were answered, and those refused for what no schema says."""
    return {
        operation: {
            kind: sum(phase[kind] for phase in phases.values()) for kind in ("accepted", "rejected", "unreachable")
        }
        for operation, phases in report["valid_rates"].items()
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="random cases per operation [500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="huggingface")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="srv") as folder:
        home = Path(folder)
        file = home / "keys.json"
        make_key = [sys.executable, "-m", "service.callers.keys", "--file", str(file), "--name", "all"]
        make_key += ["--scopes", "chat,explain,evaluate,metrics"]
        key = subprocess.run(make_key, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
        paths = ("--model", str(BUNDLED_MODEL), "--keys-file", str(file))
        server = start_server(*paths, engine=given.engine, home=home)
        try:
            report = send_generated(
                server.url, examples=given.examples, seed=given.seed, report=home / "report.json", key=key
            )
            alive = server.get("/readyz").json()
        finally:
            server.stop(signal.SIGTERM)
    cases = report["test_cases"]
    print(report["printed"] if report["exit_code"] else "", end="")
    for operation, kinds in counts(report).items():
        print(f"{operation:28}", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    print(f"{cases['generated']} cases, {cases['with_failures']} with a failure; afterwards: {alive}")
    if given.json:
        given.json.write_text(json.dumps({"cases": cases, "operations": counts(report), "seed": given.seed}, indent=1))
    return report["exit_code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

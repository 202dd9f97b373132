"""What an experiment says and hears in headers: who asks, in the operator's view, and which arm answered."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from service.errors import ApiError
from service.experiments.assignment import Assignment

UNIT_HEADER = "x-experiment-unit"
UNIT = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")
ARM_HEADER, ASSIGNMENT_HEADER = "x-vlsae-arm", "x-vlsae-assignment"


def unit_header_of(headers: Headers) -> str | None:
    """Raises ApiError for more than one, and for what no identifier needs."""
    given = headers.getlist(UNIT_HEADER)
    if len(given) > 1 or not all(UNIT.fullmatch(one) for one in given):
        raise ApiError(
            "invalid_header",
            f"{UNIT_HEADER}: send one of at most 256 printable ASCII characters, or none",
            param=UNIT_HEADER,
        )
    return given[0] if given else None


def assignment_headers(assignment: Assignment | None) -> dict[str, str]:
    """Whose steering it was, and why: both, or none where no experiment runs."""
    if assignment is None:
        return {}
    return {ARM_HEADER: assignment.shown, ASSIGNMENT_HEADER: assignment.reason}

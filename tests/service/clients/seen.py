"""What every client is asked, and what the service's page says of each client."""

from __future__ import annotations

import re
from typing import Any, Literal

import pydantic

from tests.pages import read
from tests.service.asking import PICTURE
from tests.service.examples import data_url, encoded

PICTURE_PNG = encoded(PICTURE)
PICTURE_URL = data_url(PICTURE_PNG)
ENOUGH_TOKENS = 200
"""For a `Seen`, whatever a tiny model makes of it."""
TOO_STRONG = {"steering": {"strength": 7}}
ITS_ERROR = "steering.strength: Input should be less than or equal to 1"
NO_TOOLS = "for an answer that follows a schema send response_format"


class Seen(pydantic.BaseModel):
    shape: Literal["star", "ring", "cross"]
    others: list[Literal["red", "green"]] = pydantic.Field(max_length=2)
    sure: bool


def page(client: str) -> tuple[str, str, str]:
    """How the table "Clients" says to steer, to ask for a schema and to read the receipt: the code in its cells."""
    [row] = [line for line in read("service/README.md").splitlines() if line.startswith(f"| {client} |")]
    steering, schema, receipt = (re.findall("`(.+?)`", cell) for cell in row.split(" | ")[1:])
    return steering[0], schema[0], receipt[0] if receipt else ""


def options(code: str, **names: Any) -> dict[str, Any]:
    """Keyword arguments as they stand in a cell."""
    return eval(f"dict({code})", names)

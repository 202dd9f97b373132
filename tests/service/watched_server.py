"""A running service with all places that it writes to, and the keys to it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.service.running_server import RunningServer
from tests.service.trace_collector import TraceCollector

REQUESTS_PER_MINUTE = 30
"""The quota of those keys that have one."""


class Watched:
    """The service, its keys, and all places that it writes to."""

    def __init__(self, server: RunningServer, home: Path, secrets: dict[str, str], collector: TraceCollector) -> None:
        self.server, self.home, self.secrets, self.collector = server, home, secrets, collector
        self.client = httpx.Client(base_url=server.url, headers=self.key("alice"), timeout=60)

    def key(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[name]}"}

    def scrape(self) -> dict[str, float]:
        """Sample, with its labels, to value."""
        text = self.client.get("/metrics", headers=self.key("monitor")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name + json.dumps(sample.labels, sort_keys=True): sample.value for sample in samples}

    def lines(self) -> list[dict]:
        """The log's, of requests."""
        every = [json.loads(line) for line in (self.home / "service.log").read_text().splitlines()]
        return [line for line in every if line["message"] == "request"]

"""What a cluster serves in these benchmarks, and clients that keep asking it.

The bundled miniature on Hugging Face, with batches of 4, so that few clients make a load. `Clients` are a number that
may change while they ask: each asks again as soon as it is answered, and every outcome is kept.
"""

from __future__ import annotations

import asyncio
import json
import time
from itertools import count
from typing import Any

from transformers import AutoProcessor

from service.app import APPLICATION
from service.gateway import free_port
from service.scaling import FULL_SHARE
from tests.benchmarks.serving.open_loop import Asked, Outcome, ask
from training.miniature.paths import ARTIFACT, LLAVA

BATCH = 4
TARGET = FULL_SHARE * BATCH
LONG_TOKENS, LONG_CHOICES = 180, 8
PAUSE_S = 0.2
"""After a refusal or a cut a client waits a moment, as a reasonable one does."""


def configuration(model: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """`serveConfigV2` of one ingress over a model deployment with these options; settings of the service besides."""
    port = free_port()
    args = {
        "model": str(LLAVA),
        "artifact": str(ARTIFACT),
        "engine": {"name": "huggingface", "device": "cpu", "max_batch_size": BATCH},
        "allow_anonymous": True,
        "gateway": "off",
        **settings,
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 305},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "service.app:build_application",
                "args": args,
                "deployments": [{"name": "Ingress", "num_replicas": 1}, {"name": "Model", **model}],
            }
        ],
    }


def long_streams(asked: Asked) -> Asked:
    """The first scene once more, as a request that takes many seconds: 8 choices that may not end."""
    body = json.loads(asked.bodies[0])
    end = AutoProcessor.from_pretrained(LLAVA).tokenizer.eos_token_id
    body |= {"n": LONG_CHOICES, "max_tokens": LONG_TOKENS, "logit_bias": {str(end): -100}, "temperature": 1}
    return Asked([json.dumps(body).encode()])


class Clients:
    """So many clients at a time; those that are too many finish what they are at."""

    def __init__(self, port: int, asked: Asked) -> None:
        self._port, self._asked = port, asked
        self._wanted, self._numbers = 0, count()
        self._tasks: list[asyncio.Task[None]] = []
        self.outcomes: list[Outcome] = []

    def set(self, number: int) -> None:
        for place in range(self._wanted, number):
            self._tasks.append(asyncio.create_task(self._client(place)))
        self._wanted = number

    async def _client(self, place: int) -> None:
        while place < self._wanted:
            outcome = await ask(self._port, self._asked, next(self._numbers) % len(self._asked.bodies))
            self.outcomes.append(outcome)
            if outcome.ending != "complete":
                await asyncio.sleep(PAUSE_S)

    async def finish(self) -> list[Outcome]:
        """Every request that was sent, by now ended."""
        self._wanted = 0
        await asyncio.gather(*self._tasks)
        return self.outcomes


def answers_per_second(outcomes: list[Outcome], began: float, ended: float) -> float:
    done = [one.sent + one.whole_s for one in outcomes if one.ending == "complete"]
    return sum(began <= at < ended for at in done) / (ended - began)


def now() -> float:
    return time.monotonic()

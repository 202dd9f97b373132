"""Whether a response format can be followed, found out where it harms nobody. Knows no model and no engine's tokens.

A schema is tried in a process of its own (`grammar_worker.py`) before an engine makes a grammar of it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steering.engines import grammar_worker as worker
from steering.engines.base import ResponseFormat
from steering.engines.schema_features import unenforced
from steering.engines.text_stream import TokenBytes
from steering.errors import EngineUnavailable, InvalidSteering

SCHEMA_FIELD = "response_format.json_schema.schema"
CPU_S = 5.0
"""For one schema; those of real clients take a tenth of a second with a vocabulary of 100,000 tokens."""
MEMORY_BYTES = 1024**3
CLOCK_S = 60.0
"""Then the machine is to blame, not the schema."""
AT_A_TIME = 2
REMEMBERED = 256
"""Schemas that are known to be good."""
WORKER_SCRIPT = Path(worker.__file__)


class GrammarTrials:
    """Tries schemas against one vocabulary. Belongs to one event loop."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary_size, self._end_tokens = tokenizer, vocabulary_size, end_tokens
        self._threads = ThreadPoolExecutor(AT_A_TIME, "grammar-trial")
        self._good: OrderedDict[str, None] = OrderedDict()

    async def check(self, wanted: ResponseFormat | None) -> None:
        """Raises InvalidSteering naming the field where the format cannot be followed, EngineUnavailable when busy."""
        if wanted is None or wanted.json_schema is None:
            return
        schema = wanted.json_schema
        if schema not in self._good:
            if (reason := unenforced(json.loads(schema))) is not None:
                raise bad_schema(reason)
            await asyncio.get_running_loop().run_in_executor(self._threads, self._try, schema)
        self._good[schema] = None
        self._good.move_to_end(schema)
        if len(self._good) > REMEMBERED:
            self._good.popitem(last=False)

    def close(self) -> None:
        """Nothing new begins; what runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _try(self, schema: str) -> None:
        spelled = spell(self._tokenizer, self._vocabulary_size)
        job = {"vocabulary": [token.decode("latin-1") for token in spelled], "ends": sorted(self._end_tokens)}
        try:
            tried = subprocess.run(
                [sys.executable, "-I", str(WORKER_SCRIPT), str(CPU_S), str(MEMORY_BYTES)],
                input=json.dumps({**job, "schema": schema}).encode(),
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=CLOCK_S, env={}, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EngineUnavailable(
                "response_format: the server was too busy to make a grammar of it; try again later",
                field="response_format",
            ) from None
        if tried.returncode == worker.REFUSED:
            raise bad_schema(tried.stdout.decode(errors="replace").strip())
        if tried.returncode != worker.ACCEPTED:
            raise bad_schema("it is too large or too intricate; ask for less, with smaller bounds and plainer patterns")


def bad_schema(why: str) -> InvalidSteering:
    return InvalidSteering(f"{SCHEMA_FIELD}: this schema cannot be followed: {why}", field=SCHEMA_FIELD)


def spell(tokenizer: Any, vocabulary_size: int) -> list[bytes]:
    """The bytes of every token; none for those that never are text, which no grammar then allows."""
    token_bytes = TokenBytes(tokenizer)
    silent = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [b"" if index in silent else token_bytes(index) for index in range(vocabulary_size)]

"""No client may talk to anybody but the server: not to fetch prices, not to report what is asked."""

from __future__ import annotations

import os
import socket

import pytest

os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LANGSMITH_TRACING="false", DO_NOT_TRACK="1")  # read at import


@pytest.fixture(autouse=True)
def nobody_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str | bytes | None, *arguments, **options):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"a client looks for {host!r}"
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

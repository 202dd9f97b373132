"""The routes. `build_api` needs a model and a decoder and knows nothing of Ray: tests run it in process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from openai.types import Model
from starlette.exceptions import HTTPException

from service import VERSION
from service.access import Access
from service.chat import ChatAnswer, ChatService
from service.chat_request import ALIASES, find_alias
from service.draining import Drain, shutting_down
from service.errors import ApiError
from service.feedback import FeedbackDesk
from service.guard import RequestGuard
from service.images import ImageDecoder
from service.keys import load_keys
from service.last_look import LastLook
from service.ledger import Ledger
from service.ledger_client import LedgerClient
from service.memory_budget import MemoryBudget
from service.metrics import Metrics
from service.model_client import ModelClient
from service.openapi import build_openapi
from service.remote_images import RemoteImages
from service.request_observer import RequestObserver
from service.request_record import record_of
from service.settings import Settings
from service.tracing import Tracing

log = logging.getLogger(__name__)
OWNER = "vl-sae-steering"
BUSY_WINDOW_S = 5.0
"""A token that is not older says that the model lives, though all its places are taken."""
LOOK_EVERY_S = 1.0


def build_api(
    settings: Settings,
    model: ModelClient,
    decoder: ImageDecoder,
    remote: RemoteImages | None = None,
    ledger: LedgerClient | None = None,
    proxied: bool = False,
) -> FastAPI:
    """The whole HTTP side. Where `remote` is given, images come from there instead of the settings' hosts.

    Several replicas share a `ledger`; one has its own. `proxied`: behind Serve's proxy, which answers with the request
    id itself. Raises SettingsError where keys are needed and cannot be read.
    """
    metrics, tracing = Metrics(), Tracing(settings.traces_endpoint)
    metrics.warn_if_alone(settings.ingress_replicas)
    drain = Drain(settings.drain_file, settings.drain_timeout_s)
    if remote is None:
        remote = RemoteImages(
            settings.image_hosts,
            timeout_s=settings.image_fetch_timeout_s,
            max_image_bytes=settings.max_image_bytes,
        )
    ledger = Ledger() if ledger is None else ledger
    keys = load_keys(settings, os.environ)
    access = Access(keys, ledger)
    chat = ChatService(
        settings=settings,
        model=model,
        decoder=decoder,
        remote=remote,
        metrics=metrics,
        tracing=tracing,
        drain=drain,
        access=access,
        memory=MemoryBudget(settings.max_memory_bytes),
        ledger=ledger,
    )
    desk = FeedbackDesk(ledger, metrics, body_timeout_s=settings.body_timeout_s)
    last_look = LastLook(model.status)
    started = int(time.time())
    document = json.dumps(build_openapi(settings, with_keys=keys is not None))

    async def look() -> dict:
        """What /readyz says; raises ApiError where it is not ready. The gauge says the same."""
        is_ready = False
        try:
            if drain.begun:
                raise shutting_down()
            answer = await _readiness(settings, model, last_look)
            is_ready = True
            return answer
        finally:
            metrics.ready.set(is_ready)

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_keep_looking(look))
        yield
        looking.cancel()
        tracing.close()

    api = FastAPI(
        title="VL-SAE steering", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    api.add_middleware(RequestGuard, access=access, only_local_names=settings.only_local_names)
    api.add_middleware(RequestObserver, metrics=metrics, tracing=tracing, proxied=proxied)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_error)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return ChatAnswer(chat, request)

    @api.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        async with drain.request():
            return await desk.answer(request)

    @api.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(settings.model_name + alias) for alias in ALIASES]})

    @api.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        find_alias(model_id, settings.model_name)
        return JSONResponse(_model(model_id))

    def _model(model_id: str) -> dict:
        return Model(id=model_id, created=started, object="model", owned_by=OWNER).model_dump()

    @api.get("/healthz")
    async def alive() -> Response:
        return JSONResponse({"status": "alive"})

    @api.get("/readyz")
    async def ready() -> Response:
        return JSONResponse(await look())

    @api.get("/version")
    async def version() -> Response:
        status = await last_look.status()
        able = status.capabilities
        return JSONResponse(
            {
                "version": VERSION,
                "model": settings.model_name,
                "model_family": able.model_family,
                "engine": able.engine,
                "context_tokens": able.context_tokens,
                "system_fingerprint": status.system_fingerprint,
                "artifact": able.artifact,
                "presets": list(able.presets),
                "alignment": able.alignment,
                "faithfulness": able.faithfulness,
            }
        )

    @api.get("/openapi.json")
    async def openapi() -> Response:
        return Response(document, media_type="application/json")

    @api.get("/metrics")
    async def exposition() -> Response:
        with suppress(ApiError):
            await look()
        text = await asyncio.to_thread(metrics.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


async def _keep_looking(look: Callable[[], Awaitable[object]]) -> None:
    """The gauge is true though nobody asks: a scrape may go to `machine_metrics`, a probe to Serve."""
    while True:
        try:
            await look()
        except ApiError:
            pass  # not ready, as the gauge says
        except Exception:
            log.exception("whether the model is ready cannot be found out")
        await asyncio.sleep(LOOK_EVERY_S)


async def _readiness(settings: Settings, model: ModelClient, last_look: LastLook) -> dict:
    """While the engine makes progress; else raises ApiError.

    A model too busy to be asked is ready as long as its tokens arrive.
    """
    try:
        health = (await last_look.status()).health
    except ApiError:
        if model.seconds_since_event() <= BUSY_WINDOW_S:
            return {"status": "ready"}
        raise
    if not health.alive or health.seconds_since_progress > settings.unready_after_s:
        raise ApiError("engine_unavailable", "the model makes no progress; try again later")
    return {"status": "ready", "running": health.running, "waiting": health.waiting}


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record_of(request.scope).error_code = error.code
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Routes and methods that do not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        answer = ApiError("method_not_allowed", f"{request.method} is not allowed on this path")
    else:
        answer = ApiError("route_not_found", "there is no such path")
    record_of(request.scope).error_code = answer.code
    return answer.response(dict(error.headers or {}))

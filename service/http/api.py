"""The HTTP side, put together. `build_api` needs a model and a decoder and knows nothing of Ray: tests run it in
process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from openai.types import Model
from starlette.exceptions import HTTPException

from service import APPLICATION, VERSION
from service.callers.keys import load_keys
from service.callers.ledger import Ledger, RayLedger
from service.chat.admission import Admission
from service.chat.request import ChatRunner
from service.chat.shadow import Shadows
from service.chat.steering_sources import ALIASES, find_alias
from service.concepts.index import ConceptIndex
from service.concepts.names import ConceptNames
from service.draining import Drain, shutting_down
from service.errors import ApiError
from service.http.chat_route import chat
from service.http.compare_route import compare
from service.http.concepts.route import ConceptsRoute
from service.http.feedback_route import FeedbackDesk
from service.http.middleware import Middleware
from service.http.model_answer import ModelAnswer, ModelRequests
from service.http.openapi import build_openapi
from service.http.pages.playground import Playground
from service.http.routes import ROUTES
from service.images.decoder import ImageDecoder
from service.images.remote import RemoteImages
from service.live_settings import LiveSettings
from service.metrics.exposition import Metrics
from service.metrics.request_record import Tracing, record_of
from service.model.client import ModelClient
from service.model.readiness import Readiness
from service.settings import Settings

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
CANDIDATES_EVERY_S = 5.0
"""A look asks Serve's controller; a change that names a candidate may wait for one."""
IMAGE_FETCH_TIMEOUT_S = 5.0
"""For all remote images of a request together."""


def build_api(
    settings: Settings,
    model: ModelClient,
    decoder: ImageDecoder,
    remote: RemoteImages | None = None,
    ledger: Ledger | RayLedger | None = None,
    live: LiveSettings | None = None,
    proxied: bool = False,
) -> FastAPI:
    """The whole HTTP side. Where `remote` is given, images come from there instead of the settings' hosts.

    Several replicas share a `ledger`; one has its own. `live`: what may change, if somebody else changes it. `proxied`:
    behind Serve's proxy, which answers with the request id itself. Raises SettingsError where keys are needed and
    cannot be read.
    """
    metrics, tracing = Metrics(), Tracing(settings.traces_endpoint)
    if proxied:
        metrics.warn_if_alone()
    drain = Drain(settings.drain_file, settings.drain_timeout_s)
    ledger = Ledger() if ledger is None else ledger
    keys = load_keys(settings, os.environ)
    live = live or LiveSettings(settings)
    index = ConceptIndex(Path(settings.loaded_artifact)) if settings.loaded_artifact else None
    runner = ChatRunner(
        model=model,
        decoder=decoder,
        remote=remote or _remote_images(settings),
        names=ConceptNames(index),
        ledger=ledger,
        tracing=tracing,
    )
    admission = Admission(memory_bytes=settings.max_memory_bytes, in_progress=metrics.in_progress)
    shadows = Shadows(
        model,
        metrics,
        memory_bytes=settings.max_memory_bytes,
        running=lambda: admission.running,
        ending=lambda: drain.begun,
    )
    shared = ModelRequests(live=live, runner=runner, admission=admission, drain=drain, metrics=metrics, shadows=shadows)
    handlers = Handlers(
        live=live,
        shared=shared,
        concepts=ConceptsRoute(shared, index),
        desk=FeedbackDesk(ledger, metrics, body_timeout_s=settings.body_timeout_s),
        readiness=Readiness(model, lambda: live.current.default_artifact, may_sleep=settings.model_may_sleep),
        pages=Playground(),
        with_keys=keys is not None,
        started=int(time.time()),
    )

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        await _know_candidates(model, live)
        aside = (_keep_looking(handlers), _keep_knowing(model, live), _prepare(index))
        working = [asyncio.create_task(one) for one in aside]
        yield
        for task in working:
            task.cancel()
        shadows.close()
        tracing.close()

    api = FastAPI(
        title="VL-SAE steering", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    api.add_middleware(
        Middleware,
        metrics=metrics,
        tracing=tracing,
        keys=keys,
        ledger=ledger,
        settings=settings,
        proxied=proxied,
    )
    api.add_exception_handler(HTTPException, _answer_http_error)
    for route in ROUTES:
        api.add_api_route(route.path, attrgetter(route.handler)(handlers), methods=[route.method])
    return api


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """What each route does, by the name that it has in ROUTES."""

    live: LiveSettings
    shared: ModelRequests
    concepts: ConceptsRoute
    desk: FeedbackDesk
    readiness: Readiness
    pages: Playground
    with_keys: bool
    """Whether a caller needs one."""
    started: int
    """Seconds since 1970."""

    async def chat(self, request: Request) -> Response:
        return ModelAnswer(self.shared, request, chat)

    async def compare(self, request: Request) -> Response:
        return ModelAnswer(self.shared, request, compare)

    async def feedback(self, request: Request) -> Response:
        async with self.shared.drain.request():
            return await self.desk.answer(request)

    async def models(self) -> Response:
        ids = [self.live.current.model_name + alias for alias in ALIASES]
        return JSONResponse({"object": "list", "data": [self._model(model_id) for model_id in ids]})

    async def one_model(self, model_id: str) -> Response:
        find_alias(model_id, self.live.current.model_name)
        return JSONResponse(self._model(model_id))

    async def alive(self) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        return JSONResponse(await self.look())

    async def version(self) -> Response:
        status = await self.readiness.status()
        able = status.capabilities
        return JSONResponse(
            {
                "version": VERSION,
                "model": self.live.current.model_name,
                "model_family": able.model_family,
                "engine": able.engine,
                "context_tokens": able.context_tokens,
                "system_fingerprint": status.system_fingerprint,
                "default_artifact": self.live.current.default_artifact,
                "artifact": able.artifact,
                "candidates": self.live.candidates,
                "presets": list(able.presets),
                "alignment": able.alignment,
                "faithfulness": able.faithfulness,
                "live_settings": self.live.describe(),
            }
        )

    async def openapi(self) -> Response:
        document = await asyncio.to_thread(build_openapi, self.live.current, with_keys=self.with_keys)
        return JSONResponse(document)

    async def metrics(self) -> Response:
        with suppress(ApiError):
            await self.look()
        text = await asyncio.to_thread(self.shared.metrics.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def look(self) -> dict:
        """What /readyz says; raises ApiError where it is not ready. The gauge says the same."""
        is_ready = False
        try:
            if self.shared.drain.begun:
                raise shutting_down()
            answer = await self.readiness.check()
            is_ready = True
            return answer
        finally:
            self.shared.metrics.ready.set(is_ready)

    def _model(self, model_id: str) -> dict:
        return Model(id=model_id, created=self.started, object="model", owned_by=APPLICATION).model_dump()


def _remote_images(settings: Settings) -> RemoteImages | None:
    """None where there is no host to fetch from."""
    if not settings.image_hosts.strip(","):
        return None
    return RemoteImages(settings.image_hosts, timeout_s=IMAGE_FETCH_TIMEOUT_S, max_image_bytes=settings.max_image_bytes)


async def _keep_looking(handlers: Handlers) -> None:
    """The gauge is true though nobody asks: a scrape may go to `metrics/machine.py`, a probe to Serve."""
    while True:
        try:
            with suppress(ApiError):  # not ready, as the gauge says
                await handlers.look()
        except Exception:
            log.exception("whether the model is ready cannot be found out")
        await asyncio.sleep(LOOK_EVERY_S)


async def _know_candidates(model: ModelClient, live: LiveSettings) -> None:
    """One look at what is loaded beside the service's own artifact."""
    try:
        live.know(await model.candidates())
    except Exception:
        log.exception("which candidates there are cannot be found out")


async def _keep_knowing(model: ModelClient, live: LiveSettings) -> None:
    while True:
        await asyncio.sleep(CANDIDATES_EVERY_S)
        await _know_candidates(model, live)


async def _prepare(index: ConceptIndex | None) -> None:
    """Before the first who asks would have to wait for it. Why it cannot be made, the index logs."""
    if index is not None:
        with suppress(ApiError):
            await asyncio.to_thread(index.prepare)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Routes and methods that do not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        answer = ApiError("method_not_allowed", f"{request.method} is not allowed on this path")
    else:
        answer = ApiError("route_not_found", "there is no such path")
    record_of(request.scope).error_code = answer.code
    return answer.response(dict(error.headers or {}))

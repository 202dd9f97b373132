"""The Ray Serve application: start reading here.

    client -> gateway -> Serve's HTTP proxy -> Ingress (validation, images; no torch) -> Model (tokenising, one engine)

`python -m service` runs it on a Ray of its own, on loopback without the gateway; a cluster runs
`service.app:build_application` with settings as args.
"""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

from service.callers.keys import check_keys_are_named
from service.callers.ledger import Ledger
from service.callers.ledger_client import RayLedger
from service.gateway import check_gateway_is_named, check_serve_mode
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LiveSettings
from service.metrics import logs
from service.model.client import RayModelClient
from service.model.replica import ModelReplica
from service.settings import Settings

APPLICATION = "vl-sae-steering"
HEALTH_CHECK_PERIOD_S = 2
"""A replica that was killed is noticed, and replaced, at the next check."""
HEALTH_CHECK_TIMEOUT_S = 30
LEDGER_CHECK_PERIOD_S = 1
"""While it is lost, callers with a quota are refused."""
MODEL_STARTS = 3
"""So often a model replica is started before a rollout counts as failed: a GPU may fail once, a damaged artifact always
does, and `python -m service` does not wait for the other times."""
SHUTDOWN_MARGIN_S = 5
"""So much longer than any request may take, a replica that goes, and Serve's proxy, wait for it."""


@serve.deployment(name="Model")
class Model(ModelReplica):
    """One engine per replica; ready when it has loaded."""

    async def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_file)
        ModelReplica.__init__(self, settings)
        await self.start()

    async def __del__(self) -> None:
        await self.stop()


@serve.deployment(name="Ledger")
class SharedLedger(Ledger):
    """One for all ingress replicas, however many there are or come to be."""


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """HTTP, validation and image decoding."""

    def __init__(self, settings: Settings, model: DeploymentHandle, ledger: DeploymentHandle) -> None:
        logs.configure(settings.log_file)
        check_serve_mode(os.environ)
        self._settings, self._live, self._model = settings, LiveSettings(settings), RayModelClient(model)
        self._ledger = RayLedger(ledger)
        limits = DecoderLimits(
            memory_bytes=settings.image_memory_bytes,
            timeout_s=settings.image_timeout_s,
            max_side=settings.max_image_side,
        )
        self._decoder = ImageDecoder(workers=settings.image_workers, limits=limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._settings, self._model, self._decoder, ledger=self._ledger, live=self._live, proxied=True)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve at the start and whenever the deployment's `user_config` changes."""
        self._live.change(user_config)

    def __del__(self) -> None:
        self._decoder.close()


def http_options(settings: Settings) -> HTTPOptions:
    """Of Serve's proxy; a cluster's stand in its configuration file."""
    return HTTPOptions(
        host=settings.host, port=settings.port, request_timeout_s=settings.request_timeout_s + SHUTDOWN_MARGIN_S
    )


def build_application(settings: Settings) -> Application:
    """Ingress over model. Tokens are not batched on their way: every yield of the engine is its own message.

    Ray Serve reads the annotation to make Settings of a cluster's args; as a string it would be overlooked. What
    'auto' means is settled here, so that the GPU asked of Ray is the one that the replica uses.
    """
    check_keys_are_named(settings, os.environ)
    check_gateway_is_named(settings)
    check_serve_mode(os.environ)
    settings = settings.model_copy(update={"device": settings.resolved_device(), "dtype": settings.resolved_dtype()})
    gpus = settings.tensor_parallel_size if settings.resolved_device() == "cuda" else 0
    model = Model.options(
        num_replicas=settings.model_replicas,
        ray_actor_options={"num_cpus": settings.cpu_threads, "num_gpus": gpus},
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=MODEL_STARTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.request_timeout_s + SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings)
    return Ingress.options(
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 1},
        # Above our own limit, so that it is our 503 a client sees, and health and metrics always get through.
        max_ongoing_requests=settings.max_concurrent_requests + 64,
        max_queued_requests=settings.max_concurrent_requests,  # in Serve's proxy, while a replica is being replaced
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.request_timeout_s + SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
    ).bind(settings, model, _ledger(settings))


def _ledger(settings: Settings) -> Application:
    """As many requests may wait for it as all ingress replicas work on."""
    return SharedLedger.options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.ingress_replicas * (settings.max_concurrent_requests + 64),
        health_check_period_s=LEDGER_CHECK_PERIOD_S,
    ).bind()

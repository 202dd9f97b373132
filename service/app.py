"""The Ray Serve application: start reading here.

    client -> gateway -> Serve's HTTP proxy -> Ingress (validation, images; no torch) -> Model (tokenising, one engine)

`python -m service` runs it on a Ray of its own, on loopback without the gateway; a cluster runs
`service.app:build_application` with settings as args.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from service import APPLICATION as APPLICATION
from service.callers.keys import check_keys_are_named
from service.callers.ledger import Ledger, RayLedger
from service.gateway import check_gateway_is_named, check_serve_mode
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LiveSettings
from service.metrics import logs
from service.model.candidates import CANDIDATE
from service.model.client import RayModelClient
from service.model.object_store import warn_of_small_store
from service.model.replica import ModelReplica
from service.settings import MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS, Settings, SettingsError

HEALTH_CHECK_PERIOD_S = 2
"""A replica that was killed is noticed, and replaced, at the next check."""
HEALTH_CHECK_TIMEOUT_S = 30
LEDGER_CHECK_PERIOD_S = 1
"""While it is lost, callers with a quota are refused."""
MODEL_STARTS = 3
"""So often a model replica is started before a rollout counts as failed: a GPU may fail once, a damaged artifact always
does, and `python -m service` does not wait for the other times."""
LEDGER_CPUS = 0.01
"""With none it could be put on a cluster's head, which has none, and be lost with it. Every replica leaves as much of
its own, so that there is room for the ledger wherever one is, and for any of them beside it.
"""
LEDGER_REQUESTS = 10_000
"""May wait for it, of all ingress replicas together."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
BY_PICTURE = RequestRouterConfig.model_validate(
    {"request_router_class": "service.model.affinity:PictureAffinityRouter"}
)
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
        warn_of_small_store(settings)
        self._settings, self._live = settings, LiveSettings(settings)
        self._model = RayModelClient(model, by_picture=settings.routing == "picture")
        self._ledger = RayLedger(ledger)
        self._decoder = ImageDecoder(workers=settings.image_workers, limits=DecoderLimits())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._settings, self._model, self._decoder, ledger=self._ledger, live=self._live, proxied=True)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve at the start and whenever the deployment's `user_config` changes."""
        self._live.change(user_config)

    def __del__(self) -> None:
        self._decoder.close()


def build_application(settings: Settings) -> Application:
    """The application of a cluster, whose `deployments:` say how many replicas there are.

    Ray Serve reads the annotation to make Settings of a cluster's args; as a string it would be overlooked.
    """
    return assemble(settings)


def build_candidate(settings: Settings) -> Application:
    """One more artifact, with a model of its own, as an application beside that of the service (`route_prefix: null`).

    Its name is the candidate's. Of its settings those of model, artifact and engine count, and `request_timeout_s`.
    """
    return assemble_candidate(settings)


def assemble_candidate(settings: Settings, *, model: Mapping[str, Any] = NO_OPTIONS) -> Application:
    """With options of its deployment. Raises SettingsError where there is no artifact."""
    if settings.loaded_artifact is None:
        raise SettingsError("artifact: a candidate is one; name its folder, with steering on")
    settings = settings.model_copy(update={"engine": settings.engine.settled()})
    return Model.options(name=CANDIDATE, **{**_model_options(settings), **model}).bind(settings)


def assemble(
    settings: Settings, *, ingress: Mapping[str, Any] = NO_OPTIONS, model: Mapping[str, Any] = NO_OPTIONS
) -> Application:
    """Ingress over model, each with options of its deployment.

    Tokens are not batched on their way: every yield of the engine is its own message. What 'auto' means is settled
    here, so that the GPU asked of Ray is the one that the replica uses.
    """
    check_keys_are_named(settings, os.environ)
    check_gateway_is_named(settings)
    check_serve_mode(os.environ)
    engine = settings.engine.settled()
    settings = settings.model_copy(update={"engine": engine})
    ingresses = {
        "ray_actor_options": {"num_cpus": 1 - LEDGER_CPUS},
        # Above our own limit, so that it is our 503 a client sees, and health and metrics always get through.
        "max_ongoing_requests": settings.max_concurrent_requests + 64,
        "max_queued_requests": settings.max_concurrent_requests,  # in Serve's proxy, while a replica is being replaced
    }
    ledger = SharedLedger.options(
        ray_actor_options={"num_cpus": LEDGER_CPUS},
        max_ongoing_requests=LEDGER_REQUESTS,
        health_check_period_s=LEDGER_CHECK_PERIOD_S,
    )
    replicas = Model.options(**{**_model_options(settings), **model}).bind(settings)
    return Ingress.options(**_health_options(settings), **{**ingresses, **ingress}).bind(
        settings, replicas, ledger.bind()
    )


def _health_options(settings: Settings) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": settings.request_timeout_s + SHUTDOWN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def _model_options(settings: Settings) -> dict[str, Any]:
    engine = settings.engine
    gpus = engine.tensor_parallel_size if engine.device == "cuda" else 0
    return {
        **_health_options(settings),
        "ray_actor_options": {"num_cpus": engine.cpu_threads - LEDGER_CPUS, "num_gpus": gpus},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "max_constructor_retry_count": MODEL_STARTS,
        **({"request_router_config": BY_PICTURE} if settings.routing == "picture" else {}),
    }

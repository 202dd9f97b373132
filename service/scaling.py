"""How many replicas `python -m service` has: Ray Serve's own autoscaling, its numbers derived from the settings.

A cluster says the same in `deployments:`. Knows no Ray and starts nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from service.settings import LaunchSettings, SettingsError

FULL_SHARE = 0.75
"""A replica that is fuller gets company: of the engine's batch, or of what an ingress replica may work on."""
UP_DELAY_S = 5.0
"""More load must last so long."""
LOOK_BACK_S = 15.0
"""Load is the mean of so many seconds; replicas tell of it every 10."""


def target_of_model(settings: LaunchSettings) -> float:
    """Requests at one model replica above which another one is started."""
    return FULL_SHARE * settings.engine.max_batch_size


def fewest_models(settings: LaunchSettings) -> int:
    return settings.model_replicas if settings.min_replicas is None else settings.min_replicas


def most_models(settings: LaunchSettings) -> int:
    return settings.model_replicas if settings.max_replicas is None else settings.max_replicas


def most_ingresses(settings: LaunchSettings) -> int:
    return max(settings.ingress_replicas, settings.max_replicas or 1)


def most_cpus(settings: LaunchSettings) -> int:
    """Room for every replica there may ever be, as Ray counts it."""
    models = most_models(settings) + len(settings.candidates)
    return most_ingresses(settings) + models * settings.engine.cpu_threads


def ingress_options(settings: LaunchSettings) -> dict[str, Any]:
    """Options of the deployment `Ingress`."""
    least, most = settings.ingress_replicas, most_ingresses(settings)
    return _options(settings, least, least, most, FULL_SHARE * settings.max_concurrent_requests)


def model_options(settings: LaunchSettings) -> dict[str, Any]:
    """Options of the deployment `Model`. It starts with `model_replicas`, so that a damaged artifact is found then."""
    return _options(
        settings,
        fewest_models(settings),
        settings.model_replicas,
        most_models(settings),
        target_of_model(settings),
    )


def _options(settings: LaunchSettings, least: int, first: int, most: int, target: float) -> dict[str, Any]:
    if least == most:
        return {"num_replicas": most}
    scaling = {
        "min_replicas": least,
        "initial_replicas": first,
        "max_replicas": most,
        "target_ongoing_requests": target,
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": UP_DELAY_S,
        "downscale_delay_s": settings.scale_down_delay_s,
    }
    return {"autoscaling_config": scaling}


def check_scaling(settings: LaunchSettings) -> None:
    """Raises SettingsError where the numbers contradict each other, or ask for GPUs that this machine does not have."""
    first, least, most = settings.model_replicas, fewest_models(settings), most_models(settings)
    if most < first:
        raise SettingsError(f"--max-replicas: it is {most}, fewer than the {first} of --model-replicas")
    if least > first:
        raise SettingsError(f"--min-replicas: it is {least}, more than the {first} of --model-replicas")
    if least < most and settings.max_ongoing_requests <= target_of_model(settings):
        raise SettingsError(
            f"--max-ongoing-requests: it is {settings.max_ongoing_requests}, and another model replica is started when "
            f"one has more than {target_of_model(settings):g} (three quarters of --engine.max-batch-size): raise it"
        )
    _check_gpus(settings, most + len(settings.candidates))


def _check_gpus(settings: LaunchSettings, most: int) -> None:
    if settings.engine.settled().device != "cuda":
        return
    there, each = gpus_here(), settings.engine.tensor_parallel_size
    if there == 0:
        raise SettingsError("--engine.device: there is no CUDA device here; say cpu")
    if most * each > there:
        flag = "--model-replicas" if settings.max_replicas is None else "--max-replicas"
        raise SettingsError(
            f"{flag}: {most} model replicas of {each} GPU{'s' if each > 1 else ''} need {most * each}, and there are "
            f"{there}; ask for at most {there // each}"
        )


def gpus_here() -> int:
    """CUDA devices of this machine that we may use: Ray counts them likewise."""
    devices = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    return min(devices, len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"]))

"""Room for pixels: what the admitted requests may hold fits, and a store that is smaller is named."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from service.chat.request import MAX_TEXT_BYTES
from service.images.decoder import RgbImage
from service.model.job import ModelJob, Turn
from service.model.object_store import OTHER_BYTES, SHADOWS_OF_MEMORY, fits_into_memory, needed_bytes
from service.settings import BYTES_PER_PIXEL, Settings
from steering.engines.base import Sampling
from steering.request import SteeringRequest, merge_sources
from tests.service.running_server import REPOSITORY

SETTINGS = Settings(
    model="/models/tiny", artifact="/a", max_body_bytes=10_000, max_image_pixels=40_000, max_memory_bytes=16_000_000,
    max_concurrent_requests=8,
)  # fmt: skip


def job(pixels: int, text_bytes: int) -> ModelJob:
    return ModelJob(
        request_id="r",
        turns=(Turn("user", ("x" * text_bytes, None)),),
        images=(RgbImage(pixels, 1, bytes(BYTES_PER_PIXEL * pixels)),),
        max_tokens=1,
        sampling=Sampling(max_tokens=1),
        steering=merge_sources(server=(SteeringRequest(),)),
        tenant="",
    )


@pytest.mark.parametrize("replicas", [1, 3])
def test_all_that_is_admitted_fits(replicas: int) -> None:
    places, memory = SETTINGS.max_concurrent_requests, SETTINGS.max_memory_bytes
    largest = len(pickle.dumps(job(memory // places // BYTES_PER_PIXEL, MAX_TEXT_BYTES)))
    shadow = len(pickle.dumps(job(memory // SHADOWS_OF_MEMORY // BYTES_PER_PIXEL, 0)))
    needed = needed_bytes(SETTINGS, replicas)
    assert replicas * (places * largest + shadow) < needed
    assert needed < replicas * (places * largest + shadow) + OTHER_BYTES, "and little else"


def test_what_finds_room_in_memory() -> None:
    assert fits_into_memory(4096)
    assert not fits_into_memory(2**60)


IN_RAY = """
import sys
from steering.cluster.local_ray import private_ray

with private_ray(cpus=1, object_store_bytes=200 * 2**20):
    from service.metrics import logs
    from service.model.object_store import warn_of_small_store
    from service.settings import Settings

    logs.configure(None)
    small = {"max_body_bytes": 10_000, "max_image_pixels": 40_000, "max_concurrent_requests": 8}
    warn_of_small_store(Settings(**small, max_memory_bytes=16_000_000))
    print("--", file=sys.stderr, flush=True)
    warn_of_small_store(Settings())
"""


@pytest.mark.slow
def test_a_store_that_is_too_small_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", IN_RAY], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    enough, small = done.stderr.split("--\n")
    assert "max_memory_bytes" not in enough
    assert "max_memory_bytes: requests may hold 2560 MiB in Ray's object store, which has 200 here" in small

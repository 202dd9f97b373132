"""Images of a request, from URLs to RGB pixels, the cheapest check first. This side never parses an image: processes of
their own measure and decode (`worker.py`), and one that dies or hangs costs the one request it worked for.

The caller's quota is asked for their number; URLs are judged, base64 decoded, remote images fetched; then all are
measured by their headers; only when their sums and the quota of pixels allow it is the first pixel decoded. Knows
nothing of models or Ray.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from service.errors import ApiError
from service.fair_threads import FairThreads
from service.images import worker
from service.images.data_url import decode_data_url
from service.images.remote import RemoteImages, RemoteUrl
from service.settings import Settings

Result = TypeVar("Result")
AdmitImages = Callable[[int, int], Awaitable[None]]
"""Called twice per request with images: with their number and no pixels before anything is done for them, with no
images and all their pixels once these are measured. Raises ApiError where the caller's quota refuses them."""

CLOCK_PER_CPU = 3
"""An image may take this many times its CPU time on the clock; then the machine is to blame, not the image."""
WORKER_SCRIPT = Path(worker.__file__)
OUT_OF_TIME = -1
"""A status that no worker gives: it was killed by the clock."""


class RgbImage(NamedTuple):
    """Decoded pixels as they travel to the model replica."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    rows: bytes
    """`height` rows of `width` RGB triples."""


NOTHING = RgbImage(0, 0, b"")


async def take_images(
    sources: Sequence[tuple[str, str]],
    *,
    settings: Settings,
    decoder: ImageDecoder,
    remote: RemoteImages | None,
    admit_images: AdmitImages,
    take_bytes: Callable[[int], None] = lambda _count: None,
    caller: str = "",
) -> tuple[RgbImage, ...]:
    """Pixels of every (field, URL), in their order. Raises ApiError naming the field at fault.

    `take_bytes` is told of every piece that is fetched, and may raise; `caller` is whose turn it is at the decoder.
    """
    if not sources:
        return ()
    await admit_images(len(sources), 0)
    encoded = await collect(sources, settings=settings, remote=remote, take_bytes=take_bytes)
    limits: dict[str, Any] = {"max_pixels": settings.max_image_pixels, "caller": caller}
    sizes = await together(decoder.measure(data, field=field, **limits) for field, data in encoded)
    pixels = sum(sizes)
    if pixels > settings.max_request_pixels:
        raise ApiError(
            "invalid_image",
            f"messages: the images have {pixels} pixels together; at most {settings.max_request_pixels} are allowed",
            param="messages",
        )
    await admit_images(0, pixels)
    return tuple(await together(decoder.decode(data, field=field, **limits) for field, data in encoded))


async def collect(
    sources: Sequence[tuple[str, str]],
    *,
    settings: Settings,
    remote: RemoteImages | None,
    take_bytes: Callable[[int], None],
) -> list[tuple[str, bytes]]:
    """(field, encoded image) of every source; every URL is judged before the first is fetched."""
    found: list[tuple[str, bytes | RemoteUrl]] = []
    for field, url in sources:
        if remote is not None and url[:5].lower() != "data:":
            found.append((field, remote.parse(url, field=field)))
        else:
            found.append((field, await decode_data_url(url, field=field, max_bytes=settings.max_image_bytes)))
    fetched = iter(())
    if remote is not None:
        left = settings.max_body_bytes - sum(len(data) for _, data in found if isinstance(data, bytes))
        wanted = [(field, url) for field, url in found if isinstance(url, RemoteUrl)]
        fetched = iter(await remote.fetch(wanted, max_bytes=left, take_bytes=take_bytes))
    return [(field, data if isinstance(data, bytes) else next(fetched)) for field, data in found]


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once; of several failures the first in order, so that the same request gets the same answer. What comes
    after it and has not begun never does."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class DecoderDied(Exception):
    """A worker ended in the middle of a job."""


@dataclass(frozen=True, kw_only=True)
class DecoderLimits:
    """What one worker process may use."""

    memory_bytes: int = 1024 * 1024 * 1024
    """Address space."""
    timeout_s: float = 10.0
    """CPU seconds for one image; on the clock, CLOCK_PER_CPU times as many."""
    max_side: int = 16_384
    """Longest side in pixels."""


class ImageDecoder:
    """A pool of worker processes, one per thread; each serves one image at a time, and callers in turn."""

    def __init__(self, *, workers: int, limits: DecoderLimits) -> None:
        self._limits = limits
        self._threads = FairThreads(workers, "image-decoder")
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()

    async def measure(self, encoded: bytes, *, field: str, max_pixels: int, caller: str = "") -> int:
        """Pixels that decoding would give, from the header alone. Raises ApiError as `decode` does."""
        image = await self._work(worker.MEASURE, encoded, field, max_pixels, caller)
        return image.width * image.height

    async def decode(self, encoded: bytes, *, field: str, max_pixels: int, caller: str = "") -> RgbImage:
        """Pixels of one image. Raises ApiError naming `field`; the message never quotes the decoder."""
        return await self._work(worker.DECODE, encoded, field, max_pixels, caller)

    async def _work(self, operation: int, encoded: bytes, field: str, max_pixels: int, caller: str) -> RgbImage:
        status, image = await self._threads.run(caller, self._ask, operation, encoded, max_pixels)
        if status == OUT_OF_TIME:
            raise ApiError("overloaded", f"{field}: the server was too busy to decode it in time; try again later")
        if status != worker.OK:
            raise ApiError("invalid_image", f"{field}: {self._explain(status, max_pixels)}", param=field)
        return image

    def close(self) -> None:
        self._threads.close()
        for process in list(self._processes):
            process.kill()

    def _explain(self, status: int, max_pixels: int) -> str:
        return {
            worker.NOT_AN_IMAGE: "not a complete JPEG, PNG, WebP or GIF image",
            worker.TOO_LARGE: f"the image is too large; at most {max_pixels} pixels, {self._limits.max_side} pixels a "
            f"side and sides of 1:{worker.MAX_ASPECT_RATIO} are accepted",
            worker.TOO_SMALL: f"the image is too small; at least {worker.MIN_SIDE_PX} pixels a side are needed",
            worker.ANIMATED: "animated images are not accepted; send one frame, as a picture of its own",
            worker.TOO_MANY_SCANS: f"the JPEG has more than {worker.MAX_SCANS} scans; save it again",
            worker.TOO_SLOW: "decoding the image takes too long; save it again, or smaller",
        }[status]

    def _ask(self, operation: int, encoded: bytes, max_pixels: int) -> tuple[int, RgbImage]:
        """Runs in a thread. A worker that somebody else killed is replaced once; a second death is the image's."""
        for _ in range(2):
            with suppress(DecoderDied):
                return self._ask_worker(operation, encoded, max_pixels)
        return worker.NOT_AN_IMAGE, NOTHING

    def _ask_worker(self, operation: int, encoded: bytes, max_pixels: int) -> tuple[int, RgbImage]:
        process = self._worker()
        assert process.stdin is not None
        assert process.stdout is not None
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        watchdog = threading.Timer(CLOCK_PER_CPU * self._limits.timeout_s, stop)
        watchdog.start()
        try:
            process.stdin.write(worker.JOB.pack(operation, len(encoded), max_pixels) + encoded)
            process.stdin.flush()
            answer = process.stdout.read(worker.ANSWER.size)
            if len(answer) < worker.ANSWER.size:
                raise DecoderDied
            status, width, height, length = worker.ANSWER.unpack(answer)
            rows = process.stdout.read(length)
            if len(rows) < length:
                raise DecoderDied
            return status, RgbImage(width, height, rows)
        except (OSError, DecoderDied):
            self._discard(process)
            if timed_out.is_set():
                return OUT_OF_TIME, NOTHING
            if process.returncode == -signal.SIGPROF:
                return worker.TOO_SLOW, NOTHING
            raise DecoderDied from None
        except BaseException:  # what it still has to say would be taken for the answer to the next job
            self._discard(process)
            raise
        finally:
            watchdog.cancel()

    def _worker(self) -> subprocess.Popen[bytes]:
        """This thread's process. Its environment is empty; being of the same user, it could read our own."""
        process = getattr(self._own, "process", None)
        if process is None:
            command = [sys.executable, "-I", str(WORKER_SCRIPT), str(self._limits.memory_bytes)]
            process = subprocess.Popen(
                [*command, str(self._limits.max_side), str(self._limits.timeout_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
            self._own.process = process
            self._processes.add(process)
        return process

    def _discard(self, process: subprocess.Popen[bytes]) -> None:
        self._own.process = None
        self._processes.discard(process)
        process.kill()
        process.wait()

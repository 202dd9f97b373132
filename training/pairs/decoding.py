"""From what a source found to a pair that can be used, or the reason why not; decoding runs ahead in threads.

Knows no format of files and no model.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from training.pairs.pair import Pair, Unusable

MAX_PIXELS = 89_478_485
"""Pillow's own limit, beyond which it suspects a decompression bomb."""
THREADS, AHEAD = 4, 64
"""Threads that decode, and how many pictures they may be ahead of their reader."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such pictures are skipped here, and listed

ImageContent = bytes | Path | None
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A pair as it lies in a source, nothing decoded."""

    index: int
    """In the source."""
    reference: str
    text: Any
    """The caption; other than a string where the source holds something else, None where it has none."""
    content: ImageContent
    """An encoded picture or its file; None where there is none."""


def decode_pairs(found: Iterable[Found]) -> Iterator[tuple[int, Pair | Unusable]]:
    """In the order found."""
    return ((one.index, pair) for one, pair in map_ahead(decode_pair, found, threads=THREADS, ahead=AHEAD))


def decode_images(found: Iterable[Found]) -> Iterator[tuple[str, Image.Image]]:
    """By reference; what is no picture is left out."""
    for one, image in map_ahead(lambda one: decode_image(one.content), found, threads=THREADS, ahead=AHEAD):
        if isinstance(image, Image.Image):
            yield one.reference, image


def decode_pair(found: Found) -> Pair | Unusable:
    """A pair, or why it cannot be used."""
    reason = _caption_fault(found.text)
    image = decode_image(found.content) if reason is None else None
    if isinstance(image, Image.Image):
        return Pair(image=image, text=found.text.strip(), reference=found.reference)
    return Unusable(reference=found.reference, reason=reason or str(image))


def decode_image(content: ImageContent) -> Image.Image | str:
    """RGB, or why there is none."""
    if content is None:
        return "no image"
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"too many pixels ({image.width} x {image.height})"
            return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return "missing file"
    except Image.DecompressionBombError:
        return "too many pixels"
    except UnidentifiedImageError:
        return "not an image"
    except Exception:  # a broken file makes Pillow's decoders raise anything: struct.error, SyntaxError, EOFError...
        return "broken image"


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, ahead: int) -> Iterator[tuple[A, B]]:
    """(item, function of it) in order, computed in threads, at most `ahead` items before they are asked for."""
    waiting: deque[tuple[A, Future[B]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _caption_fault(text: Any) -> str | None:
    if text is None:
        return "no caption"
    if not isinstance(text, str):
        return "caption is not text"
    if not text.strip():
        return "empty caption"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "caption is not valid Unicode"
    return None

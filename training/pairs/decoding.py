"""From what a source found to a pair that can be used, or the reason why not; decoding runs ahead in threads.

A picture that the source lacks or that is broken is skipped for good; a disk that fails is not the picture's fault and
stops the collection. Knows no format of files and no model.
"""

from __future__ import annotations

import errno
import io
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from training.errors import InvalidTraining
from training.pairs.pair import Pair, Unusable

MAX_PIXELS = 89_478_485
"""Pillow's own limit, beyond which it suspects a decompression bomb."""
MAX_ASPECT = 200
"""Of the longer side to the shorter; processors that resize by the shorter one make a picture of GBs out of more."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened at all: Pillow runs other programs for some formats."""
MISSING_FILE = "missing file"
"""Reason for a picture that is not there."""
THREADS, AHEAD = 4, 8
"""Threads that decode, and how many pictures they may be ahead of their reader."""
_NOT_THERE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_END: Any = object()

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
    return map_ahead(lambda one: (one.index, decode_pair(one)), found, threads=THREADS, ahead=AHEAD)


def decode_images(found: Iterable[Found]) -> Iterator[tuple[str, Image.Image]]:
    """By reference; what is no picture is left out."""

    def decode(one: Found) -> tuple[str, Image.Image | str]:
        return one.reference, decode_image(one.content, one.reference)

    for reference, image in map_ahead(decode, found, threads=THREADS, ahead=AHEAD):
        if isinstance(image, Image.Image):
            yield reference, image


def decode_pair(found: Found) -> Pair | Unusable:
    """A pair, or why it cannot be used."""
    if not _is_unicode(found.reference):
        escaped = found.reference.encode("utf-8", "backslashreplace").decode()
        return Unusable(reference=escaped, reason="the picture's name is not valid Unicode")
    reason = _caption_fault(found.text)
    image = decode_image(found.content, found.reference) if reason is None else None
    if isinstance(image, Image.Image):
        return Pair(image=image, text=found.text.strip(), reference=found.reference)
    return Unusable(reference=found.reference, reason=reason or str(image))


def decode_image(content: ImageContent, reference: str = "") -> Image.Image | str:
    """RGB, or why there is none. Raises InvalidTraining where that is not the picture's fault."""
    if content is None:
        return "no image"
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            return _size_fault(image.width, image.height) or image.convert("RGB")
    except Image.DecompressionBombError:
        return "too many pixels"
    except MemoryError as error:
        raise InvalidTraining(
            f"{_name(content, reference)} does not fit into this machine's memory; free some, or give fewer --workers "
            "and --threads, then run the same command again"
        ) from error
    except UnidentifiedImageError:
        return "not an image"
    except OSError as error:
        if error.errno is None:  # Pillow's own, for what it cannot decode
            return "broken image"
        if error.errno in _NOT_THERE:
            return MISSING_FILE
        raise InvalidTraining(
            f"{_name(content, reference)} cannot be read: {error.strerror}; mend that, then run the same command again"
        ) from error
    except Exception:  # a broken file makes Pillow's decoders raise anything: struct.error, SyntaxError, EOFError...
        return "broken image"


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, ahead: int) -> Iterator[B]:
    """The function of each item in order, computed in threads, at most `ahead` before they are asked for.

    A thread takes an item only when it begins with it, so that no more items than threads are in memory; items are
    taken one at a time, in whatever thread.
    """
    source, taking = iter(items), threading.Lock()
    begun: deque[Future[B]] = deque()  # in the order of the items; each is taken off when its item is
    waiting: deque[Future[B]] = deque()
    stopped = threading.Event()

    def work() -> None:
        with taking:
            future = begun.popleft()
            try:
                item = _END if stopped.is_set() else next(source, _END)
            except BaseException as error:
                stopped.set()
                future.set_exception(error)
                return
        try:
            future.set_result(_END if item is _END else function(item))
        except BaseException as error:
            future.set_exception(error)

    def begin() -> None:
        future: Future[B] = Future()
        begun.append(future)
        waiting.append(future)
        pool.submit(work)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in range(ahead + 1):
                begin()
            while (result := waiting.popleft().result()) is not _END:
                begin()
                yield result
        finally:
            stopped.set()


def _name(content: ImageContent, reference: str) -> str:
    return str(content) if isinstance(content, Path) else f"picture {reference}".strip()


def _size_fault(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"too many pixels ({width} x {height})"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"too long and narrow ({width} x {height})"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _caption_fault(text: Any) -> str | None:
    if text is None:
        return "no caption"
    if not isinstance(text, str):
        return "caption is not text"
    if not text.strip():
        return "empty caption"
    return None if _is_unicode(text) else "caption is not valid Unicode"

"""The process that measures and decodes untrusted images: one job at a time from stdin, its answer on stdout.

Run as a script (`python -I worker.py MEMORY_BYTES MAX_SIDE_PX CPU_S`) with an empty environment. It imports the
standard library and Pillow, nothing of ours, and dies with its parent because stdin ends. Nothing that Pillow says
leaves this process. It bounds what an image can use up. It is no sandbox: whoever takes over Pillow has the rights of
the ingress's user.

A job that takes more CPU time than CPU_S ends the process with SIGPROF.

Job: `!BIQ` (MEASURE or DECODE, length of the encoded image, most pixels allowed), then the image. Answer: `!BIII`
(status, width, height, length), then that many bytes of RGB rows; a measurement has none.
"""

import io
import re
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, ImageMath, ImageOps

OK, NOT_AN_IMAGE, TOO_LARGE, TOO_SMALL, ANIMATED, TOO_MANY_SCANS, TOO_SLOW = range(7)
MEASURE, DECODE = range(2)
JOB, ANSWER = struct.Struct("!BIQ"), struct.Struct("!BIII")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MIN_SIDE_PX = 4
"""Below this, image processors can take a side for the colour channels."""
MAX_ASPECT_RATIO = 50
"""Processors scale the short side up; the long side of a thread-like image would grow past any limit."""
MAX_SCANS = 64
"""Of one JPEG; encoders write about ten. Every scan costs a pass over all pixels, and 40 bytes can ask for one."""
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""The next marker, wherever it is: stuffed bytes and restart markers inside a scan are none. No repetition: over a run
of fill bytes it would look at each of them again from every other one."""
PNG_BITS = 24
"""Where a PNG says how many bits a sample has."""
START_OF_SCAN, END_OF_IMAGE = b"\xda", b"\xd9"


class Refused(Exception):
    """Carries the status of the answer."""


@contextmanager
def opened(encoded: bytes, max_pixels: int, max_side: int) -> Iterator[ImageFile.ImageFile]:
    """A picture whose header is acceptable; raises Refused. No pixel has been decoded yet."""
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as many before it makes room for a WebP's canvas
    try:
        opening = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Refused(TOO_LARGE) from None
    with opening as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE_PX:
            raise Refused(TOO_SMALL)
        too_long = max(width, height) > max_side or max(width, height) > MAX_ASPECT_RATIO * min(width, height)
        if too_long or width * height > max_pixels:
            raise Refused(TOO_LARGE)
        # A phone's JPEG may carry a second picture for other displays (MPO); the first one is the photograph.
        if image.format != "MPO" and getattr(image, "is_animated", False):  # looks no further than the second frame
            raise Refused(ANIMATED)
        if image.format in ("JPEG", "MPO") and scans(encoded) > MAX_SCANS:
            raise Refused(TOO_MANY_SCANS)
        yield image


def scans(jpeg: bytes) -> int:
    """How many scans a decoder will go through, up to one more than are allowed."""
    count, position = 0, 2
    while count <= MAX_SCANS and (marker := JPEG_MARKER.search(jpeg, position)) and marker[1] != END_OF_IMAGE:
        count += marker[1] == START_OF_SCAN
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
    return count


def measure(encoded: bytes, max_pixels: int, max_side: int) -> tuple[int, int]:
    """Width and height in pixels, as the header has them; raises Refused."""
    with opened(encoded, max_pixels, max_side) as image:
        return image.size


def decode(encoded: bytes, max_pixels: int, max_side: int) -> Image.Image:
    """One still RGB picture, upright, on white; raises Refused."""
    with opened(encoded, max_pixels, max_side) as image:
        image.load()
        bits = encoded[PNG_BITS] if image.format == "PNG" else 8
        return _on_white(_upright(image), bits)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; real cameras also write EXIF that cannot be read, and the picture is still good."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _on_white(image: Image.Image, bits: int) -> Image.Image:
    """RGB from any mode: transparency over white, 16-bit greys scaled down rather than clipped.

    `bits` of a sample in the file, by which a grey that is transparent is named: Pillow scales the samples only.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        samples = image.convert("I")
        image = samples.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        if transparent is not None:
            seen = ImageMath.lambda_eval(lambda of: (of["samples"] != transparent) * 255, samples=samples)
            image.putalpha(seen.convert("L"))
    elif image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        image = Image.alpha_composite(white, coloured)
    return image.convert("RGB")


def answer(operation: int, encoded: bytes, max_pixels: int, max_side: int) -> bytes:
    """The bytes that go back; whatever goes wrong inside Pillow is the same answer."""
    try:
        if operation == MEASURE:
            return ANSWER.pack(OK, *measure(encoded, max_pixels, max_side), 0)
        image = decode(encoded, max_pixels, max_side)
        rows = image.tobytes()
        return ANSWER.pack(OK, image.width, image.height, len(rows)) + rows
    except Refused as refused:
        return ANSWER.pack(refused.args[0], 0, 0, 0)
    except Exception:
        return ANSWER.pack(NOT_AN_IMAGE, 0, 0, 0)


def limit_resources(memory_bytes: int) -> None:
    """No more memory than asked for, no file written, no core dumped."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    memory_bytes, max_side, cpu_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    limit_resources(memory_bytes)
    warnings.simplefilter("ignore")
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(header := source.read(JOB.size)) == JOB.size:
        operation, length, max_pixels = JOB.unpack(header)
        encoded = source.read(length)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answered = answer(operation, encoded, max_pixels, max_side)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.write(answered)
        sink.flush()


if __name__ == "__main__":
    main()

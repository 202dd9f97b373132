"""The process that decodes untrusted images: reads one job at a time from stdin, answers on stdout.

Run as a script (`python -I image_worker.py MEMORY_BYTES MAX_SIDE_PX`) with an empty environment. It imports the
standard library and Pillow, nothing of ours, and dies with its parent because stdin ends. Nothing that Pillow says
leaves this process.

Job: `!IQ` (length of the encoded image, most pixels allowed), then the image. Answer: `!BIII` (status, width, height,
length), then that many bytes of RGB rows.
"""

import io
import resource
import struct
import sys
import warnings

from PIL import Image, ImageOps

OK, NOT_AN_IMAGE, TOO_LARGE, TOO_SMALL, ANIMATED = range(5)
JOB, ANSWER = struct.Struct("!IQ"), struct.Struct("!BIII")
FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE_PX = 4
"""Below this, image processors can take a side for the colour channels."""
MAX_ASPECT_RATIO = 50
"""Processors scale the short side up; the long side of a thread-like image would grow past any limit."""


class Refused(Exception):
    """Carries the status of the answer."""


def decode(encoded: bytes, max_pixels: int, max_side: int) -> Image.Image:
    """One still RGB picture, upright, on white; raises Refused. The size is judged before any pixel is decoded."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE_PX:
            raise Refused(TOO_SMALL)
        too_long = max(width, height) > max_side or max(width, height) > MAX_ASPECT_RATIO * min(width, height)
        if too_long or width * height > max_pixels:
            raise Refused(TOO_LARGE)
        # A phone's JPEG may carry a second picture for other displays (MPO); the first one is the photograph.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise Refused(ANIMATED)
        image.load()
        return _on_white(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; real cameras also write EXIF that cannot be read, and the picture is still good."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _on_white(image: Image.Image) -> Image.Image:
    """RGB from any mode: transparency over white, 16-bit greys scaled down rather than clipped."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        image = Image.alpha_composite(white, coloured)
    return image.convert("RGB")


def answer(encoded: bytes, max_pixels: int, max_side: int) -> bytes:
    """The bytes that go back; whatever goes wrong inside Pillow is the same answer."""
    try:
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
    memory_bytes, max_side = map(int, sys.argv[1:])
    limit_resources(memory_bytes)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(header := source.read(JOB.size)) == JOB.size:
        length, max_pixels = JOB.unpack(header)
        encoded = source.read(length)
        sink.write(answer(encoded, max_pixels, max_side))
        sink.flush()


if __name__ == "__main__":
    main()

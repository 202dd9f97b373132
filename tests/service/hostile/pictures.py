"""Encoded images that try something, and the status that a chat about each must have.

Bombs, lies, wrong types, loops and tiny or endless sides are a 400; what cameras, scanners and editors really write is
a 200, however odd it looks. Everything is made here from a few bytes; nothing is read from disk.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.service.examples import encoded, picture

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG, JPEG, WEBP = encoded(picture()), encoded(picture(), "JPEG"), encoded(picture(), "WEBP")
GIF = encoded(picture(), "GIF")
GIF_FRAME_AT = GIF.index(b",", 13)
"""Where its first frame begins."""
NOISE = Image.effect_noise((99, 99), 50)
SOF = b"\xff\xc0"
"""JPEG's start of frame, where the size stands."""


def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
    """One chunk of a PNG; `length` may lie."""
    said = len(content) if length is None else length
    return struct.pack("!I", said) + name + content + struct.pack("!I", zlib.crc32(name + content))


def png(*chunks: bytes, width: int = 8, height: int = 8, depth: int = 8, color: int = 2, interlace: int = 0) -> bytes:
    """A PNG of any header; 8 x 8 pixels of RGB and their chunks unless told otherwise."""
    header = struct.pack("!IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def rows(width: int = 8, height: int = 8, channels: int = 3) -> bytes:
    """An IDAT chunk with that many black pixels."""
    return chunk(b"IDAT", zlib.compress(bytes((width * channels + 1) * height), 9))


def jpeg_with(*segments: tuple[int, bytes], length: int | None = None) -> bytes:
    """A JPEG with segments of (marker, content) after its start; `length` may lie about the last."""
    out = b""
    for marker, content in segments:
        said = len(content) + 2 if length is None else length
        out += bytes((0xFF, marker)) + struct.pack("!H", said) + content
    return JPEG[:2] + out + JPEG[2:]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose frame header says so."""
    at = JPEG.index(SOF) + 5
    return JPEG[:at] + struct.pack("!HH", height, width) + JPEG[at + 4 :]


def jpeg_frame(marker: int = 0xC0, precision: int = 8) -> bytes:
    """A JPEG of another process (marker) or depth."""
    at = JPEG.index(SOF)
    return JPEG[:at] + bytes((0xFF, marker)) + JPEG[at + 2 : at + 4] + bytes((precision,)) + JPEG[at + 5 :]


def exif(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """An EXIF block with one directory of (tag, type, count, value) and the offset of the next."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following)


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    """A WebP container; `size` may lie."""
    content = b"WEBP"
    for name, data in chunks:
        content += name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(content) if size is None else size) + content


def webp_canvas(width: int, height: int) -> bytes:
    """A WebP whose canvas is that large and whose picture is 48 x 32."""
    canvas = bytes(4) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return riff((b"VP8X", canvas), (b"VP8 ", WEBP[20:]))


def vp8(width: int, height: int) -> bytes:
    """A lossy WebP whose frame says so."""
    at = WEBP.index(b"\x9d\x01\x2a") + 3
    return WEBP[:at] + struct.pack("<HH", width, height) + WEBP[at + 4 :]


def gif_canvas(width: int, height: int) -> bytes:
    """A GIF whose canvas is that large and whose one frame is 48 x 32."""
    return GIF[:6] + struct.pack("<HH", width, height) + GIF[10:]


def gif_frame(width: int, height: int) -> bytes:
    """A GIF of 48 x 32 whose frame says that it is that large."""
    at = GIF_FRAME_AT + 5
    return GIF[:at] + struct.pack("<HH", width, height) + GIF[at + 4 :]


def jpeg_of_scans(count: int, size: tuple[int, int] = (3000, 2000)) -> bytes:
    """A JPEG whose last scan comes again and again: little to send, much to decode."""
    whole = encoded(picture("white", size), "JPEG", progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * count + whole[-2:]


def jpeg_with_fill(count: int) -> bytes:
    """A JPEG with that many fill bytes in its scan that end in no marker: a careless search is quadratic over them."""
    at = JPEG.index(b"\xff\xda")
    header_end = at + 2 + int.from_bytes(JPEG[at + 2 : at + 4])
    return JPEG[:header_end] + b"\xff" * count + b"\0" + JPEG[header_end:]


def animation(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture("blue")])


def mpo_that_lies(count: int) -> bytes:
    """A phone's JPEG that says how many pictures follow."""
    whole = encoded(picture(), "MPO", save_all=True, append_images=[picture("blue")])
    entry = struct.pack("<HHII", 0xB001, 4, 1, 2)
    assert entry in whole
    return whole.replace(entry, struct.pack("<HHII", 0xB001, 4, 1, count))


SCRIPT = chunk(b"tEXt", b"Comment\0<script>alert(1)</script>")
FIRST_FRAME = chunk(b"fcTL", struct.pack("!5I2H2B", 0, 8, 8, 0, 0, 1, 1, 0, 0))
HOSTILE_PICTURES: dict[str, bytes] = {
    # other things than images
    "nothing": b"",
    "one byte": b"\x89",
    "zeros": bytes(1000),
    "text": b"hello" * 100,
    "HTML": b"<html><img src=x onerror=alert(1)></html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "PDF": b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript>>>>endobj\n",
    "ZIP": b"PK\x03\x04" + bytes(100),
    "ELF": b"\x7fELF" + bytes(100),
    "MP4": b"\0\0\0\x18ftypmp42" + bytes(100),
    "AVIF": b"\0\0\0\x18ftypavif" + bytes(100),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    # Pillow could read these; we don't let it
    "BMP": encoded(picture(), "BMP"),
    "TIFF": encoded(picture(), "TIFF"),
    "ICO": encoded(picture(), "ICO"),
    "PPM": encoded(picture(), "PPM"),
    "TGA": encoded(picture(), "TGA"),
    "GIF after a comment": b"GIF89a" + PNG,
    # sizes
    "0 x 0": png(rows(), width=0, height=0),
    "1 x 1": encoded(picture(size=(1, 1))),
    "1 x 60": encoded(picture(size=(1, 60))),
    "3 x 3": encoded(picture(size=(3, 3))),
    "JPEG 1 x 1": encoded(picture(size=(1, 1)), "JPEG"),
    "WebP 1 x 1": encoded(picture(size=(1, 1)), "WEBP"),
    "thread": encoded(picture(mode="1", size=(4, 400))),
    "lying thread": encoded(picture(mode="1", size=(400, 4))),
    "20,000 wide": encoded(picture(mode="1", size=(20_000, 500))),
    "25 megapixels and a row": encoded(picture(mode="1", size=(5000, 5001))),
    "PNG bomb": png(rows(), width=65_000, height=65_000),
    "PNG of 2**31 - 1": png(rows(), width=2**31 - 1, height=2**31 - 1),
    "PNG of 2**32 - 1": png(rows(), width=2**32 - 1, height=2**32 - 1),
    "PNG bomb that is real": encoded(Image.new("1", (12_000, 12_000)), compress_level=9),
    "JPEG bomb": jpeg_of_size(65_500, 65_500),
    "JPEG of 0 x 0": jpeg_of_size(0, 0),
    "JPEG without a height": jpeg_of_size(48, 0),
    "JPEG that is less than it says": jpeg_of_size(16_000, 1500)[:400],
    "WebP bomb": webp_canvas(16_000, 16_000),
    "WebP of 2**24": webp_canvas(2**24, 2**24),
    "WebP frame bomb": vp8(16_383, 16_383),
    "WebP canvas that is not the frame's": webp_canvas(100, 100),
    # PNGs that are broken
    "PNG signature only": PNG_SIGNATURE,
    "PNG cut in half": encoded(NOISE)[: len(encoded(NOISE)) // 2],
    "PNG without rows": png(),
    "PNG with rows of garbage": png(chunk(b"IDAT", b"garbage")),
    "PNG with a wrong checksum": PNG[:29] + b"\0\0\0\0" + PNG[33:],
    "PNG without a header": PNG_SIGNATURE + rows() + chunk(b"IEND", b""),
    "PNG of depth 3": png(rows(), depth=3),
    "PNG of color type 5": png(rows(), color=5),
    "PNG chunk of 2**31": png(chunk(b"tEXt", b"x", 2**31), rows()),
    "PNG chunk of 2**32 - 1": png(chunk(b"tEXt", b"x", 2**32 - 1), rows()),
    "PNG rows longer than the file": png(chunk(b"IDAT", b"x", 10**6)),
    "PNG header of 5 bytes": PNG_SIGNATURE + chunk(b"IHDR", b"12345") + rows(),
    "PNG text bomb": png(chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(20_000_000), 9)), rows()),
    "PNG international text bomb": png(chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(bytes(20_000_000), 9)), rows()),
    "PNG profile bomb": png(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(20_000_000), 9)), rows()),
    "PNG texts bomb": png(*[chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(1_000_000), 9))] * 80, rows()),
    "PNG animated": animation("PNG"),
    "PNG animation of one frame beside the picture": png(chunk(b"acTL", struct.pack("!II", 1, 0)), rows()),
    "PNG of 2**31 frames": png(chunk(b"acTL", struct.pack("!II", 2**31, 0)), rows()),
    "PNG animation cut short": png(chunk(b"acTL", b"\0\0"), rows()),
    # JPEGs that are broken
    "JPEG start only": b"\xff\xd8",
    "JPEG start and end": b"\xff\xd8\xff\xd9",
    "JPEG without an end": JPEG[:-2],
    "JPEG cut in half": encoded(NOISE, "JPEG")[:1500],
    "JPEG segment longer than the file": jpeg_with((0xE1, b"x"), length=65_535),
    "JPEG of 12 bits": jpeg_frame(precision=12),
    "JPEG lossless": jpeg_frame(0xC3),
    "JPEG hierarchical": jpeg_frame(0xC5),
    "JPEG of 65 scans": jpeg_of_scans(65),
    "JPEG without tables": JPEG.replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe"),
    "JPEG of markers": b"\xff\xd8" + b"\xff" * 50_000,
    # WebPs that are broken
    "WebP signature only": b"RIFF\x04\0\0\0WEBP",
    "WebP cut in half": encoded(NOISE, "WEBP")[:500],
    "WebP that says 4 GiB": riff((b"VP8 ", WEBP[20:60]), size=2**32 - 2),
    "WebP of garbage": riff((b"VP8 ", b"garbage" * 20)),
    "WebP chunk longer than the file": riff((b"VP8 ", b""))[:-4] + struct.pack("<I", 2**31),
    "WebP animated": animation("WEBP"),
    # GIFs that are broken or films
    "GIF signature only": b"GIF89a",
    "GIF without a frame": GIF[:13] + b";",
    "GIF cut in half": encoded(NOISE, "GIF")[:3000],
    "GIF bomb": gif_canvas(65_000, 65_000),
    "GIF frame bomb": gif_frame(65_000, 65_000),
    "GIF 1 x 1": encoded(picture(size=(1, 1)), "GIF"),
    "GIF animated": animation("GIF"),
    "GIF of 20,000 frames": GIF[:-1] + GIF[GIF_FRAME_AT:-1] * 20_000 + b";",
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
}
"""Each is a 400 that names the image."""

UNUSUAL_PICTURES: dict[str, bytes] = {
    "4 x 4": encoded(picture(size=(4, 4))),
    "4 x 200": encoded(picture(size=(4, 200))),
    "a large photograph": encoded(picture(mode="L", size=(4000, 3000))),
    # modes
    "CMYK": encoded(picture(mode="CMYK"), "JPEG"),
    "grey JPEG": encoded(picture(mode="L"), "JPEG"),
    "progressive JPEG": encoded(picture(), "JPEG", progressive=True),
    "1 bit": encoded(picture(mode="1")),
    "palette": encoded(picture(mode="P")),
    "palette with a clear color": encoded(picture(mode="P"), transparency=0),
    "palette with half-clear colors": encoded(picture(mode="P"), transparency=bytes(range(0, 256, 8))),
    "palette of one color": png(chunk(b"PLTE", b"\xff\0\0"), rows(channels=1), color=3),
    "palette beyond its end": png(
        chunk(b"PLTE", b"\xff\0\0"), chunk(b"IDAT", zlib.compress(b"\0\7\7\7\7\7\7\7\7" * 8)), color=3
    ),
    "grey with a clear value": encoded(picture(mode="L"), transparency=0),
    "grey and alpha": encoded(picture(mode="LA")),
    "RGB and alpha": encoded(picture(mode="RGBA")),
    "RGB with a clear color": encoded(picture(), transparency=(255, 0, 0)),
    "16-bit grey": encoded(Image.new("I;16", (8, 8), 40_000)),
    "16-bit RGB": png(rows(channels=6), depth=16),
    "16-bit RGB and alpha": png(rows(channels=8), depth=16, color=6),
    "2-bit grey": png(rows(width=2, channels=1), depth=2, color=0),
    "interlaced": png(chunk(b"IDAT", zlib.compress(bytes(500))), interlace=1),
    "GIF": GIF,
    "GIF with a clear color": encoded(picture(mode="P"), "GIF", transparency=0),
    "GIF without an end": GIF[:-1],
    "GIF with a loop of one frame": encoded(picture(), "GIF", loop=0, duration=100),
    "GIF on a larger canvas": gif_canvas(100, 100),
    "lossless WebP with alpha": encoded(picture(mode="RGBA"), "WEBP", lossless=True),
    # additions
    "a phone's two pictures": animation("MPO"),
    "a phone's one picture that says 1": mpo_that_lies(1),
    "PNG with text": png(SCRIPT, rows()),
    "PNG with 5000 texts": png(*[SCRIPT] * 5000, rows()),
    "PNG with chunks nobody knows": png(chunk(b"abCd", b"x" * 1000), rows()),
    "PNG with a broken profile": png(chunk(b"iCCP", b"p\0\0garbage"), rows()),
    "PNG with too many rows": png(rows(height=500)),
    "PNG with too few rows": png(rows(height=2)),
    "PNG without an end": PNG[:-12],
    "PNG with 1 MB behind its end": PNG + bytes(1_000_000),
    "PNG that is also HTML": PNG + b"<html><script>alert(1)</script></html>",
    "PNG that is also a ZIP": PNG + b"PK\x05\x06" + bytes(18),
    "PNG animation of one frame": png(chunk(b"acTL", struct.pack("!II", 1, 0)), FIRST_FRAME, rows()),
    "JPEG that is also PHP": jpeg_with((0xFE, b"<?php system('id'); ?>")),
    "JPEG with 1000 comments": jpeg_with(*[(0xFE, b"x" * 100)] * 1000),
    "JPEG with a profile of 1 MB": jpeg_with(
        *[(0xE2, b"ICC_PROFILE\0" + bytes((index, 17)) + b"x" * 60_000) for index in range(1, 18)]
    ),
    "JPEG with a profile in 255 parts, of which one is there": jpeg_with((0xE2, b"ICC_PROFILE\0\1\xffx")),
    "JPEG with a thumbnail that is a bomb": jpeg_with((0xE1, exif() + jpeg_of_size(65_500, 65_500))),
    "JPEG with two EXIF blocks": jpeg_with((0xE1, exif((0x112, 3, 1, 6))), (0xE1, exif((0x112, 3, 1, 3)))),
    "JPEG segment of length 0": jpeg_with((0xE1, b""), length=0),
    "JPEG segment of length 1": jpeg_with((0xE1, b""), length=1),
    "JPEG with 200,000 fill bytes in its scan": jpeg_with_fill(200_000),
    "JPEG with 1 MB behind its end": JPEG + bytes(1_000_000),
    # EXIF
    "EXIF that turns": jpeg_with((0xE1, exif((0x112, 3, 1, 6)))),
    "EXIF that turns by 77": jpeg_with((0xE1, exif((0x112, 3, 1, 77)))),
    "EXIF that turns by a text": jpeg_with((0xE1, exif((0x112, 2, 4, 0x41414141)))),
    "EXIF that turns by 2**32 - 1 values": jpeg_with((0xE1, exif((0x112, 3, 2**32 - 1, 0)))),
    "EXIF that follows itself": jpeg_with((0xE1, exif((0x112, 3, 1, 6), following=8))),
    "EXIF inside itself": jpeg_with((0xE1, exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)))),
    "EXIF of 3000 directories": jpeg_with((0xE1, exif(*[(0x8769, 4, 1, 8)] * 3000))),
    "EXIF beyond its end": jpeg_with((0xE1, exif((0x8769, 4, 1, 2**31)))),
    "EXIF of garbage": jpeg_with((0xE1, b"Exif\0\0garbage")),
    "EXIF of nothing": jpeg_with((0xE1, b"Exif\0\0")),
    "EXIF in a PNG": png(chunk(b"eXIf", exif((0x112, 3, 1, 6))[6:]), rows()),
    "EXIF in a WebP": encoded(picture(), "WEBP", exif=exif((0x112, 3, 1, 6), following=8)),
}
"""Each is a 200."""

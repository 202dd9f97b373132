"""A request to paste: a small real picture and the curl command that asks about it. Knows no engine and no server."""

from __future__ import annotations

import base64
import io
import json

from PIL import Image, ImageDraw

SIDE_PX = 48


def example_picture() -> bytes:
    """A PNG with a red circle and a blue square."""
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((3, 3, 20, 20), fill="red")
    draw.rectangle((27, 27, 44, 44), fill="blue")
    buffer = io.BytesIO()
    picture.quantize(8).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def example_body(model: str) -> dict:
    """The body of a chat request with the picture in it."""
    url = "data:image/png;base64," + base64.b64encode(example_picture()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Describe the image."},
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 48, "temperature": 0}


def curl_command(url: str, model: str) -> str:
    """One line for a shell; nothing in the body needs escaping inside single quotes."""
    body = json.dumps(example_body(model))
    assert "'" not in body
    return f"curl -sS {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"

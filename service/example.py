"""A request to paste: a small real picture, the curl command that asks about it, and what the bundled model answered.

Knows no engine and no server.
"""

from __future__ import annotations

import base64
import io
import json

from PIL import Image, ImageDraw

SIDE_PX = 96
RED, GREEN, BLUE = (214, 48, 49), (39, 158, 75), (45, 92, 214)


def example_picture() -> bytes:
    """A PNG with a red circle, a blue square and a green cross, drawn as in the bundled model's world."""
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((4, 4, 27, 27), fill=RED)
    draw.rectangle((70, 38, 90, 58), fill=BLUE)
    draw.rectangle((4, 76, 28, 84), fill=GREEN)
    draw.rectangle((12, 68, 20, 92), fill=GREEN)
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


def curl_command(url: str, model: str, *, keyed: bool = False) -> str:
    """One line for a shell; nothing in the body needs escaping inside single quotes. A key comes from $KEY."""
    body = json.dumps(example_body(model))
    assert "'" not in body
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl -sS {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def example_answer(model: str) -> dict:
    """What the bundled model answers to it. With steering off it also names a ring and a star that are not there."""
    message = {
        "role": "assistant",
        "content": " There is a square in blue, a circle in red, a cross in green.",
        "refusal": None,
    }
    return {
        "id": "chatcmpl-137fbff18d414fdab6f403f3dfb95c89",
        "object": "chat.completion",
        "created": 1795204306,
        "model": model,
        "system_fingerprint": "fp_26cfbbf2ad87",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 18, "total_tokens": 38},
        "steering": dict(EXAMPLE_RECEIPT),
    }


EXAMPLE_RECEIPT = {
    "applied": True,
    "reason": None,
    "artifact": "67b60f6f58360e5acdfad177c6c01f55bb730a1c01a2130272e4f9cbdeca8066",
    "canary": "verified",
    "layer": 3,
    "preset": "captions",
    "form": "difference",
    "mode": "causal",
    "branches": 1,
    "strength": 1.0,
    "alpha": 2.75,
    "beta_up": 1.0,
    "beta_down": 0.1,
    "gamma": 1.0,
    "plausibility": 0.0,
    "min_answer_tokens": 1,
    "control": None,
    "positions": [17],
    "relative_shift": [0.27],
    "arm": None,
    "max_shift": None,
    "edits": None,
    "clamped_positions": [0],
    "mismatch": [{"before": 0.36, "after": 0.16}],
    "explanation": None,
}

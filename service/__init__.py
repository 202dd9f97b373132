"""The HTTP front: OpenAI's chat API over one steered LVLM. Start reading in `app.py`."""

VERSION = "0.1.0"
APPLICATION = "vl-sae-steering"
"""As Ray Serve, traces and `GET /v1/models` name it."""

"""Where the committed bundle lies. Knows names of folders, nothing about what is in them."""

from pathlib import Path

BUNDLE = Path(__file__).parent / "bundle"
LLAVA = BUNDLE / "llava"
CLIP = BUNDLE / "clip"
ARTIFACT = BUNDLE / "artifact"

"""Steering inside vLLM: model classes that realign, registered by an entry point. Importing this imports no vLLM.

The classes have names of their own ('VlSaeLlava...'), so the plugin changes nothing for any other vLLM process on the
machine: only an engine that asks for one of these names, and configures an artifact, is steered.
"""

from __future__ import annotations

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "VlSaeLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "VlSaeLlavaNextForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "VlSaeQwen2_5_VLForConditionalGeneration",
}
"""vLLM's model class to ours, which steers it."""
TESTED_VLLM = "0.32"
"""The minor version that the tests run with."""


def register() -> None:
    """Entry point `vllm.general_plugins`: make the steered classes known, each loaded only when asked for."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"steering.engines.vllm.plugin.models:{name}")

"""The published procedure: for every token, two passes of the whole model over the whole sequence, and no KV cache.

The base pass and the steered pass see the image features and all text anew; the steered one adds one delta, from the
mean over all text so far, to every text position (mode `exact`, design section 1). Only the vision tower runs once per
request here, which favours this loop.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from steering.engines.huggingface.loaded_model import load_model
from steering.engines.sampling import blend_branches
from steering.hooks import output_hook
from steering.intervention import Intervention, Pass, SequenceSteering
from steering.lvlm.decoder_layers import embed_prompt
from steering.lvlm.families import find_family, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens
from steering.settings import ResolvedSteering


class TwoFullPasses:
    """Greedy generation of one sequence at a time."""

    def __init__(
        self, model: str | Path, artifact: str | Path, settings: ResolvedSteering, *, device: str, dtype: str
    ) -> None:
        self._loaded = load_model(str(model), artifact, device, dtype, None)
        assert self._loaded.checkpoint.artifact is not None
        self._settings = settings
        self._hook_layer = self._loaded.checkpoint.artifact.config.hook_layer
        self._intervention = Intervention(self._loaded.checkpoint.artifact, self._loaded.model.device)

    @torch.inference_mode()
    def generate(
        self, prompt_token_ids: tuple[int, ...], image: Image, max_tokens: int
    ) -> tuple[list[int], list[float]]:
        """Token ids, and the `time.perf_counter` at which each was known."""
        model, checkpoint = self._loaded.model, self._loaded.checkpoint
        image_token = checkpoint.image_token_id
        prompt = expand_image_tokens(prompt_token_ids, image_token, tokens_per_image(checkpoint.processor, [image]))
        pixels = find_family(checkpoint.family).image_inputs(checkpoint.processor.image_processor, [image])
        pixels = {name: value.to(model.device) for name, value in pixels.items()}
        tokens_1T = torch.tensor([prompt], device=model.device)
        image_1T = tokens_1T == image_token
        text_start = len(prompt) - prompt[::-1].index(image_token)
        embeds_1TD = embed_prompt(model, tokens_1T, image_1T, pixels)
        prompt_text_tokens = len(prompt) - text_start
        generated, arrivals = [], []
        for _ in range(max_tokens):
            text = range(text_start, embeds_1TD.shape[1])
            token = self._next_token(embeds_1TD, image_1T, text, prompt_text_tokens)
            generated.append(token)
            arrivals.append(time.perf_counter())
            new_11 = torch.tensor([[token]], device=model.device)
            embeds_1TD = torch.cat([embeds_1TD, model.get_input_embeddings()(new_11)], dim=1)
            image_1T = torch.cat([image_1T, torch.zeros_like(new_11, dtype=torch.bool)], dim=1)
        return generated, arrivals

    def _next_token(self, embeds_1TD: Tensor, image_1T: Tensor, text: range, prompt_text_tokens: int) -> int:
        base_1V = self._full_pass(embeds_1TD)
        state = SequenceSteering(settings=self._settings, prompt_text_tokens=prompt_text_tokens)
        self._intervention.prepare(Pass(rows=[state], image_BT=image_1T, text_B=[text]))
        with output_hook(self._loaded.decoder.layers[self._hook_layer], self._intervention):
            steered_1V = self._full_pass(embeds_1TD)
        blended_V = blend_branches(base_1V[0], steered_1V[0], self._settings.gamma, self._settings.plausibility)
        return int(blended_V.argmax())

    def _full_pass(self, embeds_1TD: Tensor) -> Tensor:
        """Logits [1, V] of the last position; LLaVA's positions are counted from 0."""
        decoder, length = self._loaded.decoder, embeds_1TD.shape[1]
        indices_T = torch.arange(length, device=embeds_1TD.device)
        mask_11TT = (indices_T[:, None] >= indices_T)[None, None]
        hidden_1TD = decoder.run(range(len(decoder.layers)), embeds_1TD, indices_T[None], mask_11TT, None)
        return decoder.logits(hidden_1TD[:, -1])

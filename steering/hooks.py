"""Context managers that put steering on a model and always take it off again.

`steer` is the library on its own: three lines steer one's own `model.generate`. Engines use `output_hook`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steering.artifact import Artifact, check_fits
from steering.errors import InvalidSteering
from steering.intervention import Intervention, Pass, SequenceSteering
from steering.lvlm.decoder_layers import find_decoder
from steering.lvlm.token_spans import find_spans
from steering.request import SteeringRequest, merge_sources
from steering.settings import ResolvedSteering, check_control, check_edits, resolve
from steering.tally import Tally


@contextmanager
def output_hook(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what a decoder layer returns, [B, T, D], by `change` of it."""

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return change(output)

    handle = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


class GenerationSteering:
    """Follows the forward passes of a transformers `generate` and keeps each row's steering state."""

    def __init__(self, intervention: Intervention, settings: ResolvedSteering, image_token_id: int) -> None:
        self._rows: list[SequenceSteering] = []
        self._intervention = intervention
        self._settings = settings
        self._image_token_id = image_token_id

    @property
    def tallies(self) -> list[Tally]:
        """What was done to each batch row of the latest `generate`."""
        return [self._intervention.tally(row) for row in self._rows]

    def before_forward(self, _model: nn.Module, _args: Any, kwargs: Any) -> None:
        """Read the token ids of a pass; a pass without cached tokens begins new sequences."""
        token_ids_BT = kwargs.get("input_ids")
        if token_ids_BT is None:
            raise InvalidSteering("steer() finds its positions from input_ids; pass them", field="input_ids")
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            if past is not None:
                past.reorder_cache = _refuse_beams
            self._intervention.prepare(self._begin(token_ids_BT, kwargs.get("attention_mask")))
            return
        if token_ids_BT.shape != (len(self._rows), 1):
            raise InvalidSteering(
                "steer() follows one token per row and step; beams are not supported", field="num_beams"
            )
        nowhere_B1 = torch.zeros_like(token_ids_BT, dtype=torch.bool)
        self._intervention.prepare(Pass(rows=self._rows, image_BT=nowhere_B1, text_B=[range(1)] * len(self._rows)))

    def _begin(self, token_ids_BT: Tensor, attention_BT: Tensor | None) -> Pass:
        spans = [find_spans(row, self._image_token_id) for row in token_ids_BT.tolist()]
        if not all(span.has_image for span in spans):
            raise InvalidSteering("steer() needs an image in every row to realign to", field="input_ids")
        stops = [token_ids_BT.shape[1]] * len(spans)
        if attention_BT is not None:  # padding on the right ends the text, on the left there is none
            stops = [len(row) - row[::-1].index(1) for row in attention_BT[:, : stops[0]].long().tolist()]
        texts = [range(span.text_start or 0, stop) for span, stop in zip(spans, stops, strict=True)]
        # whatever this pass holds is the prompt: the answer begins behind it
        self._rows = [SequenceSteering(settings=self._settings, prompt_text_tokens=len(text)) for text in texts]
        return Pass(rows=self._rows, image_BT=token_ids_BT == self._image_token_id, text_B=texts)


def _refuse_beams(_order: Tensor) -> None:
    raise InvalidSteering("steer() follows each row from token to token; beam search swaps rows", field="num_beams")


@contextmanager
def steer(model: Any, artifact: Artifact, request: SteeringRequest | None = None) -> Iterator[GenerationSteering]:
    """Steer a transformers LVLM inside the `with`; `model.generate(**inputs)` as usual, without beam search.

    One branch, mode 'causal'. Raises BadArtifact if the artifact is another model's, InvalidSteering for settings
    that need an engine (two branches, mode 'exact') or images that the artifact lacks (control 'other_image').
    """
    decoder = find_decoder(model)
    check_fits(artifact, family=decoder.family, hidden_size=decoder.hidden_size, num_layers=len(decoder.layers))
    settings = resolve(
        merge_sources(request or SteeringRequest()),
        presets=artifact.config.presets,
        default_preset=artifact.config.default_preset,
        has_image=True,
    )
    check_control(settings, control_images=len(artifact.control_image_MD))
    check_edits(settings, concepts=artifact.config.num_concepts)
    if settings.mode == "exact" or settings.branches == 2:
        raise InvalidSteering(
            "steer() runs one branch in mode 'causal'; use an engine for mode 'exact', gamma below 1 or plausibility",
            field="steering",
        )
    intervention = Intervention(artifact, model.device)
    follower = GenerationSteering(intervention, settings, model.config.image_token_id)
    handle = model.register_forward_pre_hook(follower.before_forward, with_kwargs=True)
    try:
        with output_hook(decoder.layers[artifact.config.hook_layer], intervention):
            yield follower
    finally:
        handle.remove()

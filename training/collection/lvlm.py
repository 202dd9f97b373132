"""Pooled states of an LVLM's decoder layers.

    v = mean over the image tokens,  t = mean over the text tokens after the image; float32, one pair per layer
    prefixes: t as it was when only the first so many tokens of the answer had been generated

Where the text stands, `placing.py` decides. Under causal attention one prefill gives the mean at every length. It stops
after the deepest layer asked for: no tail, no head, no generation. Knows no store and no autoencoder.

Shapes: B pairs, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from steering.errors import InvalidSteering
from steering.lvlm.decoder_layers import find_decoder
from steering.lvlm.families import context_limit, find_family
from training.collection.placing import PROMPTS, TextPlace, TextPlacer, special_tokens
from training.collection.prefill import PromptInputs, masked_mean, prepare_prefill, prompt_inputs
from training.collection.representer import (
    Described,
    ModelDtype,
    Prepared,
    States,
    require_weights,
    special_token_in,
)
from training.command_line import Settings
from training.errors import InvalidTraining
from training.evaluation.manifest import processor_digest, weights_digest
from training.pairs import Pair
from training.store.layout import layer_name

POOLING = "text_after_last_image"


class LvlmSettings(Settings):
    """Which states of which LVLM."""

    model: Path
    """Checkpoint of a known family."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Decoder layers that are read, counted from 0."""
    point: Literal["output", "input"] = "output"
    """Side of the layer that is read."""
    dtype: ModelDtype = "float32"
    """Number format of the model; pooling is float32 whatever it is."""
    device: str = "cpu"
    text_in: TextPlace = "answer"
    """Where the texts stand."""
    prompts: tuple[str, ...] = PROMPTS
    """What they answer, one drawn for each pair; of no use to `user_turn`."""
    prefixes: int = Field(default=3, ge=0)
    """Prefixes of each answer, of random length, that are pooled besides the whole of it; only with `answer`."""
    shortest_prefix: int = Field(default=1, ge=1)
    """Tokens of the answer in the shortest of them; a text that has fewer is skipped."""

    def describe(self) -> Described:
        require_weights(self.model)
        if self.text_in == "user_turn" and self.prefixes:
            raise InvalidTraining("prefixes: a text in the user's turn has none; give 0")
        config, processor = read_checkpoint(self.model)
        text = config.get_text_config()
        check_layers(self.layers, text.num_hidden_layers)
        return Described(
            model=str(self.model),
            model_sha256=weights_digest(self.model),
            processor_sha256=processor_digest(self.model),
            family=config.model_type,
            names=tuple(layer_name(layer) for layer in sorted(set(self.layers))),
            width=text.hidden_size,
            num_layers=text.num_hidden_layers,
            point=self.point,
            pooling=POOLING,
            text_in=self.text_in,
            prompts=tuple(map(str, self._placer(config, processor).templates)),
            prefixes=self.prefixes,
            shortest_prefix=self.shortest_prefix,
            model_dtype=self.dtype,
        )

    def load(self) -> LvlmRepresenter:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.model, dtype=getattr(torch, self.dtype), attn_implementation="sdpa"
        )
        processor = AutoProcessor.from_pretrained(self.model)
        return LvlmRepresenter(model.eval().to(self.device), processor, self._placer(model.config, processor), self)

    def _placer(self, config: Any, processor: Any) -> TextPlacer:
        return TextPlacer(processor, config.model_type, config.image_token_id, self.text_in, self.prompts)


class LvlmInputs(NamedTuple):
    """A prompt, and what of its answer is pooled besides the whole."""

    prompt: PromptInputs
    ends: tuple[int, ...]
    """Where each prefix of the answer ends, in tokens of the prompt."""


class LvlmRepresenter:
    """A loaded LVLM and its processor."""

    def __init__(self, model: Any, processor: Any, placer: TextPlacer, settings: LvlmSettings) -> None:
        self._decoder = find_decoder(model)
        check_layers(settings.layers, len(self._decoder.layers))
        self._model, self._processor, self._placer, self._settings = model, processor, placer, settings
        self._image_token: int = model.config.image_token_id
        self._special_tokens = special_tokens(processor.tokenizer)
        self._context_tokens = context_limit(model.config.get_text_config())

    def prepare(self, pair: Pair) -> Prepared | str:
        """Token ids and pixels, or why the pair cannot be used."""
        if (fault := special_token_in(pair.text, self._special_tokens)) is not None:
            return fault
        image = pair.image.convert("RGB")
        draw = Random(f"{pair.reference}\n{pair.text}")
        placed = self._placer.place(pair.text, draw)
        try:
            prompt = prompt_inputs(self._processor, self._decoder.family, placed.token_ids, image)
        except InvalidSteering as error:
            return str(error)
        except ValueError as error:
            return f"the model takes no such image ({image.width} x {image.height}): {error}"
        tokens = len(prompt.token_ids)
        if tokens > self._context_tokens:
            return f"the prompt has {tokens} tokens; the model's context is {self._context_tokens}"
        answer_tokens, shortest = len(placed.token_ids) - placed.answer_start, self._settings.shortest_prefix
        if self._settings.text_in == "answer" and answer_tokens < shortest:
            return f"the caption has {answer_tokens} tokens, the shortest prefix {shortest}"
        lengths = [draw.randint(shortest, answer_tokens) for _ in range(self._settings.prefixes)]
        ends = tuple(tokens - answer_tokens + length for length in lengths)
        return Prepared(length=tokens, inputs=LvlmInputs(prompt, ends), token_ids=placed.token_ids)

    @torch.inference_mode()
    def represent(self, batch: Sequence[Prepared]) -> Mapping[str, States]:
        """v, t and the prefixes of each layer."""
        prompts: list[LvlmInputs] = [one.inputs for one in batch]
        prefill = prepare_prefill(self._model, self._image_token, [prompt.prompt for prompt in prompts])
        position_T = torch.arange(prefill.ids_BT.shape[1], device=prefill.ids_BT.device)
        masks = [prefill.image_BT, prefill.text_BT]
        for ends_B in zip(*(prompt.ends for prompt in prompts), strict=True):
            masks.append(prefill.text_BT & (position_T < torch.tensor(ends_B, device=position_T.device)[:, None]))
        return {
            layer_name(layer): States.of([masked_mean(states_BTD, mask_BT).cpu() for mask_BT in masks])
            for layer, states_BTD in self._run_layers(prefill.hidden_BTD, prefill.rotary_BT)
        }

    def _run_layers(self, hidden_BTD: Tensor, rotary_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each wanted layer with its states [B, T, D], in order; nothing after the deepest is computed."""
        done = 0
        for layer in sorted(set(self._settings.layers)):
            end = layer + 1 if self._settings.point == "output" else layer
            if end > done:
                hidden_BTD = self._decoder.run(range(done, end), hidden_BTD, rotary_BT, None, None)
                done = end
            yield layer, hidden_BTD


def read_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Configuration and processor of an LVLM. Raises InvalidTraining where there is none of a known family."""
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        find_family(config.model_type)
        return config, AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InvalidTraining(f"--model {folder}: {error}") from error


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises InvalidTraining for a layer that the model lacks."""
    if not all(0 <= layer < num_layers for layer in layers):
        raise InvalidTraining(f"--layers: the model has layers 0..{num_layers - 1}, not all of {list(layers)}")

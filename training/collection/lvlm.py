"""Pooled states of an LVLM's decoder layers.

    prompt `USER: <image>\\n{text} ASSISTANT:`, or in families other than LLaVA the checkpoint's own chat template
    v = mean over the image tokens,  t = mean over the text tokens after the image; float32, one pair per layer

A batched prefill that stops after the deepest layer asked for: no tail, no head, no generation. Prompts are padded on
the right, where causal attention never looks, so that batches need no mask. Knows no store and no autoencoder.

Shapes: B pairs, T tokens, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from steering.errors import InvalidSteering
from steering.lvlm.decoder_layers import embed_prompt, find_decoder, place_prompt
from steering.lvlm.families import context_limit, find_family, join_image_inputs, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens, find_spans
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

PROMPT = "USER: <image>\n{text} ASSISTANT:"
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

    def describe(self) -> Described:
        require_weights(self.model)
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
            prompt=fill_prompt(processor, config.model_type, "{text}"),
            model_dtype=self.dtype,
        )

    def load(self) -> LvlmRepresenter:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.model, dtype=getattr(torch, self.dtype), attn_implementation="sdpa"
        )
        processor = AutoProcessor.from_pretrained(self.model)
        return LvlmRepresenter(model.eval().to(self.device), processor, self.layers, self.point)


class LvlmInputs(NamedTuple):
    """One prompt as the model takes it."""

    token_ids: list[int]
    """Image tokens expanded."""
    image_inputs: dict[str, Tensor]


class LvlmRepresenter:
    """A loaded LVLM and its processor."""

    def __init__(self, model: Any, processor: Any, layers: Sequence[int], point: Literal["output", "input"]) -> None:
        self._decoder = find_decoder(model)
        check_layers(layers, len(self._decoder.layers))
        self._model, self._processor = model, processor
        self._family = find_family(model.config.model_type)
        self._image_token: int = model.config.image_token_id
        self._layers, self._point = sorted(set(layers)), point
        self._special_tokens = special_tokens(processor.tokenizer)
        self._context_tokens = context_limit(model.config.get_text_config())
        self._tokenizing = threading.Lock()  # fast tokenizers are not for several threads

    def prepare(self, pair: Pair) -> Prepared | str:
        """Token ids and pixels, or why the pair cannot be used."""
        if (fault := special_token_in(pair.text, self._special_tokens)) is not None:
            return fault
        image = pair.image.convert("RGB")
        try:
            image_tokens = tokens_per_image(self._processor, [image])
            with self._tokenizing:
                ids = tokenize_prompt(self._processor, self._decoder.family, pair.text)
            token_ids = expand_image_tokens(ids, self._image_token, image_tokens)
        except InvalidSteering as error:
            return str(error)
        if len(token_ids) > self._context_tokens:
            return f"the prompt has {len(token_ids)} tokens; the model's context is {self._context_tokens}"
        try:
            image_inputs = self._family.image_inputs(self._processor.image_processor, [image])
        except ValueError as error:
            return f"the model takes no such image ({image.width} x {image.height}): {error}"
        inputs = {name: image_inputs[name] for name in self._family.image_input_names}
        return Prepared(length=len(token_ids), inputs=LvlmInputs(token_ids, inputs))

    @torch.inference_mode()
    def represent(self, batch: Sequence[Prepared]) -> Mapping[str, States]:
        """(v, t) of each layer."""
        device = self._model.device
        prompts: list[LvlmInputs] = [one.inputs for one in batch]
        tokens = max(len(prompt.token_ids) for prompt in prompts)
        ids_BT = torch.tensor([_padded(prompt.token_ids, tokens) for prompt in prompts])
        valid_BT = torch.tensor([[index < len(prompt.token_ids) for index in range(tokens)] for prompt in prompts])
        image_BT, text_BT = pooled_positions(ids_BT, valid_BT, self._image_token)
        ids_BT, image_BT, text_BT = (tensor.to(device) for tensor in (ids_BT, image_BT, text_BT))
        image_inputs = {
            name: value.to(device) for name, value in join_image_inputs([one.image_inputs for one in prompts]).items()
        }
        hidden_BTD = embed_prompt(self._model, ids_BT, image_BT, image_inputs)
        rotary_BT = place_prompt(self._model, ids_BT, image_BT, image_inputs).rotary_BT
        return {
            layer_name(layer): States(masked_mean(states_BTD, image_BT).cpu(), masked_mean(states_BTD, text_BT).cpu())
            for layer, states_BTD in self._run_layers(hidden_BTD, rotary_BT)
        }

    def _run_layers(self, hidden_BTD: Tensor, rotary_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each wanted layer with its states [B, T, D], in order; nothing after the deepest is computed."""
        done = 0
        for layer in self._layers:
            end = layer + 1 if self._point == "output" else layer
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


def fill_prompt(processor: Any, family: str, text: str) -> str:
    """A text in PROMPT; in families other than LLaVA, in the checkpoint's own chat template."""
    if family == "llava":
        return PROMPT.format(text=text)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def tokenize_prompt(processor: Any, family: str, text: str) -> list[int]:
    """Token ids of a filled prompt, one for the image; a template that writes the first token gets no second one."""
    prompt = fill_prompt(processor, family, text)
    bos = processor.tokenizer.bos_token
    begun = bos is not None and prompt.startswith(bos)
    return processor.tokenizer(prompt, add_special_tokens=not begun)["input_ids"]


def _padded(token_ids: list[int], tokens: int) -> list[int]:
    """With any token behind: nothing that is pooled can see it."""
    return token_ids + token_ids[-1:] * (tokens - len(token_ids))


def pooled_positions(ids_BT: Tensor, valid_BT: Tensor, image_token: int) -> tuple[Tensor, Tensor]:
    """Which positions make v and which make t: [B, T] each."""
    starts_B = torch.tensor([find_spans(row, image_token).text_start for row in ids_BT.tolist()])
    behind_BT = torch.arange(ids_BT.shape[1])[None] >= starts_B[:, None]
    return (ids_BT == image_token) & valid_BT, behind_BT & valid_BT


def masked_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked positions of each row, [B, D] in float32; what stands elsewhere may be infinite."""
    mask_BT1 = mask_BT.unsqueeze(-1)
    return hidden_BTD.float().masked_fill(~mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)


def special_tokens(tokenizer: Any) -> list[str]:
    """As they are spelled, each once."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises InvalidTraining for a layer that the model lacks."""
    if not all(0 <= layer < num_layers for layer in layers):
        raise InvalidTraining(f"--layers: the model has layers 0..{num_layers - 1}, not all of {list(layers)}")

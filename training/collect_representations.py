"""Stage 1: pooled representations of image-text pairs, from the residual stream of the LVLM.

    prompt `USER: <image>\\n{text} ASSISTANT:`
    v = mean over the image tokens,  t = mean over the text tokens after the image; float32, one pair per hook layer

A batched prefill that stops after the deepest layer asked for. Knows no autoencoder.

Shapes: B pairs, T tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from steering.decoder_layers import embed_prompt, find_decoder, place_prompt
from steering.families import find_family
from steering.token_spans import find_spans
from training.command_line import Settings, parse_settings
from training.representations import Representations, write_representations

PROMPT = "USER: <image>\n{text} ASSISTANT:"
POOLING = "text_after_last_image"


class CollectionSettings(Settings):
    """What is collected, and in what portions."""

    layers: tuple[int, ...]
    """Decoder layers whose output is pooled, counted from 0."""
    batch_size: int = Field(default=64, gt=0)
    """Pairs per forward pass."""


class CommandLine(CollectionSettings):
    """Collect from a file of pairs."""

    model: Path
    """Checkpoint of a model of a known family."""
    pairs: Path
    """JSON lines with `image` (a path, relative to the file) and `text`."""
    output: Path
    """Folder for the result: a safetensors file per layer, manifest.json, pairs.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and a text about it."""

    image: Image.Image
    """Any size and mode."""
    text: str
    """Put into the prompt."""
    reference: str
    """Says later where the picture is from."""


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    processor: Any,
    pairs: Iterable[Pair],
    settings: CollectionSettings,
    report: Callable[[str], None] = print,
) -> dict[int, Representations]:
    """Representations of all pairs, by layer."""
    pooled: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in settings.layers}
    texts: list[str] = []
    references: list[str] = []
    for batch in _batches(pairs, settings.batch_size):
        for layer, states in pool_batch(model, processor, batch, settings.layers).items():
            pooled[layer].append(states)
        before = len(texts)
        texts += [pair.text for pair in batch]
        references += [pair.reference for pair in batch]
        if len(texts) // 2000 > before // 2000:
            report(f"collected {len(texts)} pairs")
    return {
        layer: Representations(
            image_ND=torch.cat([image for image, _ in parts]),
            text_ND=torch.cat([text for _, text in parts]),
            texts=tuple(texts),
            image_references=tuple(references),
        )
        for layer, parts in pooled.items()
    }


def pool_batch(
    model: Any, processor: Any, batch: Sequence[Pair], layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """(v, t) [B, D] of one batch, by layer."""
    family = model.config.model_type
    inputs = processor(
        images=[pair.image.convert("RGB") for pair in batch],
        text=[fill_prompt(processor, family, pair.text) for pair in batch],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).to(model.device)
    ids_BT = inputs["input_ids"]
    valid_BT = inputs["attention_mask"].bool()
    image_BT = ids_BT == model.config.image_token_id
    text_BT = _after_image(ids_BT, model.config.image_token_id) & valid_BT
    image_inputs = {name: inputs[name] for name in find_family(family).image_input_names}
    hidden_BTD = embed_prompt(model, ids_BT, image_BT, image_inputs)
    rotary_BT = place_prompt(model, ids_BT, image_BT, image_inputs).rotary_BT
    result = {}
    for layer, states_BTD in _run_layers(model, hidden_BTD, rotary_BT, valid_BT, layers):
        result[layer] = (masked_mean(states_BTD, image_BT), masked_mean(states_BTD, text_BT))
    return result


def fill_prompt(processor: Any, family: str, text: str) -> str:
    """A text in PROMPT; in families other than LLaVA, in the checkpoint's own chat template."""
    if family == "llava":
        return PROMPT.format(text=text)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def masked_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked positions of each row, [B, D] in float32."""
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1)


def _after_image(ids_BT: Tensor, image_token_id: int) -> Tensor:
    starts = [find_spans(row, image_token_id).text_start for row in ids_BT.tolist()]
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return positions_T[None] >= torch.tensor(starts, device=ids_BT.device)[:, None]


def _run_layers(
    model: Any, hidden_BTD: Tensor, rotary_BT: Tensor, valid_BT: Tensor, layers: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Each wanted layer with its output [B, T, D], in order; nothing after the deepest is computed."""
    decoder = find_decoder(model)
    if not all(0 <= layer < len(decoder.layers) for layer in layers):
        raise ValueError(f"the model has layers 0..{len(decoder.layers) - 1}, not all of {list(layers)}")
    tokens = valid_BT.shape[1]
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=valid_BT.device).tril()
    mask_B1TT = (causal_TT & valid_BT[:, None, :]).unsqueeze(1)
    done = 0
    for layer in sorted(set(layers)):
        hidden_BTD = decoder.run(range(done, layer + 1), hidden_BTD, rotary_BT, mask_B1TT, None)
        done = layer + 1
        yield layer, hidden_BTD


def _batches(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    source = iter(pairs)
    while batch := list(islice(source, size)):
        yield batch


def read_pairs(file: Path) -> Iterator[Pair]:
    """Pairs of a JSON-lines file."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            with Image.open(file.parent / row["image"]) as image:
                yield Pair(image=image.convert("RGB"), text=row["text"], reference=row["image"])


def manifest(settings: CollectionSettings, model_name: str, prompt: str = PROMPT) -> dict[str, Any]:
    """What a later reader must know about a collection; `prompt` has `{text}` where the text goes."""
    return {"model": model_name, "prompt": prompt, "pooling": POOLING, **settings.model_dump(include={"layers"})}


def main() -> None:
    """The command line."""
    settings = parse_settings(
        CommandLine, program="python -m training.collect_representations", description=__doc__ or ""
    )
    model = AutoModelForImageTextToText.from_pretrained(settings.model).eval()
    processor = AutoProcessor.from_pretrained(settings.model)
    found = collect(model, processor, read_pairs(settings.pairs), settings)
    prompt = fill_prompt(processor, model.config.model_type, "{text}")
    write_representations(settings.output, found, manifest(settings, str(settings.model), prompt))


if __name__ == "__main__":
    main()

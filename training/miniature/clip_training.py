"""Trains the miniature's CLIP with open_clip: scenes against their captions, and what each image token shows.

The second, dense loss reads shape and colour of a grid cell from the token of its patch, one layer before the last:
that is the layer LLaVA looks at. Knows no LLaVA.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP, CLIPTextCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from training.miniature.language import Noise, caption
from training.miniature.processor import CLIP_MEAN, CLIP_STD, IMAGE_SIDE_PX, PATCH_SIDE_PX, build_tokenizer
from training.miniature.world import COLORS, GRID_SIDE, SHAPES, Scene

MODEL_CONFIG = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE_SIDE_PX,
        "patch_size": PATCH_SIDE_PX,
        "width": 128,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": 48,
        "vocab_size": len(build_tokenizer()),
        "width": 64,
        "heads": 2,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": 2,
        "pad_id": 3,
        "hf_tokenizer_name": ".",
    },
}
"""open_clip's own format."""


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """How CLIP is trained."""

    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 128
    """Scenes per step."""
    learning_rate: float = 1.5e-3
    """Peak of a one-cycle schedule."""
    dense_weight: float = 1.0
    """Weight of the dense loss beside the contrastive one."""


def build_clip() -> CLIP:
    """An untrained CLIP."""
    config = MODEL_CONFIG
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    return CLIP(config["embed_dim"], config["vision_cfg"], CLIPTextCfg(**text), quick_gelu=config["quick_gelu"])


def train_clip(
    scenes: Sequence[Scene], pixels: Tensor, config: ClipTraining, seed: int, report: Callable[[str], None]
) -> CLIP:
    """A CLIP trained on `scenes`, whose pixel values are `pixels` [N, 3, side, side]."""
    torch.manual_seed(seed)
    draw = random.Random(f"clip {seed}")
    model, heads = build_clip(), nn.Linear(MODEL_CONFIG["vision_cfg"]["width"], len(SHAPES) + 1 + len(COLORS))
    tokens = _CaptionTokens()
    targets = _cell_targets(scenes)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    for step in range(config.steps):
        rows = draw.sample(range(len(scenes)), config.batch_size)
        text = tokens([caption(scenes[row], Noise(), draw) for row in rows])
        dense, image = _patch_states(model, pixels[rows].float())
        contrastive, hits = _contrastive(model, image, text)
        cells, right = _dense(heads(dense), targets[rows])
        loss = contrastive + config.dense_weight * cells
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            report(f"clip step {step + 1}: contrastive {contrastive:.3f} (R@1 {hits:.2f}), cells right {right:.3f}")
    return model.eval()


def save_clip(model: CLIP, folder: Path) -> None:
    """open_clip's local folder: `create_model` and `get_tokenizer` of `local-dir:FOLDER` load it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer(closing=True).save_pretrained(folder)


class _CaptionTokens:
    """Captions to token ids [B, context], padded."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer(closing=True)
        self.context = MODEL_CONFIG["text_cfg"]["context_length"]

    def __call__(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.context, truncation=True, return_tensors="pt"
        )
        return batch["input_ids"]


def _patch_states(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens [B, patches, width] after the last layer but one, and the image embedding [B, embed]."""
    kept = {}

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        kept["states"] = output

    handle = model.visual.transformer.resblocks[-2].register_forward_hook(keep)
    try:
        image = model.encode_image(pixels, normalize=True)
    finally:
        handle.remove()
    return kept["states"][:, 1:], image


def _contrastive(model: CLIP, image: Tensor, text: Tensor) -> tuple[Tensor, float]:
    logits = model.logit_scale.exp().clamp(max=50) * image @ model.encode_text(text, normalize=True).T
    truth = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    return loss, (logits.argmax(-1) == truth).float().mean().item()


def _cell_targets(scenes: Sequence[Scene]) -> Tensor:
    """[N, cells, 2]: shape (the last class is an empty cell) and colour (-100 where empty)."""
    targets = torch.tensor([len(SHAPES), -100]).repeat(len(scenes), GRID_SIDE**2, 1)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            targets[row, item.cell] = torch.tensor([SHAPES.index(item.shape), COLORS.index(item.color)])
    return targets


def _dense(logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    shapes, colors = logits.flatten(0, 1).split([len(SHAPES) + 1, len(COLORS)], dim=-1)
    shape, color = targets.flatten(0, 1).unbind(-1)
    loss = F.cross_entropy(shapes, shape) + F.cross_entropy(colors, color, ignore_index=-100)
    right = (shapes.argmax(-1) == shape) & ((colors.argmax(-1) == color) | (color < 0))
    return loss, right.float().mean().item()

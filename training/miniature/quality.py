"""How well the plain miniature captions and answers, and how much it hallucinates: greedy, on dev scenes.

Evidence comes from `training.evaluate_hallucination` on held-out scenes; this is what the build prints on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from training import chair, pope
from training.miniature.drawing import draw_scene
from training.miniature.language import CAPTION_PROMPT, existence_question, shapes_mentioned
from training.miniature.llava_model import load_llava
from training.miniature.world import PARTNERS, SHAPES, Scene, scenes
from training.yes_or_no import parse_answer

BATCH = 250


def measure_quality(llava: Path, count: int, *, absent_partner: bool = True) -> dict[str, float]:
    """CHAIR and POPE of a checkpoint on `count` dev scenes, all of them with an absent partner if wanted."""
    model, processor = load_llava(llava), AutoProcessor.from_pretrained(llava)
    chosen = list(islice(scenes("dev", absent_partner=absent_partner), count))
    pictures = [draw_scene(scene) for scene in chosen]
    return caption_quality(model, processor, chosen, pictures) | question_quality(model, processor, chosen, pictures)


def caption_quality(
    model: Any, processor: Any, chosen: Sequence[Scene], pictures: Sequence[Image.Image]
) -> dict[str, float]:
    """CHAIR with recall and length."""
    texts = answer(model, processor, pictures, [CAPTION_PROMPT] * len(pictures), max_new_tokens=80)
    counts = [
        chair.count_caption(text, shapes_mentioned(text), scene.shapes)
        for text, scene in zip(texts, chosen, strict=True)
    ]
    metrics = chair.chair_metrics(chair.counts_matrix(counts).sum(0))
    return {name: float(value) for name, value in metrics.items()}


def question_quality(
    model: Any, processor: Any, chosen: Sequence[Scene], pictures: Sequence[Image.Image]
) -> dict[str, float]:
    """POPE accuracy per split."""
    asked = pope.build_questions([scene.shapes for scene in chosen], SHAPES, partners=PARTNERS, seed=0)
    prompts = [existence_question(question.object) for question in asked]
    texts = answer(model, processor, [pictures[question.scene] for question in asked], prompts, max_new_tokens=3)
    result = {}
    for split in pope.SPLITS:
        right = [
            parse_answer(text) is question.truth
            for text, question in zip(texts, asked, strict=True)
            if question.split == split
        ]
        result[f"pope_{split}"] = sum(right) / len(right)
    return result


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, batch by batch."""
    texts = []
    for start in range(0, len(prompts), BATCH):
        inputs = processor(
            images=list(pictures[start : start + BATCH]),
            text=[f"USER: <image>\n{prompt} ASSISTANT:" for prompt in prompts[start : start + BATCH]],
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]

"""Pairs a second of collection, against one pair at a time through `model.generate` with a hook on the layer.

    python -m tests.benchmarks.training.collection --json FILE            ratios cpu_576, cpu_9
    python -m tests.benchmarks.training.collection --device cuda --dtype bfloat16 --json FILE      ratio cuda_576

Both sides start from the same decoded pictures and texts, end with the same pooled v and t (checked, to 1e-4 in
float32), run the same model object in the same dtype, and read layer num_layers - 2.

What the arithmetic allows: `generate(max_new_tokens=1)` computes all layers over the prompt and the head at its last
token; collection leaves out the last layer. With 8 layers, fewer than any real LVLM has, that is 8/7 = 1.14 at best
where a single prompt of 600 tokens keeps the processor busy. There batches only push states out of the CPU's cache, so
that the CPU gets one pair at a time; the rest of the gain comes from batches, where prompts are short or the processor
wide. The model is shaped like LLaVA: 8 layers of 512, MLP 1,408, vocabulary 32,000 (58 M parameters), a random vision
tower that costs next to nothing for both. Its tokenizer has a token per byte, hence texts of 13 to 26 letters: as many
tokens as captions of 10 to 20 words have.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.hooks import output_hook
from steering.lvlm.decoder_layers import find_decoder
from steering.lvlm.token_spans import find_spans
from tests.benchmarks.steering.random_llava import LlavaShape, describe, noise, save_random_llava
from training.collection.lvlm import LvlmRepresenter, LvlmSettings
from training.collection.placing import TextPlacer
from training.collection.portion import ShardWork, collect_portion
from training.evaluation.manifest import describe_run
from training.pairs import Pair
from training.store.layout import Collected, layer_name

TOLERANCE = 1e-4
SIDES = {576: 336, 9: 42}
"""Pixels of the image's side, by image tokens."""
Pooled = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that is measured."""

    device: str
    image_tokens: int
    pairs: int
    """Per round."""
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.device}_{self.image_tokens}"


CPU_CASES = (
    Case(device="cpu", image_tokens=576, pairs=8, batch_size=1),
    Case(device="cpu", image_tokens=9, pairs=64, batch_size=8),
)
CUDA_CASES = (Case(device="cuda", image_tokens=576, pairs=128, batch_size=32),)


class Setup:
    """A model on its device and the pairs of a case."""

    def __init__(self, folder: Path, shape: LlavaShape, case: Case, dtype: str) -> None:
        self.case, self.shape = case, shape
        save_random_llava(folder, shape, dtype=dtype, device=case.device)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.eval().to(case.device)
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.layer = shape.layers - 2
        self.pairs = [_pair(index, shape.image_size) for index in range(case.pairs)]
        settings = LvlmSettings(model=folder, layers=(self.layer,), text_in="user_turn", prefixes=0)
        self._placer = TextPlacer(self.processor, "llava", self.model.config.image_token_id, settings.text_in, ())
        self._representer = LvlmRepresenter(self.model, self.processor, self._placer, settings)
        self._work = ShardWork(store=folder, collected=_collected(self.layer, shape, case, dtype), threads=_threads())

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    def collect(self) -> Pooled:
        """As a worker collects a portion."""
        portion = collect_portion(self._work, enumerate(self.pairs), self._representer)
        assert not portion.skipped
        image_ND, text_ND, _ = portion.states[layer_name(self.layer)]
        return image_ND, text_ND

    @torch.inference_mode()
    def generate(self) -> Pooled:
        """One pair after the other, stopped after the first token."""
        seen: list[Tensor] = []
        states = []
        with output_hook(find_decoder(self.model).layers[self.layer], lambda hidden: seen.append(hidden) or hidden):
            for pair in self.pairs:
                text = str(self._placer.templates[0]).replace("{text}", pair.text)
                inputs = self.processor(images=[pair.image], text=[text], return_tensors="pt").to(self.case.device)
                seen.clear()
                self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
                spans = find_spans(inputs["input_ids"][0].tolist(), self.model.config.image_token_id)
                hidden_TD = seen[0][0].float()
                image, text = hidden_TD[list(spans.image_positions)].mean(0), hidden_TD[spans.text_start :].mean(0)
                states.append((image.cpu(), text.cpu()))
        return torch.stack([image for image, _ in states]), torch.stack([text for _, text in states])


def measure(case: Case, shape: LlavaShape, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of both, interleaved, and how far their states are apart."""
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder) / "model", shape, case, dtype)
        apart = max(float((a - b).abs().max()) for a, b in zip(setup.collect(), setup.generate(), strict=True))
        size = max(float(states.abs().max()) for states in setup.collect())
        if dtype == "float32" and apart > TOLERANCE:
            raise RuntimeError(f"{case.name}: pooled states are {apart:.2e} apart; the two do not do the same")
        ours, theirs = [], []
        for index in range(rounds):
            for seconds, run in ((ours, setup.collect), (theirs, setup.generate))[:: 1 if index % 2 else -1]:
                seconds.append(_time(run))
        return {
            "name": case.name,
            "pairs_per_s": case.pairs / statistics.median(ours),
            "generate_pairs_per_s": case.pairs / statistics.median(theirs),
            "ratios": [before / now for before, now in zip(theirs, ours, strict=True)],
            "largest_difference": apart,
            "largest_state": size,
            "parameters": setup.parameters,
            "batch_size": case.batch_size,
            "pairs": case.pairs,
            "shape": describe(shape),
        }


def _time(run: Callable[[], Pooled]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _pair(index: int, side: int) -> Pair:
    draw = random.Random(f"caption {index}")
    text = "".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(13, 26)))
    image: Image.Image = noise(index, side)
    return Pair(image=image, text=text, reference=str(index))


def _collected(layer: int, shape: LlavaShape, case: Case, dtype: str) -> Collected:
    return Collected(
        model="random", model_sha256="", family="llava", names=(layer_name(layer),), width=shape.hidden,
        num_layers=shape.layers, pooling="text_after_last_image", model_dtype=dtype,
        stored_dtype="float32", batch_size=case.batch_size, portion_size=case.pairs, source={}, device=case.device,
    )  # fmt: skip


def _threads() -> int:
    return torch.get_num_threads()


def _shape(image_tokens: int, layers: int, hidden: int) -> LlavaShape:
    return LlavaShape(
        layers=layers, hidden=hidden, head_size=64, kv_heads=hidden // 64, intermediate=hidden * 11 // 4,
        vocabulary=32_000, concepts=8, active_concepts=1, image_size=SIDES[image_tokens],
    )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, help="instead of the cases' own")
    parser.add_argument("--only", help="one case by its name, as cpu_9")
    parser.add_argument("--threads", type=int, help="of torch, for both; all cores by default")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    settings = parse_arguments()
    if settings.rounds < 7:
        raise SystemExit("--rounds: at least 7, or the medians mean little")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    table = []
    for case in CPU_CASES if settings.device == "cpu" else CUDA_CASES:
        if settings.batch_size:
            case = replace(case, batch_size=settings.batch_size)
        if settings.only not in (None, case.name):
            continue
        row = measure(
            case, _shape(case.image_tokens, settings.layers, settings.hidden), settings.dtype, settings.rounds
        )
        ratios = sorted(row["ratios"])
        row["ratio"] = statistics.median(ratios)
        print(
            f"{row['name']:>9}: {row['pairs_per_s']:8.2f} pairs/s, generate {row['generate_pairs_per_s']:8.2f}; "
            f"ratio {row['ratio']:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); "
            f"{row['parameters'] / 1e6:.0f} M parameters, "
            f"states up to {row['largest_state']:.1f} are {row['largest_difference']:.1e} apart",
            flush=True,
        )
        table.append(row)
    report = {
        "ratios": {row["name"]: row["ratio"] for row in table},
        "spread": {row["name"]: [min(row["ratios"]), max(row["ratios"])] for row in table},
        "table": table,
        "manifest": describe_run(vars(settings) | {"json": str(settings.json), "threads": _threads()}),
    }
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

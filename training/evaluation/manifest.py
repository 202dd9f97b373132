"""What must be known to repeat an evaluation: versions, weights, scenes, prompts. Measures nothing."""

from __future__ import annotations

import hashlib
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.evaluation.benchmark import Benchmark

PROCESSOR_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "numpy", "pillow", "openai", "vllm")


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """When, how and with which versions."""
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.orig_argv[1:]],
        "settings": settings,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        **_describe_gpu(),
    }


def describe_benchmark(benchmark: Benchmark) -> dict[str, Any]:
    """Scenes, files and prompts; the digests change with any scene, pixel or question.

    Every picture is read once for it: one that cannot be read is found before anything is asked.
    """
    pixels, questions = hashlib.sha256(), hashlib.sha256()
    for scene in benchmark.scenes:
        pixels.update(f"{scene.seed}{sorted(scene.truth)}".encode() + scene.image.tobytes())
    for question in benchmark.questions:
        before = [benchmark.before_question(question.scene, turn) for turn in benchmark.turns]
        questions.update(repr((question, before)).encode())
    seeds = [scene.seed for scene in benchmark.scenes]
    return {
        "name": benchmark.name,
        "scenes": len(seeds),
        "captions": benchmark.captions,
        "questions": len(benchmark.questions),
        "first_scene_seed": min(seeds, default=None),
        "last_scene_seed": max(seeds, default=None),
        "sources_sha256": dict(benchmark.sources),
        "scenes_sha256": pixels.hexdigest(),
        "questions_sha256": questions.hexdigest(),
        "caption_prompt": benchmark.caption_prompt,
        "question_prompt": benchmark.questions[0].text if benchmark.questions else None,
        "turns": list(benchmark.turns),
        "caption_max_tokens": benchmark.caption_max_tokens,
        "answer_max_tokens": benchmark.answer_max_tokens,
    }


def weights_digest(folder: Path) -> str:
    """sha256 over the configuration and every safetensors file of a model folder, an LVLM's or open_clip's."""
    digest = hashlib.sha256()
    configurations = [file for name in ("config.json", "open_clip_config.json") if (file := folder / name).exists()]
    for file in [*configurations, *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def processor_digest(folder: Path) -> str:
    """sha256 over the files of a model folder that say how texts and pictures become its inputs."""
    digest = hashlib.sha256()
    for name in PROCESSOR_FILES:
        if (file := folder / name).exists():
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _describe_gpu() -> dict[str, str]:
    """Only where one was used: whoever asks over HTTP need not load torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu": torch.cuda.get_device_name()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

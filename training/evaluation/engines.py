"""Who answers an evaluation: an engine of this process, or a running service. Knows no benchmark."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from steering.artifact_config import read_config
from training.command_line import Settings
from training.errors import InvalidTraining
from training.evaluation.asking import InProcess, OverHttp, Respondent
from training.miniature.paths import ARTIFACT, LLAVA


class EngineSettings(Settings):
    """Who answers, and with what."""

    model: Path = LLAVA
    """Folder of the LVLM; the bundled miniature by default."""
    artifact: Path = ARTIFACT
    """Folder of the steering artifact; over HTTP it must be the one that the server has loaded."""
    engine: str = "huggingface"
    """huggingface, vllm, or the URL of a running service (http://127.0.0.1:8000)."""
    device: str = "cpu"
    """Device of an engine in this process."""
    dtype: str = "float32"
    """Number format of an engine in this process."""
    batch: int = Field(default=64, ge=1)
    """Sequences that an engine in this process decodes together."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of torch; a miniature is fastest on one."""


@asynccontextmanager
async def respondent(settings: EngineSettings) -> AsyncIterator[Respondent]:
    """Whoever answers, started and stopped."""
    if settings.engine.startswith(("http://", "https://")):
        async with OverHttp(settings.engine, artifact=read_config(settings.artifact).fingerprint) as client:
            yield client
        return
    import torch
    from transformers import AutoProcessor

    torch.set_num_threads(settings.threads)
    engine = _engine(settings)
    await engine.start()
    try:
        yield InProcess(engine, AutoProcessor.from_pretrained(settings.model))
    finally:
        await engine.stop()


def _engine(settings: EngineSettings) -> Any:
    arguments = {
        "model": str(settings.model),
        "artifact": str(settings.artifact),
        "device": settings.device,
        "dtype": settings.dtype,
        "max_batch_size": settings.batch,
    }
    if settings.engine == "huggingface":
        from steering.engines.huggingface.engine import HuggingFaceEngine

        return HuggingFaceEngine(**arguments)
    if settings.engine == "vllm":
        from steering.engines.vllm.engine import VllmEngine  # pyright: ignore[reportMissingImports]

        return VllmEngine(**arguments)
    raise InvalidTraining(f"--engine: {settings.engine!r} is none of huggingface, vllm, http://...")

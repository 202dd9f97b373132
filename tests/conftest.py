"""Fixtures shared by all tests; everything runs offline.

Each imports what it is made with, so that a test of plain functions does not wait for transformers.
"""

from __future__ import annotations

import os

os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_llava

    return save_tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_artifact

    return save_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact", tiny_llava)


@pytest.fixture(scope="session")
def published_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_published_llava

    return save_published_llava(tmp_path_factory.mktemp("published") / "llava-1.5-tiny-hf")


@pytest.fixture(scope="session")
def published_artifact(published_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_artifact

    return save_tiny_artifact(tmp_path_factory.mktemp("published") / "artifact", published_llava)


@pytest.fixture(scope="session", params=["llava_next", "qwen2_5_vl"])
def tiny_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family beside LLaVA."""
    from tests import tiny_families

    save = {"llava_next": tiny_families.save_tiny_llava_next, "qwen2_5_vl": tiny_families.save_tiny_qwen2_5_vl}
    return save[request.param](tmp_path_factory.mktemp("tiny_family"))


@pytest.fixture(scope="session")
def tiny_family_artifact(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_artifact

    return save_tiny_artifact(tmp_path_factory.mktemp("tiny_family") / "artifact", tiny_family)

"""Benchmark files in their published formats."""

from pathlib import Path

import pytest

from tests.published_benchmarks import CocoFolders, write_coco


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolders:
    return write_coco(tmp_path)

"""An untrained miniature: real classes, random weights, ready in a second."""

import pytest
import torch

from training.miniature.clip_training import build_clip
from training.miniature.llava_model import build_llava
from training.miniature.processor import build_processor


@pytest.fixture(scope="session")
def untrained_llava():
    torch.manual_seed(0)
    return build_llava(build_clip().eval())


@pytest.fixture(scope="session")
def miniature_processor():
    return build_processor()

"""One thread for every test of training; and an untrained miniature: real classes, random weights, ready at once."""

import pytest
import torch

from training.miniature.clip_training import build_clip
from training.miniature.llava_model import build_llava
from training.miniature.processor import build_processor


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are rounded in one order, and suites that run beside each other leave each other a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def untrained_llava():
    torch.manual_seed(0)
    return build_llava(build_clip().eval())


@pytest.fixture(scope="session")
def miniature_processor():
    return build_processor()

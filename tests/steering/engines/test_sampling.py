"""From logits to tokens."""

from __future__ import annotations

import pytest
import torch

from steering.engines.base import IMPLAUSIBLE, MASKED_LOGPROB, Sampling
from steering.engines.sampling import Sampler, blend_branches, top_logprobs

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0])


def sampler(**settings):
    return Sampler(Sampling(**{"max_tokens": 5, "temperature": 0.0} | settings), choice=0)


def test_greedy_takes_the_largest():
    assert sampler().sample(LOGITS) == 3


def test_penalties_follow_what_was_generated():
    penalised = sampler(presence_penalty=0.6, frequency_penalty=0.5)
    assert [penalised.sample(LOGITS) for _ in range(5)] == [3, 2, 3, 3, 1]


def test_logit_bias_moves_the_choice():
    assert sampler(logit_bias={0: 10.0}).sample(LOGITS) == 0


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 0.01}, {"temperature": 0.01}])
def test_tight_limits_leave_the_most_likely(limits):
    drawn = sampler(**{"temperature": 1.0, "seed": 3} | limits)
    assert {drawn.sample(LOGITS) for _ in range(30)} == {3}


def test_sampling_follows_the_distribution():
    drawn = sampler(temperature=1.0, seed=0)
    tokens = torch.tensor([drawn.sample(LOGITS) for _ in range(4000)])
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, LOGITS.softmax(0), atol=0.03, rtol=0)


def test_blend_and_plausibility():
    base, steered = torch.tensor([0.0, -1.0, -5.0]), torch.tensor([0.0, 3.0, 9.0])
    torch.testing.assert_close(blend_branches(base, steered, 1.0, 0.0), steered)
    torch.testing.assert_close(blend_branches(base, steered, 0.5, 0.0), (base + steered) / 2)
    masked = blend_branches(base, steered, 1.0, 0.1)
    assert masked.tolist() == [0.0, 3.0, 9.0 - IMPLAUSIBLE]
    assert masked.softmax(0)[2] == 0
    own, top = top_logprobs(masked, 2, 3)
    assert own == MASKED_LOGPROB
    assert [token for token, _ in top] == [1, 0, 2]

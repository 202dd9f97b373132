"""From logits to one token and its logprobs. Knows one sequence at a time; no text, no model.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from steering.engines.base import IMPLAUSIBLE, MASKED_LOGPROB, Sampling

MIN_TEMPERATURE = 1e-5
"""Below this a temperature is greedy: logits divided by it would overflow."""


def blend_branches(base_V: Tensor, steered_V: Tensor, gamma: float, plausibility: float) -> Tensor:
    """(1 - gamma) base + gamma steered, without tokens implausible to the base branch (paper, section 4.2).

    A token whose base logit is below log(plausibility) + max(base) loses IMPLAUSIBLE; plausibility 0 drops none.
    """
    blended_V = (1 - gamma) * base_V + gamma * steered_V
    if plausibility == 0:
        return blended_V
    floor = base_V.max() + torch.log(torch.tensor(plausibility, device=base_V.device))
    return torch.where(base_V < floor, blended_V - IMPLAUSIBLE, blended_V)


class Sampler:
    """Draws the tokens of one choice."""

    def __init__(self, sampling: Sampling, choice: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + choice) % 2**63)
        self._counts: dict[int, int] = {}
        self._warpers = _warpers(sampling)

    @property
    def is_plain_greedy(self) -> bool:
        """True where the next token is simply the largest logit: a batch of such rows needs one argmax."""
        chosen = self.sampling
        penalised = chosen.presence_penalty or chosen.frequency_penalty or chosen.logit_bias
        return chosen.temperature < MIN_TEMPERATURE and not penalised

    def sample(self, logits_V: Tensor) -> int:
        """The next token; it is counted for the penalties."""
        adjusted_V = self._penalised(logits_V.cpu())
        if self.sampling.temperature < MIN_TEMPERATURE:
            token = int(adjusted_V.argmax())
        else:
            warped_1V = adjusted_V[None]
            for warper in self._warpers:
                warped_1V = warper(None, warped_1V)
            token = int(torch.multinomial(warped_1V.softmax(-1)[0], 1, generator=self._generator))
        self.count(token)
        return token

    def count(self, token: int) -> None:
        """Remember a token that was chosen elsewhere, for the penalties."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def _penalised(self, logits_V: Tensor) -> Tensor:
        chosen = self.sampling
        if not (chosen.logit_bias or chosen.presence_penalty or chosen.frequency_penalty):
            return logits_V
        adjusted_V = logits_V.clone()
        for token, bias in chosen.logit_bias.items():
            adjusted_V[token] += bias
        for token, times in self._counts.items():
            adjusted_V[token] -= chosen.presence_penalty + chosen.frequency_penalty * times
        return adjusted_V


def top_logprobs(logits_V: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Logprob of a token and the `top` most likely (token, logprob), before temperature and penalties."""
    logprobs_V = logits_V.log_softmax(-1).clamp(min=MASKED_LOGPROB)
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return float(logprobs_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


def _warpers(sampling: Sampling) -> list:
    warpers: list = []
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers

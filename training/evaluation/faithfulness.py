"""Does a VL-SAE hold where it steers: on states of a text that is being generated? Knows an LVLM and no engine.

    unexplained    share of the variance of v, and of the running mean t at each position of an answer, that is lost on
                   the way through the code and back
    spliced        the tail runs on h + (x - t) at every position of the answer, x the reconstruction of t: what
                   `published` does with alpha 1 and both betas 0
    ablated        the same with x = 0
    recovered      (ablated - spliced) / (ablated - plain) of the cross-entropy of the model's own answer, and of the
                   divergence KL(plain | .): 1 is as good as the model's own states, 0 as bad as none. As SAE libraries
                   report it of a single state, here of the mean that steering reads and changes.

Shapes: B answers, T tokens, D hidden size, N positions of all answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.artifact import Artifact
from steering.lvlm.decoder_layers import find_decoder
from training.collection.prefill import Prefill, PromptInputs, masked_mean, prepare_prefill, running_means
from training.losses import unexplained_variance


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt with what the model said to it."""

    prompt: PromptInputs
    """The answer's tokens are its last ones."""
    answer_tokens: int


@dataclass(kw_only=True)
class Found:
    """What all batches add up to."""

    image: list[Tensor] = field(default_factory=list)
    """v [B, D] of each batch."""
    text: list[Tensor] = field(default_factory=list)
    """t [N, D] at each position of its answers."""
    sums: dict[str, float] = field(default_factory=dict)
    """Of cross-entropies and divergences, in nats."""
    predictions: int = 0
    """Number of them."""


class Faithfulness:
    """Of one artifact on its model."""

    def __init__(self, model: Any, artifact: Artifact) -> None:
        self._model, self._decoder = model, find_decoder(model)
        self._image_token: int = model.config.image_token_id
        self._tail = range(artifact.config.hook_layer + 1, artifact.config.num_layers)
        self._auxiliary = artifact.auxiliary.to(model.device)
        self._sae = artifact.sae.to(model.device)

    @torch.inference_mode()
    def measure(self, batches: Iterable[Sequence[Answered]], *, splice: bool) -> dict[str, float]:
        """Shares and nats by name; with `splice` also what is recovered. An answer needs two tokens."""
        found = Found()
        for batch in batches:
            self._add(batch, found, splice=splice)
        image_ND, text_ND = torch.cat(found.image), torch.cat(found.text)
        measures = {
            "image_unexplained": unexplained_variance(self._rebuild_image(image_ND), image_ND),
            "text_unexplained": unexplained_variance(self._rebuild_text(text_ND), text_ND),
            "tokens": float(len(text_ND)),
        }
        return measures | (_recovered(found) if splice else {})

    def _add(self, batch: Sequence[Answered], found: Found, *, splice: bool) -> None:
        prefill = prepare_prefill(self._model, self._image_token, [one.prompt for one in batch])
        hook_BTD = self._decoder.run(range(self._tail.start), prefill.hidden_BTD, prefill.rotary_BT, None, None)
        answer_BT = _answer_positions(batch, prefill)
        means_BTD = running_means(hook_BTD, prefill.text_BT)
        found.image.append(masked_mean(hook_BTD, prefill.image_BT))
        found.text.append(means_BTD[answer_BT])
        if not splice:
            return
        targets_BT = prefill.ids_BT.roll(-1, dims=1)
        predicting_BT = answer_BT & answer_BT.roll(-1, dims=1)
        predicting_BT[:, -1] = False
        plain_NV = self._log_probabilities(hook_BTD, prefill, predicting_BT)
        found.predictions += len(plain_NV)
        _add_to(found.sums, "plain", plain_NV, plain_NV, targets_BT[predicting_BT])
        for name, instead_ND in (("spliced", self._rebuild_text(found.text[-1])), ("ablated", None)):
            moved_BTD = hook_BTD.float().clone()
            moved_BTD[answer_BT] += (0 if instead_ND is None else instead_ND) - found.text[-1]
            other_NV = self._log_probabilities(moved_BTD.to(hook_BTD.dtype), prefill, predicting_BT)
            _add_to(found.sums, name, plain_NV, other_NV, targets_BT[predicting_BT])

    def _log_probabilities(self, hook_BTD: Tensor, prefill: Prefill, wanted_BT: Tensor) -> Tensor:
        last_BTD = self._decoder.run(self._tail, hook_BTD, prefill.rotary_BT, None, None)
        return F.log_softmax(self._decoder.logits(last_BTD[wanted_BT]), dim=-1)

    def _rebuild_image(self, image_ND: Tensor) -> Tensor:
        code = self._sae.encode(self._auxiliary.vision_projection(image_ND))
        return self._auxiliary.vision_decoder(self._sae.decode(code, "image"))

    def _rebuild_text(self, text_ND: Tensor) -> Tensor:
        code = self._sae.encode(self._auxiliary.text_projection(text_ND))
        return self._auxiliary.text_decoder(self._sae.decode(code, "text"))


def _answer_positions(batch: Sequence[Answered], prefill: Prefill) -> Tensor:
    """[B, T] bool: tokens of the answers."""
    ends = torch.tensor([len(one.prompt.token_ids) for one in batch])
    starts = ends - torch.tensor([one.answer_tokens for one in batch])
    position_T = torch.arange(prefill.ids_BT.shape[1])
    return ((position_T >= starts[:, None]) & (position_T < ends[:, None])).to(prefill.ids_BT.device)


def _add_to(sums: dict[str, float], name: str, plain_NV: Tensor, other_NV: Tensor, targets_N: Tensor) -> None:
    cross_entropy = F.nll_loss(other_NV, targets_N, reduction="sum")
    divergence = F.kl_div(other_NV, plain_NV, log_target=True, reduction="sum")
    for key, value in ((f"cross_entropy_{name}", cross_entropy), (f"divergence_{name}", divergence)):
        sums[key] = sums.get(key, 0.0) + float(value)


def _recovered(found: Found) -> dict[str, float]:
    means = {name: total / found.predictions for name, total in found.sums.items()}
    shares = {}
    for measure in ("cross_entropy", "divergence"):
        plain, spliced, ablated = (means[f"{measure}_{name}"] for name in ("plain", "spliced", "ablated"))
        shares[f"{measure}_recovered"] = (ablated - spliced) / (ablated - plain)
    return {name: value for name, value in means.items() if name != "divergence_plain"} | shares

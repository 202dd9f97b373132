"""What happens at the hook layer, for a batch of sequences: pool, align, encode, mix, decode, add back.

Knows hidden states and token classes; knows nothing of how a model is run or tokens are sampled.

Shapes: B batch rows, T tokens of this pass, D hidden size, N steered positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from steering.realignment import ImageCode, MixParameters, Realignment
from steering.request import Form
from steering.settings import ResolvedSteering


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: which sequence each batch row continues, and what its tokens are."""

    rows: list[SequenceSteering]
    """State of each batch row, [B]."""
    image_BT: Tensor
    """[B, T] bool: image tokens of the prompt."""
    text_BT: Tensor
    """[B, T] bool: tokens after the last image; padding is neither."""


@dataclass(kw_only=True)
class SequenceSteering:
    """Running state of one sequence at the hook layer."""

    settings: ResolvedSteering
    image: ImageCode | None = None
    """z_v as rows of one; fixed once the images are in. None while unknown and for unsteered sequences."""
    direction_D: Tensor | None = None
    """Unit direction of the control `random`."""
    text_sum_D: Tensor | None = None
    text_count: int = 0
    span: list[Tensor] = field(default_factory=list)
    """'exact' only: unsteered states of the text so far, each [T, D]."""
    span_delta_D: Tensor | None = None
    """'exact' only: the delta of the latest step; None until there is one."""
    visited_text: bool = False
    """A delta was computed for at least one position, be it zero."""
    visited: bool = False
    """The hook has seen this sequence: without it nothing could have been steered."""
    positions: int = 0
    shift_sum: Tensor | float = 0.0
    """Sum over steered positions of |delta| / |h|."""

    @property
    def exact(self) -> bool:
        return self.settings.active and self.settings.mode == "exact"

    @property
    def scale(self) -> float:
        return self.settings.strength * self.settings.alpha

    def relative_shift(self) -> float:
        """Mean of |delta| / |h| over the steered positions; 0 where there are none."""
        return float(self.shift_sum) / self.positions if self.positions else 0.0

    def exact_span(self) -> Tensor | None:
        """'exact': steered states [T_text, D] of the whole text span; None while there is nothing to steer."""
        if self.span_delta_D is None:
            return None
        base_TD = torch.cat(self.span)
        return (base_TD.float() + self.span_delta_D).to(base_TD.dtype)


class Intervention:
    """Steers the output of the hook layer. Announce each pass with `prepare`; call the object with its states."""

    def __init__(self, realignment: Realignment, *, min_text_tokens: int, control_image_MD: Tensor) -> None:
        self.realignment = realignment
        self.min_text_tokens = min_text_tokens
        self.control_image_MD = control_image_MD
        """[M, D] pooled image states that `other_image` draws from."""
        self._pass: Pass | None = None
        self.base_BTD: Tensor | None = None
        """The latest pass's states before steering."""

    def prepare(self, forward_pass: Pass) -> None:
        """Announce the pass whose hidden states come next."""
        self._pass, self.base_BTD = forward_pass, None

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """States after the hook layer to steered states; rows that are off come back untouched, bit for bit.

        In mode 'exact' a prefill is steered here; later steps leave the span to `SequenceSteering.exact_span`.
        """
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            return self._change(hidden_BTD)

    def _change(self, hidden_BTD: Tensor) -> Tensor:
        assert self._pass is not None, "prepare() announces every pass"
        current, self._pass = self._pass, None
        self.base_BTD = hidden_BTD
        active = [index for index, row in enumerate(current.rows) if row.settings.active]
        if not active:
            return hidden_BTD
        hidden_aTD = hidden_BTD[active].float()
        self._encode_new_images(current, active, hidden_aTD)
        means_aTD, counts_aT = self._pool_text(current, active, hidden_aTD)
        return self._steer(current, active, hidden_BTD, hidden_aTD, means_aTD, counts_aT)

    def _encode_new_images(self, current: Pass, active: list[int], hidden_aTD: Tensor) -> None:
        new = [place for place, index in enumerate(active) if current.rows[index].image is None]
        if not new:
            return
        mask_nT1 = current.image_BT[[active[place] for place in new]][..., None]
        pooled_nD = (hidden_aTD[new] * mask_nT1).sum(1) / mask_nT1.sum(1)
        for place, image_D in zip(new, pooled_nD, strict=True):
            row = current.rows[active[place]]
            row.visited = True
            if row.settings.control == "other_image":
                image_D = self.control_image_MD[row.settings.control_seed % len(self.control_image_MD)]
            elif row.settings.control == "random":
                row.direction_D = random_direction(image_D, row.settings.control_seed)
            row.image = self.realignment.encode_image(image_D[None])

    def _pool_text(self, current: Pass, active: list[int], hidden_aTD: Tensor) -> tuple[Tensor, Tensor]:
        """Running means [a, T, D] of the text up to and including each position, and their counts [a, T]."""
        mask_aT = current.text_BT[active]
        rows = [current.rows[index] for index in active]
        zero_D = hidden_aTD.new_zeros(hidden_aTD.shape[-1])
        earlier_aD = torch.stack([zero_D if row.text_sum_D is None else row.text_sum_D for row in rows])
        earlier_a = torch.tensor([row.text_count for row in rows], device=hidden_aTD.device)
        sums_aTD = earlier_aD[:, None] + (hidden_aTD * mask_aT[..., None]).cumsum(1)
        counts_aT = earlier_a[:, None] + mask_aT.cumsum(1)
        for row, sum_D, added in zip(rows, sums_aTD[:, -1], mask_aT.sum(1).tolist(), strict=True):
            row.text_sum_D, row.text_count = sum_D, row.text_count + added
        return sums_aTD / counts_aT.clamp(min=1)[..., None], counts_aT

    def _steer(
        self,
        current: Pass,
        active: list[int],
        hidden_BTD: Tensor,
        hidden_aTD: Tensor,
        means_aTD: Tensor,
        counts: Tensor,
    ) -> Tensor:
        steered_aT = current.text_BT[active] & (counts >= self.min_text_tokens)
        rows = [current.rows[index] for index in active]
        steered_BTD = hidden_BTD.clone()
        causal = torch.tensor([not row.exact for row in rows], device=hidden_BTD.device)
        place_N, position_N = torch.nonzero(steered_aT & causal[:, None], as_tuple=True)
        if len(place_N):
            delta_ND = self._delta(rows, place_N, means_aTD[place_N, position_N])
            self._tally(rows, place_N, hidden_aTD[place_N, position_N], delta_ND)
            batch_N = torch.tensor(active, device=place_N.device)[place_N]
            moved_ND = hidden_aTD[place_N, position_N] + delta_ND
            steered_BTD[batch_N, position_N] = moved_ND.to(hidden_BTD.dtype)
        for index, row in zip(active, rows, strict=True):
            if row.exact:
                text_T = current.text_BT[index]
                self._steer_span(row, hidden_BTD[index][text_T])
                span_TD = row.exact_span()
                if span_TD is not None:
                    steered_BTD[index, text_T] = span_TD[-int(text_T.sum()) :]
        return steered_BTD

    def _steer_span(self, row: SequenceSteering, added_TD: Tensor) -> None:
        """'exact': one delta, from the mean over all text so far, for all of it."""
        row.span.append(added_TD)
        if row.text_sum_D is None or row.text_count < self.min_text_tokens:
            return
        mean_1D = row.text_sum_D[None] / row.text_count
        place_1 = torch.zeros(1, dtype=torch.long, device=mean_1D.device)
        row.span_delta_D = self._delta([row], place_1, mean_1D)[0]
        row.visited_text = True
        length = row.span_delta_D.norm()
        row.positions = row.text_count if float(length) > 0 else 0
        row.shift_sum = (length / torch.cat(row.span).float().norm(dim=-1)).sum()

    def _delta(self, rows: list[SequenceSteering], place_N: Tensor, mean_ND: Tensor) -> Tensor:
        """Deltas [N, D]; rows of one form are computed together."""
        forms: list[Form] = list(dict.fromkeys(row.settings.form for row in rows))
        delta_ND = torch.zeros_like(mean_ND)
        for form in forms:
            of_form = torch.tensor([row.settings.form == form for row in rows], device=place_N.device)
            chosen = of_form[place_N].nonzero()[:, 0]
            if len(chosen):
                delta_ND[chosen] = self._delta_of_form(rows, place_N[chosen], mean_ND[chosen], form)
        return _apply_controls(rows, place_N, delta_ND)

    def _delta_of_form(self, rows: list[SequenceSteering], place_N: Tensor, mean_ND: Tensor, form: Form) -> Tensor:
        images = [cast(ImageCode, row.image) for row in rows]
        codes = ImageCode(*(torch.cat(parts) for parts in zip(*images, strict=True)))
        settings = [(row.settings.beta_up, row.settings.beta_down, row.scale) for row in rows]
        mix = MixParameters(*torch.tensor(settings, device=mean_ND.device).T[:, place_N])
        return self.realignment.delta(mean_ND, codes, place_N, mix, form)

    @staticmethod
    def _tally(rows: list[SequenceSteering], place_N: Tensor, hidden_ND: Tensor, delta_ND: Tensor) -> None:
        shift_N = delta_ND.norm(dim=-1) / hidden_ND.norm(dim=-1)
        shift_a = shift_N.new_zeros(len(rows)).index_add_(0, place_N, shift_N)
        count_a = torch.bincount(place_N[shift_N > 0], minlength=len(rows)).tolist()
        for row, shift, count in zip(rows, shift_a, count_a, strict=True):
            row.positions += count
            row.shift_sum = row.shift_sum + shift
        for place in place_N.unique().tolist():
            rows[place].visited_text = True


def random_direction(like_D: Tensor, seed: int) -> Tensor:
    """Isotropic unit vector [D], the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    direction_D = torch.randn(like_D.shape[0], generator=generator).to(like_D.device)
    return direction_D / direction_D.norm()


def _apply_controls(rows: list[SequenceSteering], place_N: Tensor, delta_ND: Tensor) -> Tensor:
    """`reversed` flips the sign; `random` keeps the length and takes the sequence's own isotropic direction."""
    for place, row in enumerate(rows):
        mine_N = place_N == place
        if row.settings.control == "reversed":
            delta_ND[mine_N] = -delta_ND[mine_N]
        elif row.direction_D is not None:
            delta_ND[mine_N] = delta_ND[mine_N].norm(dim=-1, keepdim=True) * row.direction_D
    return delta_ND

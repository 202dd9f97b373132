"""Pictures of a run for whoever asks whether it is good. Measures nothing.

A panel is drawn for what was logged: an auxiliary autoencoder has no codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.durable_files import in_place_of

PLOT_FOLDER = "plots"
CURVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("loss", ("loss/train", "loss/held_out")),
    "fvu": ("share of the variance that is lost", ("image/fvu", "text/fvu", "image/states_fvu", "text/states_fvu")),
    "dead_fraction": ("share of concepts not used for an epoch", ("image/dead_fraction", "text/dead_fraction")),
    "retrieval": (
        "share of held-out pairs found across modalities",
        ("retrieval/shared_r1", "retrieval/shared_r10", "retrieval/codes_r1", "retrieval/codes_r10"),
    ),
    "overlap": ("share of concepts in common", ("overlap/paired", "overlap/strangers")),
}
"""By file: label of the axis, and what is drawn."""
_NEVER = -8.0
"""Where concepts that were never active stand on the logarithmic axis."""


def draw_plots(run: Path, rows: Sequence[Mapping[str, Any]], histograms: Mapping[str, Tensor]) -> None:
    """PNG files in the run folder."""
    folder = run / PLOT_FOLDER
    for name, (label, curves) in CURVES.items():
        drawn = [curve for curve in curves if curve in rows[-1]]
        if drawn:
            draw_curves(folder / f"{name}.png", label, rows, drawn)
    if histograms:
        _draw_frequencies(folder / "activation_frequency.png", histograms)


def draw_curves(
    file: Path, label: str, rows: Sequence[Mapping[str, Any]], curves: Sequence[str], *, over: str = "step"
) -> None:
    """One line for each curve, `over` on the horizontal axis; a PNG file."""
    figure, axis = _figure()
    places = [row[over] for row in rows]
    for curve in curves:
        axis.plot(places, [row[curve] for row in rows], marker=".", label=curve)
    axis.set_xlabel(over)
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, file)


def _draw_frequencies(file: Path, histograms: Mapping[str, Tensor]) -> None:
    figure, axis = _figure()
    for name, frequencies_K in histograms.items():
        logarithms_K = torch.log10(frequencies_K.clamp(min=10**_NEVER)).cpu().numpy()
        axis.hist(logarithms_K, bins=80, range=(_NEVER, 0), histtype="step", label=name)
    axis.set_xlabel(f"log10 of the share of rows in which a concept is active ({_NEVER:g}: never)")
    axis.set_ylabel("concepts")
    axis.set_yscale("symlog")
    axis.legend()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    with in_place_of(file) as made:
        figure.savefig(made, format="png", dpi=120)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()

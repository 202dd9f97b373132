"""Which layer to steer: the measures that need no generation, over every layer of one store, as a table and a plot.

    python -m training.collect_representations --model M --layers 1 2 3 ... --output STORE
    python -m training.sweep_layers --representations STORE --output SWEEP --auxiliary "..." --sparse "..."

For each layer both autoencoders are trained as `pipeline.sh` would train them, and measured on held-out pairs:
retrieval across the modalities, how far the codes of a pair agree beyond those of strangers, and how much of the states
is lost. A layer that fails here need not be tried on the model; among those that do not, generation decides. Stopped,
the same command goes on where it was.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from training import train_auxiliary_autoencoder as auxiliary_stage
from training import train_sparse_autoencoder as sparse_stage
from training.command_line import Settings, parse_settings, run_stage
from training.compare_runs import markdown_table, read_metrics
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.fitting.plots import draw_curves
from training.fitting.workers import DeviceChoice
from training.store.layout import MANIFEST_FILE, read_manifest
from training.store.reader import RepresentationStore

MEASURES = {
    "R@1 across modalities": "retrieval/shared_r1",
    "codes of a pair agree": "overlap/paired",
    "codes of strangers agree": "overlap/strangers",
    "image variance lost": "image/states_fvu",
    "text variance lost": "text/states_fvu",
}
"""By the name in the plot: what is logged of a sparse run."""


class SweepSettings(Settings):
    """Which layers, and how each is trained."""

    representations: Path
    """Store written by collect_representations, of several layers."""
    output: Path
    """Folder of a pair of runs for each layer, of the table and of the plot."""
    auxiliary: str = ""
    """Options of train_auxiliary_autoencoder, as on its command line."""
    sparse: str = ""
    """Options of train_sparse_autoencoder, as on its command line."""
    device: DeviceChoice = "auto"
    """For both."""


def sweep_layers(settings: SweepSettings, report: Callable[[str], None] = print) -> dict[str, dict[str, float]]:
    """Measures of each layer by its number. Raises InvalidTraining for a store without layers."""
    manifest = read_manifest(settings.representations)
    stores = [RepresentationStore(settings.representations, manifest, name) for name in manifest.collected.names]
    layers = [store.layer for store in stores if store.layer is not None]
    if not layers:
        raise InvalidTraining(f"{settings.representations / MANIFEST_FILE}: states of no layer are there to sweep")
    measured = {}
    for layer in layers:
        report(f"== layer {layer}")
        shared = ["--layer", str(layer), "--device", settings.device]
        options = [[*shared, *shlex.split(own)] for own in (settings.auxiliary, settings.sparse)]
        metrics = read_metrics(train_both(settings.representations, settings.output / f"layer_{layer}", *options))
        measured[str(layer)] = {name: metrics[key] for name, key in MEASURES.items()}
    rows = [{"layer": int(layer)} | found for layer, found in measured.items()]
    write_json(settings.output / "layers.json", measured)
    draw_curves(settings.output / "layers.png", "share", rows, list(MEASURES), over="layer")
    return measured


def train_both(store: Path, folder: Path, auxiliary_options: list[str], sparse_options: list[str]) -> Path:
    """Both autoencoders, into FOLDER/auxiliary and FOLDER/sparse, with options as on their stages' command lines; or
    nothing where that is done. The sparse run is given back."""
    auxiliary, sparse = folder / "auxiliary", folder / "sparse"
    shared = ["--representations", str(store)]
    argv = [*shared, "--output", str(auxiliary), *auxiliary_options]
    auxiliary_stage.train_auxiliary_autoencoder(
        parse_settings(auxiliary_stage.CommandLine, program="train_auxiliary_autoencoder", argv=argv), report=_quiet
    )
    argv = [*shared, "--auxiliary", str(auxiliary), "--output", str(sparse), *sparse_options]
    sparse_stage.train_sparse_autoencoder(
        parse_settings(sparse_stage.CommandLine, program="train_sparse_autoencoder", argv=argv), report=_quiet
    )
    return sparse


def _quiet(line: str) -> None:
    """Whoever trains several reports those, not their steps."""


def main() -> None:
    """The command line."""
    settings = parse_settings(SweepSettings, program="python -m training.sweep_layers", description=__doc__)
    columns = {f"layer {layer}": found for layer, found in sweep_layers(settings).items()}
    print(markdown_table(columns))
    print(f"plot: {settings.output / 'layers.png'}")


if __name__ == "__main__":
    run_stage(main)

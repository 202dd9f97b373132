"""Training runs side by side, on every metric that they logged on held-out pairs.

    python -m training.compare_runs --runs RUN RUN ... [--json FILE]

Prints a Markdown table, a column for each run. Reads run folders; knows no metric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from training.command_line import Settings, parse_settings, run_stage
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.run_folder import METRICS_FILE, read_run_config

_BOOKKEEPING = frozenset({"step", "epoch", "learning_rate"})


class ComparisonSettings(Settings):
    """Which runs."""

    runs: tuple[Path, ...] = Field(min_length=1)
    """Finished run folders of train_sparse_autoencoder or train_auxiliary_autoencoder."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the numbers go."""


def read_metrics(folder: Path) -> dict[str, float]:
    """A finished run's last evaluation. Raises InvalidTraining where there is none."""
    read_run_config(folder)
    file = folder / METRICS_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidTraining(f"{file} cannot be read: {error}; has the run been finished?") from error
    return {name: value for name, value in found.items() if name not in _BOOKKEEPING}


def markdown_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each metric that some run has."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    lines = [["metric", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_shown(metrics.get(name)) for metrics in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def column_names(folders: Sequence[Path]) -> list[str]:
    """The kinds, or the folders where two runs are of the same kind."""
    kinds = [read_run_config(folder).kind for folder in folders]
    return list(kinds) if len(set(kinds)) == len(kinds) else [str(folder) for folder in folders]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main() -> None:
    """The command line."""
    settings = parse_settings(ComparisonSettings, program="python -m training.compare_runs", description=__doc__)
    columns = dict(zip(column_names(settings.runs), map(read_metrics, settings.runs), strict=True))
    print(markdown_table(columns))
    if settings.json_file:
        write_json(settings.json_file, columns)


if __name__ == "__main__":
    run_stage(main)

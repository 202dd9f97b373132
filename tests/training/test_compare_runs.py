"""Runs side by side: every metric of every run, and a run that is not finished is named."""

import json

import pytest

from training.compare_runs import column_names, markdown_table, read_metrics
from training.errors import InvalidTraining
from training.run_folder import RunConfig, StoreIdentity


def write_run(folder, kind, metrics):
    folder.mkdir()
    store = StoreIdentity(
        model="m", model_sha256="0", data_sha256="1", family="llava", name="layer_1", point="output", pooling="p",
        text_in="answer",
        width=4, pairs=9,
    )  # fmt: skip
    (folder / "config.json").write_text(RunConfig(kind=kind, settings={}, shared_size=4, store=store).model_dump_json())
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_every_metric_has_a_row_and_every_run_a_column(tmp_path):
    first = write_run(tmp_path / "a", "vl_sae", {"step": 7, "image/fvu": 0.25, "overlap/ratio": 19.2308})
    second = write_run(tmp_path / "b", "sae_d", {"step": 7, "image/fvu": 0.5})
    columns = dict(zip(column_names([first, second]), map(read_metrics, [first, second]), strict=True))
    assert markdown_table(columns).splitlines() == [
        "| metric | vl_sae | sae_d |",
        "| --- | --- | --- |",
        "| image/fvu | 0.25 | 0.5 |",
        "| overlap/ratio | 19.23 |  |",
    ]


def test_runs_of_one_kind_are_told_apart_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / name, "vl_sae", {}) for name in ("a", "b")]
    assert column_names(runs) == [str(run) for run in runs]


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(InvalidTraining, match=r"a/metrics.json .* finished"):
        read_metrics(write_run(tmp_path / "a", "vl_sae", None))

"""Promises the repository makes about itself: its pages' trees, commands and links, and what must not be in it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from service.settings import EngineSettings
from steering.artifact import load_artifact, save_artifact
from steering.request import SteeringRequest
from tests.pages import (
    ANNEXES,
    FOLDERS,
    MAX_LINE,
    PAGES,
    ROOT,
    TREE,
    code_blocks,
    commands,
    comments_in,
    read,
    sections,
    tree_of,
)
from training.alignment import FAITHFULNESS, alignment_gate

BUNDLE = ROOT / "training/miniature/bundle"
each_page = pytest.mark.parametrize("page", PAGES)
each_text = pytest.mark.parametrize("page", [*PAGES, *ANNEXES])
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:make|python -m|python|pytest|serve deploy|pip install|kubectl|docker build) "
    r"|training/pipeline\.sh "
)
"""How a line of a page's code begins: what follows is looked up below, and in `tests/deploy/test_runbook.py`."""
MADE = {".venv/bin/activate", "atlas/index.html", "shards/*.skipped.jsonl", "thumbnails/"}
"""Paths on the pages that a user's own run makes; what lies in build/ it makes, too."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_of_a_page_is_the_tree_on_disk(folder: str):
    [tree] = TREE.findall(read(f"{folder}/README.md"))
    comments = comments_in(tree)
    assert [path for path in comments if not (ROOT / folder / path).exists()] == []
    modules = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert {path for path in modules if Path(path).name != "__init__.py"} - set(comments) == set()
    assert [path for path, comment in comments.items() if not comment] == []
    assert tree_of(ROOT / folder, tree) == tree, "python -m tests.pages"


def test_a_tree_keeps_the_comments_of_files_that_moved(tmp_path: Path):
    (tmp_path / "rooms").mkdir()
    for name in ("README.md", "notes.txt", "__init__.py", "rooms/__init__.py", "rooms/keys.py"):
        (tmp_path / name).touch()
    (tmp_path / "door.py").write_text('"""The way in: knock first.\n\nKnows no keys."""')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/table.json").touch()
    old = "gone.py # Was here\nkeys.py # Who may\nnotes.txt # Remember\n"
    expected = ["notes.txt # Remember", "door.py   # The way in", "data/", "rooms/", "  keys.py # Who may"]
    assert tree_of(tmp_path, old).splitlines() == expected


@each_page
def test_a_page_opens_with_whom_it_is_for_and_what_is_in_it(page: str):
    title, blank, whom, what, *_ = read(page).splitlines()
    assert (title[:2], blank, whom[:4], what[:6]) == ("# ", "", "For ", "In it:")
    others = {os.path.relpath(other, Path(page).parent) for other in PAGES if other != page}
    assert others - set(re.findall(r"\]\(([^)#]+)", read(page))) == set()


@each_text
def test_no_line_of_a_page_is_long_and_the_front_page_is_short(page: str):
    lines = read(page).splitlines()
    assert [line for line in lines if len(line) > MAX_LINE and not line.startswith("|")] == []
    assert page != "README.md" or len(lines) <= 200


def test_the_front_page_names_every_folder():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {path.partition("/")[0] for path in listed if "/" in path}
    assert [folder for folder in sorted(folders) if f"{folder}/" not in read("README.md")] == []


@each_page
def test_every_make_target_and_variable_of_a_page_exists(page: str):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) [?:]?= ?", makefile, re.MULTILINE))
    used = re.findall(r"\bmake ([a-z-]+)([^#`\n]*)", "\n".join(commands(read(page))))
    assert used
    assert {target for target, _ in used} - targets == set()
    assert {name for _, options in used for name in re.findall(r"([A-Z_]+)=", options)} - variables == set()


@each_text
def test_every_module_named_on_a_page_exists(page: str):
    dotted = re.findall(r"(?<![\w./:-])(?:training|service|tests)(?:\.[a-z_]+)+", read(page).replace("README.md", ""))
    named = [name for name in dotted if not name.endswith((".py", ".sh", ".yaml"))]
    assert named or page in ("README.md", "steering/README.md")
    for name in sorted(set(named) | set(re.findall(r"python -m ([a-z_.]*[a-z_])", read(page))) - {"pytest"}):
        path = ROOT / name.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@each_text
def test_every_option_on_a_page_is_one_that_some_command_takes(page: str):
    ours = [command for command in commands(read(page)) if not command.startswith(("kubectl ", "docker "))]
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", "\n".join(ours)))
    sources = [path for folder in ("training", "service", "tests/benchmarks") for path in (ROOT / folder).rglob("*.py")]
    others = [ROOT / "training/pipeline.sh", ROOT / "tests/service/generated_requests.py"]
    code = "\n".join(path.read_text() for path in [*sources, *others])
    fields = {"--" + name.replace("_", "-") for name in re.findall(r"^    (\w+):", code, re.MULTILINE)}
    literal = set(re.findall(r"--[a-z][a-z0-9-]+", re.sub(r'"""[\s\S]*?"""', "", code)))
    assert used - fields - literal - {"--noconftest", "--target"} == set()


@each_text
def test_every_command_of_a_page_is_of_a_kind_that_is_checked(page: str):
    """Examples in a language of their own are run elsewhere."""
    blocks = code_blocks(read(page))
    lines = "".join(code for language, code in blocks if not language).replace("\\\n", " ").splitlines()
    assert [line for line in lines if not COMMAND.match(line)] == []
    languages = [language for language, _ in blocks if language]
    run = {"README.md": ["sh"], "service/README.md": ["python", "json"], "steering/README.md": ["python"]}
    assert languages == run.get(page, [])


@each_text
def test_every_path_and_link_of_a_page_leads_somewhere(page: str):
    text, folder = read(page), (ROOT / page).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        assert (folder / target).exists(), target
        headings = re.findall(r"^#+ (.+)$", ((folder / target) if target else ROOT / page).read_text(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
    code = " ".join(command for command in commands(text) if not command.startswith("kubectl "))
    paths = set(re.findall(r"(?<![\w./:~*-])(?:[\w.-]+/)+(?:[\w.*-]+\w)?(?![\w/])", code))
    ours = {path for path in paths if path.partition("/")[0] not in ("build", "application")} - MADE
    assert [path for path in sorted(ours) if not (any(ROOT.glob(path)) or any(folder.glob(path)))] == []


@each_page
def test_every_measured_figure_of_a_page_has_its_command(page: str):
    """An interval in a section without a command could be repeated by nobody."""
    measured = {
        title: text for title, text in sections(read(page)).items() if re.search(r"\[[-+]?[\d.]+, [-+]?[\d.]+\]", text)
    }
    assert measured or page in ("service/README.md",)
    for title, text in measured.items():
        assert re.search(r"python -m\s(training|tests\.benchmarks)\.|training/pipeline\.sh", text), title


def test_every_field_of_steering_and_every_setting_of_an_engine_is_explained():
    service, steering = read("service/README.md"), read("steering/README.md")
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", sections(service)["Ask it something"], re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(rows))) == set(SteeringRequest.model_fields)
    for name in ("branches", "cuda_graphs", "kv_cache_gib", "gpu_memory_share", "tensor_parallel_size", "compile"):
        assert name in EngineSettings.model_fields
        assert f"| `--engine.{name.replace('_', '-')}" in steering


@pytest.mark.parametrize(
    "pattern",
    [
        r"py" + r"pi\.org|python" + r"hosted|registry\.npm" + r"js|download\.py" + r"torch",
        r"\bpickle\.load|torch\.load\((?!.*weights_only=True)",
        r"trust_remote_code=True",
    ],
    ids=["a registry's address", "a pickle loaded", "remote code"],
)
def test_no_file_holds(pattern):
    found = subprocess.run(
        ["git", "grep", "-nIP", pattern, "--", ":!tests/test_repository.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == ""


def test_the_bundle_is_small_and_of_safe_formats():
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16 * 1024 * 1024
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".png"}


def test_the_bundled_artifact_is_as_artifacts_are_written(tmp_path):
    save_artifact(tmp_path / "artifact", load_artifact(BUNDLE / "artifact"))
    bundled, written = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (BUNDLE / "artifact", tmp_path / "artifact")
    )
    assert written == bundled


def test_the_bundled_artifact_passes_its_gate_and_names_its_presets():
    config = json.loads((BUNDLE / "artifact/config.json").read_text())
    passed, figures = alignment_gate(config["alignment"], config["faithfulness"])
    assert passed, figures
    assert max(config["faithfulness"][name] for name in FAITHFULNESS) < 0.3
    assert set(config["presets"]) == {"captions", "questions", "off", "paper_pope", "paper_chair"}


@pytest.mark.slow
def test_the_library_s_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [example] = [code for language, code in code_blocks(read("steering/README.md")) if language == "python"]
    assert "with steer(" in example
    exec(compile(example, "steering/README.md", "exec"), {})
    answer, counted = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "ASSISTANT: There is a" in answer
    positions, shift = re.findall(r"(?:positions|relative_shift)=([0-9.]+)", counted)
    assert int(positions) > 0
    assert float(shift) > 0

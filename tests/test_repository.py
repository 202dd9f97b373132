"""Promises the repository makes about itself: the README's tree, its commands, and what must not be in it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from steering.artifact import load_artifact, save_artifact
from training.alignment import FAITHFULNESS, alignment_gate

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "steering/README.md")
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("steering", "service", "training")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)
BUNDLE = ROOT / "training/miniature/bundle"


def tree_paths() -> list[str]:
    """Paths of the README's annotated file tree; two spaces of indentation are one level."""
    block = README.split("## Where things are")[1].split("```")[1]
    stack: list[str] = []
    paths = []
    for line in block.strip("\n").splitlines():
        names = line.split("  #")[0]
        depth = (len(names) - len(names.lstrip())) // 2
        for name in names.split():
            del stack[depth:]
            stack.append(name.rstrip("/"))
            paths.append("/".join(stack))
    return paths


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    paths = tree_paths()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [module for module in MODULES if module not in paths] == []


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", README))
    assert used
    assert used <= targets


def test_every_module_named_in_the_readme_can_be_asked_for_help():
    named = set(re.findall(r"python -m ((?:training|service)[a-z_.]*)", README))
    assert named
    for name in sorted(named):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


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


def test_the_readme_s_library_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "with steer(" in block)
    exec(compile(example, "README.md", "exec"), {})
    answer, counted = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "ASSISTANT: There is a" in answer
    positions, shift = re.findall(r"[a-z]+=([0-9.]+)", counted)
    assert int(positions) > 0
    assert float(shift) > 0

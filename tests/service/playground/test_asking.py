"""Asking on the page, in Chromium against the real HTTP side: streams, the dial, history, and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

from service.errors import ApiError
from service.http.pages.playground import FOLDER
from steering.engines.base import Health
from tests.service.gateways import running_gateway
from tests.service.playground.conftest import CHROMIUM, KEY, QUOTA_KEY, STEERED, PageServer

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]
OpenPage = Callable[..., Page]


def words(page: Page, answer: str):
    return page.locator(f"#{answer} .words")


def ask(page: Page) -> None:
    page.locator("#go").click()


def ask_to_the_end(page: Page) -> None:
    ask(page)
    expect(page.locator("#difference")).to_be_visible()


def steering_of(front: PageServer) -> list[float | None]:
    """Strength of each job so far; None: off."""
    asked = [job.steering.settings for job in front.model.jobs]
    return [None if one.enabled is False else one.strength for one in asked]


def test_two_answers_side_by_side_and_a_turn_of_the_dial(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    expect(page.locator("#status")).to_have_text("tiny")
    page.get_by_role("button", name="A drawing of").nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="A drawing of").nth(1)).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Question").fill("What is there?")
    front.model.gate.clear()
    page.keyboard.press("Control+Enter")
    for answer in ("plain", "steered"):
        expect(words(page, answer)).to_have_text("There is a")
        expect(page.locator(f"#{answer}")).to_have_attribute("aria-busy", "true")
    assert page.locator("#announcer").text_content() == "Asking twice.", "words are not read out one by one"
    front.model.gate.set()
    expect(page.locator("#difference")).to_have_text("Only plain: “a star in blue”.")
    expect(page.locator("#announcer")).to_have_text("Both answers are there. Only plain: “a star in blue”.")
    expect(page.locator("#plain mark")).to_have_text("[only here: a star in blue]")
    expect(page.locator("#steered mark")).to_have_count(0)
    expect(words(page, "steered")).to_have_text(STEERED)
    expect(page.locator("#steered .facts")).to_contain_text("6 tokens")
    page.locator("#steered summary").click()
    expect(page.locator("#steered dl")).to_contain_text("25 %")
    assert sorted(map(str, steering_of(front))) == ["1.0", "None"]
    assert {job.turns[0].parts[1] for job in front.model.jobs} == {"What is there?"}

    page.get_by_label("Strength").press("ArrowLeft")
    expect(page.locator("#strength-shown")).to_have_text("0.95")
    expect(page.locator("#history-list li")).to_have_count(2)
    assert steering_of(front)[2:] == [0.95], "the plain answer stays"


def test_it_is_the_same_behind_the_gateway(open_page: OpenPage, front: PageServer) -> None:
    with running_gateway(front.port) as port:
        page = open_page(f"http://127.0.0.1:{port}/")
        front.model.gate.clear()
        ask(page)
        expect(words(page, "steered")).to_have_text("There is a")
        front.model.gate.set()
        expect(page.locator("#difference")).to_have_text("Only plain: “a star in blue”.")
        page.close()


def test_history_is_kept_here_and_opened_again(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    expect(page.locator("#status")).to_have_text("tiny")
    page.get_by_role("button", name="A drawing of").nth(2).click()
    ask_to_the_end(page)
    page.reload()
    expect(page.locator("#plain .placeholder")).to_be_visible()
    page.locator("#history-list button").click()
    expect(words(page, "plain")).to_contain_text("There is a circle")
    expect(page.locator("#plain mark")).to_have_count(1)
    expect(page.get_by_role("button", name="A drawing of").nth(2)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#answers")).to_be_focused()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#history")).to_be_hidden()
    assert page.evaluate("localStorage.getItem('vlsae-history')") is None


def test_the_key_is_asked_for_and_stays_in_the_tab(open_page: OpenPage, keyed_front: PageServer) -> None:
    keyed_front.model.reset()
    page = open_page(keyed_front.url)
    expect(page.locator("#key-button")).to_be_visible()
    ask(page)
    dialog = page.get_by_role("dialog")
    for wrong, said in (("sk-wrong", "answers to those who have a key"), ("sk-wrong too", "not valid")):
        expect(dialog).to_contain_text(said)
        page.get_by_label("API key").fill(wrong)
        page.keyboard.press("Enter")
    expect(dialog).to_contain_text("not valid")
    page.get_by_label("API key").fill(KEY)
    dialog.get_by_role("button", name="Use it").click()
    expect(page.locator("#difference")).to_be_visible()
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
    assert KEY not in page.locator("#snippet").inner_text()
    other = page.context.new_page()
    other.goto(keyed_front.url)
    assert other.evaluate("sessionStorage.length") == 0


def test_a_quota_says_when_to_come_back(open_page: OpenPage, keyed_front: PageServer) -> None:
    """Two are asked at once; one of them is too many."""
    page = open_page(keyed_front.url)
    page.evaluate("key => sessionStorage.setItem('vlsae-key', key)", QUOTA_KEY)
    ask(page)
    problem = page.locator(".answer .problem")
    expect(problem).to_have_count(1)
    expect(problem).to_contain_text("quota for this minute is used up")
    again = problem.get_by_role("button")
    expect(again).to_be_disabled()
    expect(again).to_contain_text("Ask again in ")
    expect(page.locator("#announcer")).to_contain_text("quota")


def test_too_much_to_do_is_said_plainly_and_asked_again(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    front.model.refusal = ApiError("overloaded", "all places are taken", retry_after_s=1)
    ask(page)
    problem = page.locator("#steered .problem")
    expect(problem).to_contain_text("too much to do at the moment. (all places are taken)")
    front.model.refusal = None
    expect(problem.get_by_role("button")).to_be_enabled()
    problem.get_by_role("button").click()
    expect(words(page, "steered")).to_have_text(STEERED)


@pytest.mark.parametrize("how", ["an error", "a lost connection"])
def test_a_stream_that_breaks_keeps_what_had_come(open_page: OpenPage, front: PageServer, how: str) -> None:
    page = open_page(front.url)
    front.model.gate.clear()
    ask(page)
    for answer in ("plain", "steered"):
        expect(words(page, answer)).to_have_text("There is a")
    if how == "an error":
        front.model.error = ApiError("engine_unavailable", "the model was lost")
    front.lines.broken = how == "a lost connection"
    front.model.gate.set()
    for answer in ("plain", "steered"):
        expect(page.locator(f"#{answer} .problem")).to_contain_text("broke off; this is what had come.")
        expect(words(page, answer)).to_have_text("There is a")
    expect(page.locator("#steered .problem")).to_contain_text("the model was lost" if how == "an error" else "")
    expect(page.locator("#history")).to_be_hidden()
    front.lines.broken, front.model.error = False, None
    page.locator("#steered").get_by_role("button", name="Ask again").click()
    expect(words(page, "plain")).to_contain_text("star in blue")


def test_stop_ends_it_and_keeps_the_words(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    front.model.gate.clear()
    ask(page)
    expect(words(page, "plain")).to_have_text("There is a")
    expect(words(page, "steered")).to_have_text("There is a")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#plain .problem")).to_contain_text("Stopped")
    expect(words(page, "plain")).to_have_text("There is a")
    expect(page.locator("#go")).to_be_enabled()


def test_a_slow_network_shows_that_something_goes_on(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    expect(page.locator("#status")).to_have_text("tiny")
    slow = {"offline": False, "latency": 2500, "downloadThroughput": 20_000, "uploadThroughput": 20_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    ask(page)
    expect(page.locator("#plain .progress")).to_contain_text("waiting for the first word")
    expect(page.locator("#plain .progress")).to_contain_text(" s")
    expect(words(page, "plain")).to_contain_text("There is a circle")


def test_a_service_that_is_not_there_is_said_and_looked_for_again(open_page: OpenPage, front: PageServer) -> None:
    page = open_page(front.url)
    expect(page.locator("#status")).to_have_text("tiny")
    page.route("**/openapi.json", lambda route: route.abort("connectionrefused"))
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    ask(page)
    expect(page.locator("#plain .problem")).to_contain_text("The service does not answer. Is it running")
    page.reload()
    expect(page.locator("#notice")).to_contain_text("The service does not answer")
    page.unroute_all()
    page.get_by_role("button", name="Look again").click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("tiny")


def test_a_model_that_loads_is_waited_for(open_page: OpenPage, front: PageServer) -> None:
    alive = front.model.health
    front.model.health = ApiError("engine_unavailable", "the model loads")
    try:
        page = open_page(front.url)
        expect(page.locator("#notice")).to_contain_text("This page looks again by itself.")
    finally:
        front.model.health = alive
    assert isinstance(alive, Health)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_page_without_its_service_says_so(browser: Browser) -> None:
    page = browser.new_page()
    page.goto((FOLDER / "index.html").as_uri())
    expect(page.get_by_text("This page needs the service it belongs to.")).to_be_visible()
    expect(page.locator("#main")).to_be_hidden()
    page.close()


def test_markup_in_an_answer_is_text(open_page: OpenPage, front: PageServer) -> None:
    markup = "<img src=x onerror=alert(1)><b>bold</b> & <script>alert(2)</script>"
    front.model.texts = {False: markup, True: markup}
    page = open_page(front.url)
    ask_to_the_end(page)
    expect(words(page, "steered")).to_have_text(markup)
    assert page.locator("#answers img[src=x], #answers b").count() == 0

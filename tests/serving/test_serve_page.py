"""The page that the server has, in headless Chromium."""

import contextlib
import time

import httpx2
import pytest

from tests.support.browser_pages import contrast
from tests.support.echo_server import CALL, ORDER, eventually, serving
from tests.support.rows import PROBES
from tuner.data.tool_call import format_call
from tuner.inference import judging
from tuner.inference.probes import load_questions


@pytest.fixture(scope="module")
def two(echo):
    """A server of the echo as tuned and base, whose page asks for answers of 200 tokens: of letters, here."""
    echo[0].disable_adapter = contextlib.nullcontext
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "MAX_NEW_TOKENS", 200)
        with serving(echo, names=("tuned", "base"), probes=load_questions("probes.json")) as server:
            yield server


@pytest.fixture
def visit(browser, two):
    """Open a server's page; any error in it, and any request to another site, fails the test."""
    troubles, requests, contexts = [], [], []

    def visit(server=two, expected=(), **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)

        def note(text):
            if not any(words in text for words in expected):
                troubles.append(text)

        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("dialog", lambda dialog: (note(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: requests.append(r.url) if not r.url.startswith(server.url) else None)
        page.goto(server.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []
    assert requests == ["data:,"] * len(requests)


def columns(page, notes):
    """Return the answers that the page shows once the notes below them are these."""
    for number, note in enumerate(notes):
        page.locator("section").nth(number).get_by_text(note, exact=True).wait_for()
    assert page.locator("section h2").all_inner_texts() == ["tuned", "base"][: len(notes)]
    assert page.locator(".answer[aria-live=polite][aria-busy=false]").count() == len(notes)
    return page.locator(".answer").all_inner_texts()


@pytest.mark.browser
def test_enter_asks_both_and_calls_are_shown_as_calls(visit, two):
    page = visit()
    page.locator("section").nth(1).wait_for()
    page.locator("#question:focus").wait_for()
    page.keyboard.type("Привет, мир!")  # the question has the focus
    page.keyboard.press("Enter")
    assert columns(page, ["13 tokens, text"] * 2) == ["Привет, мир!"] * 2
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(f"Вот: {ORDER}")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("a call").nth(1).wait_for()
    call = 'get_order({"номер": 5, "note": "a \\"b\\" <c>"})'
    assert page.locator("code").all_inner_texts() == [call] * 2
    assert page.locator(".answer").all_inner_texts() == [f"Вот: {call}"] * 2
    page.keyboard.press("Control+a")
    page.locator("#question").fill("я" * 300)
    page.keyboard.press("Enter")
    assert columns(page, ["200 tokens, cut off"] * 2) == ["я" * 200] * 2
    assert not page.locator("#hint").is_visible()


@pytest.mark.browser
def test_a_question_waits_for_the_models_and_asks_for_them_again_if_there_were_none(visit):
    page = visit(expected=["ERR_FAILED"])
    asked = []
    page.route("**/v1/models", lambda route: (asked.append(route), time.sleep(0.5), route.continue_()))
    page.reload()
    page.locator("#question:focus").wait_for()
    page.keyboard.type("ab")
    page.keyboard.press("Enter")
    assert columns(page, ["3 tokens, text"] * 2) == ["ab"] * 2
    assert len(asked) == 1
    page.unroute_all()
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.locator("#trouble", has_text="cannot reach the server").wait_for()
    page.unroute_all()
    page.locator("#question:focus").wait_for()
    page.keyboard.type("cd")
    page.keyboard.press("Enter")
    assert columns(page, ["3 tokens, text"] * 2) == ["cd"] * 2
    assert not page.locator("#trouble").is_visible()


@pytest.mark.browser
def test_the_six_probes_are_buttons_in_the_order_of_the_tab_key(visit):
    page = visit()
    page.locator("section").nth(1).wait_for()
    seen = []
    for _ in range(2 + len(PROBES)):
        seen.append(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
        style = "getComputedStyle(document.activeElement)"
        assert page.evaluate(f"{style}.outlineStyle + parseInt({style}.outlineWidth)") == "solid3"
        page.keyboard.press("Tab")
    probes = [probe for probe, _ in PROBES]
    assert seen == ["question", "Ask", *probes]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator(".answer", has_text=probes[-1]).nth(1).wait_for()
    assert page.locator("#question").input_value() == probes[-1]


@pytest.mark.browser
@pytest.mark.parametrize(
    "hostile",
    ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</div></section>&amp;", "${alert(1)}"],
)
def test_what_a_model_writes_is_only_text(visit, hostile):
    page = visit()
    page.locator("section").nth(1).wait_for()
    before = page.locator("*").count()
    page.locator("#question").fill(hostile)
    page.keyboard.press("Enter")
    page.get_by_text(", text").nth(1).wait_for()
    assert page.locator(".answer").all_inner_texts() == [hostile] * 2
    assert page.locator("*").count() == before
    page.locator("#question").fill(format_call("f", {"a": hostile}))
    page.keyboard.press("Enter")
    page.get_by_text("a call").nth(1).wait_for()
    assert [hostile in text for text in page.locator("code").all_inner_texts()] == [True, True]
    assert page.locator("*").count() == before + 2


@pytest.mark.browser
def test_the_next_question_breaks_off_the_one_before(visit, two, echo, monkeypatch):
    page = visit()
    page.locator("section").nth(1).wait_for()
    with monkeypatch.context() as patch:
        patch.setattr(echo[0], "delay", 0.1)
        page.locator("#question").fill("я" * 70)  # seven seconds, twice
        page.keyboard.press("Enter")
        page.locator(".answer", has_text="яяя").first.wait_for()
        assert page.locator(".answer[aria-busy=true]").count() == 2
        page.locator("#question").fill("ab")
        page.keyboard.press("Enter")
        started = time.monotonic()
        assert columns(page, ["3 tokens, text"] * 2) == ["ab"] * 2
        assert time.monotonic() - started < 4
    eventually(lambda: not two.generations)
    assert page.locator(".answer").all_inner_texts() == ["ab"] * 2
    assert page.locator(".trouble").filter(visible=True).count() == 0


@pytest.mark.browser
def test_what_goes_wrong_is_shown_below_the_answer(visit, echo):
    refused = ("status of 400", "status of 429", "ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET")
    with serving(echo, names=("tuned", "base")) as server:
        page = visit(server, refused)
        page.locator("section").nth(1).wait_for()
        page.locator("#question").fill("中" * 4000)
        page.keyboard.press("Enter")
        page.locator("small.trouble", has_text="the context of").nth(1).wait_for()
        page.locator("#question").fill("ab")
        page.keyboard.press("Enter")
        assert columns(page, ["3 tokens, text"] * 2) == ["ab"] * 2
        assert page.locator(".trouble").filter(visible=True).count() == 0
    page.keyboard.press("Enter")
    page.locator("small.trouble", has_text="cannot reach the server").nth(1).wait_for()
    assert page.locator(".answer").all_inner_texts() == ["", ""]


@pytest.mark.browser
def test_the_page_asks_for_the_key(visit, echo):
    with serving(echo, "word", ["tuned"]) as server:
        page = visit(server, ["status of 401"])
        page.locator("#trouble", has_text="API key is missing or wrong").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("sword")
        with page.expect_response(lambda response: response.status == 401):
            page.keyboard.press("Enter")
        page.locator("#trouble", has_text="API key is missing or wrong").wait_for()
        page.locator("#key").fill("цщкв")  # typed on a Russian keyboard: no header can carry it
        page.keyboard.press("Enter")
        assert page.locator("#key:invalid").is_visible()
        page.locator("#key").fill("word")
        page.keyboard.press("Enter")
        page.locator("section").wait_for()
        assert page.locator("#trouble, #unlock").filter(visible=True).count() == 0
        page.locator("#question:focus").wait_for()
        page.keyboard.type("ab")
        page.keyboard.press("Enter")
        assert columns(page, ["3 tokens, text"]) == ["ab"]
        assert page.locator("#hint").is_visible(), "one model: it says how to see the base"
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_the_page_may_run_and_load_nothing_but_its_own(two):
    answer = httpx2.get(two.url)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith(
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in answer.text
    assert "MAX_NEW_TOKENS" not in answer.text


@pytest.mark.browser
def test_a_phone_scrolls_only_downwards(visit):
    page = visit(viewport={"width": 360, "height": 740})
    page.locator("#question").fill("Ж" * 70)
    page.keyboard.press("Enter")
    assert columns(page, ["71 tokens, text"] * 2) == ["Ж" * 70] * 2
    page.locator("#question").fill(format_call("f", {"a": "Ж" * 20}))
    page.keyboard.press("Enter")
    page.get_by_text("a call").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    left, right = (page.locator("section").nth(n).bounding_box() for n in (0, 1))
    assert left["x"] == right["x"], "one above the other"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    page = visit(color_scheme=scheme, expected=["status of 400"])
    page.locator("section").nth(1).wait_for()
    page.locator("#question").fill(f"a {CALL}")
    page.keyboard.press("Enter")
    page.get_by_text("a call").nth(1).wait_for()
    for selector in (
        "h1",
        "h2",
        "label",
        "input",
        "#ask button",
        "#probes button",
        ".answer",
        "code",
        "small",
    ):
        ratio, light_on_dark = contrast(page, selector)
        assert ratio >= 4.5, selector
        assert light_on_dark == ((scheme == "dark") != (selector == "#ask button")), selector
    page.locator("#question").fill("中" * 4000)
    page.keyboard.press("Enter")
    page.locator("small.trouble").nth(1).wait_for()
    assert contrast(page, "small.trouble")[0] >= 4.5
    left, right = (page.locator("section").nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"], "side by side"


@pytest.mark.browser
def test_without_javascript_it_says_so(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("noscript p").is_visible()

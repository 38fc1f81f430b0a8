"""The page that the server has, in headless Chromium."""

import contextlib
import html.parser
import json
import time
from pathlib import Path

import httpx2
import pytest

from tests.support.browser_pages import contrast
from tests.support.echo_server import CALL, ORDER, eventually, serving
from tests.support.rows import PROBES, row
from tuner.data.tool_call import format_call
from tuner.inference.probes import load_questions
from tuner.serving.history import render_history
from tuner.serving.page import read_page


@pytest.fixture(scope="module")
def two(echo):
    """A server of the echo as tuned and base; here a token is a letter."""
    echo[0].disable_adapter = contextlib.nullcontext
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
    assert columns(page, ["256 tokens, cut off"] * 2) == ["я" * 256] * 2
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


class Data(html.parser.HTMLParser):
    """What stands in a page's data-page, and the names of its elements, as a parser of HTML reads it."""

    def __init__(self, text):
        super().__init__()
        self.value, self.names = None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.value = dict(attributes).get("data-page", self.value)


def function(name, description):
    return {"type": "function", "function": {"name": name, "description": description}}


HOSTILE = (
    """</script><script>alert(1)</script> "'><img src=x onerror=alert(1)> &amp; data-page="" \u2028 --> \\"""
)


def write_rows(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_questions(path)


def test_what_probes_say_is_data_and_the_script_is_always_the_same(tmp_path):
    rows = [row(HOSTILE, HOSTILE, f"{HOSTILE} {number}", "Да." * number) for number in (1, 400)]
    rows[0]["tools"] = [function(HOSTILE, HOSTILE), function("f", "two\nlines")]
    page, policy = read_page(write_rows(tmp_path / "probes.json", *rows))
    bare, bare_policy = read_page()
    data, bare_data = Data(page), Data(bare)
    assert (policy, data.names) == (bare_policy, bare_data.names)
    value, bare_value = json.loads(data.value), json.loads(bare_data.value)
    assert [probe["messages"] for probe in value["probes"]] == [one["messages"][:3] for one in rows]
    assert [probe["max_tokens"] for probe in value["probes"]] == [256, 600], "half a token a letter"
    assert [tool["function"]["name"] for tool in value["tools"]] == [HOSTILE, "f"]
    assert value["tools"][0]["function"]["description"] == HOSTILE
    assert (bare_value["probes"], len(bare_value["tools"]), bare_value["max_tokens"]) == ([], 1, 256)
    assert "get_sensitive_data" not in bare


def test_conversations_go_through_the_page_and_the_server_as_they_stand_in_the_file():
    for path in sorted(Path("examples/bank").glob("*.jsonl")):
        questions = load_questions(path)
        value = json.loads(Data(read_page(questions)[0]).value)
        assert value["tools"] == questions.tools
        rendered = [render_history(probe["messages"]) for probe in value["probes"]]
        assert rendered == [
            [{k: v for k, v in m.items() if k != "weight"} for m in c] for c in questions.conversations
        ]
    assert any(message["role"] == "tool" for conversation in rendered for message in conversation)


def asked_by(page, act):
    """Return the bodies, by model, of the two requests that something on the page makes."""
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    act()
    eventually(lambda: page.evaluate("1") and len(bodies) == 2)
    page.locator(".answer[aria-busy=false]").nth(1).wait_for()
    return {body.pop("model"): body for body in bodies}


@pytest.mark.browser
def test_a_probe_is_sent_whole_and_an_edited_question_by_itself(visit, echo, tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": {"b": [1]}}'}}
    asked = [
        {"role": "user", "content": "Сколько?"},
        {"role": "assistant", "content": "Смотрю.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "<5> & 7"},
    ]
    answer = {"role": "assistant", "content": "Пять."}
    last = {"role": "user", "content": "А вчера?\n<b>"}
    probes = write_rows(
        tmp_path / "probes.json",
        {"messages": [*asked, answer], "tools": [function("f", "g")]},
        {"messages": [*asked, answer, last, answer]},
    )
    with serving(echo, names=("tuned", "base"), probes=probes) as server:
        page = visit(server)
        page.locator("section").nth(1).wait_for()
        buttons = page.locator("#probes button")
        assert buttons.all_inner_texts() == ["Сколько?\n3 messages", "А вчера? <b>\n5 messages"]
        sent = asked_by(page, buttons.first.click)
        assert sent["tuned"] == sent["base"]
        assert sent["tuned"]["tools"] == probes.tools
        assert (sent["tuned"]["max_tokens"], sent["tuned"]["stream"]) == (256, True)
        assert render_history(sent["tuned"]["messages"]) == probes.conversations[0]
        assert page.locator("#question").input_value() == "Сколько?"
        page.locator("summary").click()
        shown = 'user: Сколько?\nassistant: Смотрю. f({"a": {"b": [1]}})\ntool: <5> & 7'
        assert page.locator("pre").inner_text() == shown
        again = asked_by(page, page.get_by_role("button", name="Ask").click)
        assert again == sent, "what is not edited is asked once more"
        second = asked_by(page, buttons.nth(1).click)
        assert render_history(second["base"]["messages"]) == probes.conversations[1]
        page.locator("#question").press("End")
        assert page.locator("#sent").is_visible()
        page.keyboard.type("!")
        assert not page.locator("#sent").is_visible()
        edited = asked_by(page, lambda: page.keyboard.press("Enter"))
        assert edited["tuned"]["messages"] == [{"role": "user", "content": "А вчера? <b>!"}]


@pytest.mark.browser
def test_probes_and_names_of_tools_are_only_text(visit, echo, tmp_path):
    probes = write_rows(tmp_path / "probes.json", row(HOSTILE, format_call(HOSTILE, {})))
    with serving(echo, names=("tuned", "base"), probes=probes) as server:
        page = visit(server)
        page.locator("section").nth(1).wait_for()
        assert page.locator("#probes button").all_inner_texts() == [HOSTILE]
        before = page.locator("*").count()
        sent = asked_by(page, page.locator("#probes button").click)
        assert sent["tuned"]["tools"][0]["function"]["name"] == HOSTILE
        assert page.locator("*").count() == before
        assert page.locator(".answer").first.inner_text() == HOSTILE


@pytest.mark.browser
def test_without_probes_there_are_no_buttons_and_calls_are_still_shown_as_calls(visit, echo):
    with serving(echo, names=("tuned", "base")) as server:
        page = visit(server)
        page.locator("section").nth(1).wait_for()
        assert page.locator("button").filter(visible=True).all_inner_texts() == ["Ask"]
        page.locator("#question").fill(format_call("anything", {"a": 1}))
        page.keyboard.press("Enter")
        page.get_by_text("a call").nth(1).wait_for()
        assert page.locator("code").all_inner_texts() == ['anything({"a": 1})'] * 2


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

"""The page of labels: every token as text, in order, with its mark; and the page in a real browser."""

import re
from html.parser import HTMLParser

import pytest

from tests.support.browser_pages import contrast
from tuner.data import label_page

VOID = ("meta", "input")
HOSTILE = "<script>alert(1)</script>"


def row(line, call, *pieces, warnings=()):
    """A row of tokens, one a piece: "*" before a piece marks it as trained, "<…>" is a special token."""
    pieces = [(p.removeprefix("*"), p.startswith("*"), bool(re.fullmatch(r"\*?<\w+>", p))) for p in pieces]
    return {"line": line, "call": call, "pieces": pieces, "warnings": list(warnings)}


ROWS = [
    row(1, True, "<bos>", "Покажи", " мой", " баланс", "\n", '*<tool_call name="x"', "*/>", "*<end_of_turn>"),
    row(2, False, "<bos>", "Привет", "!", "\n", "*Здравствуйте", "*!", "*<end_of_turn>"),
    row(4, True, "<bos>", HOSTILE, "</article>", "&amp;", "\"'", "*</p></main>", "*x" + HOSTILE, "*x", "*y"),
    row(5, False, "\n", "\n\n", " \n  ", "*a\n", "*\n", "*b"),
    row(7, False, "Ж" * 400, " " * 300, "*" + "long_" * 100, "*" + "\u00a0" * 90),
    row(8, True, "", "*", "<img src=x onerror=alert(1)>", "*<img src=http://127.0.0.1:9/x>", '*" onclick="a'),
    row(9, False, *["слово "] * 30, *["*ответ "] * 20, warnings=["a warning"]),
    row(11, False, "<bos>", "Спасибо", "*Пожалуйста", "*<end_of_turn>"),
]
ROWS[2]["warnings"] = [HOSTILE, "the same question as in line 1"]


class Page(HTMLParser):
    """Collects what a browser would show: tokens [(text, trained, special), …] of each article, and texts."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.articles, self.texts = [], [], [], {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "article":
            self.articles.append([])
        elif self.open[-2:] == ["article", "p"]:
            self.articles[-1].append(["", tag == "b", dict(attributes).get("class") == "special"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, text):
        if self.open[-3:-1] == ["article", "p"] or self.open[-4:-2] == ["article", "p"]:
            self.articles[-1][-1][0] += text
        elif self.open and self.open[-1] != "html":
            self.texts.setdefault(self.open[-1], []).append(text)


def write(folder, rows, title="examples.json"):
    path = folder / "labels.html"
    label_page.write(path, title, rows)
    return path


def tokens(page):
    return [[tuple(token) for token in article] for article in page.articles]


def test_all_tokens_are_there_in_order_as_text(tmp_path):
    page = Page(write(tmp_path, ROWS).read_text("utf-8"))
    assert tokens(page) == [row["pieces"] for row in ROWS]


def test_nothing_of_a_row_or_a_title_becomes_markup(tmp_path):
    page = Page(write(tmp_path, ROWS, title=f"</title>{HOSTILE}").read_text("utf-8"))
    plain = Page(write(tmp_path, [ROWS[0]] * len(ROWS)).read_text("utf-8"))
    inner = ("b", "span", "i", "ul", "li", "article")  # what rows differ in
    assert [t for t in page.tags if t[0] not in inner] == [t for t in plain.tags if t[0] not in inner]
    assert page.texts["title"] == page.texts["h1"] == [f"</title>{HOSTILE}"]
    assert page.texts["li"] == [warning for row in ROWS for warning in row["warnings"]]
    assert {name for tag, attributes in page.tags if tag in inner for name in attributes} == {
        "class", "tabindex", "data-tokens",
    }  # fmt: skip


def test_the_page_forbids_all_loading(tmp_path):
    page = Page(write(tmp_path, ROWS).read_text("utf-8"))
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    assert not [a for _, a in page.tags if {"src", "href"} & a.keys()]


@pytest.mark.parametrize("hidden", ["\0", "\r", "\t", "\x7f", "\x85", "\u202e", "\u200b", "\u2028", "\ud83d"])
def test_what_cannot_be_seen_is_replaced(tmp_path, hidden):
    rows = [row(1, True, f"a{hidden}b\n", "*😀 ё№", warnings=[f"a{hidden}b"])]
    source = write(tmp_path, rows, title=f"a{hidden}b").read_bytes().decode("utf-8")
    assert hidden not in source
    page = Page(source)
    assert tokens(page) == [[("a\ufffdb\n", False, False), ("😀 ё№", True, False)]]
    assert page.texts["li"] == page.texts["h1"] == ["a\ufffdb"]


def test_heads_and_totals(tmp_path):
    page = Page(write(tmp_path, ROWS).read_text("utf-8"))
    assert page.texts["h2"] == [
        "line 1",
        "line 2",
        "line 4",
        "line 5",
        "line 7",
        "line 8",
        "line 9",
        "line 11",
    ]
    assert page.texts["small"] == [
        "call, 8 tokens, 3 trained", "general, 7 tokens, 3 trained", "call, 9 tokens, 4 trained",
        "general, 6 tokens, 3 trained", "general, 4 tokens, 2 trained", "call, 5 tokens, 3 trained",
        "general, 50 tokens, 20 trained", "general, 4 tokens, 2 trained",
    ]  # fmt: skip
    assert "8 rows, 93 tokens, 40 trained tokens" in page.texts["p"]
    page = Page(write(tmp_path, []).read_text("utf-8"))
    assert "0 rows, 0 tokens, 0 trained tokens" in page.texts["p"]


def test_rows_are_streamed_and_an_earlier_page_stays_until_the_end(tmp_path):
    path = tmp_path / "labels.html"
    path.write_text("earlier")

    def rows():
        for line in range(1, 1201):
            yield row(line, False, "x" * 1000, "*y")
            assert path.read_text() == "earlier"
            (aside,) = tmp_path.glob(".labels.html.*.part/new")
            assert aside.stat().st_size > (line - 20) * 1000, "rows are held back"

    label_page.write(path, "many", rows())
    assert list(tmp_path.iterdir()) == [path]
    assert "1,200 rows, 2,400 tokens, 1,200 trained tokens" in Page(path.read_text("utf-8")).texts["p"]


def test_os_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError):
        label_page.write(tmp_path / "nowhere" / "labels.html", "title", ROWS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        label_page.write(tmp_path / "folder", "title", ROWS)


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of ROWS with the given context settings; whatever it complains of fails the test."""
    url, troubles, requests, contexts = write(tmp_path, ROWS).as_uri(), [], [], []

    def visit(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []
    assert requests == [url] * len(contexts)


def lines(page):
    return [
        int(text.removeprefix("line ")) for text in page.locator("article:visible h2").all_text_contents()
    ]


def pressed(page):
    return page.locator("button[aria-pressed=true]").all_inner_texts()


ALL = [1, 2, 4, 5, 7, 8, 9, 11]
FILTERS = [("All", ALL), ("Calls", [1, 4, 8]), ("General", [2, 5, 7, 9, 11]), ("With warnings", [4, 9])]
LONGEST = [9, 4, 1, 2, 5, 8, 7, 11]


@pytest.mark.browser
@pytest.mark.parametrize("by_key", [False, True], ids=["mouse", "keys"])
def test_filters_and_longest(visit, by_key):
    page = visit()
    names = [*(name for name, _ in FILTERS), "Longest"]

    def press(name):
        if by_key:
            page.keyboard.press(str(names.index(name) + 1))
        else:
            page.get_by_role("button", name=name, exact=True).click()

    for name, expected in [*FILTERS[1:], FILTERS[0]]:
        press(name)
        assert lines(page) == expected
        assert pressed(page) == [name]
        assert page.get_by_role("status").inner_text() == f"{len(expected)} of 8 rows"
    press("Longest")
    assert lines(page) == LONGEST
    press("General")
    assert lines(page) == [9, 2, 5, 7, 11]
    assert pressed(page) == ["General", "Longest"]
    press("Longest")
    assert lines(page) == [2, 5, 7, 9, 11]
    assert pressed(page) == ["General"]


@pytest.mark.browser
def test_search(visit):
    page = visit()
    for wanted, expected in [
        ("ПРИВЕТ", [2]), ("мой баланс", [1]), ("alert(1)", [4, 8]), ("trained", []), ("line", []), ("", ALL),
    ]:  # fmt: skip
        page.keyboard.press("/")
        page.keyboard.press("Control+a")
        page.keyboard.press("Delete")
        page.keyboard.type(wanted)  # "alert(1)" holds a key of a filter
        assert lines(page) == expected, wanted
        assert page.get_by_role("status").inner_text() == f"{len(expected)} of 8 rows"
        assert pressed(page) == ["All"]
        page.locator("h1").click()
        page.evaluate("document.activeElement.blur()")


# Playwright presses no keys of a Russian keyboard.
RUSSIAN_KEY = "key => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"
UNCOVERED = """() => {
  const focused = document.activeElement, {left, top, bottom} = focused.getBoundingClientRect();
  return [top + 3, bottom - 3].every(y => focused.contains(document.elementFromPoint(left + 20, y)));
}"""


@pytest.mark.browser
def test_keys_go_from_row_to_row(visit):
    page = visit(viewport={"width": 800, "height": 500})
    page.keyboard.press("2")
    seen = []
    for key in ["j", "ArrowDown", "о", "j", "ArrowUp", "k", "л", ".", "ArrowDown", "/"]:
        page.evaluate(RUSSIAN_KEY, key) if key in "ол." else page.keyboard.press(key)
        seen.append(page.evaluate("document.activeElement.querySelector('h2')?.textContent ?? 'search'"))
        assert page.evaluate(UNCOVERED), "the focused row is off the screen or behind a bar"
        style = "getComputedStyle(document.activeElement)"
        assert page.evaluate(f"{style}.outlineStyle + parseInt({style}.outlineWidth)") == "solid3"
    assert seen == [
        "line 1",
        "line 4",
        "line 8",
        "line 8",
        "line 4",
        "line 1",
        "line 1",
        "search",
        "line 1",
        "search",
    ]
    assert page.get_by_role("searchbox").input_value() == "", "the key that leads there is typed, too"
    foot = page.locator("footer").inner_text()
    assert all(key in foot for key in ["1–5", "/", "j/k", "↓/↑"])


@pytest.mark.browser
def test_no_row_covers_the_bars(visit):
    page = visit(viewport={"width": 800, "height": 500})
    for y in range(100, 500, 40):
        page.evaluate("y => scrollTo(0, y)", y)
        assert page.evaluate("""[...document.querySelectorAll("button, input, footer")].every(bar => {
            const {left, top} = bar.getBoundingClientRect();
            return document.elementFromPoint(left + 20, top + 9) === bar;
        })""")


@pytest.mark.browser
def test_newlines_break_and_are_marked(visit):
    page = visit()
    text = page.locator("article", has_text="line 5").locator(".text")
    assert text.inner_text().count("\n") >= 6
    assert text.bounding_box()["height"] > 6 * 20
    mark = "getComputedStyle(document.querySelector('article i'), '::before').content"
    assert page.evaluate(mark) == '"⏎"'
    assert page.locator("article", has_text="line 8").locator("b").first.bounding_box()["width"] > 5  # empty


@pytest.mark.browser
def test_without_javascript(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("article").filter(visible=True).count() == 8
    assert page.locator("button").filter(visible=True).count() == 0
    assert page.locator("#totals").inner_text() == "8 rows, 93 tokens, 40 trained tokens"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_marks(visit, scheme):
    page = visit(color_scheme=scheme)
    texts = ["b:not(.special)", "span:not(.special)", "b.special", "span.special", "small", "li", "h2"]
    for selector in [*(f"article {text}" for text in texts), "#totals", "#count", "footer", "button + button",
                     "button[aria-pressed=true]", "input", "h1"]:  # fmt: skip
        ratio, light_on_dark = contrast(page, selector)
        assert ratio >= 4.5, selector
        assert light_on_dark == ((scheme == "dark") != ("pressed" in selector)), selector
    weight = "selector => Number(getComputedStyle(document.querySelector(selector)).fontWeight)"
    assert page.evaluate(weight, "article b") >= 600 > page.evaluate(weight, "article span")
    assert page.evaluate("getComputedStyle(document.querySelector('.special')).borderStyle") == "solid"


@pytest.mark.browser
def test_a_phone_scrolls_only_downwards(visit):
    page = visit(viewport={"width": 360, "height": 740})
    for _ in ALL:  # rows off the screen are not laid out
        page.keyboard.press("j")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    for article in page.locator("article").all():
        assert article.evaluate("a => a.scrollWidth <= a.clientWidth")

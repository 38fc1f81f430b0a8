"""Write one HTML page that shows rows token by token as training sees them; it loads nothing else."""

import html
import unicodedata

from tuner.system import atomic

HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1b1e24; --quiet: #565d69;
  --line: #c9ced6; --focus: #0b57d0; --chip: #eaecf1; --trained: #0a5229; --green: #cfeedb; --warn: #8f3d00 }
@media (prefers-color-scheme: dark) { :root { --page: #121418; --card: #1b1e24; --text: #e6e8ec;
  --quiet: #a9b1bd; --line: #3d434d; --focus: #8ab4f8; --chip: #2b3038; --trained: #9be8b8; --green: #143d26;
  --warn: #ffb877 } }
html { scroll-padding: 6.5rem 0 3rem }
body { margin: 0 auto; padding: 0 1rem; max-width: 60rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 1rem 0 0; font-size: 1.4rem; line-height: 1.2 }
h2 { display: inline; margin-right: .6em; font-size: 1rem }
small, footer, #totals, #count { color: var(--quiet); font-size: .9rem; margin: 0 }
#tools, footer { padding: .5rem 0; background: var(--page) }
#tools:not([hidden]) { display: flex; flex-wrap: wrap; gap: .4rem }
button, input { min-height: 2.2rem; padding: .2rem .7rem; border: 1px solid var(--quiet);
  border-radius: .5rem; background: var(--card); color: inherit; font: inherit; font-size: .9rem }
button[aria-pressed=true] { background: var(--text); color: var(--page) }
input { flex: 1 1 10rem; min-width: 0 }
#count { flex: 1 0 100% }
article { margin-bottom: .8rem; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); content-visibility: auto; contain-intrinsic-size: auto 8rem }
:focus-visible, article:focus { outline: 3px solid var(--focus); outline-offset: 1px }
ul { margin: .2rem 0; padding-left: 1.2rem; color: var(--warn) }
.text { margin: .4rem 0 0; line-height: 1.75; white-space: break-spaces; unicode-bidi: plaintext }
.text :is(b, span) { padding: .1em 0; margin-right: 2px; border-radius: 3px; color: var(--quiet);
  background: var(--chip) }
.text b { color: var(--trained); background: var(--green) }
.text .special { padding: 0 .25em; border: 1px solid; font-size: .85em }
.text i::before { content: "⏎"; font-style: normal }
.text :is(b, span):empty::before { content: "∅" }
@media (min-width: 40rem) and (min-height: 30rem) {
  #tools, footer { position: sticky; top: 0; bottom: 0; z-index: 1 } }
</style>
<noscript><style>main { display: block }</style></noscript>
<h1>{title}</h1>
<p class="text"><b>trained</b> <span>masked (label −100)</span> \
<span class="special">special&nbsp;token</span> <span>⏎</span> newline \
<span>∅</span> no text <span>&#xfffd;</span> no printable character</p>
<div id="tools" role="group" aria-label="Rows to show" hidden>
<button aria-pressed="true" value="*">All</button>
<button aria-pressed="false" value=".call">Calls</button>
<button aria-pressed="false" value=".general">General</button>
<button aria-pressed="false" value=".warned">With warnings</button>
<button aria-pressed="false">Longest</button>
<input type="search" aria-label="Search" placeholder="Search" autocomplete="off" spellcheck="false">
<p id="count" role="status" aria-live="polite"></p>
</div>
<main hidden>
"""
TAIL = """</main>
<p id="totals">{totals}</p>
<footer hidden>Keys: 1–5 press the buttons, / searches, j/k or ↓/↑ move between rows</footer>
<script>
const main = document.querySelector("main"), search = document.querySelector("input");
const rows = [...main.children], [...filters] = document.querySelectorAll("button"), longest = filters.pop();
let filter = filters[0], texts;

function refresh() {
  const wanted = search.value.toLowerCase();
  if (wanted) texts ??= rows.map(row => row.lastElementChild.textContent.toLowerCase());
  let count = 0;
  rows.forEach((row, i) => {
    const shown = row.matches(filter.value) && (!wanted || texts[i].includes(wanted));
    row.hidden = !shown;
    count += shown;
  });
  for (const button of filters) button.ariaPressed = button === filter;
  document.querySelector("#count").textContent = `${count.toLocaleString("en")} of {rows} rows`;
  scrollTo(0, 0);
}
function sort() {
  longest.ariaPressed = longest.ariaPressed !== "true";
  const byLength = rows.toSorted((a, b) => b.dataset.tokens - a.dataset.tokens);
  main.replaceChildren();  // moved one by one, rows take five times as long
  for (const row of longest.ariaPressed === "true" ? byLength : rows) main.append(row);
  scrollTo(0, 0);
}
function move(step) {
  let row = document.activeElement.closest("article");
  do row = !row ? main.firstElementChild : step > 0 ? row.nextElementSibling : row.previousElementSibling;
  while (row?.hidden);
  row?.focus();
}
for (const button of filters) button.onclick = () => { filter = button; refresh(); };
longest.onclick = sort;
search.oninput = refresh;
document.onkeydown = event => {
  const typing = event.target === search && event.key !== "ArrowDown";
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  // On a Russian keyboard the keys of j, k and / are о, л and a full stop.
  const step = {j: 1, о: 1, arrowdown: 1, k: -1, л: -1, arrowup: -1}[event.key.toLowerCase()];
  const button = [...filters, longest][event.key - 1];
  if (step) move(step);
  else if (button) button.click();
  else if (event.key === "/" || event.key === ".") search.focus();
  else return;
  event.preventDefault();
};
document.querySelector("h1").after(document.querySelector("#totals"));
refresh();
// Shown only now: laid out while it is read, a page of 100,000 rows takes four times as long.
for (const element of document.querySelectorAll("#tools, main, footer")) element.hidden = false;
</script>
"""
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, format and bidi marks, half a pair, odd line ends


def escape(text):
    """Return text for HTML; every character but newline that cannot be seen or stored becomes U+FFFD."""
    if not text.isprintable():
        text = "".join("\ufffd" if c != "\n" and unicodedata.category(c) in HIDDEN else c for c in text)
    return html.escape(text)


def trained_tokens(row):
    return sum(bool(trained) for _, trained, _ in row["pieces"])


def article(row):
    """Return one row as HTML: one element per token, with the token's text."""
    tokens = ""
    for text, trained, special in row["pieces"]:
        tag, style = "b" if trained else "span", ' class="special"' if special else ""
        tokens += f"<{tag}{style}>{escape(text)}</{tag}>".replace("\n", "<i>\n</i>")
    kind, count = "call" if row["call"] else "general", len(row["pieces"])
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in row["warnings"])
    return (
        f'<article class="{kind}{" warned" if warnings else ""}" tabindex="0" data-tokens="{count}">'
        f"<h2>line {row['line']}</h2><small>{kind}, {count} tokens, {trained_tokens(row)} trained</small>"
        + (f"<ul>{warnings}</ul>" if warnings else "")
        + f'<p class="text" lang="">{tokens}</p></article>\n'
    )


def write(path, title, rows):
    """Write the page atomically: after an OSError, which is passed on, an earlier page stays.

    rows: any iterable of {"line": int, "call": bool, "pieces": [(text, trained, special), …], one per token,
    "warnings": [text, …]}; one row at a time is in memory.
    """
    count = tokens = trained = 0
    with atomic.open_text(path) as file:
        file.write(HEAD.replace("{title}", escape(title)))
        for row in rows:
            file.write(article(row))
            count += 1
            tokens += len(row["pieces"])
            trained += trained_tokens(row)
        totals = f"{count:,} rows, {tokens:,} tokens, {trained:,} trained tokens"
        file.write(TAIL.replace("{totals}", totals).replace("{rows}", f"{count:,}"))

"""benchmarks/engines.py: its table, of servers in place of the engines, and what it does without them."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import engines
from tests.support.chat_server import Endpoint, calling, completion
from tests.support.scripts import run_main
from tuner.data import tool_call
from tuner.inference.probes import load_all
from tuner.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = load_all((ROOT / "probes.json", "--probes"), (ROOT / "heldout.json", "--data"))
DUE = {
    conversation[-1]["content"]: expected is not None
    for part in QUESTIONS
    for conversation, expected in zip(part.conversations, part.expected, strict=True)
}
NAME = "get_sensitive_data"


def parsed(body):
    last = body["messages"][-1]
    return calling((NAME, "{}")) if DUE.get(last["content"]) else completion("Готово.")


def as_text(body):
    """Tags, the results of which are refused; and one general question gets one too."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return 400, {}, b'{"error": {"message": "alternate"}}'
    first = next(text for text, due in list(DUE.items())[6:] if not due)
    call = DUE[last["content"]] or last["content"] == first
    return completion(tool_call.format_call(NAME, {}) if call else "Готово.")


def test_a_line_an_engine_and_serve_py_is_the_measure(monkeypatch, tmp_path):
    answers = {"serve.py": parsed, "llama.cpp": as_text}

    @contextmanager
    def serving(engine, model, log):
        if engine.name == "broken":
            raise UserError("broken ended with 1: no memory")
        server = Endpoint(answers[engine.name])
        yield server.url
        server.close()

    monkeypatch.setattr(engines, "serving", serving)
    monkeypatch.setattr(engines, "model_for", lambda engine, merged, folder: Path(merged))
    known = [engines.Engine(name, [sys.executable]) for name in ("serve.py", "broken", "llama.cpp")]
    known[2] = known[2]._replace(gguf="q8_0", parses=False)
    missing = engines.Engine("vLLM", ["{program}"], "NO_SUCH_PROGRAM")
    monkeypatch.setattr(engines, "ENGINES", [*known, missing])
    results = tmp_path / "serving.md"
    results.write_text(
        "before\n<!-- benchmark engines: begin -->\nold\n<!-- benchmark engines: end -->\nafter\n"
    )
    code, output, _ = run_main(engines.main, "--results", results, folder=tmp_path)
    assert code == 0
    assert "broken: broken ended with 1: no memory\n" in output
    assert "vLLM: NO_SUCH_PROGRAM names no program; left out\n" in output
    before, begin, heads, _, *rows, end, after = results.read_text(encoding="utf-8").splitlines()
    assert (before, begin[:4], end[:4], after) == ("before", "<!--", "<!--", "after")
    assert [cell.strip() for cell in heads.split("|")[1:-1]] == engines.HEADS
    assert rows == [
        "| serve.py | bf16 | 6 | 1.00 | 0 of 40 | 40 of 40 | 44 / 0 | 4 of 4 | 6 of 6 | 86 of 86 |",
        "| llama.cpp | q8_0 | 6 | 0.99 | 1 of 40 | 40 of 40 | 0 / 45 | refused | 6 of 6 | 85 of 86 |",
    ]


def test_without_serve_py_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "ENGINES", [engines.Engine("vLLM", ["{program}"], "NO_SUCH_PROGRAM")])
    code, output, _ = run_main(engines.main, "--results", tmp_path / "serving.md", folder=tmp_path)
    assert code == 1
    assert output.endswith("serve.py, which the others are compared with, gave no answers\n")
    assert not list(tmp_path.iterdir())


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(engine, log):
    with engines.serving(engine, "model", log) as url:
        return url


def test_an_engine_is_started_at_a_free_port_and_stopped(tmp_path):
    engine = engines.Engine("mine", [sys.executable, "-c", SERVER, "{port}"])
    with engines.serving(engine, "model", tmp_path / "log") as url:
        assert start(engine, tmp_path / "log2") != url
    words = "import sys; print('first\\nlast words'); sys.exit(3)"
    with pytest.raises(UserError, match=r"mine ended with 3: last words"):
        start(engine._replace(command=[sys.executable, "-c", words]), tmp_path / "log")

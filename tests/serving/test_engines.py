"""Real engines serve the rehearsal's merged model: `pytest -m engines -n 0`, set up as CONTRIBUTING.md says.

Each that is installed is given what training gives the model, token by token, and answers as serve.py does.
"""

import os
from pathlib import Path

import httpx2
import pytest
from transformers import AutoTokenizer

from benchmarks import engines
from tests.support.rows import SHAPES
from tests.support.training import trained_prompt
from tuner.data.tool_call import calls_in
from tuner.inference.probes import load_all
from tuner.model import folders

ROOT = Path(__file__).resolve().parents[2]
MERGED = Path(os.environ.get("MERGED", ROOT / "gemma-3-270m-merged"))
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def merged():
    if not (MERGED / "config.json").is_file():
        pytest.skip(f"{MERGED} is not there: runs/rehearse.sh makes it, or MERGED names another")
    template = (MERGED / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == folders.CHAT_TEMPLATE.read_text(encoding="utf-8"), f"{MERGED} is old: merge again"
    return MERGED


@pytest.fixture(scope="module")
def questions():
    return load_all((ROOT / "probes.json", "--probes"), (ROOT / "heldout.json", "--data"))


@pytest.fixture(scope="module")
def reference(merged, questions, tmp_path_factory):
    """The Outcome of serve.py."""
    return engines.judge(engines.ENGINES[0], merged, questions, tmp_path_factory.mktemp("serve") / "log")


@pytest.fixture(scope="module", params=engines.ENGINES[1:], ids=engines.title)
def engine(request, merged, tmp_path_factory):
    """(Engine, the model that it serves, a folder)."""
    if not engines.program(request.param):
        pytest.skip(f"{request.param.variable} names no program")
    folder = tmp_path_factory.mktemp("engine")
    return request.param, engines.model_for(request.param, merged, folder), folder


def post(url, body):
    response = httpx2.post(url, json=body, timeout=60, trust_env=False)
    assert response.is_success, response.text
    return response.json()


def vllm_ids(server, messages):
    asked = {"messages": messages, "add_generation_prompt": True, "add_special_tokens": False}
    return post(f"{server}/tokenize", asked)["tokens"]


def llama_cpp_ids(server, messages):
    prompt = post(f"{server}/apply-template", {"messages": messages})["prompt"]
    asked = {"content": prompt, "add_special": True, "parse_special": True}  # as for a completion
    return post(f"{server}/tokenize", asked)["tokens"]


RENDERED = {"vLLM": vllm_ids, "llama.cpp": llama_cpp_ids}  # the others show no tokens


def test_an_engine_is_given_what_is_trained(engine, merged):
    kind, model, folder = engine
    ids = next((ids for name, ids in RENDERED.items() if kind.name.startswith(name)), None)
    if ids is None:
        pytest.skip(
            f"{kind.name} shows no tokens; tests/model/test_chat_template.py calls what it renders by"
        )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    with engines.serving(kind, model, folder / "log") as url:
        for name, messages in SHAPES.items():
            trained = trained_prompt(tokenizer, messages)
            assert ids(url.removesuffix("/v1"), messages[:-1]) == trained, name


def test_an_engine_answers_as_serve_py_does(engine, questions, reference):
    kind, model, folder = engine
    outcome = engines.judge(kind, model, questions, folder / "log")
    replies = outcome.replies
    assert outcome.passed == reference.passed == 6
    assert (replies.loop.sent, replies.loop.answered, replies.loop.refused) == (4, 4, None)
    assert (replies.stream.other_calls, replies.stream.refused) == ([], None)
    assert min(replies.parsed, replies.tagged) == 0
    assert (replies.parsed > 0) == kind.parses
    if kind.gguf in (None, "bf16"):  # the same weights: kernels that round otherwise turn words
        pairs = list(zip(replies.replies, reference.replies.replies, strict=True))
        assert sum(mine.text != theirs.text for mine, theirs in pairs) <= 15
        assert sum(calls_in(mine.text) != calls_in(theirs.text) for mine, theirs in pairs) <= 1

"""Fixtures that several rooms share, and what has to be set before torch is imported."""

import json
import os
import shutil
import signal
from pathlib import Path

# Two threads in each of two workers wait for one another: one each takes 40 % of the CPU time and a third
# of the seconds (2 cores, tests of training and checkpoints). Before torch is loaded; children inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tuner.data import chat_rows, chat_text

# A shell that starts pytest in the background makes it ignore SIGINT, and its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """Do what train_qlora.py does before its first product, in the processes that run tests.

    The one that only starts them needs no torch: so modules of support that import it are imported late.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from tuner.system import libraries

        libraries.silence_bitsandbytes()
        from tuner.system import devices

        devices.make_cpu_matmul_deterministic()


@pytest.fixture(scope="session")
def tokenizer():
    from tests.support import tiny_models

    return tiny_models.tiny_tokenizer()


@pytest.fixture(scope="session", params=["text", "multimodal"])
def tiny_model(request, tmp_path_factory):
    from tests.support import tiny_models

    return tiny_models.write_tiny_model(tmp_path_factory.mktemp(request.param), request.param == "multimodal")


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory):
    from tests.support import tiny_models

    return tiny_models.write_tiny_model(tmp_path_factory.mktemp("text-only"))


@pytest.fixture(scope="module")
def adapter(tiny_text_model, tmp_path_factory):
    """The folder of an adapter for tiny_text_model."""
    from tests.support import tiny_models

    folder = tmp_path_factory.mktemp("adapter") / "qlora_output"
    return tiny_models.write_tiny_adapter(folder, tiny_text_model)


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory):
    """The path of 20 short rows, half of them with a call."""
    rows = sorted(
        (row for _, row in chat_rows.read_rows(ROOT / "examples.json")), key=lambda row: len(json.dumps(row))
    )
    kinds = {True: [], False: []}
    for row in rows:
        kinds[chat_text.is_call(row["messages"])].append(row)
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in kinds[True][:10] + kinds[False][:10]))
    return path


@pytest.fixture(scope="module")
def echo(tiny_text_model):
    from tests.support import echo_server

    return echo_server.echo(tiny_text_model)


@pytest.fixture(scope="module")  # it runs an event loop in this thread, which other tests want as well
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "google-chrome", "chromium-browser")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()

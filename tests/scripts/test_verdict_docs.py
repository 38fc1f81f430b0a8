"""docs/verdict.md: its keys are those that compare.py writes, and its example is what compare.py prints."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import compare
from tests.support.chat_server import Endpoint, completion
from tests.support.scripts import run_main
from tuner.data import tool_call
from tuner.inference import generation
from tuner.inference.judging import Answer

PAGE = (Path(__file__).resolve().parents[2] / "docs/verdict.md").read_text(encoding="utf-8")
RATE = {"part", "whole", "value", "interval"}


def tag(name, **arguments):
    return tool_call.format_call(name, arguments)


EXAMPLE = [  # of docs/verdict.md: what is due, and what is answered
    (tag("get_balance", account="card"), tag("get_balance", account="card")),
    (
        tag("find_payments", filter={"merchant": "Steam"}, limit=10),
        tag("find_payments", filter={"merchant": "Steam"}, limit=5),
    ),
    (
        tag("get_balance", account="savings") + tag("get_rate", currency="USD"),
        tag("get_rate", currency="USD") + tag("get_balance", account="savings"),
    ),
    (tag("block_card", last_digits="6482"), tag("find_payments", filter={})),
    (tag("get_rate", currency="EUR"), "One moment, please."),
    (tag("get_balance"), '<tool_call name="get_balance" arguments="{account: card}"/>'),
    ("Hello!", "Good morning!"),
    ("It is a price.", "A price."),
    ("You're welcome!", "Gladly."),
    ("Open the app.", tag("get_balance")),
]


class Loaded:
    """A model as generation.load_tuned returns it; the answers come from elsewhere."""

    device = torch.device("cpu")
    peft_config: ClassVar = {"default": SimpleNamespace(base_model_name_or_path="google/gemma")}

    def disable_adapter(self):
        return contextlib.nullcontext()


def row(question, text):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


@pytest.fixture
def folder(adapter, tiny_text_model, tmp_path, monkeypatch):
    """A folder with the example's rows, the first of them as probe, and models that answer as it says."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [json.dumps(row(f"Question {n}", due)) for n, (due, _) in enumerate(EXAMPLE)]
    (tmp_path / "heldout.json").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "probes.json").write_text(lines[0], encoding="utf-8")
    shutil.copytree(adapter, tmp_path / "qlora_output")
    shutil.copytree(tiny_text_model, tmp_path / "merged")
    answers = [Answer(text, True, []) for _, text in EXAMPLE[:1] + EXAMPLE]
    monkeypatch.setattr(generation, "load_tuned", lambda *_: (Loaded(), None, {}))
    monkeypatch.setattr(generation, "load_model", lambda *_: (Loaded(), None))
    monkeypatch.setattr(generation, "answer_all", lambda *_: answers)
    return tmp_path


def judge(folder, *flags):
    """Return what compare.py prints and writes with these flags."""
    code, output, error = run_main(compare.main, *flags, "--json", "report.json", folder=folder)
    assert (code, error) == (1, "")
    return output, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_example_is_what_is_printed(folder):
    output, _ = judge(folder, "--merged", "merged")
    shown = re.search(r"\n```\n(heldout\.json.*?)\n```\n", PAGE, re.DOTALL)[1]
    printed = re.sub(r"\n\nmemory .*\ntime .*\n", "\n", output[output.index("\nheldout.json  ") + 1 :])
    assert printed.replace("  merged\n", "   tuned\n").replace("merged falls", "tuned falls").strip() == shown
    table = PAGE.split("| line | due | answered |")[1].split("\n```")[0]
    for texts in EXAMPLE:
        for text in texts:
            for part in tool_call.split_text(text)[0]:
                if isinstance(part, tool_call.Call):
                    given = ", ".join(f"{k}={json.dumps(v)}" for k, v in part.arguments.items())
                    assert f"`{part.name}({given})`" in table


def figures(value, path=""):
    """Return the paths of the rates in a model's figures, as `decision.precision`."""
    if set(value) == RATE:
        return [path]
    return [place for key in value for place in figures(value[key], f"{path}.{key}".lstrip("."))]


def test_the_figures_that_are_documented_are_those_written(folder):
    _, report = judge(folder)
    for model in (report["rows"]["tuned"], report["rows"]["base"], report["probe_rates"]["tuned"]):
        tools, confusion = model.pop("tools"), model.pop("confusion")
        documented = re.findall(r"^\| [\w :]+ \| `([\w.]+)` \|", PAGE, re.MULTILINE)
        assert documented == figures(model)
        assert confusion
    sentence = re.search(r"In the JSON it has (.*?);", PAGE)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == RATE
    line = re.search(r"`tools\.<tool>`: (.*?)\n- ", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", line)) == {key for counts in tools.values() for key in counts}


def keys_of(report):
    """Return {where: its keys} of a report, but for the models' names and figures."""
    rows, gate = report["rows"], report["gate"]
    places = {"": report, "rows": rows, "gate": gate, "probes[]": report["probes"][0]}
    places |= {"gate.asked": gate["asked"], "gate.reached": gate["reached"], "seconds": report["seconds"]}
    places |= {"rows.failing[]": rows["failing"][0]}
    places |= {place: report.get(place, {}) for place in ("calls", "results", "streamed")}
    return {place: set(value) for place, value in places.items()}


def test_the_keys_that_are_documented_are_those_written(folder):
    server = Endpoint(lambda body: completion("Yes."))
    try:
        runs = [
            judge(folder, *flags)[1] for flags in ([], ["--merged", "merged"], ["--endpoint", server.url])
        ]
    finally:
        server.close()
    written = {}
    for name, run in zip(("tuned", "merged", "endpoint"), runs, strict=True):
        for place, keys in keys_of(run).items():
            models = set() if place == "" else {name, "base"}
            written[place] = written.get(place, set()) | keys - models
    documented = {"": set()}
    table = PAGE.split("## The keys of the JSON")[1]
    for heads, inner in re.findall(r"^\| (`.*?) \| (.*?) ?\|", table, re.MULTILINE):
        names = re.findall(r"`(.+?)`", heads)
        documented[""] |= {re.sub(r"\..*|\[\]", "", name) for name in names}
        if inner:
            documented[names[0]] = set(re.findall(r"`(\w+)`", inner))
    assert documented == written

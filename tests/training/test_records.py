"""run.json and compare.json with something else than these scripts write are named in one line."""

import json
import shutil

import pytest

import compare
import merge
import train_qlora
from tests.support.rows import copy_questions
from tests.support.scripts import run_main
from tuner.system.errors import UserError
from tuner.training import records

RUN = {
    "revision": "ab",
    "bits": 4,
    "prompts_sha256": ["ab"],
    "rows": {"all": 7},
    "settings": {},
    "other": [1],
}
RATE = {"part": 1, "whole": 2, "value": 0.5, "interval": [0.1, 0.9]}
RATES = {"decision": {"false_call_rate": RATE}, "right": {"f1": RATE}}
OLDER = {"right": 1, "needed": 2, "false": 0, "general": 2, "f1": 0.5}
COMPARISON = {"bits": None, "passed": 5, "probes": [{}], "rows": {"base": RATES, "tuned": RATES}}
WRONG = {
    "revision": (3, ["ab"], {}, True),
    "bits": ("4", 4.5, True, [4], float("nan"), 10**20),
    "prompts_sha256": ("abc", 3, {"ab": 1}, [3], [["ab"]], ["ab", {}]),
    "rows": (3, "seven", [7], {"all": "seven"}, {"all": {}}),
    "tools": ("f", {"f": 1}, ["f", 3]),
    "settings": ([], "x", 3),
    "versions": ([["torch", 1]], "x"),
    "passed": ("five", [5], 1e30, float("inf")),
    "probes": (6, "six", {"a": 1}, [1]),
    "gate": (1, [], {"asked": 1}, {"asked": {"min_f1": "1 --json x"}}, {"asked": {"max_false_calls": True}}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_named(tmp_path, name):
    path = tmp_path / "record.json"
    good, form = (
        (COMPARISON, records.COMPARISON) if name in ("passed", "probes", "gate") else (RUN, records.RUN)
    )
    for value in WRONG[name]:
        path.write_text(json.dumps({**good, name: value}))
        with pytest.raises(UserError) as error:
            records.read(path, form, "train again")
        text = str(error.value)
        assert text.startswith(f"{path} is damaged ({name}")
        assert ", expected a" in text
        assert text.endswith("); train again")
        assert text.isprintable()


@pytest.mark.parametrize("value", [{}, RUN, {**RUN, "bits": None}, {"rows": {}}, {"settings": {"a": [1]}}])
def test_what_is_written_or_missing_is_taken(tmp_path, value):
    path = tmp_path / "record.json"
    assert records.read(path, records.RUN, "") == {}
    path.write_text(json.dumps(value))
    assert records.read(path, records.RUN, "") == value
    path.write_text(json.dumps(COMPARISON))
    assert records.read(path, records.COMPARISON, "") == COMPARISON
    path.write_text(json.dumps({**COMPARISON, "rows": {"tuned": OLDER}}))
    assert records.read(path, records.COMPARISON, "")["rows"] == {"tuned": OLDER}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", '{"prompts_sha256": [{}]}'),
        ("run.json", '{"bits": "4; rm -rf /"}'),
        ("run.json", "[1]"),
        ("run.json", '{"a": ' * 10**5),
        ("run.json", b"\xff\xfe"),
        ("compare.json", '{"passed": "five", "rows": 3}'),
        ("compare.json", json.dumps({**COMPARISON, "rows": {"tuned": {"decision": "much"}}})),
        (
            "compare.json",
            json.dumps(
                {**COMPARISON, "rows": {"base": {"decision": {"false_call_rate": {**RATE, "part": "1"}}}}}
            ),
        ),
    ],
)
def test_a_record_that_is_none_is_one_line_of_every_script_that_reads_it(adapter, tmp_path, file, content):
    copy_questions(tmp_path)
    copy = shutil.copytree(adapter, tmp_path / "qlora_output")
    (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    data, probes = (
        train_qlora.__file__.replace("train_qlora.py", f"{n}.json") for n in ("examples", "probes")
    )
    for main, flags, expected in (
        (merge.main, ["--output", "out"], 1),
        (compare.main, ["--data", data, "--probes", probes], 2),
        (train_qlora.main, ["--rehearse", "--resume", "--data", data], 1),
    ):
        if file == "compare.json" and main is not merge.main:
            continue  # not read there
        code, out, errors = run_main(main, *flags, folder=tmp_path, error_code=expected)
        assert code == expected
        assert len(errors.splitlines()) == 1
        assert f"qlora_output/{file} is damaged (" in errors
        assert "merging" not in out

"""The merged model: its weights against numbers worked out by hand, its proofs, and what a kill leaves."""

import io
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
import train_qlora
from tests.support.merging import refused, run, run_well
from tests.support.processes import disk_for, other_writer
from tests.support.rows import PROBES, ROOT, row
from tests.support.scripts import run_main
from tests.support.tiny_models import tiny_tokenizer, write_tiny_adapter
from tuner.inference import generation, probe_answers, probes
from tuner.inference.judging import Answer
from tuner.inference.probe_answers import ProbeAnswer
from tuner.model import folders, loading
from tuner.system import output_folder
from tuner.system.errors import UserError
from tuner.training import merge_proof, merging

RECORD = {
    "rows": {"all": 70},
    "data_sha256": "ab" * 32,
    "bits": 4,
    "steps": 40,
    "settings": {"lora_r": 16, "data": "secret.json"},
    "versions": {"torch": "2.13.0"},
    "prompts_sha256": ["12" * 32],
}


PART = ".out.*.part/new"  # where a merge into "out" writes


@pytest.fixture(scope="module")
def processes():
    """A server of processes that have the libraries imported when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.scripts.test_merge"])
    return context


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_model)
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture(scope="module")
def text_adapter(tiny_text_model, tmp_path_factory):
    return write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "qlora_output", tiny_text_model)


@pytest.fixture(scope="module")
def short_probe(tmp_path_factory):
    """The path of one probe that needs a short answer."""
    path = tmp_path_factory.mktemp("probes") / "one.json"
    path.write_text(json.dumps(row("Привет!", "Да.")))
    return str(path)


@pytest.fixture
def one_probe(monkeypatch, short_probe):
    """Ask one probe for a short answer, where it is not the answers that are tested."""
    monkeypatch.setattr(merge, "PROBES", short_probe)
    monkeypatch.setattr(probes, "MAX_NEW_TOKENS", 8)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "tiny-merged"
    run_well(adapter, output)
    return output


def weights(folder):
    return {k: v for path in folders.weight_files(folder) for k, v in load_file(path).items()}


# ------------------------------------------------------------------------------------------- weights


def test_a_merged_weight_is_base_and_delta_worked_out_in_float64(tiny_model, adapter, merged):
    before, after = weights(tiny_model), weights(merged)
    lora = load_file(adapter / "adapter_model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(lora) / 2 == 2 * 7
    for name in changed:
        tail = name[name.index("layers.") : -len(".weight")]
        (a,) = (v.double().numpy() for k, v in lora.items() if f"{tail}.lora_A" in k)
        (b,) = (v.double().numpy() for k, v in lora.items() if f"{tail}.lora_B" in k)
        delta = numpy.zeros((b.shape[0], a.shape[1]))
        for rank in range(16):
            delta += numpy.outer(b[:, rank], a[rank]) * 32 / 16
        exact = before[name].double().numpy() + delta
        # On a CPU the sum is made in fp32 and rounded once: half a unit in the last of bf16's 8 bits.
        spacing = 2.0 ** (numpy.floor(numpy.log2(numpy.abs(exact))) - 7)
        assert (numpy.abs(after[name].double().numpy() - exact) <= 0.5001 * spacing + 1e-7).all()


def load_bare(folder):
    """Exit with 0 if a folder loads by transformers alone, without a warning; in a process of its own."""
    report = io.StringIO()
    logging.getLogger("transformers").addHandler(logging.StreamHandler(report))
    logging.getLogger("transformers").setLevel(logging.WARNING)
    warnings.simplefilter("error", UserWarning)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template
    assert model.config.get_text_config().use_cache
    assert model.generation_config.eos_token_id == [1, 106]
    assert report.getvalue() == ""


def test_the_folder_loads_bare_and_without_a_warning(processes, merged):
    process = processes.Process(target=load_bare, args=(merged,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_folder_answers_as_base_and_adapter(adapter, merged):
    conversation = [{"role": "user", "content": PROBES[0][0]}]
    tuned, tokenizer, _ = generation.load_tuned(adapter, None, train_qlora.quantization_config)
    model = loading.load_base(str(merged), None, "cpu", torch.float32).eval()
    (before,) = generation.answer_all(tuned, tokenizer, [conversation])
    (after,) = generation.answer_all(model, tokenizer, [conversation])
    assert before.ids[:10] == after.ids[:10]


def test_what_belongs_to_a_model_goes_along(tiny_model, adapter, merged):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (Path(tiny_model) / name).read_bytes()
    assert "ai.google.dev/gemma/terms" in (merged / "NOTICE").read_text()
    card = (merged / "README.md").read_text(encoding="utf-8")
    for fact in ("license: gemma", "ab" * 32, "in 4 bits, 40 steps", "lora_r 16", "torch 2.13.0"):
        assert fact in card
    assert "secret.json" not in card
    assert "base_model" not in card
    assert json.loads((merged / "run.json").read_text()) == {"prompts_sha256": ["12" * 32]}
    assert tiny_model not in card
    for weights in merged.glob("*.safetensors"):  # a server run by another user reads them
        assert weights.stat().st_mode == (merged / "config.json").stat().st_mode
    assert sorted(p.name for p in merged.parent.iterdir()) == ["tiny-merged"]


def test_terms_and_processor_go_along(tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    merged.mkdir()
    for name in ("GEMMA_TERMS.html", "NOTICE.md", "processor_config.json", "preprocessor_config.json"):
        (base / name).write_text(name)
    for name in ("model.safetensors", "REVISION", "pickle.bin", "code.py"):
        (base / name).write_text(name)
    merge.copy_files(base, merged)
    processor = ["processor_config.json", "preprocessor_config.json"]
    assert sorted(p.name for p in merged.iterdir()) == sorted(
        [
            "GEMMA_TERMS.html",
            "NOTICE",
            "NOTICE.md",
            *processor,
            "chat_template.jinja",
            "tokenizer_config.json",
        ]
    )


# -------------------------------------------------------------------------------------------- proofs


def alter(folder, part, change):
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = change(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


ALTERED = {
    "no delta": ("layers.1.mlp.up_proj", "old", "did not change"),
    "half the delta": ("layers.0.self_attn.q_proj", "half", "did not change by B·A·alpha/r"),
    "a norm": ("layers.0.input_layernorm", lambda t: t + 1, "has no adapter and changed"),
    "the sign of a zero": ("layers.0.input_layernorm", lambda t: -t, "has no adapter and changed"),
    "lost": ("layers.0.input_layernorm", lambda t: None, "differ in which tensors they have"),
    "fp32": ("layers.1.mlp.up_proj", lambda t: t.float(), "is torch.float32"),
}


@pytest.mark.usefixtures("one_probe")
@pytest.mark.parametrize("what", ALTERED)
def test_a_merge_that_went_wrong_is_found_and_not_kept(
    tiny_text_model, text_adapter, tmp_path, monkeypatch, what
):
    part, change, says = ALTERED[what]
    old = next(v for k, v in weights(tiny_text_model).items() if part in k)
    if change == "old":
        change = lambda new: old  # noqa: E731
    elif change == "half":
        change = lambda new: ((new.float() + old.float()) / 2).to(torch.bfloat16)  # noqa: E731
    copy_files = merge.copy_files

    def copy_and_alter(base, merged):
        copy_files(base, merged)
        alter(merged, part, change)

    monkeypatch.setattr(merge, "copy_files", copy_and_alter)
    refused(run(text_adapter, tmp_path / "out"), says)
    assert list(tmp_path.iterdir()) == []


def probe_answer(ids, top_two):
    return ProbeAnswer(Answer("", True, ids), top_two)


def test_a_near_tie_is_shown_and_another_answer_is_refused(capsys):
    tokenizer = tiny_tokenizer()
    tie = [[(110, 9.0), (0, 1.0)], [(111, 5.0), (112, 4.9)], [(106, 9.0), (0, 1.0)]]
    turned = [[(110, 9.0), (0, 1.0)], [(112, 5.0), (111, 4.9)], [(106, 9.0), (0, 1.0)]]
    before = [probe_answer([110, 111], tie), probe_answer([110, 111], tie)]
    after = [probe_answer([110, 111], tie), probe_answer([110, 112], turned)]
    assert probe_answers.compare_answers(tokenizer, before, after) == 1
    output = capsys.readouterr().out
    assert "probe 2 differs at token 2" in output
    assert "(near tie from bf16 rounding, harmless)" in output
    assert output.count("5.000") == output.count("4.900") == 2
    turned[1] = [(112, 5.0), (111, 4.4)]
    with pytest.raises(UserError, match="answers differently"):
        probe_answers.compare_answers(tokenizer, before, after)
    assert "harmless" not in capsys.readouterr().out
    # One answer goes on where the other one ends.
    shorter, longer = [probe_answer([110], tie)], [probe_answer([110, 111], tie)]
    assert probe_answers.compare_answers(tokenizer, shorter, longer) == 0


# ------------------------------------------------------------------------------------------- folders


def output_refused(match, *arguments):
    with pytest.raises(UserError, match=match):
        merge.check_output(*arguments)


def test_an_existing_folder_is_never_overwritten_unasked(merged, tmp_path):
    output_refused("exists; add --overwrite", merged, "base", "adapter", False)
    merge.check_output(merged, "base", "adapter", True)
    (tmp_path / "notes").mkdir()
    merge.check_output(tmp_path / "notes", "base", "adapter", False)
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    output_refused("holds no model", tmp_path / "notes", "base", "adapter", True)
    base = shutil.copytree(merged, tmp_path / "another base")
    (base / "REVISION").write_text("0123\n")
    output_refused("holds a base as it was downloaded; name another", base, "base", "adapter", True)
    output_refused("is the base or the adapter itself", merged, merged, "adapter", True)
    output_refused("is the base or the adapter itself", tmp_path / "notes", "base", tmp_path / "notes", True)


def test_a_folder_that_cannot_be_written_to_is_refused(text_adapter, tmp_path):
    refused(
        run(text_adapter, tmp_path / "none" / "out"),
        "none is not writable; choose another folder",
    )


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.usefixtures("one_probe")
def test_what_is_the_users_stays_beside_the_model_and_in_it(text_adapter, tmp_path, is_link):
    (tmp_path / "disk").mkdir()
    output, model = tmp_path / "out", tmp_path / ("disk/model" if is_link else "out")
    if is_link:
        output.symlink_to("disk/model")
    for name in ("out.old", "out.part", "disk/model.old", "disk/model.part", ".out.12345678.part/earlier"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "out.lock").write_text("mine")
    mine = {path for path in tmp_path.rglob("*") if path.is_file()}
    refused(run(text_adapter, tmp_path / "disk"), "exists; add --overwrite")
    run_well(text_adapter, output)
    assert folders.missing_files(model) == []
    (model / "gemma-q4.gguf").write_text("mine")
    refused(run(text_adapter, output), "out exists; add --overwrite")
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_text("{}")
    run_well(text_adapter, output, "--overwrite")
    assert (model / "config.json").read_bytes() == config
    mine.add(model / "gemma-q4.gguf")
    assert {path.read_text() for path in mine} == {"mine"}
    others = {path.parent for path in tmp_path.rglob("*") if path.is_file() and path not in mine}
    assert others == {model}
    assert output.is_symlink() == is_link


def test_an_output_that_can_be_no_folder_is_one_line(text_adapter, tmp_path):
    (tmp_path / "file").touch()
    for output, problem in [
        ("", '"" names no folder'),
        (".", ". is the folder you are in"),
        ("/", "/ is the folder you are in"),
        ("~/out", "~/out would be a folder of the name ~ here"),
        ("file", "file is a file"),
        ("x" * 300, "File name too long"),
    ]:
        arguments = [
            "--adapter",
            text_adapter,
            "--probes",
            ROOT / "probes.json",
            "--overwrite",
            "--output",
            output,
        ]
        refused(run_main(merge.main, *arguments, folder=tmp_path), problem)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("one_probe")
def test_a_mount_point_is_filled_once(text_adapter, tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    run_well(text_adapter, tmp_path)
    assert folders.missing_files(tmp_path) == []
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    for flags in ([], ["--overwrite"]):
        refused(
            run(text_adapter, tmp_path, *flags), "is not empty and cannot be replaced; name a folder in it"
        )


@pytest.mark.usefixtures("one_probe")
def test_on_a_full_disk_nothing_half_written_stays(text_adapter, tmp_path):
    with disk_for(100_000):
        result = run(text_adapter, tmp_path / "out")
    refused(result, "File too large")
    assert "cannot be written (" in result[2]
    assert result[2].endswith("; free some disk space; nothing was kept\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_probe")
def test_a_second_merge_into_a_folder_is_refused(text_adapter, tmp_path):
    with other_writer(tmp_path / "out") as pid:
        refused(run(text_adapter, tmp_path / "out"), f"by process {pid}; wait")
    run_well(text_adapter, tmp_path / "out")  # that process was killed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def leave_killed(output):
    """Leave what a merge does that is killed between its two renames."""
    work = output.with_name(f".{output.name}.abcd1234.part")
    (work / "new").mkdir(parents=True)
    (work / "new/config.json").write_text("{}")
    output_folder.mark(work)
    output.rename(work / "earlier")


@pytest.mark.usefixtures("one_probe")
def test_overwrite_replaces_and_a_kill_between_the_renames_is_repaired(text_adapter, tmp_path):
    output = tmp_path / "out"
    run_well(text_adapter, output)
    (output / "model-00002-of-00002.safetensors").touch()  # of a larger one
    run_well(text_adapter, output, "--overwrite")
    assert not (output / "model-00002-of-00002.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    leave_killed(output)
    refused(run(text_adapter, output), "exists; add --overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert folders.missing_files(output) == []


@pytest.mark.usefixtures("one_probe")
def test_the_next_command_is_the_verdict_on_what_was_merged(text_adapter, tmp_path):
    adapter = shutil.copytree(text_adapter, tmp_path / "adapter")
    (tmp_path / "my rows.json").touch()
    mine = f"{tmp_path}/my rows.json"
    defaults = {"asked": {"min_f1": 0.9, "max_false_calls": 0.1}}
    for judged_by, flags in (
        ({"data": "heldout.json", "gate": defaults}, ""),
        ({"data": f"{tmp_path}/gone.json"}, ""),
        (
            {"data": None, "gate": {"asked": {"min_f1": None, "max_false_calls": 0.25}}},
            " --max-false-calls 0.25",
        ),
        ({"data": mine, "gate": {"asked": {"min_f1": 0.5}}}, f" --data '{mine}' --min-f1 0.5"),
    ):
        (adapter / "compare.json").write_text(json.dumps(judged_by))
        stdout = run_well(adapter, tmp_path / "it's", "--overwrite")
        quoted = str(tmp_path / "it's").replace("'", "'\"'\"'")
        assert stdout.endswith(f"\nnext       python compare.py --merged '{quoted}'{flags}\n")


def test_any_probes_are_answered_before_and_after_and_named_in_what_to_type_next(
    text_adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(probes, "MAX_NEW_TOKENS", 8)
    one, fifty = tmp_path / "one.json", tmp_path / "my fifty.json"
    call = '<tool_call name="f" arguments="{}"/>'
    turns = [row("а", call, "б", "в"), *(row(f"Вопрос {number}", "Да.") for number in range(49))]
    one.write_text(json.dumps(turns[0]))
    fifty.write_text("\n".join(map(json.dumps, turns)))
    for path, quoted, asked in ((one, f"{one}", "1 probe"), (fifty, f"'{fifty}'", "50 probes")):
        stdout = run_well(text_adapter, tmp_path / "out", "--probes", path, "--overwrite")
        assert re.search(rf"^ {{11}}\d+ of {asked} answered with the same tokens as base \+", stdout, re.M)
        assert stdout.endswith(f" --merged {tmp_path}/out --probes {quoted}\n")


def test_probes_that_cannot_be_asked_are_told_before_anything_is_loaded(text_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    wrong = tmp_path / "wrong.json"
    rows = [row("а", "<tool_call name='f'/>"), row("б", "да"), {"messages": []}]
    wrong.write_text("\n".join(map(json.dumps, rows)))

    def refused_with(*flags):
        flags = ["--adapter", text_adapter, "--output", tmp_path / "out", *flags]
        code, stdout, stderr = run_main(merge.main, *flags, folder=tmp_path)
        assert (code, stdout) == (1, "")
        return stderr

    assert refused_with() == "probes.json: no such file; name it with --probes\n"
    assert refused_with("--probes", "nope\x1b.json").endswith("no such file; name it with --probes\n")
    first, second = refused_with("--probes", wrong).splitlines()
    assert first == f"{wrong}:1: malformed call (no arguments); fix it"
    assert second.startswith(f'{wrong}:3: "messages" is an empty list; ')
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.json"]


def test_too_little_disk_or_memory_is_reported_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(UserError, match="not enough memory"):
        merging.choose_device(psutil.virtual_memory().total, tmp_path)
    assert "GB of memory on the CPU" in capsys.readouterr().out
    with pytest.raises(UserError, match="not enough disk space"):
        merging.choose_device(shutil.disk_usage(tmp_path).total, tmp_path)


def test_a_missing_adapter_is_one_line_and_exit_1(tmp_path):
    code, stdout, stderr = run_main(merge.main, folder=tmp_path)
    assert (code, stdout) == (1, "")
    assert stderr == "qlora_output does not exist; train an adapter first: python train_qlora.py\n"


def test_a_missing_base_is_named_with_the_adapter_that_needs_it(text_adapter, tmp_path):
    adapter = shutil.copytree(text_adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./nope"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    needs = f"does not exist; the adapter in {adapter} needs it; name the base's folder, or its name"
    refused(run(adapter, tmp_path / "out"), f"./nope {needs}")
    refused(run(adapter, tmp_path / "out", "--base", "./none"), f"./none {needs}")


# ----------------------------------------------------------------------------------- signals and kills


def merge_in_a_process(adapter, output, probe):
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    probes.MAX_NEW_TOKENS = 8
    flags = ["--adapter", str(adapter), "--output", str(output), "--probes", probe, "--overwrite"]
    sys.argv = ["merge.py", *flags]
    merge.main()


def merge_for_ever(*arguments):
    def work(*_):
        while True:  # a single long sleep would not notice a signal that came just before it
            time.sleep(0.01)

    merge_proof.prove_weights = work
    merge_in_a_process(*arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_clears_away_what_was_begun(processes, text_adapter, short_probe, tmp_path, number):
    process = processes.Process(target=merge_for_ever, args=(text_adapter, tmp_path / "out", short_probe))
    process.start()
    while not list(tmp_path.glob(".out.*.part/new/README.md")):  # all is written
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_probe")
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_ten_random_moments_it_leaves_the_old_or_the_new(
    processes, text_adapter, short_probe, tmp_path, seed
):
    adapter, output = text_adapter, tmp_path / "out"
    run_well(adapter, output)
    new = {p.name: p.read_bytes() for p in output.iterdir()}

    def start():
        process = processes.Process(target=merge_in_a_process, args=(adapter, output, short_probe))
        process.start()
        return process

    def wait_for_part(process):
        while process.is_alive() and not list(tmp_path.glob(PART)):
            time.sleep(0.002)
        return time.monotonic()

    start().join()  # the server is up and warm
    began, process = time.monotonic(), start()
    writing = wait_for_part(process)
    process.join()
    assert process.exitcode == 0
    ended = time.monotonic()
    moments = random.Random(seed)
    saw_half = False
    for number in range(10):
        # Half of the moments from where there is something to leave half written.
        moment = moments.uniform(0, ended - (writing if number % 2 else began))
        killed = False
        while not killed:  # or it had ended: again, and earlier
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            for name, content in {**new, "config.json": new["config.json"] + b" "}.items():
                (output / name).write_bytes(content)
            old = {p.name: p.read_bytes() for p in output.iterdir()}
            process = start()
            if number % 2:
                wait_for_part(process)
            time.sleep(moment)
            process.kill()  # SIGKILL; nothing happens if it has ended
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            saw_half |= bool(list(tmp_path.glob(PART)))
            if not output.exists():  # killed between the two renames: the next merge puts it back
                refused(run(adapter, output), "exists; add --overwrite")
            assert {p.name: p.read_bytes() for p in output.iterdir()} in (old, new)
            moment *= 0.8
    assert saw_half
    run_well(adapter, output, "--overwrite")
    assert {p.name: p.read_bytes() for p in output.iterdir()} == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

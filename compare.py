"""Base and tuned side by side: does the tuned model call when it must, and only then?

    python compare.py             six probes, and the held-out rows of heldout.json
    python compare.py --bits 4    on a card that the unquantized model does not fit
    python compare.py --endpoint http://127.0.0.1:8000/v1    the same, of a model that is served already

Exit with 0 if the tuned model (the endpoint) passes all six probes, 1 if not, 2 for wrong arguments, a
damaged adapter or an endpoint that does not answer.
"""

import argparse
import time
from pathlib import Path

from train_qlora import OUTPUT_DIR, quantization_config
from tuner.data import chat_text
from tuner.inference import endpoint, judging, report
from tuner.inference.probes import HELD_OUT, PROBES, load_questions
from tuner.system import atomic, console
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.system.libraries import heavy_imports
from tuner.system.scripts import run_script
from tuner.training import adapter_folder

OUT_OF_MEMORY = "close what else runs on the GPU (nvidia-smi), or compare with --bits 4"
NO_OVERLAP_CHECK = "cannot check for training/test overlap"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description="Compare base and tuned model on probes and held-out rows.")
    parser.add_argument("--adapter", help=f"folder of the adapter (default: {OUTPUT_DIR})")
    parser.add_argument("--base", help="folder or hub name of the base (default: as the adapter records it)")
    parser.add_argument("--data", default=HELD_OUT, help="file of held-out rows (default: %(default)s)")
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], help="bits to quantize the base to (default: unquantized)"
    )
    parser.add_argument("--json", metavar="FILE", help="file to write the full report to (default: none)")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="compare a served model instead, such as http://127.0.0.1:8000/v1 (default: none)",
    )
    parser.add_argument("--model", help="model name at the endpoint (default: the first that it lists)")
    args = parser.parse_args(arguments)
    if args.endpoint is None:
        if args.model is not None:
            parser.error("--model names a model at an endpoint; add --endpoint")
        args.adapter = args.adapter or OUTPUT_DIR
        return args
    if args.adapter or args.bits or args.base:
        parser.error("--adapter, --base and --bits do not apply to a served model; remove them")
    try:
        args.endpoint = endpoint.check_address(args.endpoint)
    except ValueError:
        parser.error(
            "--endpoint is not a plain http or https address; expected http://host:port/v1 "
            f"(an API key goes into {endpoint.KEY})"
        )
    return args


def check_report_path(path):
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist; create it first")
    if path and Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")


# ------------------------------------------------------------------------------------- base and tuned


def compare_tuned(args, questions):
    """Ask base and tuned model, print and write the judgment; return the exit code."""
    adapter_folder.read_adapter(args.adapter)  # a wrong one is reported before seconds of imports
    started = time.perf_counter()
    with heavy_imports():  # torch and what stands on it: seconds, so flags and rows are checked first
        from tuner.inference import generation
        from tuner.system import devices

    model, tokenizer, run = generation.load_tuned(args.adapter, args.bits, quantization_config, args.base)
    loaded = time.perf_counter()
    base_name = model.peft_config["default"].base_model_name_or_path
    seen = seen_in_training(args.adapter, run, questions)
    bits = f"in {args.bits} bits" if args.bits else "unquantized"
    print(
        f"base {printable(base_name)} {bits}, tuned with {args.adapter}: {len(PROBES)} probes, "
        f"{len(questions.lines)} rows",
        flush=True,
    )
    with model.disable_adapter():
        base = generation.answer_all(model, tokenizer, questions.conversations, "base ")
    tuned = generation.answer_all(model, tokenizer, questions.conversations, "tuned")
    seconds = {"loading": round(loaded - started, 1), "answering": round(time.perf_counter() - loaded, 1)}
    memory = devices.peak_memory(model.device)

    judgment = judging.judge_all(questions, {"base": base, "tuned": tuned}, seen)
    judgment |= {
        "base_model": base_name,
        "bits": args.bits,
        "device": devices.device_name(model.device),
        "seconds": seconds,
        "peak_memory_gib": memory,
    }
    seen_lines = [
        line for line, was_seen in zip(questions.lines, seen[len(PROBES) :], strict=True) if was_seen
    ]
    report.print_report(judgment, ["base", "tuned"], seen_lines)
    print(f"\nmemory     {devices.format_memory(memory)}")
    print(f"time       {seconds['loading']} s importing and loading, {seconds['answering']} s answering")
    exit_code = report.print_verdict("tuned", judgment)
    if args.json:
        atomic.write_json(args.json, judgment)
    atomic.write_json(
        Path(args.adapter, adapter_folder.COMPARISON), judgment, "make it and its folder writable"
    )
    if exit_code == 0:
        adapter = "" if args.adapter == OUTPUT_DIR else f" --adapter {args.adapter}"
        print(f"next       python merge.py{adapter}")
    return exit_code


def seen_in_training(adapter, run, questions):
    """Return for each question whether the run, as its run.json says, trained on its prompt."""
    trained_on = set(run.get("prompts_sha256", []))
    if not trained_on:
        print(f"{adapter} does not record the rows that it was trained on; {NO_OVERLAP_CHECK}")
    return [chat_text.fingerprint(messages) in trained_on for messages in questions.conversations]


# ----------------------------------------------------------------------------------------- an endpoint


def compare_endpoint(args, questions):
    """Ask a served model, print and write the judgment; return the exit code. torch is not imported."""
    print(f"endpoint {args.endpoint}: {len(PROBES)} probes, {len(questions.lines)} rows", flush=True)
    started = time.perf_counter()
    model, listed, replies, tools_refused = endpoint.ask(
        args.endpoint, args.model, questions.conversations, questions.sources, questions.tools
    )
    seconds = round(time.perf_counter() - started, 1)
    others = f" (the first of {listed} listed)" if listed > 1 else ""
    print(f"model {printable(model)}{others}; {NO_OVERLAP_CHECK}")

    answers = [judging.Answer(reply.text, reply.ended, []) for reply in replies]
    judgment = judging.judge_all(questions, {"endpoint": answers}, seen=[False] * len(answers))
    parsed, tagged = sum(reply.parsed for reply in replies), sum(reply.tagged for reply in replies)
    judgment |= {
        "endpoint": args.endpoint,
        "model": model,
        "tools_refused": tools_refused,
        "calls": {"parsed": parsed, "text": tagged},
        "seconds": {"answering": seconds},
    }
    report.print_report(judgment, ["endpoint"], seen_lines=[])
    print(f"\ncalls      {parsed} parsed tool_calls, {tagged} unparsed tags in text")
    if tools_refused:
        text = f"not declared, since the endpoint rejects them ({tools_refused})"
        console.print_wrapped(text, "tools      ", " " * 11)
    print(f"time       {seconds} s answering")
    exit_code = report.print_verdict("the endpoint", judgment)
    if args.json:
        atomic.write_json(args.json, judgment)
    return exit_code


# ------------------------------------------------------------------------------------------------ main


def main():
    args = parse_arguments()
    questions = load_questions(args.data)
    check_report_path(args.json)
    return compare_endpoint(args, questions) if args.endpoint else compare_tuned(args, questions)


if __name__ == "__main__":
    run_script(main, out_of_memory=OUT_OF_MEMORY, error_code=2)

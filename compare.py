"""Base and tuned side by side: does the tuned model call when it must, and only then?

    python compare.py             six probes, and the rows of heldout.json that no one was trained on
    python compare.py --bits 4    on a card that the unquantised model does not fit
    python compare.py --endpoint http://127.0.0.1:8000/v1    the same, of a model that is served already

Exits with 0 if tuned (the endpoint) passes all six probes, 1 if not, 2 for wrong arguments, a damaged
adapter or an endpoint that does not answer.
"""

import argparse
import sys
import time
from pathlib import Path

import train_qlora
from tuner.data import chat_rows, chat_text, tool_call
from tuner.inference import endpoint, generation, judging, report
from tuner.inference.probes import CALL, HELD_OUT, PROBES
from tuner.system import atomic, console, devices, scripts
from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error
from tuner.training import adapter_folder


def show_probe(number, probe):
    verdict = (
        console.colorize("pass", 32)
        if probe["pass"]
        else console.colorize("FAIL", 31) + f": {probe['reason']}"
    )
    seen = " (seen in training: proves nothing)" if probe["seen"] else ""
    print(f"\nprobe {number}    {verdict}{seen}")
    lines = {"prompt": probe["prompt"], "expected": probe["expected"]}
    lines |= {name: probe[name] for name in ("base", "tuned", "endpoint") if name in probe}
    for name, text in lines.items():
        console.print_wrapped(text, f"  {name:<10}", " " * 12)
    if probe["deviations"]:
        print(f"  {'form':<10}{', '.join(probe['deviations'])}")


def show_answers(data, rows, expected, answers, seen):
    """Shows the answers to probes and rows, {"base": [Answer, …], "tuned": …}, and judges the last of them.

    Returns the part of the report that tells of it.
    """
    judged_one = list(answers)[-1]
    verdicts = {
        name: [judging.judge(a, e) for a, e in zip(given, expected, strict=True)]
        for name, given in answers.items()
    }
    probes = []
    for i, (prompt, need) in enumerate(PROBES):
        kind, reason = verdicts[judged_one][i]
        call = tool_call.parse(answers[judged_one][i].text)[0]
        probe = {
            "prompt": prompt,
            "expected": "a call" if need else "text",
            **{name: given[i].text for name, given in answers.items()},
            "pass": kind == "right",
            "reason": reason,
            "deviations": list(call.deviations) if call else [],
            "seen": seen[i],
        }
        probes.append(probe)
        show_probe(i + 1, probe)

    n = len(PROBES)
    judged = [i for i in range(n, len(expected)) if not seen[i]]
    table = {
        name: judging.rates([verdicts[name][i][0] for i in judged], [expected[i] is not None for i in judged])
        for name in verdicts
    }
    report.show_table(printable(str(data), 25), table)
    failing = []
    for i in range(n, len(expected)):
        line, text, (kind, reason) = rows[i - n][0], answers[judged_one][i].text, verdicts[judged_one][i]
        if seen[i]:
            print(f"{data}:{line}: seen in training, left out of the figures")
        elif kind != "right":
            failing.append({"line": line, "kind": kind, "reason": reason, judged_one: text})
            console.print_wrapped(f"{reason}: {text}", f"{data}:{line}: ", "    ")
    return {
        "data": data,
        "probes": probes,
        "rows": {**table, "seen_in_training": sum(seen[n:]), "failing": failing},
        "passed": sum(probe["pass"] for probe in probes),
    }


# ---------------------------------------------------------------------------------------------- main


def expected_call(path, line, messages):
    """Returns the call that a row's last answer is, None for text; UserError for a call that is none."""
    if not chat_text.is_call(messages):
        return None
    call, reason = tool_call.parse(messages[-1]["content"].strip())
    if call is None:
        raise rows_error(path, [(line, f"the call cannot be read ({reason}); mend it")])
    return call


def questions(args):
    """Returns the rows, and of probes and rows the conversations and what each must be answered with."""
    rows = chat_rows.read_rows(args.data)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"{args.json} cannot be written: its folder is not there; make it first")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"{args.json} is a folder; name a file in it")
    conversations = [[{"role": "user", "content": prompt}] for prompt, _ in PROBES]
    conversations += [row["messages"][:-1] for _, row in rows]
    expected = [CALL if need else None for _, need in PROBES]
    expected += [expected_call(args.data, line, row["messages"]) for line, row in rows]
    return rows, conversations, expected


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description="Compare base and tuned model on probes and held-out rows.")
    parser.add_argument("--adapter", help=f"folder of the adapter (default: {train_qlora.OUTPUT_DIR})")
    parser.add_argument("--data", default=HELD_OUT, help="rows never trained on (default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the base (default: unquantised)")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    parser.add_argument(
        "--endpoint", metavar="URL", help="ask a served model instead, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--model", help="its name there (default: the first that the endpoint lists)")
    args = parser.parse_args(arguments)
    if args.endpoint is None:
        if args.model is not None:
            parser.error("--model names a model of an endpoint; name that with --endpoint")
        args.adapter = args.adapter or train_qlora.OUTPUT_DIR
        return args
    if args.adapter or args.bits:
        parser.error("an endpoint answers as it is served; take --adapter and --bits out, or --endpoint")
    try:
        args.endpoint = endpoint.check_address(args.endpoint)
    except ValueError:
        cure = f"write http://host:port/v1, and put a key into {endpoint.KEY}"
        parser.error(f"--endpoint is no plain http or https address; {cure}")
    return args


def main():
    args = parse_arguments()
    try:
        sys.exit(run_endpoint(args) if args.endpoint else run(args))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not scripts.is_out_of_memory(error):
            raise
        print(
            "the GPU's memory is full; close what else runs on it, or compare with --bits 4", file=sys.stderr
        )
        sys.exit(2)


def run(args):
    """Returns the exit code: 0 if tuned passes every probe, else 1."""
    rows, conversations, expected = questions(args)
    started = time.perf_counter()
    model, tokenizer, settings = generation.load_tuned(args.adapter, args.bits)
    loaded = time.perf_counter()
    trained_on = set(settings.get("prompts_sha256", []))
    seen = [chat_text.fingerprint(messages) in trained_on for messages in conversations]
    if not trained_on:
        print(f"{args.adapter} does not say which rows it was trained on: none can be marked as seen")
    base_name = printable(model.peft_config["default"].base_model_name_or_path)
    bits = f"in {args.bits} bits" if args.bits else "unquantised"
    print(
        f"base {base_name} {bits}, tuned with {args.adapter}: {len(PROBES)} probes, {len(rows)} rows",
        flush=True,
    )
    with model.disable_adapter():
        base = generation.answer_all(model, tokenizer, conversations, "base ")
    tuned = generation.answer_all(model, tokenizer, conversations, "tuned")
    seconds = {"loading": round(loaded - started, 1), "answering": round(time.perf_counter() - loaded, 1)}
    memory = devices.peak_memory(model.device)

    report = show_answers(args.data, rows, expected, {"base": base, "tuned": tuned}, seen)
    report |= {
        "base_model": model.peft_config["default"].base_model_name_or_path,
        "bits": args.bits,
        "device": devices.device_name(model.device),
        "seconds": seconds,
        "peak_memory_gib": memory,
    }
    print(f"\nmemory     {devices.format_memory(memory)}")
    print(f"time       {seconds['loading']} s imports and loading, {seconds['answering']} s answering")
    failed = verdict("tuned", report)
    if args.json:
        atomic.write_json(args.json, report)
    atomic.write_json(
        Path(args.adapter, adapter_folder.COMPARISON), report, "have it and its folder writable"
    )
    if failed:
        return 1
    adapter = "" if args.adapter == train_qlora.OUTPUT_DIR else f" --adapter {args.adapter}"
    print(f"next       python merge.py{adapter}")
    return 0


def run_endpoint(args):
    """Does what run does for a model that is served; torch is not imported."""
    rows, conversations, expected = questions(args)
    places = [f"probe {i}" for i in range(1, len(PROBES) + 1)] + [f"{args.data}:{line}" for line, _ in rows]
    tools = list(dict.fromkeys(call.name for call in expected if call))
    print(f"endpoint {args.endpoint}: {len(PROBES)} probes, {len(rows)} rows", flush=True)
    started = time.perf_counter()
    model, listed, replies, refusal = endpoint.ask(
        args.endpoint, args.model, conversations, places, tools, generation.MAX_NEW_TOKENS
    )
    seconds = round(time.perf_counter() - started, 1)
    others = f", the first of {listed} listed" if listed > 1 else ""
    print(f"model {printable(model)}{others}; rows that it has seen cannot be told")
    answers = [generation.Answer(reply.text, reply.ended, []) for reply in replies]
    report = show_answers(args.data, rows, expected, {"endpoint": answers}, [False] * len(expected))
    parsed, tagged = sum(reply.parsed for reply in replies), sum(reply.tagged for reply in replies)
    report |= {
        "endpoint": args.endpoint,
        "model": model,
        "tools_refused": refusal,
        "calls": {"parsed": parsed, "text": tagged},
        "seconds": {"answering": seconds},
    }
    print(f"\ncalls      {parsed} came as tool_calls, {tagged} as tags in the text")
    if refusal:
        console.print_wrapped(f"asked without: it takes none ({refusal})", "tools      ", " " * 11)
    print(f"time       {seconds} s answering")
    failed = verdict("the endpoint", report)
    if args.json:
        atomic.write_json(args.json, report)
    return failed


def verdict(who, report):
    """Prints how many probes were passed; returns the exit code, 0 if all were."""
    print(f"verdict    {who} passes {report['passed']} of {len(PROBES)} probes")
    return int(report["passed"] < len(PROBES))


if __name__ == "__main__":
    main()

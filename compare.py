"""Base and tuned side by side: does the tuned model call when it must, what it must, and only then?

    python compare.py             the probes of probes.json, and the held-out rows of heldout.json
    python compare.py --bits 4    on a card that the unquantized model does not fit
    python compare.py --merged gemma-3-4b-it-merged    the same of a merged model
    python compare.py --endpoint http://127.0.0.1:8000/v1    the same of a model that is served already

Exit with 0 if the tuned model (merged, the endpoint) passes all probes, and reaches --min-f1 and
--max-false-calls on the held-out rows; with 1 if it falls short, with 2 for wrong arguments or rows, a
damaged adapter or an endpoint that does not answer. docs/verdict.md says what is counted.
"""

import argparse
import os
import time
from contextlib import suppress
from pathlib import Path

from train_qlora import OUTPUT_DIR, quantization_config
from tuner.data import chat_text
from tuner.inference import comparison, endpoint, endpoint_checks, endpoint_client, gate, judging, report
from tuner.inference.probes import HELD_OUT, PROBES, Questions, load_all
from tuner.model import gemma_folder
from tuner.system import atomic, commands
from tuner.system.console import one_line, printable
from tuner.system.errors import UserError
from tuner.system.libraries import heavy_imports
from tuner.system.scripts import run_script
from tuner.training import adapter_folder, records

OUT_OF_MEMORY = "close what else runs on the GPU (nvidia-smi), or compare with --bits 4"
NO_OVERLAP_CHECK = "cannot check for training/test overlap"


def share(text):
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {printable(text)}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description="Compare base and tuned model on probes and held-out rows.")
    parser.add_argument("--adapter", help=f"folder of the adapter (default: {OUTPUT_DIR})")
    parser.add_argument("--base", help="folder or hub name of the base (default: as the adapter records it)")
    parser.add_argument("--merged", metavar="FOLDER", help="judge a merged model instead (default: none)")
    parser.add_argument("--probes", default=PROBES, help="file of probes, as rows (default: %(default)s)")
    parser.add_argument("--data", help=f"file of held-out rows (default: {HELD_OUT}, if it is there)")
    parser.add_argument(
        "--min-f1",
        type=share,
        default=gate.MIN_F1,
        metavar="F1",
        help="least F1 of calls right in name and arguments on held-out rows (default: %(default)s)",
    )
    parser.add_argument(
        "--max-false-calls",
        type=share,
        default=gate.MAX_FALSE_CALLS,
        metavar="RATE",
        help="highest share of held-out general rows answered by a call (default: %(default)s)",
    )
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], help="bits to quantize the model to (default: unquantized)"
    )
    parser.add_argument("--json", metavar="FILE", help="file to write the full report to (default: none)")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="compare a served model instead, such as http://127.0.0.1:8000/v1 (default: none)",
    )
    parser.add_argument("--model", help="model name at the endpoint (default: the first that it lists)")
    args = parser.parse_args(arguments)
    if args.endpoint and args.merged:
        parser.error("--merged and --endpoint name two models; remove one")
    if args.endpoint is None and args.model is not None:
        parser.error("--model names a model at an endpoint; add --endpoint")
    if args.merged and (args.adapter or args.base):
        parser.error("--adapter and --base do not apply to a merged model; remove them")
    if args.endpoint is None:
        args.adapter = None if args.merged else args.adapter or OUTPUT_DIR
        return args
    if args.adapter or args.bits or args.base:
        parser.error("--adapter, --base and --bits do not apply to a served model; remove them")
    try:
        args.endpoint = endpoint_client.check_address(args.endpoint)
    except ValueError:
        parser.error(
            "--endpoint is not a plain http or https address; expected http://host:port/v1 "
            f"(an API key goes into {endpoint_client.KEY})"
        )
    return args


def check_report_path(path):
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist; create it first")
    if path and Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a file in it")


# --------------------------------------------------------------------------- base and tuned, or merged


def check_model(args):
    """Raise UserError if the folder to judge holds no adapter, or no merged model."""
    if not args.merged:
        adapter_folder.read_adapter(args.adapter)
        return
    if not os.path.isdir(args.merged):
        raise UserError(f"{args.merged} does not exist; create it: python merge.py")
    if adapter_folder.is_finished(args.merged):
        instead = commands.command("compare.py", adapter=args.merged)
        raise UserError(f"{args.merged} is an adapter; compare it with its base: {instead}")
    gemma_folder.check(args.merged, args.merged, "check --merged, or merge again")


def compare_here(args, probes, held_out):
    """Ask base and tuned, or the merged model, print and write the judgment; return the exit code."""
    check_model(args)  # a wrong one is reported before seconds of imports
    started = time.perf_counter()
    with heavy_imports():  # torch and what stands on it: seconds, so flags and rows are checked first
        from tuner.inference import generation
        from tuner.system import devices

    bits = f"in {args.bits} bits" if args.bits else "unquantized"
    if args.merged:
        model, tokenizer = generation.load_model(args.merged, args.merged, args.bits, quantization_config)
        run = records.read(Path(args.merged, adapter_folder.RUN), records.RUN, "merge again")
        base_name, what = None, f"merged {one_line(args.merged)} {bits}"
    else:
        model, tokenizer, run = generation.load_tuned(args.adapter, args.bits, quantization_config, args.base)
        base_name = model.peft_config["default"].base_model_name_or_path
        what = f"base {one_line(base_name)} {bits}, tuned with {one_line(args.adapter)}"
    loaded = time.perf_counter()
    conversations = probes.conversations + held_out.conversations
    limits = probes.max_new_tokens + held_out.max_new_tokens
    seen = seen_in_training(args.merged or args.adapter, run, conversations)
    print(f"{what}: {len(probes.lines)} probes, {len(held_out.lines)} rows", flush=True)
    answers = {}
    if not args.merged:
        with model.disable_adapter():
            answers["base"] = generation.answer_all(model, tokenizer, conversations, "base ", limits)
    judged = "merged" if args.merged else "tuned"
    answers[judged] = generation.answer_all(model, tokenizer, conversations, judged, limits)
    seconds = {"loading": round(loaded - started, 1), "answering": round(time.perf_counter() - loaded, 1)}
    memory = devices.peak_memory(model.device)

    judgment = comparison.judge_all(probes, held_out, answers, seen, (args.min_f1, args.max_false_calls))
    judgment |= {"merged": args.merged} if args.merged else {"base_model": base_name}
    judgment |= {
        "bits": args.bits,
        "device": devices.device_name(model.device),
        "seconds": seconds,
        "peak_memory_gib": memory,
    }
    lines = zip(held_out.lines, seen[len(probes.lines) :], strict=True)
    report.print_report(judgment, list(answers), seen_lines=[line for line, was_seen in lines if was_seen])
    print(f"\nmemory     {devices.format_memory(memory)}")
    print(f"time       {seconds['loading']} s importing and loading, {seconds['answering']} s answering")
    exit_code = report.print_verdict(judged, judgment, judged)
    write_judgment(args, judgment)
    if exit_code == 0:
        print_next(args)
    return exit_code


def seen_in_training(folder, run, conversations):
    """Return for each conversation whether the run, as its run.json says, trained on its prompt."""
    trained_on = set(run.get("prompts_sha256") or [])
    if not trained_on:
        print(f"{one_line(folder)} does not record the rows that it was trained on; {NO_OVERLAP_CHECK}")
    return [chat_text.fingerprint(messages) in trained_on for messages in conversations]


def write_judgment(args, judgment):
    """Write compare.json beside the adapter, and the report that --json names. Raise UserError."""
    if args.json:
        atomic.write_json(args.json, judgment)
    if args.adapter:
        path = Path(args.adapter, adapter_folder.COMPARISON)
        atomic.write_json(path, judgment, "make it and its folder writable")


def print_next(args):
    """Print what to type after a good verdict: it holds for what was judged, and for nothing else."""
    adapter = None if args.adapter == OUTPUT_DIR else args.adapter
    probes = None if args.probes == PROBES else args.probes
    if args.merged:
        serve = commands.command("serve.py", model=args.merged, bits=args.bits, probes=probes)
        print(f"next       {serve}")
    elif args.bits:
        again = {"data": args.data, "min_f1": args.min_f1, "max_false_calls": args.max_false_calls}
        defaults = (None, gate.MIN_F1, gate.MAX_FALSE_CALLS)
        again = {
            name: None if value == default else value
            for (name, value), default in zip(again.items(), defaults, strict=True)
        }
        compare = commands.command("compare.py", adapter=adapter, base=args.base, probes=probes, **again)
        print(f"next       {compare}")
        print("           on the unquantized base, as merge.py merges it; or serve what was judged:")
        flags = {"adapter": args.adapter, "base": args.base, "bits": args.bits, "probes": probes}
        print(f"           {commands.command('serve.py', **flags)}")
    else:
        print(f"next       {commands.command('merge.py', adapter=adapter, base=args.base, probes=probes)}")


# ----------------------------------------------------------------------------------------- an endpoint


def compare_endpoint(args, probes, held_out):
    """Ask a served model, print and write the judgment; return the exit code. torch is not imported."""
    print(f"endpoint {args.endpoint}: {len(probes.lines)} probes, {len(held_out.lines)} rows", flush=True)
    started = time.perf_counter()
    replies = endpoint.ask(args.endpoint, args.model, [probes, held_out])
    seconds = round(time.perf_counter() - started, 1)
    others = f" (the first of {replies.listed} listed)" if replies.listed > 1 else ""
    print(f"model {printable(replies.model)}{others}; {NO_OVERLAP_CHECK}")

    answers = [judging.Answer(reply.text, reply.ended, []) for reply in replies.replies]
    seen, asked = [False] * len(answers), (args.min_f1, args.max_false_calls)
    judgment = comparison.judge_all(probes, held_out, {"endpoint": answers}, seen, asked)
    gate.add(judgment["gate"], endpoint_checks.shortcomings(replies.loop, replies.stream))
    judgment |= {
        "endpoint": args.endpoint,
        "model": replies.model,
        "tools_refused": replies.tools_refused,
        "calls": {"parsed": replies.parsed, "text": replies.tagged},
        "results": replies.loop._asdict(),
        "streamed": replies.stream._asdict(),
        "seconds": {"answering": seconds},
    }
    report.print_report(judgment, ["endpoint"], seen_lines=[])
    print()
    report.print_endpoint(replies, endpoint.sources([probes, held_out]))
    print(f"time       {seconds} s answering")
    write_judgment(args, judgment)
    return report.print_verdict("the endpoint", judgment, "endpoint")


# ------------------------------------------------------------------------------------------------ main


def load_files(args):
    """Return the Questions of probes and held-out rows; those of none where no rows are named or there."""
    if args.data is None and not os.path.lexists(HELD_OUT):
        return *load_all((args.probes, "--probes")), Questions(None, *([] for _ in Questions._fields[1:]))
    return load_all((args.probes, "--probes"), (HELD_OUT if args.data is None else args.data, "--data"))


def main():
    args = parse_arguments()
    probes, held_out = load_files(args)
    check_report_path(args.json)
    compare = compare_endpoint if args.endpoint else compare_here
    return compare(args, probes, held_out)


if __name__ == "__main__":
    run_script(main, out_of_memory=OUT_OF_MEMORY, error_code=2)

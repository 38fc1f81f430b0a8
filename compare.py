"""Base and tuned side by side: does the tuned model call when it must, and only then?

    python compare.py             six probes, and the rows of heldout.json that no one was trained on
    python compare.py --bits 4    on a card that the unquantised model does not fit
    python compare.py --endpoint http://127.0.0.1:8000/v1    the same, of a model that is served already

Exits with 0 if tuned (the endpoint) passes all six probes, 1 if not, 2 for wrong arguments, a damaged
adapter or an endpoint that does not answer.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import adapter_folder
import cuda_decoding
import endpoint
import train_qlora
from tuner.data import batching, chat_rows, chat_text, tool_call
from tuner.model import folders, locate
from tuner.system import atomic, console, devices, libraries, scripts
from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error

HELD_OUT = "heldout.json"
# Four that need the call and two that do not; none of them stands in examples.json or heldout.json.
PROBES = [
    ("Какой у меня остаток на счёте?", True),
    ("Покажи мои последние покупки", True),
    ("Мой договор ещё действует?", True),
    ("Сколько я задолжал за квартиру?", True),
    ("Что такое кредитный лимит?", False),
    ("Добрый день, как настроение?", False),
]
CALL = tool_call.Call("get_sensitive_data", {}, ())
MAX_NEW_TOKENS = 80
TOKENS_PER_BATCH = 8192  # rows × (longest prompt + MAX_NEW_TOKENS) answered at once: 1.1 GB of cache on 4B
WEIGHTS_ROOM = 1.2  # of the weights' size: activations and cache of a batch beside them, measured on 4B
FAST_ON = "cuda"  # the kind of device that decodes by graphs
Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


# ------------------------------------------------------------------------------------------- answers


class Answer(NamedTuple):
    text: str
    ended: bool  # by itself, within MAX_NEW_TOKENS
    ids: list  # of its tokens, without the end token


def load(adapter, bits):
    """Returns (model, tokenizer, run): the base that the adapter names with the adapter on, and its run.json.

    Computes in bf16 on a GPU that has it and in fp32 on a CPU, where bf16 is some 200 times slower.
    Raises UserError if adapter or base are missing, damaged or not each other's, or the GPU is too small.
    """
    config, run = adapter_folder.read_settings(adapter)

    libraries.import_libraries()

    import torch
    from peft import PeftConfig, PeftModel

    base = config["base_model_name_or_path"]
    folder, revision = locate.find_model(base, rehearse=not torch.cuda.is_available())
    adapter_folder.check_weights(adapter, folder, revision)
    model, tokenizer = load_folder(folder, base, bits)
    lora = PeftConfig.from_pretrained(adapter)
    lora.exclude_modules = None  # the vision tower, which is not there: PEFT warns of excluding nothing
    return PeftModel.from_pretrained(model, adapter, config=lora).eval(), tokenizer, run


def load_folder(folder, name, bits):
    """Returns (model, tokenizer) of a model folder, which messages call by its name; raises as load does."""
    import torch
    from transformers import AutoTokenizer

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda:0", devices.gpu_dtype()) if gpu else ("cpu", torch.float32)
    if gpu and bits is None:
        needed = WEIGHTS_ROOM * folders.weight_bytes(folder) * dtype.itemsize / torch.bfloat16.itemsize
        free, _ = torch.cuda.mem_get_info()
        if needed > free:
            raise UserError(
                f"{name} unquantised needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free on the "
                "GPU; add --bits 4"
            )
    model = train_qlora.load_model(folder, bits, device, dtype, vision=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer, messages):
    """Returns the tokens of a conversation up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model):
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def padded(tokenizer, prompts, device):
    """Returns the input_ids and attention_mask of tokenised prompts.

    Padded on the left, so that every answer begins where its prompt ends.
    """
    return tokenizer.pad(
        {"input_ids": prompts},
        padding_side="left",
        pad_to_multiple_of=8,  # fp32 on an H100, torch 2.11: padded to 33, all went wrong
        return_tensors="pt",
    ).to(device)


def generate(model, tokenizer, prompts, on_token, **settings):
    """Continues tokenised prompts, greedily unless the settings differ; returns the new tokens of each.

    on_token(the newest token of each) is called at every step, and ends all by returning True.
    """
    import torch
    from transformers import StoppingCriteriaList

    def stop(input_ids, scores, **_):
        stopped = bool(on_token(input_ids[:, -1].tolist()))
        return torch.full((len(input_ids),), stopped, device=input_ids.device)

    inputs = padded(tokenizer, prompts, model.device)
    settings = {
        "do_sample": False,
        "top_k": None,  # what Gemma's own generation config asks for when it samples
        "top_p": None,
        "use_cache": True,
        "eos_token_id": end_tokens(model),
        **settings,
    }
    with torch.inference_mode(), devices.uncompiled_attention():
        output = model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([stop]))
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def cut(prompts):
    """Cuts the numbers of tokenised prompts into batches of at most TOKENS_PER_BATCH, longest first."""

    def length(i):
        return len(prompts[i]) + MAX_NEW_TOKENS

    ordered = sorted(range(len(prompts)), key=length, reverse=True)
    return batching.group(ordered, length, TOKENS_PER_BATCH)


def answer(model, tokenizer, conversations, title="answering"):
    """Answers conversations, each a list of messages that ends with the user's, greedily; returns Answers."""
    from tqdm import tqdm

    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    ends = end_tokens(model)
    answers = [None] * len(prompts)
    work = cut(prompts)
    bar = tqdm(total=MAX_NEW_TOKENS * len(work), desc=title, unit="token", leave=False, disable=None)

    def advance(*_):
        bar.update()

    with bar:
        for number, batch in enumerate(work, 1):
            asked = [prompts[i] for i in batch]
            if model.device.type == FAST_ON:
                inputs = padded(tokenizer, asked, model.device)
                output = cuda_decoding.decode(model, **inputs, new=MAX_NEW_TOKENS, ends=ends, on_step=advance)
            else:
                output = generate(model, tokenizer, asked, advance, max_new_tokens=MAX_NEW_TOKENS)
            for i, ids in zip(batch, output, strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), None)
                ids = ids[:end]
                answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=False), end is not None, ids)
            bar.update(number * MAX_NEW_TOKENS - bar.n)
    return answers


# ------------------------------------------------------------------------------------------- verdict


def judge(answer, expected):
    """Returns (kind, reason) of an Answer where `expected` is a tool_call.Call, or None for plain text.

    Kinds where a call is needed: "right", "missed" (no trace of a call), "malformed" (a trace, and not the
    one call asked for); where text is: "right", "false" (a trace of a call), "unfit" (empty, unended).
    """
    unended = None if answer.ended else f"does not end within {MAX_NEW_TOKENS} tokens"
    traced = tool_call.trace(answer.text)
    if expected is None:
        if traced:
            return "false", "a call where text is expected"
        if unended or not answer.text.strip():
            return "unfit", unended or "an empty answer"
        return "right", None
    if not traced:
        return "missed", "no call"
    call, reason = tool_call.parse(answer.text)
    if call is None or unended:
        return "malformed", reason or unended
    if call.name != expected.name:
        return "malformed", f"calls {printable(call.name)}, not {expected.name}"
    if json.dumps(call.arguments, sort_keys=True) != json.dumps(expected.arguments, sort_keys=True):
        return "malformed", "other arguments than expected"
    return "right", None


def wilson(part, whole):
    """Returns the 95 % Wilson score interval (low, high) of a proportion (Wilson 1927); whole ≥ 1."""
    share = part / whole
    centre = share + Z**2 / (2 * whole)
    half = Z * (share * (1 - share) / whole + Z**2 / (4 * whole**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + Z**2 / whole)), min(1.0, (centre + half) / (1 + Z**2 / whole))


def figures(kinds, needed):
    """Returns the counts and rates of judged rows; kinds and needed (a call) are lists of equal length.

    A call made is a right, a malformed or a false one. A rate is {"part", "whole", "value", "low", "high"}
    with its 95 % Wilson interval, or has None for the last three where it is 0 of 0.
    """

    def tally(kind, need):
        return sum(k == kind and n == need for k, n in zip(kinds, needed, strict=True))

    def rate(part, whole, curve=lambda share: share):
        value, low, high = (part / whole, *wilson(part, whole)) if whole else (None,) * 3
        shares = {"value": value, "low": low, "high": high}
        return {"part": part, "whole": whole, **{k: v if v is None else curve(v) for k, v in shares.items()}}

    counts = {
        "needed": sum(needed),
        "right": tally("right", True),
        "missed": tally("missed", True),
        "malformed": tally("malformed", True),
        "general": len(needed) - sum(needed),
        "false": tally("false", False),
        "unfit": tally("unfit", False),
    }
    made = counts["right"] + counts["malformed"] + counts["false"]
    rates = {
        "precision": rate(counts["right"], made),
        "recall": rate(counts["right"], counts["needed"]),
        # F1 = 2J / (1 + J) of the Jaccard index J, which is a proportion, so J's interval carries over.
        "f1": rate(counts["right"], counts["needed"] + made - counts["right"], lambda j: 2 * j / (1 + j)),
        "false_call_rate": rate(counts["false"], counts["general"]),
    }
    return {
        **counts,
        **{name: r["value"] for name, r in rates.items()},
        "intervals": {name: [r["low"], r["high"]] for name, r in rates.items()},
        "of": {name: [r["part"], r["whole"]] for name, r in rates.items()},
    }


def show_probe(number, probe):
    verdict = (
        console.paint("pass", 32) if probe["pass"] else console.paint("FAIL", 31) + f": {probe['reason']}"
    )
    seen = " (seen in training: proves nothing)" if probe["seen"] else ""
    print(f"\nprobe {number}    {verdict}{seen}")
    lines = {"prompt": probe["prompt"], "expected": probe["expected"]}
    lines |= {name: probe[name] for name in ("base", "tuned", "endpoint") if name in probe}
    for name, text in lines.items():
        console.show(text, f"  {name:<10}", " " * 12)
    if probe["deviations"]:
        print(f"  {'form':<10}{', '.join(probe['deviations'])}")


def show_table(title, columns):
    """Prints the figures of each column, by its name."""

    def rate(figures, name):
        part, whole = figures["of"][name]
        if figures[name] is None:
            return f"– ({part} of {whole})"
        low, high = figures["intervals"][name]
        counts = "" if name == "f1" else f"{part} of {whole}: "
        return f"{counts}{figures[name]:.2f} ({low:.2f}–{high:.2f})"

    def line(label, cells):
        print(f"{label:<26}" + "".join(f"{cell:>27}" for cell in cells))

    print()
    line(title, columns)
    labels = {
        "needed": "calls needed",
        "right": "  made right",
        "missed": "  missed",
        "malformed": "  malformed",
    }
    labels |= {"general": "text needed", "false": "  false calls", "unfit": "  empty or unended"}
    for key, label in labels.items():
        line(label, [figures[key] for figures in columns.values()])
    for name in ("precision", "recall", "f1", "false_call_rate"):
        label = {"f1": "F1"}.get(name, name.replace("_", "-"))
        line(label, [rate(figures, name) for figures in columns.values()])
    print("in brackets: 95 % Wilson interval")


def show_answers(data, rows, expected, answers, seen):
    """Shows the answers to probes and rows, {"base": [Answer, …], "tuned": …}, and judges the last of them.

    Returns the part of the report that tells of it.
    """
    judged_one = list(answers)[-1]
    verdicts = {
        name: [judge(a, e) for a, e in zip(given, expected, strict=True)] for name, given in answers.items()
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
        name: figures([verdicts[name][i][0] for i in judged], [expected[i] is not None for i in judged])
        for name in verdicts
    }
    show_table(printable(str(data), 25), table)
    failing = []
    for i in range(n, len(expected)):
        line, text, (kind, reason) = rows[i - n][0], answers[judged_one][i].text, verdicts[judged_one][i]
        if seen[i]:
            print(f"{data}:{line}: seen in training, left out of the figures")
        elif kind != "right":
            failing.append({"line": line, "kind": kind, "reason": reason, judged_one: text})
            console.show(f"{reason}: {text}", f"{data}:{line}: ", "    ")
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
    rows = chat_rows.read(args.data)
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
    model, tokenizer, settings = load(args.adapter, args.bits)
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
        base = answer(model, tokenizer, conversations, "base ")
    tuned = answer(model, tokenizer, conversations, "tuned")
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
    print(f"\nmemory     {devices.told(memory)}")
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
        args.endpoint, args.model, conversations, places, tools, MAX_NEW_TOKENS
    )
    seconds = round(time.perf_counter() - started, 1)
    others = f", the first of {listed} listed" if listed > 1 else ""
    print(f"model {printable(model)}{others}; rows that it has seen cannot be told")
    answers = [Answer(reply.text, reply.ended, []) for reply in replies]
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
        console.show(f"asked without: it takes none ({refusal})", "tools      ", " " * 11)
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

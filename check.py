"""Everything that can be known before a GPU is rented: are the rows right, what exactly will be learned, how
long will it take and what will it cost, and will the model be had?

    python check.py                           rows, labels, plan, cost, access, in seconds, on a laptop
    python check.py --html labels.html        every row as the model will see it, as one page

Exits with 0 if the rows can be trained on, 1 if not (--strict: if anything is found), 2: wrong arguments.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import train_qlora
from tuner.data import chat_rows, chat_text, row_faults, row_warnings
from tuner.inference.probes import HELD_OUT, PROBES
from tuner.model import folders, gemma_tokenizer, hub, locate
from tuner.system import console, devices, hardware, libraries
from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error
from tuner.training import adapter_folder, loss_functions, memory_plan

GPU_PRICE = 60  # an hour, in whatever currency: roubles for an RTX 4090 at the time of writing
SHOWN_OF_A_KIND = 20  # warnings
TOKENIZER_FOLDER = "gemma-3-tokenizer"  # made of the small model's package where no model is there
CARDS = (8, 12, 16, 24, 48)  # GiB

# Training's seconds, measured with an H100 (torch 2.11), 40 steps of 16 short rows, by number of bits. A
# micro-batch is some ten thousand small kernels, whatever it holds, and 4 operations a weight and token: 2
# forward, and 2 in the backward pass, which needs no gradient of the base's weights.
START = {4: 21, 8: 29}  # imports and loading, between what two hosts took
EPOCH = 0.6  # an evaluation and a checkpoint
BUSY = {4: 0.17, 8: 0.15}  # of the published figure is what a card then does of these operations
# Published dense bf16 tera-operations a second, and GiB; the T4 computes in fp32, having no bf16.
PUBLISHED = {"H100": (989, 80), "A100": (312, 40), "RTX 4090": (165, 24), "L4": (121, 24)}
PUBLISHED |= {"A10": (125, 24), "RTX 3090": (71, 24), "T4": (8.1, 16)}
MEASURED_ON, WITHOUT_BF16 = "H100", "T4"
ALONE = SimpleNamespace(process_index=0, num_processes=1)  # one GPU


def show_warnings(path, rows, found):
    texts = {line: row["messages"][-2] for line, row in reversed(rows)}  # of a line's first row
    shown = Counter()
    for line, kind, text in found:
        shown[kind] += 1
        if shown[kind] <= SHOWN_OF_A_KIND:
            print(f"{path}:{line}: {console.colorize('warning', 33)}: {printable(text, 300)}")
            if line in texts and kind != "balance":
                console.print_wrapped(texts[line]["content"], "    ", "    ")
    for kind, count in shown.items():
        if count > SHOWN_OF_A_KIND:
            print(f"… and {count - SHOWN_OF_A_KIND} more of the kind {kind}")


# -------------------------------------------------------------------------------------------- labels


def find_tokenizer(model, online):
    """Returns (tokenizer, where it is from): the model's own, or else the small model's, which is the same.

    online: whether the hub may be asked for a model that is not here. Raises UserError if there is none.
    """
    with libraries.without_torch():  # tokenising needs none, and importing it takes longer than all the rest
        from transformers import logging

        logging.set_verbosity_error()
        if is_tokenizer(model):
            return gemma_tokenizer.load_tokenizer(model), model
        if not locate.is_local(model):
            try:
                return gemma_tokenizer.load_tokenizer(model, local_files_only=not online), model
            except (OSError, ValueError):
                pass  # "access" says why
        small = next((f for f in (folders.SMALL_FOLDER, TOKENIZER_FOLDER) if is_tokenizer(f)), None)
        if small is None:
            # In a process of its own: the reader of the package wants torch.
            code = f"from tuner.model import small_model; small_model.build_tokenizer({TOKENIZER_FOLDER!r})"
            made = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            )  # fmt: skip
            if made.returncode:
                reason = made.stderr.strip().split("\n")[-1].removeprefix("tuner.system.errors.UserError: ")
                raise UserError(f"no tokenizer of {model} is here, and {reason}")
            small = TOKENIZER_FOLDER
        return gemma_tokenizer.load_tokenizer(small), f"./{small}, the same as Gemma-3-4b's"


def is_tokenizer(folder):
    return Path(folder, "tokenizer.json").is_file()


def count_tokens(rows, tokenizer):
    """Returns [(tokens, trained tokens), …] of the rows, by the function that training uses."""
    counts = []
    for start in range(0, len(rows), row_warnings.ROWS_AT_ONCE):
        messages = [row["messages"] for _, row in rows[start : start + row_warnings.ROWS_AT_ONCE]]
        batch = train_qlora.preprocess_function({"messages": messages}, tokenizer)
        counts += [(len(labels), len(labels) - labels.count(-100)) for labels in batch["labels"]]
    return counts


def pieces(row, tokenizer):
    """Returns [(text, trained, special), …], one for each token of a row, as training will see it."""
    batch = train_qlora.preprocess_function({"messages": [row["messages"]]}, tokenizer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    texts = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids)]
    # No text of a row holds a control token, so these are the template's.
    return [(t, x != -100, t in row_faults.CONTROL_TOKENS) for t, x in zip(texts, labels, strict=True)]


def show_labels(rows, tokenizer):
    """Prints rows token by token: trained ones in colour, or between ⟦ and ⟧ where there is none."""
    colour = console.colorize("x", 32) != "x"
    for line, row in rows:
        tokens = pieces(row, tokenizer)
        trained = sum(t for _, t, _ in tokens)
        kind = "a call" if chat_text.has_call(row["messages"]) else "general"
        print(f"\nline {line}: {kind}, {len(tokens)} tokens, {trained} trained")
        text, before = "", False
        for piece, learned, special in tokens:
            shown = printable(piece.replace("\n", "⏎"), 100)
            if colour:
                shown = console.colorize(shown, ("1;" if special else "") + ("32" if learned else "90"))
            elif learned != before:
                shown = ("⟦" if learned else "⟧") + shown
            text += shown + "\n" * piece.count("\n")
            before = learned
        print(text.rstrip("\n") + "⟧" * (before and not colour))


def choose(rows, counts, wanted):
    """Returns the rows to show: those on the lines asked for, all, or a call, a general and the longest one.

    Raises UserError for a line that has no row.
    """
    if wanted == "all":
        return rows
    if wanted:
        lines = {line for line, _ in rows}
        if missing := sorted(set(wanted) - lines):
            raise UserError(f"--rows: no row begins on line {missing[0]}; name lines of the file")
        return [pair for pair in rows if pair[0] in wanted]
    calls = [chat_text.is_call(row["messages"]) for _, row in rows]
    places = {calls.index(True)} if True in calls else set()
    places |= {calls.index(False)} if False in calls else set()
    places.add(max(range(len(rows)), key=lambda i: counts[i][0]))
    return [rows[i] for i in sorted(places)]


# ------------------------------------------------------------------------------------- plan and cost


def plan(rows, counts):
    """Returns what training will do, as a dict of its numbers, and [text, …] of what is off about it."""
    plain = [row for _, row in rows]
    training, validation = train_qlora.split_rows(plain)
    calls = [chat_text.is_call(row["messages"]) for row in plain]
    epoch = [[counts[i][0] for i in step] for step in train_qlora.steps_of(1, training)]
    steps = train_qlora.EPOCHS * len(epoch)
    numbers = {
        "training": len(training),
        "validation": len(validation),
        "validation_calls": sum(calls[i] for i in validation),
        "steps": steps,
        "warmup": train_qlora.warmup_steps(steps),
        "epoch": epoch,
        "longest": max(tokens for tokens, _ in counts),
        "trained_at_once": min(loss_functions.LOGITS_AT_ONCE, sum(trained for _, trained in counts)),
    }
    off = []
    if not validation:
        off.append("too few rows to hold 10 % out: nothing is evaluated, and the last step's adapter is kept")
    elif len({calls[i] for i in validation}) < 2:
        lacks = "without" if calls[validation[0]] else "with"
        off.append(f"no row {lacks} a call is held out: the best adapter is chosen by the other kind alone")
    if steps < 2 * train_qlora.WARMUP_STEPS:
        off.append(f"only {steps} steps: few rows; 40 and more is what was measured to teach the call")
    return numbers, off


def show_plan(numbers, counts):
    n = numbers
    calls, times = n["validation_calls"], train_qlora.EPOCHS if n["validation"] else 0
    tokens, trained = (sum(column) for column in zip(*counts, strict=True))
    print(f"\ntokens     {tokens} in all, {trained} trained, {n['longest']} in the longest row")
    print(f"split      {n['training']} rows trained on, {n['validation']} held out ({calls} with a call)")
    print(
        f"steps      {n['steps']}: {train_qlora.EPOCHS} epochs, {train_qlora.ROWS_PER_STEP} rows a step; ",
        end="",
    )
    print(f"warm-up {n['warmup']}, then a cosine")
    kept = f"{times} times, once an epoch, the best one's" if times else "none, the last step's"
    print(f"evaluation {kept} adapter is written at the end;")
    print("           a checkpoint each epoch, and at Ctrl-C: --resume goes on from there")


def seconds(d, numbers, bits, card):
    """Returns how long a run takes on a card, from start to adapter: what was measured, scaled to it."""
    speed, size = PUBLISHED[card]
    budget = memory_plan.MEMORY_FRACTION * memory_plan.usable_bytes(size)
    sizes = numbers["trained_at_once"], numbers["longest"]
    plans = memory_plan.make_plans(d, bits, train_qlora.LORA_R, budget, *sizes)
    if card == WITHOUT_BF16:
        plans = [memory_plan.Plan(0, train_qlora.TOKENS_PER_MICRO_BATCH)]
    kernels = min(memory_plan.plan_seconds(plan, numbers["epoch"], bits, ALONE) for plan in plans)
    operations = 4 * memory_plan.text_weights(d) * sum(map(sum, numbers["epoch"]))
    arithmetic = operations / (speed * 1e12 * BUSY[bits])
    return START[bits] + train_qlora.EPOCHS * (kernels + arithmetic + EPOCH)


def show_cost(d, numbers, price):
    for bits in (4, 8):
        size = memory_plan.least_bytes(
            d, bits, train_qlora.LORA_R, numbers["longest"], numbers["trained_at_once"]
        )
        cards = [
            str(card)
            for card in CARDS
            if size <= memory_plan.MEMORY_FRACTION * memory_plan.usable_bytes(card)
        ]
        takes = f"fits cards of {', '.join(cards)} GB" if cards else "fits none of the usual cards"
        print(f"memory     {bits} bits: {size / 2**30:.1f} GiB at least, and faster with more; {takes}")
    print(f"time       from start to adapter, and its price at {price:g} an hour, without the download:")
    for card in PUBLISHED:
        cells = []
        for bits in (4, 8):
            total = seconds(d, numbers, bits, card)
            cells.append(f"{bits} bits {total:>6.0f} s {total * price / 3600:>7.2f}")
        how = "from measurements" if card == MEASURED_ON else "scaled"
        print(f"           {card:<9} {'   '.join(cells)}   {how}")


# -------------------------------------------------------------------------------------------- access


def access(model, offline):
    """Returns [(mark, text), …]: mark is ✓, ✗ (with the cure) or – (not needed, or not known)."""
    lines = []
    if locate.is_local(model):
        missing = folders.missing_files(model)
        cure = "; python download_model.py brings one"
        lines.append(
            ("✗", f"model: {model} lacks {missing[0]}{cure}") if missing else ("✓", f"model: {model}")
        )
    elif offline:
        lines.append(("–", "token and licence: not asked for (--offline)"))
    else:
        from huggingface_hub import get_token

        token = ("✓", "token: there") if get_token() else ("–", "token: none")
        try:
            _, files = hub.ask_hub(model)
            download = sum(file.size for file in files)
            lines += [token, ("✓", f"licence: accepted, {model} may be downloaded ({download / 1e9:.1f} GB)")]
        except UserError as error:
            lines += [token] if error.about != "token" else []
            lines.append(("✗", f"{error.about}: {error}"))
            lines += [("–", "licence: not known before that")] if error.about != "licence" else []
    free = shutil.disk_usage(".").free
    weights = 2 * memory_plan.GEMMA_3_4B_WEIGHTS  # bytes
    needed = 2 * weights + adapter_folder.DISK_NEEDED + hub.RESERVE
    takes = f"model ({weights / 1e9:.1f}, a download), adapter and merged model take {needed / 1e9:.0f}"
    enough = f"disk: {free / 1e9:.0f} GB free; {takes}"
    lines.append(("✓", enough) if free >= needed else ("✗", enough + "; free some, or take another folder"))
    return lines + hardware.check_host_memory() + devices.check_gpu()


# ---------------------------------------------------------------------------------------------- main


def parse_arguments(arguments=None):
    def price(text):
        value = float(text)
        if not 0 <= value < math.inf:
            raise ValueError
        return value

    def lines(text):
        return text if text == "all" else [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="Check rows, labels, plan, cost and access before training.")
    base = locate.default_model()
    parser.add_argument("--data", default=train_qlora.DATA_PATH, help="chat rows (default: %(default)s)")
    parser.add_argument("--model", default=base, help="folder or hub name of the base (default: %(default)s)")
    parser.add_argument("--gpu-price", type=price, default=GPU_PRICE, help="an hour (default: %(default)s)")
    parser.add_argument(
        "--rows", type=lines, metavar="5,17", help="lines to show the labels of, or all (default: three rows)"
    )
    parser.add_argument("--html", metavar="FILE", help="write the labels of all rows as a page")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings and ✗ too")
    parser.add_argument("--offline", action="store_true", help="ask no hub")
    return parser.parse_args(arguments)


def main():
    args = parse_arguments()
    try:
        sys.exit(run(args))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python check.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(args):
    """Returns the exit code."""
    rows = chat_rows.read_rows(args.data)
    asked = []

    def ask():
        try:
            asked.extend(access(args.model, args.offline))
        except Exception as error:  # of a thread, it would be lost
            reason = printable(f"{type(error).__name__}: {error}", 200)
            asked.append(("✗", f"access could not be checked ({reason}); report that, with --offline go on"))

    asking = threading.Thread(target=ask, daemon=True)  # the hub is asked while the rows are looked at
    asking.start()
    calls = sum(chat_text.has_call(row["messages"]) for _, row in rows)
    print(
        f"rows       {len(rows)} of {args.data}: {calls} with a call, {len(rows) - calls} without", flush=True
    )
    held_out = []
    if Path(HELD_OUT).exists() and Path(HELD_OUT).resolve() != Path(args.data).resolve():
        held_out = chat_rows.read_rows(HELD_OUT)
    found = row_warnings.warnings(rows, [prompt for prompt, _ in PROBES], held_out)
    show_warnings(args.data, rows, found)

    asking.join()
    online = any(mark == "✓" and text.startswith("licence") for mark, text in asked)
    tokenizer, source = find_tokenizer(args.model, online)
    counts = count_tokens(rows, tokenizer)
    too_long = train_qlora.too_long([line for line, _ in rows], [tokens for tokens, _ in counts])
    if too_long:
        raise rows_error(args.data, too_long)
    print(f"\nlabels     tokenizer of {source}; trained is what is", end=" ")
    print("green" if console.colorize("x", 32) != "x" else "between ⟦ and ⟧")
    show_labels(choose(rows, counts, args.rows), tokenizer)
    if args.html:
        write_page(args.html, args.data, rows, found, tokenizer)
    numbers, off = plan(rows, counts)
    show_plan(numbers, counts)
    for text in off:
        print(f"           {console.colorize('warning', 33)}: {text}")
    show_cost(dimensions_of(args.model), numbers, args.gpu_price)

    print()
    for mark, text in asked:
        print(f"{console.colorize(mark, {'✓': 32, '✗': 31}.get(mark, 90))} {text}")
    wrong = len(found) + len(off)
    missing = sum(mark == "✗" for mark, _ in asked)
    print(f"\nverdict    {wrong or 'no'} warning{'s' * (wrong != 1)}", end="")
    print(f"; to mend before training: {missing} ✗" if missing else "")
    if not (args.strict and (wrong or missing)):
        print("next       python download_model.py, then python train_qlora.py on a GPU")
    return int(args.strict and bool(wrong or missing))


def dimensions_of(model):
    """Returns the Dimensions of a model that is here, otherwise those of Gemma-3-4b."""
    try:
        return memory_plan.read_dimensions(json.loads(Path(model, "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return memory_plan.GEMMA_3_4B


def write_page(path, data, rows, found, tokenizer):
    from tuner.data import label_page

    told = defaultdict(list)
    for line, _, text in found:
        told[line].append(text)
    page = (
        {
            "line": line,
            "call": chat_text.has_call(row["messages"]),
            "pieces": pieces(row, tokenizer),
            "warnings": told[line],
        }
        for line, row in rows
    )
    try:
        label_page.write(path, data, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from error
    print(f"\npage       {path}: open it in a browser")


if __name__ == "__main__":
    main()

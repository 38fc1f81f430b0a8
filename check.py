"""Check all that can be known before a GPU is rented: are the rows right, what exactly will be learned, how
long will it take, what will it cost, and may the model be downloaded?

    python check.py                           rows, tools, labels, plan, cost, access, in seconds, on a laptop
    python check.py --html labels.html        every row as the model will see it, as one page

Exits with 0 if the rows can be trained on, 1 if not (--strict: if there is any warning), 2 for wrong flags.
Imports no torch, unless there is a GPU to check.
"""

import argparse
import math
import shutil
import threading
from collections import Counter
from pathlib import Path

from train_qlora import DATA_PATH, RECIPE, preprocess_function
from tuner.data import chat_rows, chat_text, label_page, labels, row_warnings, tool_survey, tool_warnings
from tuner.inference.probes import HELD_OUT, PROBES, answer_faults
from tuner.model import folders, hub, locate
from tuner.model.access import check_model, find_tokenizer, is_downloadable
from tuner.system import commands, console, hardware
from tuner.system.console import colorize, printable
from tuner.system.errors import UserError, join_errors, rows_error
from tuner.system.scripts import run_script
from tuner.training import adapter_folder, cost, memory_plan, run_plan

GPU_PRICE = 60  # per hour, in any currency: rubles for an RTX 4090 at the time of writing
SHOWN_PER_KIND = 20  # warnings
GREEN, RED, YELLOW, GRAY = 32, 31, 33, 90


def main():
    """Check rows, labels, plan, cost and access, and print each; return the exit code."""
    args = parse_arguments()
    data, rows, probes, held_out = read_files(args)
    wait_for_access = start_access_check(args.model, args.offline)  # the hub answers while rows are checked
    calls = sum(chat_text.has_call(row["messages"]) for _, row in rows)
    general = len(rows) - calls
    path = console.one_line(args.data)
    print(f"rows       {len(rows)} of {path}: {calls} with a call, {general} without", flush=True)
    if data.ignored_keys:
        print(f"ignored keys: {printable(', '.join(data.ignored_keys), 200)}")
    tools = tool_survey.survey(rows, held_out, probes)
    warnings = find_warnings(rows, held_out, probes, tools)
    show_warnings({None: args.data, "held_out": args.held_out, "probes": args.probes}, warnings)
    show_tools(tools, bool(probes or held_out))

    access = wait_for_access()
    tokenizer, source = find_tokenizer(args.model, is_downloadable(access))
    counts = labels.count_tokens(rows, tokenizer, preprocess_function)
    lines, lengths = [line for line, _ in rows], [tokens for tokens, _ in counts]
    if too_long := labels.too_long(lines, lengths, RECIPE.max_tokens):
        raise rows_error(args.data, too_long)
    marked = "green" if console.has_colors() else "between ⟦ and ⟧"
    print(f"\nlabels     tokenizer of {console.one_line(source)}; trained tokens are {marked}")
    show_labels(choose_rows(rows, counts, args.rows), tokenizer)
    if args.html:
        write_page(args.html, args.data, rows, warnings, tokenizer)

    plan = run_plan.plan_run(rows, counts, RECIPE)
    plan_warnings = list(run_plan.warn_of_plan(plan, RECIPE))
    run_plan.show_plan(plan, RECIPE)
    for text in plan_warnings:
        print(f"           {colorize('warning', YELLOW)}: {text}")
    run_plan.show_cost(cost.dimensions_of(args.model), plan.workload, args.gpu_price, RECIPE)

    print()
    for mark, text in access:
        print(f"{colorize(mark, {'✓': GREEN, '✗': RED}.get(mark, GRAY))} {console.one_line(text)}")
    count = len(warnings) + len(plan_warnings)
    problems = sum(mark == "✗" for mark, _ in access)
    verdict = f"{count or 'no'} warning{'s' * (count != 1)}"
    if problems:
        verdict += f"; {problems} problem{'s' * (problems != 1)} to fix before training"
    print(f"\nverdict    {verdict}")
    failed = args.strict and bool(count or problems)
    if problems:
        print("next       fix what is marked ✗, then check again")
    elif not failed:
        print(f"next       {next_command(args.model, args.data)}")
    return int(failed)


def next_command(model, data):
    """Return what to type next: download what is not here, and train, or rehearse with the small model."""
    data = None if data == DATA_PATH else data
    if Path(model) == Path(folders.SMALL_FOLDER):
        return commands.command("train_qlora.py", rehearse=True, data=data)
    folder = model if locate.is_local(model) else model.split("/")[-1]
    is_default = Path(folder) == Path(folders.BASE_FOLDER)
    train = commands.command("train_qlora.py", model=None if is_default else folder, data=data)
    if locate.is_local(model):
        return train
    download = commands.command("download_model.py", model=None if model == folders.BASE_MODEL else model)
    return f"{download} && {train}"


# ---------------------------------------------------------------------------------------------- rows


def read_files(args):
    """Return (Rows, rows, probes, held-out rows), the last three as [(line, row), …].

    Probes and held-out rows are not read if there is no file of the default name, or if it is the one that is
    checked. Raise one UserError that lists all rows that cannot be trained on, or judged by.
    """

    def load(path, flag, *more_faults):
        try:
            return chat_rows.load(path, flag, *more_faults)
        except UserError as error:
            errors.append(error)

    def load_judge(path, flag, default):
        is_missing = path == default and not Path(path).exists()
        is_read = not is_missing and Path(path).resolve() != Path(args.data).resolve()
        return load(path, flag, answer_faults) if is_read else None

    errors = []
    data = load(args.data, "--data")
    files = (
        data,
        load_judge(args.probes, "--probes", PROBES),
        load_judge(args.held_out, "--held-out", HELD_OUT),
    )
    if errors:
        raise join_errors(errors)
    return data, *(list(zip(rows.lines, rows, strict=True)) if rows else [] for rows in files)


def find_warnings(rows, held_out, probes, tools):
    """Return [RowWarning, …] by file and line."""
    judges = ([(line, row["messages"][:-1]) for line, row in file] for file in (probes, held_out))
    warnings = [*row_warnings.warnings(rows, *judges), *tool_warnings.warnings(tools, held_out, probes)]
    return sorted(warnings, key=lambda warning: (warning.file or "", warning.line))


def show_tools(tools, is_judged):
    """Print how many rows call each tool, and how many values its arguments have, if any is called."""
    if any(tool.rows or tool.asked() for tool in tools.values()):
        print("\n" + "\n".join(tool_survey.table(tools, is_judged)))


def show_warnings(paths, warnings):
    """Print warnings, up to SHOWN_PER_KIND of each kind, with the turn that each is about; paths: by file."""
    shown = Counter()
    for warning in warnings:
        shown[warning.kind] += 1
        if shown[warning.kind] <= SHOWN_PER_KIND:
            place = f"{console.one_line(paths[warning.file])}:{warning.line}"
            print(f"{place}: {colorize('warning', YELLOW)}: {printable(warning.text, 300)}")
            if warning.about is not None:
                console.print_wrapped(warning.about, "    ", "    ")
    for kind, count in shown.items():
        if count > SHOWN_PER_KIND:
            print(f"… and {count - SHOWN_PER_KIND} more of the kind {kind}")


# -------------------------------------------------------------------------------------------- labels


def choose_rows(rows, counts, wanted):
    """Return the rows to show: those on the wanted lines, "all", or for None a call, a general, the longest.

    Raise UserError for a line on which no row begins.
    """
    if wanted == "all":
        return rows
    if wanted:
        wanted = set(wanted)
        if missing := sorted(wanted - {line for line, _ in rows}):
            raise UserError(f"--rows: no row begins on line {missing[0]}; choose lines of the file")
        return [pair for pair in rows if pair[0] in wanted]
    calls = [chat_text.is_call(row["messages"]) for _, row in rows]
    chosen = {calls.index(kind) for kind in (True, False) if kind in calls}
    chosen.add(max(range(len(rows)), key=lambda i: counts[i][0]))
    return [rows[i] for i in sorted(chosen)]


def show_labels(rows, tokenizer):
    """Print rows token by token."""
    for line, row in rows:
        pieces = labels.pieces(row, tokenizer, preprocess_function)
        trained = sum(trained for _, trained, _ in pieces)
        kind = "a call" if chat_text.has_call(row["messages"]) else "general"
        print(f"\nline {line}: {kind}, {len(pieces)} tokens, {trained} trained")
        print(labels.format_pieces(pieces))


def write_page(path, data_path, rows, warnings, tokenizer):
    """Write the labels of all rows as a page. Raise UserError if it cannot be written."""
    page_rows = labels.page_rows(rows, warnings, tokenizer, preprocess_function)
    try:
        label_page.write(path, data_path, page_rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another file") from error
    print(f"\npage       {console.one_line(path)}: open it in a browser")


# -------------------------------------------------------------------------------------------- access


def check_access(model, offline):
    """Return [(mark, text), …] for model, disk, memory and GPU: ✓, ✗ with the cure, or – for unknown."""
    free = shutil.disk_usage(".").free
    weights = 2 * memory_plan.GEMMA_3_4B_WEIGHTS  # bytes
    needed = 2 * weights + adapter_folder.DISK_NEEDED + hub.RESERVE
    purpose = f"model ({weights / 1e9:.1f} to download), adapter and merged model"
    disk = f"disk: {free / 1e9:.0f} GB free; {purpose} need {needed / 1e9:.0f}"
    mark, cure = ("✓", "") if free >= needed else ("✗", "; free some, or use another folder")
    lines = [*check_model(model, offline), (mark, disk + cure), *hardware.check_host_memory()]
    if not hardware.has_driver():
        return [*lines, ("–", "GPU: none on this machine; checking and rehearsing need none")]
    from tuner.system import devices  # torch, which is needed only where there is a GPU

    return lines + devices.check_gpu()


def start_access_check(model, offline):
    """Start check_access in the background; return a function that waits for its lines."""
    lines = []

    def work():
        try:
            lines.extend(check_access(model, offline))
        except Exception as error:  # of a thread, it would be lost
            reason = printable(f"{type(error).__name__}: {error}", 200)
            lines.append(
                ("✗", f"access could not be checked ({reason}); report this, continue with --offline")
            )

    def wait():
        thread.join()
        return lines

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return wait


# --------------------------------------------------------------------------------------------- flags


def parse_arguments():
    def price(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number ≥ 0")
        return value

    def line_numbers(text):
        try:
            return text if text == "all" else [int(number) for number in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected line numbers such as 5,17, or all"
            ) from None

    parser = argparse.ArgumentParser(description="Check rows, labels, plan, cost and access before training.")
    base = locate.default_model()
    parser.add_argument("--data", default=DATA_PATH, help="chat rows (default: %(default)s)")
    parser.add_argument("--held-out", default=HELD_OUT, help="held-out rows (default: %(default)s)")
    parser.add_argument("--probes", default=PROBES, help="file of probes, as rows (default: %(default)s)")
    parser.add_argument("--model", default=base, help="folder or hub name of the base (default: %(default)s)")
    parser.add_argument(
        "--gpu-price", type=price, default=GPU_PRICE, help="GPU price per hour (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=line_numbers, metavar="5,17", help="lines to show labels of, or all (default: three)"
    )
    parser.add_argument("--html", metavar="FILE", help="write the labels of all rows as a page")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings and ✗ too")
    parser.add_argument("--offline", action="store_true", help="do not contact the hub")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)

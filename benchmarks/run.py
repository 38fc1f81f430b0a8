"""Train with this project and its peers on the same rows, one after the other, each in its own process.

    python benchmarks/run.py                                     on a CUDA GPU, at 4B dimensions
    python benchmarks/run.py --long 5000                         5,000 rows of 20 to 2,000 tokens instead
    python benchmarks/run.py --model gemma-3-270m --epochs 1     on a CPU, where it only shows that it works

Makes a random model of the 4B dimensions unless --model names one, trains it with this project, with TRL (if
it is installed) and with Unsloth (if --unsloth names the Python of its environment), and replaces one of the
two tables of docs/results.md. A peer runs with settings of its own, which are named.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_qlora import DATA_PATH, RECIPE  # noqa: E402
from tuner.model import gemma_tokenizer  # noqa: E402
from tuner.system import devices, libraries  # noqa: E402

RESULTS = ROOT / "docs/results.md"
# Bits, and how much of the GPU's memory may be reserved (GiB), for the shipped rows and for long ones.
OURS = {"short": [(4, 20), (4, 8), (4, 5), (4, 3.8), (8, 20)], "long": [(4, 20)]}
# The settings of a peer on top of our recipe: what is fast for it, and on long rows the fastest found.
PEERS = {
    "short": {
        "TRL, 16×1, checkpointing": ("trl", {"gradient_checkpointing": True}),
        "TRL, 16×1, no checkpointing": ("trl", {"gradient_checkpointing": False}),
        "Unsloth, 16×1, compiled, no checkpointing": ("unsloth", {"gradient_checkpointing": False}),
    },
    "long": {
        # Slower on 300 such rows: 4×1 and 2×1 with checkpointing; unpacked, by length, 16×1, 8×2 and 4×4.
        "TRL, packed, 1×2, no checkpointing": (
            "trl",
            {
                "gradient_checkpointing": False,
                "packing": True,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
            },
        ),
    },
}
SHORTEST, LONGEST = 20, 2000  # tokens of a long-tailed row


class Work(NamedTuple):
    """What all trainings of a benchmark share."""

    folder: str  # for what they write
    model: str
    data: str
    epochs: int


def long_rows(count, tokenizer):
    """Return rows of SHORTEST to LONGEST tokens, few of them long (log-normal, median 200), seeded.

    A third of each row is the assistant's.
    """
    generator = random.Random(RECIPE.seed)
    words = ["счёт", "карта", "заказ", "когда", "можно", "где", "сумма", "перевод", "номер", "вчера"]
    ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    rows = []
    for _ in range(count):
        tokens = min(LONGEST, max(SHORTEST, generator.lognormvariate(math.log(200), 1.0)))
        text, size = [], len(ids[0]) + 12  # the template's
        while size < tokens or len(text) < 2:
            word = generator.randrange(len(words))
            text.append(words[word])
            size += len(ids[word])
        third = math.ceil(len(text) / 3)
        question, answer = " ".join(text[third:]), " ".join(text[:third])
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    return rows


# --------------------------------------------------------------------------------------------- running


def run_command(command, folder):
    """Run a command and return its seconds; None if it failed, after printing the last line of its log."""
    log, environment = Path(folder, "log"), {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["UNSLOTH_COMPILE_LOCATION"] = str(Path(folder, "compiled"))  # or it is where this was started
    started = time.perf_counter()
    with open(log, "w") as file:
        code = subprocess.run(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        print(f"  failed with {code}: {lines[-1][:200] if lines else 'no output'}", flush=True)
        return None
    return time.perf_counter() - started


def train_ours(work, bits, memory):
    """Return what run.json says after train_qlora.py, and the command's seconds; None if it failed.

    memory: the GiB of the GPU that may be reserved, None to train on the CPU.
    """
    output = Path(work.folder, "ours")
    command = [sys.executable, ROOT / "train_qlora.py", "--model", work.model, "--data", work.data]
    command += ["--output", output, "--bits", bits, "--epochs", work.epochs]
    command += ["--memory", memory] if memory else ["--rehearse", "--batch-size", RECIPE.rows_per_step]
    seconds = run_command(command, work.folder)
    if seconds is None:
        return None
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    run["trained_tokens"] *= run["rows"]["training"] / run["rows"]["all"]
    shutil.rmtree(output)
    return {**run, "command": seconds}


def train_peer(work, python, peer, settings, bits):
    """Return what the script of a peer writes, and the command's seconds; None if it failed."""
    result = Path(work.folder, "result.json")
    command = [python, ROOT / f"benchmarks/peer_{peer}.py", work.model, work.data, result]
    command += ["--bits", bits, "--epochs", work.epochs, "--settings", json.dumps(settings)]
    seconds = run_command(command, work.folder)
    return {**json.loads(result.read_text()), "command": seconds} if seconds else None


def run_all(work, kind, unsloth):
    """Run what OURS and PEERS list; return [(name, bits, result), …], the result None where one failed.

    kind: short or long. unsloth: the Python of its environment, None for none.
    """
    gpu, results = torch.cuda.is_available(), []
    cases = OURS[kind] if gpu else [(4, None)]
    for bits, memory in cases:
        name = f"this project, {f'within {memory:g} GiB' if memory else 'on a CPU'}"
        print(f"{name}, {bits} bits", flush=True)
        results.append((name, bits, train_ours(work, bits, memory)))
    pythons = {"trl": importlib.util.find_spec("trl") and sys.executable, "unsloth": unsloth}
    for name, (peer, settings) in PEERS[kind].items():
        if not gpu or not pythons[peer]:
            print(f"{name}: {'not installed' if gpu else 'its kernels need a GPU'}", flush=True)
            continue
        for bits in sorted({bits for bits, _ in cases}):
            print(f"{name}, {bits} bits", flush=True)
            results.append((name, bits, train_peer(work, pythons[peer], peer, settings, bits)))
    return results


# --------------------------------------------------------------------------------------------- results


def table(results, epochs):
    """Return results, [(name, bits, result), …], as lines of Markdown.

    Ratios are of trained tokens a second, to those of the fastest TRL with the same bits.
    """
    lines = [
        "| | bits | a step, s (first) | all steps, s | × TRL | command, s | allocated / reserved, GiB "
        "| trained tokens a second |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def rate(result):
        return result["trained_tokens"] * epochs / sum(result["step_seconds"])

    reference = {}
    for name, bits, result in results:
        if name.startswith("TRL"):
            reference[bits] = max(rate(result), reference.get(bits, 0.0))
    for name, bits, result in results:
        steps, memory = result["step_seconds"], result["peak_memory_gib"]
        ratio = f"{rate(result) / reference[bits]:.1f}" if bits in reference else "–"
        gib = " / ".join(f"{value:.2f}" for value in memory.values())
        cells = [name, bits, f"{statistics.median(steps):.3f} ({steps[0]:.2f})", f"{sum(steps):.1f}", ratio]
        cells += [f"{result['command']:.0f}", gib, f"{rate(result):.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def version_lines(results):
    """Return lines with the versions that results, [(name, bits, result), …], were measured with."""
    ours, lines = libraries.library_versions(), []
    for name, _, result in results:
        others = {k: v for k, v in result.get("versions", {}).items() if v != ours.get(k)}
        if name.startswith("this project"):
            others, name = ours, "this project"
        lines.append(f"{name.split(',')[0]}: {', '.join(f'{k} {v}' for k, v in others.items())}")
    return [f"- {line}" for line in dict.fromkeys(lines)]


def replace_section(document, kind, lines):
    """Return the Markdown `document` with `lines` between the two markers of `kind`, or at its end."""
    begin, end = (f"<!-- benchmark {kind}: {word} -->" for word in ("begin", "end"))
    section = "\n".join([begin, *lines, end])
    if begin not in document:
        return document + "\n" * bool(document) + section + "\n"
    before, _, rest = document.partition(begin)
    return before + section + rest.partition(end)[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of the base (default: a random one of 4B dimensions)")
    parser.add_argument("--data", default=ROOT / DATA_PATH, help="chat rows (default: the shipped ones)")
    parser.add_argument(
        "--epochs", type=int, default=RECIPE.epochs, help="number of epochs (default: %(default)s)"
    )
    parser.add_argument("--results", help="file for the table (default: docs/results.md, for a GPU's)")
    parser.add_argument("--unsloth", metavar="PYTHON", help="of an environment with Unsloth (default: none)")
    parser.add_argument(
        "--long", type=int, metavar="ROWS", help="train on this number of long-tailed rows instead"
    )
    args = parser.parse_args()
    if args.results and not Path(args.results).absolute().parent.is_dir():
        parser.error(f"the folder of {args.results} does not exist; create it first")

    gpu, kind = torch.cuda.is_available(), "long" if args.long else "short"
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "gemma-3-4b-random")
        if not args.model:
            command = [sys.executable, ROOT / "benchmarks/random_gemma_4b.py", model]
            if run_command(command, folder) is None:
                sys.exit(1)
        if args.long:
            args.data = Path(folder, "rows.json")
            rows = long_rows(args.long, gemma_tokenizer.load_tokenizer(model))
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            args.data.write_text(text, encoding="utf-8")
        results = run_all(Work(folder, model, args.data, args.epochs), kind, args.unsloth)
    succeeded = [one for one in results if one[2]]
    if not succeeded:
        sys.exit(1)
    steps = len(succeeded[0][2]["step_seconds"])
    device = devices.device_name(torch.device("cuda:0" if gpu else "cpu"))
    lines = [f"## {steps} steps of {RECIPE.rows_per_step} rows on {device}", ""]
    lines += [*version_lines(succeeded), "", *table(succeeded, args.epochs)]
    print("\n".join(lines))
    if args.results or gpu:
        path = Path(args.results or RESULTS)
        document = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(replace_section(document, kind, lines), encoding="utf-8")
        print(f"written to {path}")
    sys.exit(len(succeeded) < len(results))


if __name__ == "__main__":
    main()

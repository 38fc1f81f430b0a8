"""Train with several seeds, one after the other, and judge each: how much of a verdict is the seed's?

    python benchmarks/verdict.py                                    seeds 1 to 5 of the rehearsal, on a CPU
    python benchmarks/verdict.py --model ./gemma-3-270m --learning-rate 1e-3        the same on a CUDA GPU
    python benchmarks/verdict.py --set mine=my_rows.jsonl --seeds 3 --epochs 5      other rows and settings

What this script does not know goes to train_qlora.py as it stands. Each adapter is judged as it was trained:
in the same bits. Prints a table with the median and the range of each set of rows, and writes it into
docs/results.md on a GPU, or where --results says.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.run import RESULTS, replace_section, run_command, version_lines  # noqa: E402
from train_qlora import RECIPE, quantization_config  # noqa: E402
from tuner.inference import generation, judging, probes, rates  # noqa: E402

# The last two are for the last measurement alone: no row and no setting is chosen by them.
SETS = {
    "held-out": "heldout.json",
    "plain": "benchmarks/rows/plain.jsonl",
    "hard": "benchmarks/rows/hard.jsonl",
}
PROBES = "probes"  # the name of that set


def named_file(text):
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE")
    return name, path


def parse_arguments():
    """Return (args, flags of train_qlora.py)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1 on (default: %(default)s)")
    parser.add_argument(
        "--set", type=named_file, action="append", metavar="NAME=FILE",
        help=f"rows to judge by, again for more (default: {', '.join('='.join(p) for p in SETS.items())})",
    )  # fmt: skip
    parser.add_argument("--probes", default=ROOT / probes.PROBES, help="file of probes (default: shipped)")
    parser.add_argument("--json", metavar="FILE", help="file for all figures (default: none)")
    parser.add_argument("--results", help="file for the table (default: docs/results.md, for a GPU's)")
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], default=RECIPE.bits, help="to train and judge in (default: 4)"
    )
    args, flags = parser.parse_known_args()
    if args.seeds < 1:
        parser.error("--seeds: expected a whole number ≥ 1")
    args.sets = dict(args.set or [(name, ROOT / path) for name, path in SETS.items()])
    for path in (args.json, args.results):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist; create it first")
    return args, flags


def train(seed, bits, flags, output):
    """Train with a seed; return run.json, None if it failed."""
    command = [sys.executable, ROOT / "train_qlora.py", *flags, "--bits", bits, "--seed", seed]
    if run_command([*command, "--output", output], Path(output).parent) is None:
        return None
    return json.loads(Path(output, "run.json").read_text(encoding="utf-8"))


def judge(adapter, bits, sets):
    """Return {name: figures as rates.count has them, with the number of answers and of right ones}."""
    model, tokenizer, _ = generation.load_tuned(adapter, bits, quantization_config)
    figures = {}
    for name, questions in sets.items():
        limits = questions.max_new_tokens
        answers = generation.answer_all(model, tokenizer, questions.conversations, name, limits)
        judged = map(judging.judge, answers, questions.expected, limits)
        verdicts = list(judged)
        passed = sum(verdict.step is None for verdict in verdicts)
        figures[name] = {"passed": passed, "rows": len(verdicts), **rates.count(verdicts, questions.expected)}
    return figures


def spread(values, form="{:.2f}"):
    """Return the median of values, and their range."""
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{form.format(median)} ({form.format(low)}–{form.format(high)})"


def table(seeds):
    """Return lines of Markdown of [{"seed", "sets": {name: figures}}, …]: median and range of each set."""
    lines = [
        "| rows | F1 of right calls | false calls | missed calls | right answers |",
        "|---|---|---|---|---|",
    ]
    for name in seeds[0]["sets"]:
        figures = [one["sets"][name] for one in seeds]
        decisions = [one["decision"] for one in figures]
        f1 = [one["right"]["f1"]["value"] or 0.0 for one in figures]
        cells = [name, spread(f1)]
        for key in ("false_call_rate", "missed"):
            whole = decisions[0][key]["whole"]
            cells.append(f"{spread([one[key]['part'] for one in decisions], '{:g}')} of {whole}")
        cells.append(f"{spread([one['passed'] for one in figures], '{:g}')} of {figures[0]['rows']}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    args, flags = parse_arguments()
    pairs = [(args.probes, "--probes"), *((path, "--set") for path in args.sets.values())]
    questions = dict(zip([PROBES, *args.sets], probes.load_all(*pairs), strict=True))
    on_gpu = torch.cuda.is_available()
    flags += [] if on_gpu or "--rehearse" in flags else ["--rehearse"]
    seeds, run = [], None
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            output = Path(folder, f"seed-{seed}")
            run = train(seed, args.bits, flags, output)
            if run is None:
                sys.exit(1)
            sets = judge(output, args.bits, questions)
            seeds.append({"seed": seed, "seconds": run["seconds"], "sets": sets})
            parts = [f"{name} {one['passed']} of {one['rows']} right" for name, one in sets.items()]
            print(f"seed {seed}: {', '.join(parts)}", flush=True)
    title = f"## {args.seeds} seeds, {args.bits} bits, {run['steps']} steps on {run['device']}"
    lines = [title, "", *version_lines([("this project", args.bits, run)]), "", *table(seeds)]
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(seeds, indent=1) + "\n", encoding="utf-8")
    if args.results or on_gpu:
        path = Path(args.results or RESULTS)
        document = path.read_text(encoding="utf-8") if path.exists() else ""
        kind = f"verdict {args.bits} bits" + " on a CPU" * (not on_gpu)
        path.write_text(replace_section(document, kind, lines), encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()

"""This project and its peers on the same rows, one after the other, each in a process of its own.

    python benchmarks/run.py                                     on a CUDA GPU, at 4B dimensions
    python benchmarks/run.py --long 5000                         5,000 rows of 20 to 2,000 tokens instead
    python benchmarks/run.py --model gemma-3-270m --epochs 1     on a CPU, where it only shows that it works

Makes a random model of the 4B dimensions unless --model names one, trains it as this project, TRL (if it is
installed) and Unsloth (if --unsloth names the Python of its environment) do, and writes benchmarks/results.md
or, with --long, benchmarks/results_long.md. A peer runs at settings of its own, which are named.
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
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_qlora  # noqa: E402
from tuner.data import batching  # noqa: E402
from tuner.model import gemma_tokenizer, loading  # noqa: E402
from tuner.system import devices, libraries  # noqa: E402

# Bits, and what of the GPU's memory may be reserved (GiB), of the shipped rows and of long ones.
OURS = {"short": [(4, 20), (4, 8), (4, 5), (4, 3.8), (8, 20)], "long": [(4, 20)]}
# What a peer is run with, on top of our recipe: what is fast for it, and on long rows the fastest found.
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


def long_rows(count, tokenizer):
    """Returns rows of SHORTEST to LONGEST tokens, few of them long (log-normal, median 200), seeded.

    A third of a row is what the assistant says.
    """
    chance = random.Random(train_qlora.SEED)
    words = ["счёт", "карта", "заказ", "когда", "можно", "где", "сумма", "перевод", "номер", "вчера"]
    ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    rows = []
    for _ in range(count):
        tokens = min(LONGEST, max(SHORTEST, chance.lognormvariate(math.log(200), 1.0)))
        text, size = [], len(ids[0]) + 12  # the template's
        while size < tokens or len(text) < 2:
            word = chance.randrange(len(words))
            text.append(words[word])
            size += len(ids[word])
        third = math.ceil(len(text) / 3)
        asked, answered = " ".join(text[third:]), " ".join(text[:third])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows.append({"messages": messages})
    return rows


def versions(peer=None):
    """Returns the versions of what a run is made of, and of the peer, by name."""
    return {**libraries.library_versions(), **({peer: metadata.version(peer)} if peer else {})}


# ---------------------------------------------------------------------------------------------- peers


def peer(args):
    """Trains as a peer does, in this process, and writes what run.json has of ours to args.result."""
    settings = json.loads(args.settings)
    model, tokenizer = {"trl": trl, "unsloth": unsloth}[args.peer](args, settings)

    import torch  # after Unsloth, which changes what it finds
    from datasets import Dataset
    from transformers import TrainerCallback

    rows = train_qlora.load_data(args.data)
    training, _ = train_qlora.split_rows(rows)
    examples = train_qlora.tokenise_rows(args.data, rows, tokenizer)
    examples = [{k: examples[i][k] for k in ("input_ids", "labels")} for i in training]

    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        seconds, begun = [], 0.0

        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=args.epochs,
            learning_rate=train_qlora.LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=train_qlora.WARMUP_STEPS,
            max_grad_norm=train_qlora.MAX_GRAD_NORM,
            optim="paged_adamw_8bit",
            bf16=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=train_qlora.SEED,
            max_length=train_qlora.MAX_TOKENS,
            weight_decay=0.0,
            **{
                "per_device_train_batch_size": train_qlora.ROWS_PER_STEP,
                "gradient_accumulation_steps": 1,
                **settings,
            },
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(examples), processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        trainer.save_model(folder)
    result = {
        "step_seconds": Clock.seconds,
        "trained_tokens": batching.trained_tokens(examples),
        "peak_memory_gib": devices.peak_memory(torch.device("cuda:0")),
        "versions": versions(args.peer),
    }
    Path(args.result).write_text(json.dumps(result))


def trl(args, settings):
    """Returns (model, tokenizer) as TRL's own QLoRA example has them, with our recipe's numbers."""
    import torch

    model = loading.load_base(args.model, args.bits, "cuda:0", torch.bfloat16)
    return train_qlora.add_lora(model), gemma_tokenizer.load_tokenizer(args.model)


def unsloth(args, settings):
    """Returns (model, tokenizer) as Unsloth's notebooks have them, with our recipe's numbers.

    settings: its kind of checkpointing is taken out, as that is the model's and not the trainer's.
    """
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(args.result).with_suffix(".code"))
    from unsloth import FastModel

    checkpointing = settings.pop("gradient_checkpointing")
    model, _ = FastModel.from_pretrained(
        args.model,
        max_seq_length=train_qlora.MAX_TOKENS,
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastModel.get_peft_model(
        model,
        r=train_qlora.LORA_R,
        lora_alpha=train_qlora.LORA_ALPHA,
        lora_dropout=train_qlora.LORA_DROPOUT,
        finetune_vision_layers=False,
        use_gradient_checkpointing=checkpointing,
    )
    return model, gemma_tokenizer.load_tokenizer(args.model)


# --------------------------------------------------------------------------------------------- running


def timed(command, log):
    """Runs a command; returns its seconds, or None if it failed, which is said with the log's last line."""
    begun = time.perf_counter()
    with open(log, "w") as file:
        code = subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = Path(log).read_text(errors="replace").strip().splitlines()
        print(f"  failed with {code}: {lines[-1][:200] if lines else 'it said nothing'}", flush=True)
        return None
    return time.perf_counter() - begun


def run_ours(folder, model, data, epochs, bits, memory, gpu):
    """Returns what run.json says of a run of train_qlora.py, and the command's seconds; None if it failed."""
    output = Path(folder, "ours")
    command = [sys.executable, ROOT / "train_qlora.py", "--model", model, "--data", data, "--output", output]
    command += ["--bits", bits, "--epochs", epochs, *(["--memory", memory] if memory else [])]
    seconds = timed(command + ["--rehearse"] * (not gpu), Path(folder, "log"))
    if seconds is None:
        return None
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    run["trained_tokens"] = run["trained_tokens"] * run["rows"]["training"] / run["rows"]["all"]
    shutil.rmtree(output)
    return {**run, "command": seconds}


def run_peer(python, folder, name, settings, model, data, epochs, bits):
    """Returns what `peer` writes, run by that Python, and the command's seconds; None if it failed."""
    result = Path(folder, "result.json")
    command = [python, __file__, "--peer", name, "--settings", json.dumps(settings)]
    command += ["--result", result, "--model", model]
    seconds = timed([*command, "--data", data, "--epochs", epochs, "--bits", bits], Path(folder, "log"))
    return {**json.loads(result.read_text()), "command": seconds} if seconds else None


def table(results, epochs):
    """Returns the results, [(name, bits, result), …], as lines of Markdown; ratios are to the fastest TRL's
    trained tokens a second with as many bits.
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


def made_of(results):
    """Returns lines of the versions that the results, [(name, bits, result), …], were made with."""
    ours, lines = versions(), []
    for name, _, result in results:
        other = {k: v for k, v in result.get("versions", {}).items() if v != ours.get(k)}
        if name.startswith("this project"):
            other, name = ours, "this project"
        lines.append(f"{name.split(',')[0]}: {', '.join(f'{k} {v}' for k, v in other.items())}")
    return [f"- {line}" for line in dict.fromkeys(lines)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of the base (default: a random one of 4B dimensions)")
    parser.add_argument(
        "--data", default=ROOT / "examples.json", help="chat rows (default: the shipped ones)"
    )
    parser.add_argument("--epochs", type=int, default=train_qlora.EPOCHS, help="(default: %(default)s)")
    parser.add_argument("--results", help="file for the table (default: on a GPU one beside this script)")
    parser.add_argument("--unsloth", metavar="PYTHON", help="of an environment with Unsloth (default: none)")
    parser.add_argument("--long", type=int, metavar="ROWS", help="train on so many long-tailed rows instead")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, default=4, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.peer:
        peer(args)
        return
    if args.results and not Path(args.results).absolute().parent.is_dir():
        parser.error(f"the folder of {args.results} is not there; make it first")

    import torch

    gpu = torch.cuda.is_available()
    kind = "long" if args.long else "short"
    cases = OURS[kind] if gpu else [(4, None)]
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "gemma-3-4b-random")
        if not args.model:
            command = [sys.executable, ROOT / "benchmarks/random_gemma_4b.py", model]
            if timed(command, Path(folder, "log")) is None:
                sys.exit(1)
        if args.long:
            args.data = Path(folder, "rows.json")
            rows = long_rows(args.long, gemma_tokenizer.load_tokenizer(model))
            args.data.write_text(
                "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
            )
        results = []
        for bits, memory in cases:
            title = f"this project, {f'within {memory:g} GiB' if memory else 'on a CPU'}"
            print(f"{title}, {bits} bits", flush=True)
            results.append((title, bits, run_ours(folder, model, args.data, args.epochs, bits, memory, gpu)))
        pythons = {"trl": importlib.util.find_spec("trl") and sys.executable, "unsloth": args.unsloth}
        for title, (name, settings) in PEERS[kind].items():
            if not gpu or not pythons[name]:
                print(f"{title}: {'not installed' if gpu else 'its kernels need a GPU'}", flush=True)
                continue
            for bits in sorted({bits for bits, _ in cases}):
                print(f"{title}, {bits} bits", flush=True)
                case = name, settings, model, args.data, args.epochs, bits
                results.append((title, bits, run_peer(pythons[name], folder, *case)))
    failed = [name for name, _, result in results if result is None]
    results = [one for one in results if one[2]]
    if not results:
        sys.exit(1)
    steps = len(results[0][2]["step_seconds"])
    device = devices.device_name(torch.device("cuda:0" if gpu else "cpu"))
    lines = [f"# {steps} steps of {train_qlora.ROWS_PER_STEP} rows on {device}", ""]
    lines += [*made_of(results), "", *table(results, args.epochs), ""]
    print("\n".join(lines))
    path = args.results or ROOT / "benchmarks" / ("results_long.md" if args.long else "results.md")
    if args.results or gpu:
        Path(path).write_text("\n".join(lines), encoding="utf-8")
        print(f"written to {path}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

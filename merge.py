"""Bakes the adapter into its base, in bf16, and proves that the result is the two of them and nothing else.

python merge.py    qlora_output and its base → a folder to serve, gemma-3-4b-it-merged
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import train_qlora
from tuner.inference import generation
from tuner.inference.probes import PROBES
from tuner.model import folders, loading, locate
from tuner.system import atomic, devices, libraries, signals
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights, merge_proof, model_card

SHARD_SIZE = "5GB"
# The base's files that go along as they are; the weights are written anew.
COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "processor_config.json", "preprocessor_config.json", "LICENSE*", "*TERMS*", "NOTICE*",
)  # fmt: skip
# Section 3.1 of Gemma's terms asks for this sentence in a file of this name.
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
GPU_ROOM = 1.2  # of the weights' size: what merging and answering six probes takes beside them
CPU_ROOM = 2.4  # the CPU computes in fp32: twice the bf16 weights, and the same room
NEAR_TIE = 0.5  # between two logits: what rounding the merged weights to bf16 may turn around


# -------------------------------------------------------------------------------------- before anything


def check_output(output, base, adapter, overwrite):
    """Raises UserError if the folder cannot be written, or is there and may not be overwritten."""
    earlier = output.with_name(output.name + ".old")  # left where a merge was killed between two renames
    if earlier.exists() and not output.exists():
        earlier.rename(output)
    shutil.rmtree(earlier, ignore_errors=True)
    if output.resolve() in (Path(base).resolve(), Path(adapter).resolve()):
        raise UserError(f"{output} is the base or the adapter itself; name another folder with --output")
    if output.exists() and not atomic.is_empty_folder(output):
        if not overwrite:
            raise UserError(f"{output} is there; add --overwrite, or name another folder with --output")
        if not output.is_dir() or folders.missing_files(output):
            raise UserError(f"{output} is there and is no model; name another folder with --output")


def choose_device(weights, parent):
    """Returns the device to merge on; says what it takes there and on disk. `weights` is the base's bytes.

    Raises UserError if disk or memory are too small.
    """
    import psutil
    import torch

    device, needed, free = "cpu", CPU_ROOM * weights, psutil.virtual_memory().available
    if torch.cuda.is_available() and devices.gpu_dtype() == torch.bfloat16:
        free_gpu, _ = torch.cuda.mem_get_info()
        if free_gpu > GPU_ROOM * weights:
            device, needed, free = "cuda:0", GPU_ROOM * weights, free_gpu
    disk, free_disk = 1.05 * weights + 100e6, shutil.disk_usage(parent).free
    print(
        f"needs      {needed / 1e9:.1f} GB of memory on {devices.device_name(torch.device(device))} "
        f"({free / 1e9:.1f} free), {disk / 1e9:.1f} GB of disk ({free_disk / 1e9:.1f} free)",
        flush=True,
    )
    if disk > free_disk:
        raise UserError(
            f"{parent} has too little disk; free some, or name a folder on a larger with --output"
        )
    if needed > free:
        raise UserError("there is too little memory; close other programs, or merge on a larger machine")
    return device


# --------------------------------------------------------------------------------------------- proofs


def top_two(model, tokenizer, conversation, answer):
    """Returns the two likeliest tokens at each place of an answer, its end too: [[(id, logit), (…)], …]."""
    import torch

    ids = generation.prompt_ids(tokenizer, conversation) + answer.ids
    with torch.inference_mode(), devices.without_cudnn_attention():
        inputs = torch.tensor([ids], device=model.device)
        logits = model(input_ids=inputs, logits_to_keep=len(answer.ids) + 1).logits[0].float()
    best = logits.topk(2)
    ids, values = best.indices.tolist(), best.values.tolist()
    return [list(zip(*place, strict=True)) for place in zip(ids, values, strict=True)]


def parting(one, other):
    """Returns the place of the first token in which two lists differ, or where the shorter one ends."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def compare_answers(tokenizer, before, after, before_top, after_top):
    """Prints where the merged model gives other tokens than base + adapter; returns how many probes agree.

    Raises UserError where the first differing token was no near tie, which rounding cannot explain.
    """
    same = 0
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if one == other:
            same += 1
            continue
        place = parting(one.ids, other.ids)
        tops = {"base + adapter": before_top[number][place], "merged": after_top[number][place]}
        print(f"           probe {number + 1} differs at token {place + 1}, by these logits:")
        for name, top in tops.items():
            words = (f'"{printable(tokenizer.decode([i]), 20)}" {logit:.3f}' for i, logit in top)
            print(f"             {name + ':':<16}{', '.join(words)}", flush=True)
        if any(top[0][1] - top[1][1] > NEAR_TIE for top in tops.values()):
            raise UserError("the merged model answers otherwise, and by no near tie; nothing was kept")
    return same


def copy_files(base, merged):
    """Copies what belongs to a model beside its weights, and writes the notice that Gemma's terms ask for."""
    for path in sorted(Path(base).iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED):
            shutil.copyfile(path, merged / path.name)
    if not (merged / "NOTICE").exists():
        (merged / "NOTICE").write_text(NOTICE, encoding="utf-8")


def move(aside, output):
    """Moves a finished folder into place; what was there is removed after that."""
    atomic.copy_permissions(aside)
    atomic.fsync_tree(aside)
    earlier = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(earlier)
    atomic.rename_synced(aside, output)
    shutil.rmtree(earlier, ignore_errors=True)


# ----------------------------------------------------------------------------------------------- main


def parse_arguments():
    parser = argparse.ArgumentParser(description="Merge an adapter into its bf16 base, and prove it.")
    parser.add_argument(
        "--adapter", default=train_qlora.OUTPUT_DIR, help="folder of the adapter (default: %(default)s)"
    )
    parser.add_argument("--output", help="folder for the merged model (default: the base's name and -merged)")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged model that is there")
    return parser.parse_args()


def main():
    args = parse_arguments()
    signals.exit_on_signals()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; no merged model was written", file=sys.stderr)
        sys.exit(130)


def run(args):
    config, record = adapter_folder.read_adapter(args.adapter)
    base = config["base_model_name_or_path"]
    output = Path(args.output or f"{Path(base).name}-merged")
    atomic.check_parent_writable(output)
    with atomic.exclusive_lock(output):
        merge(args, base, record, output)


def merge(args, base, record, output):
    started = time.perf_counter()
    check_output(output, base, args.adapter, args.overwrite)

    libraries.import_libraries()

    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    folder, revision = locate.find_model(base, rehearse=not torch.cuda.is_available())
    adapter_weights.check_adapter(args.adapter, folder, revision)
    print(f"merging    {args.adapter} into {printable(base)}")
    device = choose_device(folders.weight_bytes(folder), output.absolute().parent)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the same bf16 values, exactly, in fp32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = [[{"role": "user", "content": prompt}] for prompt, _ in PROBES]

    def answers(model):
        given = generation.answer_all(model, tokenizer, probes)
        return given, [top_two(model, tokenizer, *pair) for pair in zip(probes, given, strict=True)]

    model = loading.load_base(folder, None, device, dtype)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    before = answers(model)
    aside = atomic.part_path(output)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model = model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
        model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
        del model
        copy_files(folder, aside)
        path = Path(args.adapter, adapter_folder.COMPARISON)
        comparison = adapter_folder.read_json(path, "run compare.py again, or remove it")
        card = model_card.model_card(base, revision, record, comparison)
        (aside / "README.md").write_text(card, encoding="utf-8")

        changed, untouched = merge_proof.prove_weights(folder, args.adapter, aside)
        print(f"proof      {changed} modules changed, each by B·A·alpha/r within bf16 rounding")
        print(f"           {untouched} other tensors are the base's, bit for bit")
        merged = loading.load_base(str(aside), None, device, dtype).eval()
        print("           read back from disk: no key missing, unexpected or of another shape", flush=True)
        after = answers(merged)
        same = compare_answers(tokenizer, before[0], after[0], before[1], after[1])
        print(f"           {same} of {len(probes)} probes answered with the same tokens as base + adapter")
        move(aside, output)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by its own
        reason = printable(getattr(error, "strerror", None) or str(error), 100)
        raise UserError(f"{output} cannot be written ({reason}); free some disk; nothing was kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"memory     {devices.format_memory(devices.peak_memory(torch.device(device)))}")
    print(f"time       {time.perf_counter() - started:.1f} s")
    print(f"merged     {output}, {folders.weight_bytes(output) / 1e9:.1f} GB")
    print(f"next       python serve.py --model {output}")


if __name__ == "__main__":
    main()

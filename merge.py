"""Bakes the adapter into its base, in bf16, and proves that the result is the two of them and nothing else.

python merge.py    qlora_output and its base → a folder to serve, gemma-3-4b-it-merged
"""

import argparse
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import adapter_folder
import compare
import train_qlora
from tuner.model import folders, locate
from tuner.system import atomic, devices, libraries, signals
from tuner.system.console import printable
from tuner.system.errors import UserError

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
ROUNDING = 2.0**-8  # of a value rounded to bf16 (8 bits of significand), relative
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

    ids = compare.prompt_ids(tokenizer, conversation) + answer.ids
    with torch.inference_mode(), devices.uncompiled_attention():
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


def tensors(folder):
    """Returns {name: file} of a model folder's tensors."""
    from safetensors import safe_open

    names = {}
    for path in folders.weight_files(folder):
        with safe_open(path, "pt") as file:
            names.update(dict.fromkeys(file.keys(), path))
    return names


def hub_name(module, names):
    """Returns the one of a checkpoint's tensor names that is a LoRA module's weight.

    The class in memory and the files on the hub name the text model differently; from `layers.` on they
    agree, and the vision tower, which has layers too, has no adapter.
    """
    tail = "." + module[module.index("layers.") :] + ".weight"
    found = [name for name in names if name.endswith(tail) and "vision" not in name]
    if len(found) != 1:
        raise UserError(f"{module} of the adapter is {len(found)} tensors of the base; nothing was kept")
    return found[0]


def prove_weights(base, adapter, merged):
    """Compares all tensors of the folder `merged` with base and adapter; returns (changed, untouched) counts.

    A module's merged weight W' must be W + B·A·alpha/r, rounded to bf16 once or, as PEFT does in bf16, twice
    (B·A first). Raises UserError for a tensor that is anything else.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    config, _ = adapter_folder.read_settings(adapter)
    scale = config["lora_alpha"] / config["r"]
    lora = load_file(Path(adapter, adapter_folder.WEIGHTS))
    before, after = tensors(base), tensors(merged)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise UserError(f"base and merged have not the same tensors ({name}); nothing was kept")
    targets = {}
    for name in lora:
        if ".lora_A." in name:
            module = name[: name.index(".lora_A.")]
            targets[hub_name(module, before)] = lora[name], lora[name.replace(".lora_A.", ".lora_B.")]
    for name in before:
        with safe_open(before[name], "pt") as one, safe_open(after[name], "pt") as other:
            old, new = one.get_tensor(name), other.get_tensor(name)
        if new.dtype != torch.bfloat16 or old.shape != new.shape:
            raise UserError(f"{name} is {new.dtype} {tuple(new.shape)} after merging; nothing was kept")
        if name not in targets:
            if not torch.equal(old.view(torch.int16), new.view(torch.int16)):
                raise UserError(f"{name} has no adapter and changed; nothing was kept")
            continue
        a, b = targets[name]
        delta = (b.float() @ a.float()) * scale
        wanted = old.float() + delta
        error = (new.float() - wanted).abs()
        if not (error <= ROUNDING * (wanted.abs() + delta.abs()) + 1e-30).all():
            raise UserError(f"{name} did not change by B·A·alpha/r ({error.max():.3g} off); nothing was kept")
        if torch.equal(old, new):
            raise UserError(f"{name} did not change; nothing was kept")
    return len(targets), len(before) - len(targets)


# --------------------------------------------------------------------------------------------- result


def model_card(base, revision, run, comparison):
    """Returns the README.md of the merged model; run and comparison are {} where nothing is known."""
    lines = [
        "---",
        f"base_model: {base}",
        "license: gemma",
        "library_name: transformers",
        "---",
        "",
        f"# {base}, tuned with QLoRA to answer a request for personal data with a tool call",
        "",
        f"Modified from {base} (revision {revision or 'unknown'}): a LoRA adapter was merged into its text "
        "model. Gemma's terms of use apply: https://ai.google.dev/gemma/terms",
        "",
    ]
    for facts, found in ((run_facts, run), (comparison_facts, comparison)):
        with suppress(LookupError, TypeError, AttributeError):  # {}, or not written by these scripts
            lines += facts(found)
    return "\n".join(lines) + "\n"


def run_facts(run):
    settings = {k: v for k, v in run["settings"].items() if k not in ("model", "data", "output")}
    return [
        f"- settings: {', '.join(f'{k} {v}' for k, v in settings.items())}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in run['versions'].items())}",
        f"- rows: {run['rows']['all']}, sha256 of the file {run['data_sha256']}",
        f"- trained: in {run['bits']} bits, step {run['kept_step']} of {run['steps']} kept",
    ]


def comparison_facts(comparison):
    tuned = comparison["rows"]["tuned"]
    bits = f"in {comparison['bits']} bits" if comparison["bits"] else "unquantised"
    return [
        f"- probes passed, base {bits}: {comparison['passed']} of {len(comparison['probes'])}",
        f"- held-out rows, base {bits}: {tuned['right']} of {tuned['needed']} calls right, "
        f"{tuned['false']} of {tuned['general']} false calls, F1 {tuned['f1'] or 0:.2f}",
    ]


def copy_files(base, merged):
    """Copies what belongs to a model beside its weights, and writes the notice that Gemma's terms ask for."""
    for path in sorted(Path(base).iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED):
            shutil.copyfile(path, merged / path.name)
    if not (merged / "NOTICE").exists():
        (merged / "NOTICE").write_text(NOTICE, encoding="utf-8")


def move(aside, output):
    """Moves a finished folder into place; what was there is removed after that."""
    atomic.open_up(aside)
    atomic.sync(aside)
    earlier = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(earlier)
    atomic.rename(aside, output)
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
    signals.leave_on_signals()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; no merged model was written", file=sys.stderr)
        sys.exit(130)


def run(args):
    config, record = adapter_folder.read_settings(args.adapter)
    base = config["base_model_name_or_path"]
    output = Path(args.output or f"{Path(base).name}-merged")
    atomic.check_parent(output)
    with atomic.only_writer(output):
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
    adapter_folder.check_weights(args.adapter, folder, revision)
    print(f"merging    {args.adapter} into {printable(base)}")
    device = choose_device(folders.weight_bytes(folder), output.absolute().parent)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the same bf16 values, exactly, in fp32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = [[{"role": "user", "content": prompt}] for prompt, _ in compare.PROBES]

    def answers(model):
        given = compare.answer(model, tokenizer, probes)
        return given, [top_two(model, tokenizer, *pair) for pair in zip(probes, given, strict=True)]

    model = train_qlora.load_model(folder, None, device, dtype)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    before = answers(model)
    aside = atomic.aside(output)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model = model.merge_and_unload(safe_merge=True).to(torch.bfloat16)
        model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
        del model
        copy_files(folder, aside)
        path = Path(args.adapter, adapter_folder.COMPARISON)
        comparison = adapter_folder.read_json(path, "run compare.py again, or remove it")
        card = model_card(base, revision, record, comparison)
        (aside / "README.md").write_text(card, encoding="utf-8")

        changed, untouched = prove_weights(folder, args.adapter, aside)
        print(f"proof      {changed} modules changed, each by B·A·alpha/r within bf16 rounding")
        print(f"           {untouched} other tensors are the base's, bit for bit")
        merged = train_qlora.load_model(str(aside), None, device, dtype).eval()
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
    print(f"memory     {devices.told(devices.peak_memory(torch.device(device)))}")
    print(f"time       {time.perf_counter() - started:.1f} s")
    print(f"merged     {output}, {folders.weight_bytes(output) / 1e9:.1f} GB")
    print(f"next       python serve.py --model {output}")


if __name__ == "__main__":
    main()

"""Step 5: merge the adapter into its base, in bf16, and prove that the result is these two and nothing else.

python merge.py                       qlora_output and its base → a folder to serve, gemma-3-4b-it-merged
python merge.py --gguf q8_0           and that as a file for llama.cpp and Ollama, gemma-3-4b-it-merged.gguf
python merge.py --push-to-hub NAME    and that folder to a private repository on the hub
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from train_qlora import OUTPUT_DIR
from tuner.inference import gate
from tuner.inference.probes import HELD_OUT, PROBES, load_questions
from tuner.model import folders, gemma_folder, gguf_files, locate
from tuner.system import atomic, commands, output_folder, signals
from tuner.system.console import one_line, printable
from tuner.system.errors import UserError
from tuner.system.libraries import heavy_imports
from tuner.system.scripts import run_script
from tuner.training import adapter_folder, model_card, publishing, records

INTERRUPTED = "stopped; what was not finished was not kept"
OUT_OF_MEMORY = "close what else runs on the GPU (nvidia-smi); no merged model was written"
# The base's files that are copied as they are; the weights are written, not copied.
COPIED = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "LICENSE*", "*TERMS*", "NOTICE*",
)  # fmt: skip
# What belongs to a merged model; of one that is overwritten, all else stays in the folder.
REPLACED = (
    *COPIED, *folders.TOKENIZER_FILES, "chat_template*", "model*.safetensors", "model.safetensors.index.json",
    "README.md", adapter_folder.RUN,
)  # fmt: skip


def parse_arguments():
    parser = argparse.ArgumentParser(description="Merge an adapter into its bf16 base, and prove it.")
    parser.add_argument("--adapter", default=OUTPUT_DIR, help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--base", help="folder or hub name of the base (default: as the adapter records it)")
    parser.add_argument("--probes", default=PROBES, help="file of probes, as rows (default: %(default)s)")
    output = "folder for the merged model (default: the base's name and -merged)"
    parser.add_argument("--output", type=output_folder.tidy, help=output)
    parser.add_argument("--overwrite", action="store_true", help="replace a merged model that exists")
    gguf = "write it for llama.cpp and Ollama too, in bf16 or q8_0 (default: do not)"
    parser.add_argument("--gguf", choices=gguf_files.TYPES, help=gguf)
    push = "name of a repository on the hub to push the merged model to (default: push nothing)"
    parser.add_argument("--push-to-hub", metavar="NAME", help=push)
    public = "create that repository for everybody to read (default: a private one)"
    parser.add_argument("--public", action="store_true", help=public)
    alone = "push the adapter and merge nothing (default: merge, and push the merged model)"
    parser.add_argument("--adapter-only", action="store_true", help=alone)
    return publishing.check_flags(parser, parser.parse_args())


# --------------------------------------------------------------------------------------- the output folder


def check_output(output, base, adapter, overwrite):
    """Raise UserError if the folder `output` exists and may not be overwritten."""
    target = output_folder.resolve(output)
    if target in (Path(base).resolve(), Path(adapter).resolve()):
        raise UserError(f"{output} is the base or the adapter itself; {output_folder.CURE}")
    if output_folder.is_vacant(target):
        return
    if output_folder.is_fixed(target):
        raise UserError(f"{output} is not empty and cannot be replaced; name a folder in it with --output")
    if not overwrite:
        raise UserError(f"{output} exists; add --overwrite, or name another folder with --output")
    if folders.missing_files(target):
        raise UserError(f"{output} exists and holds no model; {output_folder.CURE}")
    if (target / folders.REVISION_FILE).exists():
        raise UserError(f"{output} holds a base as it was downloaded; {output_folder.CURE}")


def copy_files(base, merged):
    """Copy what belongs to a model beside its weights, and write the notice that Gemma's terms ask for."""
    for path in sorted(Path(base).iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED):
            shutil.copyfile(path, merged / path.name)
            if path.name == "config.json":
                gemma_folder.declare_bf16(merged / path.name)
    folders.copy_tokenizer(base, merged)
    if not (merged / "NOTICE").exists():
        (merged / "NOTICE").write_text(model_card.NOTICE, encoding="utf-8")


def write_run(merged, run):
    """Write what compare.py needs to tell which of its rows the merged model was trained on."""
    text = json.dumps({"prompts_sha256": run.get("prompts_sha256") or []}, indent=1) + "\n"
    (merged / adapter_folder.RUN).write_text(text, encoding="utf-8")


def read_comparison(adapter):
    """Return what compare.py left beside the adapter, {} if nothing; raise UserError if it is damaged."""
    path = Path(adapter, adapter_folder.COMPARISON)
    return records.read(path, records.COMPARISON, "run compare.py again, or remove it")


# ---------------------------------------------------------------------------------------------------- main


def main():
    args = parse_arguments()
    signals.exit_on_signals(INTERRUPTED)
    config, run = adapter_folder.read_adapter(args.adapter)
    comparison = read_comparison(args.adapter)
    if args.adapter_only:
        return publishing.push_adapter(args, config, run, comparison)
    probes = load_questions(args.probes, "--probes")
    recorded, commit = config["base_model_name_or_path"], locate.hub_commit(run)
    base = args.base or locate.find_recorded(recorded, args.adapter, commit)
    output = f"{Path(base).absolute().name}-merged" if args.output is None else args.output
    target = output_folder.resolve(output)
    output_folder.check_writable(output)
    with atomic.exclusive_lock(output):
        atomic.clear_workspaces(target, REPLACED)
        # A merged model that is there is proved to be this one, and not merged again.
        wants_more = args.gguf or args.push_to_hub
        is_there = wants_more and not args.overwrite and not output_folder.is_vacant(target)
        check_output(output, base, args.adapter, args.overwrite or is_there)
        if args.gguf:
            gguf_files.check(output, args.overwrite)
        push = publishing.Push(args) if args.push_to_hub else None
        if push:
            push.agree(output, publishing.weights_size(base), REPLACED)
        merge(args, Path(output), is_there, run, comparison, probes)
        if push:
            push.upload(output, publishing.merged_files(output, REPLACED), REPLACED)
    print_next(Path(output), comparison, args)


def merge(args, output, is_there, run, comparison, probes):
    """Write the model of base and adapter to `output`, once weights and answers are proved to be theirs.

    is_there: whether it is, so that its weights are proved alone. run, comparison: the adapter's run.json and
    compare.json; probes: Questions. Raise UserError, and write nothing, if a proof fails.
    """
    adapter, base = args.adapter, args.base
    started = time.perf_counter()
    with heavy_imports():  # torch and what stands on it: seconds, so flags and folders are checked first
        from tuner.inference import probe_answers
        from tuner.model import gguf_writing, loading
        from tuner.system import devices
        from tuner.training import adapter_weights, merge_proof, merging

    folder, revision, name = adapter_weights.find_base(adapter, base)
    if is_there:
        merge_proof.prove_existing(folder, adapter, output)
        print(f"proof      {one_line(f'{output} is {adapter} merged into {name}')}, tensor by tensor")
        if args.gguf:
            gguf_writing.write_gguf(output, args.gguf, args.repeat)
        return
    print(f"merging    {one_line(adapter)} into {one_line(name)}")
    target = output_folder.resolve(output)
    parent = output_folder.work_folder(target)
    gguf_bytes = gguf_writing.gguf_bytes(folder, args.gguf) if args.gguf else 0
    device, dtype = merging.choose_device(gemma_folder.bf16_bytes(folder), parent, gguf_bytes)
    if dtypes := gemma_folder.rounded_from(folder):
        print(f"base       {' and '.join(dtypes)} in its files, merged as it is rounded to bf16")
    try:
        with atomic.workspace(target, REPLACED) as work:
            part = work / atomic.NEW
            model, tokenizer = merging.load_with_adapter(folder, adapter, device, dtype)
            before = probe_answers.answer_probes(model, tokenizer, probes)
            merging.save_merged(model, part)
            del model
            copy_files(folder, part)
            card = model_card.model_card(folders.hub_name(folder), revision, run, comparison)
            (part / "README.md").write_text(card, encoding="utf-8")
            write_run(part, run)

            changed, untouched = merge_proof.prove_weights(folder, adapter, part)
            print(f"proof      {changed} modules changed, each by B·A·alpha/r within bf16 rounding")
            rounded = " in bf16" if dtypes else ""
            print(f"           {untouched} other tensors are the base's{rounded}, bit for bit")
            merged = loading.load_base(str(part), None, device, dtype).eval()
            read_back = "read back from disk: no key missing, unexpected or of another shape"
            print(f"           {read_back}", flush=True)
            after = probe_answers.answer_probes(merged, tokenizer, probes)
            same = probe_answers.compare_answers(tokenizer, before, after)
            asked = f"{len(after)} probe{'s' * (len(after) != 1)}"
            print(f"           {same} of {asked} answered with the same tokens as base + adapter")
            atomic.move_into_place(part, target, "config.json", work / atomic.EARLIER)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = printable(getattr(error, "strerror", None) or str(error), 100)
        raise UserError(
            f"{output} cannot be written ({reason}); free some disk space; nothing was kept"
        ) from error
    print(f"memory     {devices.format_memory(devices.peak_memory(device))}")
    print(f"time       {time.perf_counter() - started:.1f} s")
    print(f"merged     {one_line(str(output))}, {folders.weight_bytes(output) / 1e9:.1f} GB", flush=True)
    if args.gguf:
        gguf_writing.write_gguf(output, args.gguf, args.repeat)


def print_next(output, comparison, args):
    """Print what to type next: the verdict on the merged model, by what the adapter was judged by."""
    data = comparison.get("data")
    asked = (comparison.get("gate") or {}).get("asked") or {}
    flags = {
        "probes": None if args.probes == PROBES else args.probes,
        "data": data if isinstance(data, str) and data != HELD_OUT and os.path.isfile(data) else None,
    }
    defaults = {"min_f1": gate.MIN_F1, "max_false_calls": gate.MAX_FALSE_CALLS}
    flags |= {name: asked.get(name) for name, default in defaults.items() if asked.get(name) != default}
    print(f"next       {commands.command('compare.py', merged=output, **flags)}")
    for command in gguf_files.serving_commands(output) if args.gguf else ():
        print(f"           {command}")


if __name__ == "__main__":
    run_script(main, interrupted=INTERRUPTED, out_of_memory=OUT_OF_MEMORY)

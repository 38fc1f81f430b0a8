"""QLoRA tuning of Gemma-3-4b-it: rows → labels → quantized base → LoRA → steps → an adapter in qlora_output.

    python train_qlora.py               on a CUDA GPU
    python train_qlora.py --rehearse    the same on the CPU with the small Gemma 3 (270M)
    python train_qlora.py --resume      continue a run that was stopped, by whatever it was

Read it from top to bottom: the recipe, the five functions that make it QLoRA, and `tune`, a run from rows to
adapter. What makes that fast and safe is in tuner/.
"""

import argparse
import dataclasses
import math
import time
from dataclasses import dataclass

from tuner.data import chat_rows, chat_text
from tuner.data.splitting import epoch_batches, split_rows
from tuner.model import folders, locate
from tuner.system import commands, hardware, libraries, output_folder
from tuner.system.console import ignore_broken_pipes, is_main_process, print_main, printable
from tuner.system.errors import UserError
from tuner.system.scripts import run_script
from tuner.system.signals import stop_requests
from tuner.training import adapter_folder, checkpoints, memory_plan, resuming, run_command

# ------------------------------------------------------------------------------------------- the recipe

DATA_PATH = "examples.json"
OUTPUT_DIR = "qlora_output"


@dataclass(frozen=True)
class Recipe:
    """What decides the result: the article's values, unless a comment says otherwise.

    The names are keys of run.json and of checkpoints: a run resumes only with the values that it began with.
    """

    bits: int = 4  # NF4 with double quantization; 8 is LLM.int8
    epochs: int = 10
    learning_rate: float = 1e-4
    rehearse: bool = False  # on the CPU, in fp32, with torch's own AdamW
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: tuple = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    exclude_modules: str = r".*vision_tower.*"  # ours: it has q/k/v too, and text never reaches them
    rows_per_step: int = 16  # one optimizer step; the last one of an epoch takes what is left
    max_grad_norm: float = 0.3
    warmup_steps: int = 10
    warmup_share: float = 0.25  # ours: a short run must not spend itself on warming up
    validation_share: float = 0.1
    seed: int = 42
    max_tokens: int = 2048  # of a row; a longer row is an error, never cut

    def settings(self):
        """Return the values by name, as JSON has them."""
        return {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}


RECIPE = Recipe()
# Ours: 270M parameters want larger steps, and a CPU few rows: small steps teach more with each of them.
REHEARSAL = {"rehearse": True, "epochs": 5, "rows_per_step": 4, "learning_rate": 1e-3}


# ------------------------------------------------------------------------------- what makes it QLoRA


def load_data(data_path):
    """Return the chat_rows.Rows of a Chat Messages JSON file, in order: {"messages": [{role, content}, …]}.

    Content is text; calls become text too (chat_rows.validate_and_render). Raise UserError that lists every
    row in error as `file:line: what is wrong; what to do`.
    """
    return chat_rows.load(data_path)


def preprocess_function(examples, tokenizer):
    """Turn a batch {"messages": [row, …]} into lists input_ids, attention_mask, labels, not padded.

    A label is its token where the assistant speaks, `<end_of_turn>` included, and −100 elsewhere, in turns of
    weight 0, and in a row of more than RECIPE.max_tokens, which is refused. Where the assistant begins to
    speak is where the template's own generation prompt ends. Raise UserError where that is no prefix of the
    row.
    """
    end_of_turn = tokenizer.convert_tokens_to_ids(chat_text.END_OF_TURN)
    rows = examples["messages"]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    # add_special_tokens=False: the template has written <bos> already.
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts, ends = [], []  # the prompts of all answers, and how many there are after each row
    for row, input_ids in zip(rows, tokens, strict=True):
        # A longer row is refused: its prompts, each as long as the turns before it, would take for ever.
        for i in range(len(row)) if len(input_ids) <= RECIPE.max_tokens else []:
            if chat_text.is_trained(row[i]):
                prompt = tokenizer.apply_chat_template(row[:i], tokenize=False, add_generation_prompt=True)
                prompts.append(prompt)
        ends.append(len(prompts))
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []

    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for input_ids, start, end in zip(tokens, [0, *ends], ends, strict=False):
        labels = [-100] * len(input_ids)
        for prompt in prompts[start:end]:
            begin = len(prompt)
            if input_ids[:begin] != prompt:
                raise UserError(
                    "the chat template's generation prompt is no prefix of the row; use Gemma 3's own"
                )
            stop = input_ids.index(end_of_turn, begin) + 1
            labels[begin:stop] = input_ids[begin:stop]
        assert input_ids.count(tokenizer.bos_token_id) == 1, "a row has exactly one <bos>"
        batch["input_ids"].append(input_ids)
        batch["attention_mask"].append([1] * len(input_ids))
        batch["labels"].append(labels)
    return batch


def quantization_config(bits, dtype):
    """Return how to quantize the base: to 4 bits (NF4), to 8 (LLM.int8), or None for not at all."""
    from transformers import BitsAndBytesConfig  # heavy: called after heavy_imports

    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0) if bits == 8 else None


def lora_config(recipe):
    """Return the LoRA of the text model's seven projections; nothing else is trained."""
    from peft import LoraConfig  # heavy: called after heavy_imports

    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        bias="none",
        target_modules=list(recipe.target_modules),
        exclude_modules=recipe.exclude_modules,
        task_type="CAUSAL_LM",
    )


# ----------------------------------------------------------------------------------------------- a run


def main():
    args = parse_arguments()
    flags = ("bits", "epochs", "rows_per_step", "learning_rate", "seed")
    recipe = dataclasses.replace(args.recipe, **{name: getattr(args, name) for name in flags})
    rows = load_data(args.data)
    adapter_folder.check_output(args.output, args.resume)
    with adapter_folder.opened(args.output):
        if args.resume and adapter_folder.is_finished(args.output):
            resuming.check_finished(args, recipe.settings(), rows)
            print_main(f"finished   the run in {args.output} is complete: there is nothing to resume")
            print_main(f"next       {compare_command(args.output)}")
        else:
            tune(args, recipe, rows)


def tune(args, recipe, rows):
    """Train an adapter on rows and write it into args.output: labels → base → LoRA → steps → adapter."""
    # Rows.
    identity = {"format": checkpoints.FORMAT, "data_sha256": rows.sha256, "settings": recipe.settings()}
    checkpoint = resuming.find_checkpoint(args, identity)
    training, validation = split_rows(rows, recipe)
    with libraries.heavy_imports():  # torch and what stands on it: seconds
        import torch

        from tuner.data import tokenized
        from tuner.model import fused, gemma_tokenizer, loading, lora
        from tuner.system import devices
        from tuner.training import adapter_weights, checkpoint_state, gpu_budget, loss_functions, trainer
    state, dtype = devices.start(recipe.bits, cpu=recipe.rehearse)
    report_rows(args.data, rows, validation)

    # Labels.
    with state.main_process_first():
        folder, revision = locate.find_model(args.model, recipe.rehearse)
    tokenizer = gemma_tokenizer.load_tokenizer(folder)
    examples = tokenized.tokenize_rows(args.data, rows, tokenizer, preprocess_function, recipe.max_tokens)
    identity["model_sha256"] = folders.weights_fingerprint(folder)
    identity["tokens_sha256"] = tokenized.token_fingerprint(examples)
    resuming.check_unchanged(args.output, checkpoint, identity)
    workload = gpu_budget.measure(examples, epoch_batches(training, 1, recipe))
    print_main(f"tokens     {workload.describe()}")

    # The quantized base, with LoRA.
    plan = None if recipe.rehearse else gpu_budget.plan_memory(args.memory, recipe, folder, workload, state)
    print_main(f"model      {args.model} in {recipe.bits} bits on {devices.device_name(state.device)}")
    started = time.perf_counter()
    torch.manual_seed(recipe.seed)  # LoRA's first weights
    quantization = quantization_config(recipe.bits, dtype)
    model = loading.load_base(folder, quantization, state.device, dtype, vision=False)
    model = lora.add_lora(model, lora_config(recipe))
    model.peft_config["default"].base_model_name_or_path = locate.record(args.model)
    if not recipe.rehearse:  # a CPU's memory is not the limit; recomputing would cost a third more time
        loss_functions.checkpoint_layers(model)
    if is_main_process():
        model.print_trainable_parameters()
    if plan or recipe.rehearse:
        fused.fuse_layers(model, cpu=recipe.rehearse)
    loading_seconds = round(time.perf_counter() - started, 1)

    # Steps.
    report_start(args.output, training, validation, recipe, checkpoint)
    is_call = [chat_text.is_call(row["messages"]) for row in rows]
    data = trainer.TrainingData(tokenizer, examples, is_call, training, validation)
    run = trainer.Trainer(model, data, recipe, state, plan)
    described = {**identity, **run_command.begun_with(args)}
    writer = checkpoint_state.CheckpointWriter(args.output, model.peft_config["default"], described)
    with stop_requests() as run.stop_request:
        with run.checkpointing(writer, checkpoint, resuming.resume_command()):
            for epoch in range(1, recipe.epochs + 1):
                for batch in epoch_batches(training, epoch, recipe):
                    run.step(batch)
                run.end_epoch(epoch)
        if run.stopped:
            resuming.exit_stopped(args.output, run.stop_request)

        # Adapter.
        if not is_main_process():
            return
        record = describe_data(args, recipe, rows) | run.describe(dtype, loading_seconds)
        record |= {"revision": revision, "data_sha256": rows.sha256, "model_sha256": identity["model_sha256"]}
        record |= {"tokens": workload.total, "trained_tokens": workload.trained}
        adapter_weights.write_adapter(args.output, model, folder, record, resuming.way_on(args.output))
    report_end(args.output, record, devices.format_memory(record["peak_memory_gib"]))


# ------------------------------------------------------------------------------- flags, resuming, reports


def parse_arguments():
    def positive(kind, what):
        def parse(text):
            try:
                value = kind(text)
                if 0 < value < math.inf:
                    return value
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}")

        return parse

    count, number = positive(int, "a whole number ≥ 1"), positive(float, "a number > 0")
    base = locate.default_model()
    parser = argparse.ArgumentParser(description="Tune Gemma 3 with QLoRA on chat rows.", allow_abbrev=False)
    parser.add_argument("--model", help=f"folder or hub name of the base model (default: {base})")
    parser.add_argument("--data", default=DATA_PATH, help="chat rows (default: %(default)s)")
    parser.add_argument("--output", default=OUTPUT_DIR, help="folder for the adapter (default: %(default)s)")
    bits = "bits to quantize the base to (default: %(default)s)"
    parser.add_argument("--bits", type=int, choices=[4, 8], default=RECIPE.bits, help=bits)
    default = f"(default: {RECIPE.epochs}, with --rehearse {REHEARSAL['epochs']})"
    parser.add_argument("--epochs", type=count, help=f"number of epochs {default}")
    default = f"rows per step (default: {RECIPE.rows_per_step}, with --rehearse {REHEARSAL['rows_per_step']})"
    parser.add_argument("--batch-size", dest="rows_per_step", metavar="ROWS", type=count, help=default)
    default = f"(default: {RECIPE.learning_rate:g}, with --rehearse {REHEARSAL['learning_rate']:g})"
    parser.add_argument("--learning-rate", type=number, help=f"highest learning rate {default}")
    seed = "of the split, the order of rows, LoRA's first weights and dropout (default: %(default)s)"
    parser.add_argument("--seed", type=count, default=RECIPE.seed, help=seed)
    parser.add_argument(
        "--memory", type=number, metavar="GIB",
        help=f"GPU memory to use (default: {memory_plan.MEMORY_FRACTION:.0%}% of what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true",
        help=f"train on the CPU, by default the small Gemma 3 in ./{folders.SMALL_FOLDER}",
    )  # fmt: skip
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the output folder"
    )
    choice.add_argument(
        "--overwrite", action="store_true", help="start afresh where the output folder has an unfinished run"
    )
    args = parser.parse_args()
    args.typed, args.output = resuming.typed_flags(parser, args), output_folder.tidy(args.output)
    if args.rehearse and args.memory:
        parser.error("--memory limits GPU memory; --rehearse runs on the CPU")
    args.model = args.model or (f"./{folders.SMALL_FOLDER}" if args.rehearse else base)
    args.recipe = dataclasses.replace(RECIPE, **REHEARSAL) if args.rehearse else RECIPE
    for name in ("epochs", "rows_per_step", "learning_rate"):
        setattr(args, name, getattr(args, name) or getattr(args.recipe, name))
    return args


def compare_command(output):
    return commands.command("compare.py", adapter=None if output == OUTPUT_DIR else output)


def report_rows(path, rows, validation):
    calls = sum(chat_text.has_call(row["messages"]) for row in rows)
    print_main(f"rows       {len(rows)} of {path}: {calls} with a call, {len(rows) - calls} without")
    if rows.ignored_keys:
        print_main(f"ignored keys: {printable(', '.join(rows.ignored_keys), 200)}")
    for mark, text in hardware.check_host_memory():
        if mark == "✗":
            print_main(f"warning    {text}")
    if not validation:
        print_main("warning    too few rows for a validation set; training on all")


def report_start(output, training, validation, recipe, checkpoint):
    """Prepare the output folder for a new run, and print what will be trained."""
    counts = f"{len(training)} training rows, batch size {recipe.rows_per_step}"
    print_main(f"training   {counts}; {len(validation)} validation rows")
    if checkpoint:
        print_main(f"resumed    after step {checkpoint.step} of {checkpoint.history['steps']}")
    elif is_main_process() and (previous := adapter_folder.prepare(output)):
        print_main(f"previous adapter moved to {previous}")


def describe_data(args, recipe, rows):
    """Return what run.json says of the settings and of what the rows ask."""
    fingerprints = {print_ for row in rows for _, print_ in chat_text.trained_prompts(row["messages"])}
    return {
        "model": args.model,
        "bits": recipe.bits,
        "data": args.data,
        "rows_sha256": resuming.rows_sha256(rows),
        "prompts_sha256": sorted(fingerprints),
        "tools": chat_text.called_names(rows),
        "settings": {"model": args.model, "data": args.data, "output": args.output, **recipe.settings()},
    }


def report_end(output, record, memory):
    seconds = record["seconds"]
    print_main(f"memory     {memory}")
    print_main(f"time       {seconds['loading']} s loading, {seconds['training']} s training")
    print_main(f"saved      {output}; loss curves: {output}/loss.png")
    print_main(f"next       {compare_command(output)}")


if __name__ == "__main__":
    ignore_broken_pipes()
    run_script(
        main,
        interrupted="stopped before training began",
        out_of_memory="close what else runs on it (nvidia-smi), train with --bits 4 or shorter rows, or use "
        "a larger GPU; no adapter was written",
    )

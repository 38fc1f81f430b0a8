"""QLoRA tuning of Gemma-3-4b-it: rows → labels → quantised model → LoRA → an adapter in qlora_output.

    python train_qlora.py               on a CUDA GPU
    python train_qlora.py --rehearse    the same on the CPU with the small Gemma 3 (270M)
    python train_qlora.py --resume      goes on where a run was stopped, by whatever it was

torch and the libraries around it are imported by the functions that need them: a mistake in the rows or
in a flag is then told at once, not after ten seconds of imports.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuner.data import batching, chat_rows, chat_text
from tuner.model import folders, fused, gemma_tokenizer, loading, locate
from tuner.system import atomic, console, devices, hardware, libraries, scripts, signals
from tuner.system.console import printable
from tuner.system.errors import UserError, rows_error
from tuner.training import (
    adapter_folder,
    adapter_weights,
    checkpoints,
    collate,
    cuda_graphs,
    flat_weights,
    loss_functions,
    memory_plan,
)

# The recipe; the constants are the article's unless a comment says otherwise.
DATA_PATH = "examples.json"
OUTPUT_DIR = "qlora_output"
BITS = 4
LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.1
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXCLUDE_MODULES = r".*vision_tower.*"  # the vision tower has q/k/v too, and text never reaches them
EPOCHS = 10
LEARNING_RATE = 1e-4
ROWS_PER_STEP = 16  # an optimizer step; the last one of an epoch takes what is left
WARMUP_STEPS = 10
WARMUP_SHARE = 0.25  # ours: a short run must not spend itself on warming up
MAX_GRAD_NORM = 0.3
VALIDATION_SHARE = 0.1
SEED = 42
MAX_TOKENS = 2048  # a row's; a longer row is an error, never cut

EXPLODED = 1.5  # ours: a loss so many times that of guessing evenly, or of the first step, ends the run

# What decides memory and speed, and changes no result.
TOKENS_PER_MICRO_BATCH = 2048  # rows × longest row; halved where the GPU's memory is full
CACHED_ROWS = 10_000  # so many take some seconds to tokenise; fewer are not worth a file
TOKENS_EVALUATED = 256  # at least, at a time in an evaluation: without a gradient they take little memory

# What differs in the rehearsal, and why.
REHEARSAL_LEARNING_RATE = 1e-3  # 270M parameters want larger steps; measured, F1 1.00 on 40 unseen rows
REHEARSAL_OPTIMIZER = "AdamW"  # bitsandbytes pages its 8-bit optimizer between GPU and host only
REHEARSAL_DTYPE = "float32"  # a CPU without AVX512-BF16 multiplies bf16 some 200 times slower than fp32
REHEARSAL_CHECKPOINTING = False  # a CPU's memory is not the limit; recomputing would cost a third more time


@dataclass(frozen=True)
class Recipe:
    """What decides the result. The names are keys of run.json and of checkpoints."""

    bits: int = BITS
    epochs: int = EPOCHS
    learning_rate: float = LEARNING_RATE
    rehearse: bool = False
    lora_r: int = LORA_R
    lora_alpha: int = LORA_ALPHA
    lora_dropout: float = LORA_DROPOUT
    target_modules: tuple = tuple(TARGET_MODULES)
    exclude_modules: str = EXCLUDE_MODULES
    rows_per_step: int = ROWS_PER_STEP
    max_grad_norm: float = MAX_GRAD_NORM
    warmup_steps: int = WARMUP_STEPS
    warmup_share: float = WARMUP_SHARE
    validation_share: float = VALIDATION_SHARE
    seed: int = SEED
    max_tokens: int = MAX_TOKENS


RECIPE = Recipe()


def quantization_config(bits, dtype):
    """Return how to quantize the base: to 4 bits (NF4), to 8 (LLM.int8), or None for not at all."""
    from transformers import BitsAndBytesConfig

    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0) if bits == 8 else None


# ---------------------------------------------------------------------------------------------- rows


def load_data(data_path):
    """Returns the rows of a Chat Messages JSON file, in order, each {"messages": [{role, content}, …]}.

    Content is text; calls and their results are text too (chat_rows.as_text). Raises UserError that
    lists every row in error as `file:line: what is wrong; what to do`.
    """
    return [row for _, row in chat_rows.read_rows(data_path)]


def split_rows(rows):
    """Returns (training, validation): lists of row numbers, in order.

    Seeded, stratified by call / no call; equal rows stay on one side. Validation is empty where the set is
    too small to hold a row of each kind out.
    """
    kinds = {True: {}, False: {}}
    for i, row in enumerate(rows):
        kinds[chat_text.is_call(row["messages"])].setdefault(json.dumps(row, sort_keys=True), []).append(i)
    queue = []  # groups of equal rows of both kinds, merged in proportion
    for kind, groups in kinds.items():
        groups = sorted(groups.values())
        random.Random(f"{SEED} split {kind}").shuffle(groups)
        queue += [((place + 0.5) / len(groups), group) for place, group in enumerate(groups)]
    wanted = round(VALIDATION_SHARE * len(rows))
    validation = []
    for _, group in sorted(queue):
        if len(validation) + len(group) <= wanted:
            validation += group
    kinds_in = {chat_text.is_call(rows[i]["messages"]) for i in validation}
    if kinds_in != {kind for kind, groups in kinds.items() if groups}:
        validation = []
    return sorted(set(range(len(rows))) - set(validation)), sorted(validation)


# -------------------------------------------------------------------------------------------- labels


def preprocess_function(examples, tokenizer):
    """Turns a batch {"messages": [row, …]} into lists input_ids, attention_mask, labels, not padded.

    A label is its token where the assistant speaks, `<end_of_turn>` included, and −100 elsewhere. Where the
    assistant begins to speak is where the template's own generation prompt ends.
    """
    end_of_turn = tokenizer.convert_tokens_to_ids(chat_text.END_OF_TURN)
    texts, places = [], []  # of a row: all its text, and as far as where each answer begins
    for messages in examples["messages"]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        places.append(range(len(texts) + 1, len(texts) + 1 + len(answers)))
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        for i in answers:
            prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            texts.append(prompt)
    # add_special_tokens=False: the template has written <bos> already.
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]

    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for place in places:
        ids = tokens[place.start - 1]
        labels = [-100] * len(ids)
        for prompt in (tokens[i] for i in place):
            assert ids[: len(prompt)] == prompt, "the generation prompt is no prefix of the row's tokens"
            end = ids.index(end_of_turn, len(prompt)) + 1
            labels[len(prompt) : end] = ids[len(prompt) : end]
        assert ids.count(tokenizer.bos_token_id) == 1, "a row has exactly one <bos>"
        batch["input_ids"].append(ids)
        batch["attention_mask"].append([1] * len(ids))
        batch["labels"].append(labels)
    return batch


def tokenise_rows(data_path, rows, tokenizer):
    """Returns the rows as a datasets.Dataset of token ids; raises UserError for rows over MAX_TOKENS.

    What CACHED_ROWS or more rows gave is kept in the cache of datasets and read from there the next time.
    """
    import datasets

    datasets.disable_progress_bars()  # the bar of the run is the training's
    plain = datasets.Dataset.from_list(rows)

    def tokens(cache_file):
        return plain.map(
            preprocess_function,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=["messages"],
            new_fingerprint="tokens",  # a tokenizer has no hash that stays the same
            cache_file_name=cache_file,
        )

    try:
        name = fingerprint_of_labels(rows, tokenizer) if len(rows) >= CACHED_ROWS else None
        dataset = tokens(name and str(Path(datasets.config.HF_DATASETS_CACHE, f"tokens-{name}.arrow")))
    except OSError:  # a cache that cannot be written, or is full
        dataset = tokens(None)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if max(lengths) > MAX_TOKENS:
        raise rows_error(data_path, too_long([line for line, _ in chat_rows.read_rows(data_path)], lengths))
    return dataset


def fingerprint_of_labels(rows, tokenizer):
    """Returns the sha256 of all that labels come from: rows, tokenizer, template and code."""
    digest = hashlib.sha256(json.dumps(rows).encode())
    code = inspect.getsource(preprocess_function)
    for text in (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, code):
        digest.update(text.encode())
    return digest.hexdigest()


def too_long(lines, lengths):
    """Returns [(line, error), …] of the rows that have more than MAX_TOKENS tokens."""
    return [
        (line, f"the row has {length} tokens, more than {MAX_TOKENS}; shorten it or split it in two")
        for line, length in zip(lines, lengths, strict=True)
        if length > MAX_TOKENS
    ]


def steps_of(epoch, training):
    """Returns the row numbers of each step of an epoch (1, 2, …): shuffled, ROWS_PER_STEP at a time."""
    order = list(training)
    random.Random(f"{SEED} epoch {epoch}").shuffle(order)
    return [order[start : start + ROWS_PER_STEP] for start in range(0, len(order), ROWS_PER_STEP)]


def warmup_steps(steps):
    return min(WARMUP_STEPS, int(WARMUP_SHARE * steps))


def micro_batches(examples, state, tokens=None):
    """Cuts this process's share of a step into micro-batches of `tokens` at most (TOKENS_PER_MICRO_BATCH)."""
    return batching.group_padded(
        batching.shard(examples, state), batching.length, tokens or TOKENS_PER_MICRO_BATCH
    )


def padded_sizes(examples, state, tokens=None):
    """Returns [(whether it is several rows, tokens), …] of this process's micro-batches."""
    return [(len(b) > 1, len(b) * batching.length(b[0])) for b in micro_batches(examples, state, tokens)]


def add_lora(model):
    """Wraps the model with LoRA on the text model's seven projections; nothing else is trained.

    prepare_model_for_kbit_training is not called: it would cast the 262k-row embedding to fp32 (+1.3 GB).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        bias="none",
        target_modules=TARGET_MODULES,
        task_type="CAUSAL_LM",
    )
    vision = getattr(model.config, "vision_config", None)
    if vision and vision.num_hidden_layers:  # PEFT warns of a pattern that excludes nothing
        config.exclude_modules = EXCLUDE_MODULES
    model = get_peft_model(model, config)
    if vision:  # who loads the adapter may have a tower with layers
        config.exclude_modules = EXCLUDE_MODULES
    return model


# ------------------------------------------------------------------------------------------ training


def add_gradients(model, examples, pad_id, state, tokens=None, total=None):
    """Adds this process's part of the gradient of a step's mean loss to the LoRA weights, and returns the
    same part of that loss, as a tensor.

    The loss is summed and divided by the trained tokens of the whole step, so micro-batches and processes
    of any size give the same gradient. `total` is that number, where these are not all examples of the step.
    """
    import torch

    total = total or batching.trained_tokens(examples)
    loss = torch.zeros((), device=state.device)
    for batch in micro_batches(examples, state, tokens):
        part = (
            loss_functions.loss_and_predictions(model, collate.collate_padded(batch, pad_id, state.device))[0]
            / total
        )
        part.backward()
        loss += part.detach()
    return loss


def add_up(loss, weights, state):
    """Adds up what the processes have of a step's loss and gradients; returns the loss as a number."""
    import torch

    if state.num_processes > 1:
        torch.distributed.all_reduce(loss)
        torch.distributed.all_reduce(weights.grad)
    return loss.item()


def within_memory(work, cut, state, tokens, less=1 / 2):
    """Returns (work(tokens), tokens); where the GPU's memory is full, does it again with `less` of them.

    cut(tokens=…) gives [(whether less may do, tokens), …] of the micro-batches. Raises UserError if none may.
    """
    import torch

    while True:
        try:
            return work(tokens), tokens
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).split(" Process ")[0], 150)
        # Not within `except`: there the error would hold on to all that the work had in memory.
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes = cut(tokens=tokens)
        largest = max(size for _, size in sizes)
        divisible = [size for less_may_do, size in sizes if less_may_do]
        if not divisible:
            raise UserError(
                f"the GPU's memory is full with one row of {largest} tokens ({reason}); train with "
                "--bits 4, close what else runs on it (nvidia-smi), shorten that row, or take a larger GPU"
            )
        tokens, less = int(max(divisible) * less), max(1 / 2, less * less)
        console.print_main(
            f"memory     full with {largest} tokens at a time; the same again with {tokens} at most"
        )


def evaluate(model, examples, calls, call_token, pad_id, state, tokens=None, asked=(), at_once=None):
    """Returns the mean loss of the examples' trained tokens, and how many rows are decided right; None if the
    run is asked to stop meanwhile.

    A call row is decided right if every token of its last answer is the most likely one, a general row if
    its last answer's first token is not a call's. Read from the logits of the loss, without generating.
    """
    import torch

    was_training = model.training
    model.eval()
    examples = [{**example, "is_call": call} for example, call in zip(examples, calls, strict=True)]
    sums = torch.zeros(2, dtype=torch.float64, device=state.device)
    with torch.no_grad(), devices.without_cudnn_attention():
        for batch in micro_batches(examples, state, tokens):
            if asked and state.num_processes == 1:  # several would wait for one another
                model.train(was_training)
                return None
            loss, guesses = loss_functions.loss_and_predictions(
                model, collate.collate_padded(batch, pad_id, state.device), at_once
            )
            sums[0] += loss
            guesses = iter(guesses.tolist())
            for example in batch:
                labels = example["labels"][1:]
                guess = [next(guesses) if label != -100 else None for label in labels]
                last = loss_functions.answer_span(labels)
                right = guess[last] == labels[last]
                sums[1] += right if example["is_call"] else guess[last.start] != call_token
    if state.num_processes > 1:
        torch.distributed.all_reduce(sums)
    model.train(was_training)
    return sums[0].item() / batching.trained_tokens(examples), int(sums[1])


def make_optimizer(weights, learning_rate, steps, device):
    """Returns (optimizer, schedule)."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    if device.type == "cuda":
        import bitsandbytes

        kind = bitsandbytes.optim.PagedAdamW8bit
    else:
        kind = getattr(torch.optim, REHEARSAL_OPTIMIZER)
    optimizer = kind(weights, lr=learning_rate, weight_decay=0.0)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps(steps), steps)


def check_loss(what, loss, limit, step, learning_rate):
    """Raises UserError if what a step gave, a loss or a gradient's norm, is not finite or over `limit`."""
    if math.isfinite(loss) and loss <= limit:
        return
    cause = f"the learning rate {learning_rate:g} is too high"
    cure = f"start afresh with --overwrite --learning-rate {learning_rate / 10:g}"
    if step == 1:
        cause, cure = "the base model's weights are damaged", "fetch them anew"
    problem = "explodes" if math.isfinite(loss) else "is not finite"
    raise UserError(f"step {step}: the {what} ({loss:.4g}) {problem}; most likely {cause}: {cure}")


def any_asked(asked, state):
    """Whether any of the processes was asked to stop."""
    if state.num_processes == 1:
        return bool(asked)
    import torch

    flag = torch.tensor(float(bool(asked)), device=state.device)
    torch.distributed.all_reduce(flag)
    return flag.item() > 0


def train(
    model, examples, training, validation, calls, tokenizer, args, state,
    found=None, save=None, asked=(), plan=None,
):  # fmt: skip
    """Trains the LoRA weights and leaves those in the model that decided most validation rows right.

    found: a checkpoint to go on from, as checkpoints.newest gives it.
    save(history, adapter, best, states): writes a checkpoint, of weights that stay as they are; called after
    each epoch, and before stopping as soon as `asked` has anything in it.
    plan: a memory_estimate.Plan, to train by CUDA graphs.

    Returns what happened: steps, losses by step, evaluations by epoch, the kept step; None if it was stopped.
    """
    import torch
    from peft import get_peft_model_state_dict
    from tqdm import tqdm

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    call_token = tokenizer(chat_text.CALL_START, add_special_tokens=False)["input_ids"][0]
    guessing = math.log(model.config.get_text_config().vocab_size)  # the loss of one that knows nothing
    held_out, held_out_calls = [examples[i] for i in validation], [calls[i] for i in validation]
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = flat_weights.flatten_parameters(parameters)
    adapter = get_peft_model_state_dict(model)  # the weights themselves, by name
    per_epoch = len(steps_of(1, training))
    steps = per_epoch * args.epochs
    optimizer, schedule = make_optimizer([weights], args.learning_rate, steps, state.device)
    history = {"steps": steps, "warmup_steps": warmup_steps(steps), "kept_step": steps}
    history |= {"losses": [], "evaluations": [], "resumed_at": [], "seconds": 0.0, "step_seconds": []}
    best = None
    if found:
        history, best = checkpoints.restore(found, adapter, optimizer, schedule)
        history["resumed_at"].append(len(history["losses"]))
    losses, evaluations = history["losses"], history["evaluations"]
    done, seconds, started = len(losses), history["seconds"], time.perf_counter()
    step, tokens, tokens_evaluated = 0, TOKENS_PER_MICRO_BATCH, TOKENS_PER_MICRO_BATCH
    plain = partial(add_gradients, model, pad_id=pad_id, state=state)
    add, sizes, less = plain, partial(padded_sizes, state=state), 1 / 2
    evaluated_at_once = None
    if plan:
        tokens = plan.tokens or plan.checkpointed
        tokens_evaluated = max(tokens, TOKENS_EVALUATED)
    if plan and plan.tokens:
        evaluated_at_once = memory_plan.evaluated_at_once(plan.tokens, loss_functions.LOGITS_AT_ONCE)
        less = 7 / 8  # the plan may be wrong by so much
        ahead = [numbers for epoch in range(args.epochs) for numbers in steps_of(epoch + 1, training)]
        add, sizes = cuda_graphs.make(
            model, examples, ahead, plan, plain, pad_id, state, loss_functions.LOGITS_AT_ONCE
        )
    bar = tqdm(
        total=steps, initial=done, desc="training", unit="step", disable=not state.is_main_process,
        dynamic_ncols=True,
    )  # fmt: skip

    def keep():
        if save is None:
            return
        history["seconds"] = round(seconds + time.perf_counter() - started, 1)
        states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        now = flat_weights.copy_to_cpu(adapter, weights)
        save(history, now, best if history["kept_step"] != step else None, states)

    def check(what, value, limit):
        check_loss(what, value, limit, step, args.learning_rate)

    def gradients(tokens):
        weights.grad.zero_()
        # A step's dropout depends on nothing that came before it, an evaluation least of all.
        torch.manual_seed(SEED + step * state.num_processes + state.process_index)
        return add(rows, tokens=tokens)

    def evaluation(tokens):
        given = model, held_out, held_out_calls, call_token, pad_id, state
        return evaluate(*given, tokens, asked, evaluated_at_once)

    model.train()
    with bar:
        for epoch in range(1, args.epochs + 1):
            for numbers in steps_of(epoch, training):
                step += 1
                if step <= done:
                    continue
                begun = time.perf_counter()
                rows = [examples[i] for i in numbers]
                loss, tokens = within_memory(gradients, partial(sizes, rows), state, tokens, less)
                loss = add_up(loss, weights, state)
                # Of each weight first, then of these norms: one sum over all would round otherwise.
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
                torch.nn.utils.clip_grads_with_norm_(weights, MAX_GRAD_NORM, norm)
                norm = norm.item()
                check("loss", loss, EXPLODED * max([guessing, *losses[:1]]))
                check("gradient", norm, math.inf)
                optimizer.step()
                schedule.step()
                losses.append(loss)
                history["step_seconds"].append(round(time.perf_counter() - begun, 4))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if step % per_epoch and any_asked(asked, state):
                    keep()
                    return None
            over = len(evaluations) >= epoch if validation else step <= done
            if over:  # before the run was stopped
                continue
            line = f"epoch {epoch:>2}/{args.epochs}  step {step:>3}  training loss {losses[-1]:.3f}"
            if validation:
                cut = partial(padded_sizes, held_out, state)
                result, tokens_evaluated = within_memory(evaluation, cut, state, tokens_evaluated)
                if result is None:
                    keep()
                    return None
                loss, right = result
                check("validation loss", loss, EXPLODED * max(guessing, losses[0]))
                line += f"  validation loss {loss:.3f}  decided right {right}/{len(validation)}"
                if all((-right, loss) < (-e["right"], e["loss"]) for e in evaluations):
                    best = flat_weights.copy_to_cpu(adapter, weights)
                    history["kept_step"] = step
                evaluations.append({"epoch": epoch, "step": step, "loss": loss, "right": right})
            console.print_main(line)
            keep()
            if epoch < args.epochs and any_asked(asked, state):
                return None
    if best:
        with torch.no_grad():
            for name, weight in adapter.items():
                weight.copy_(best[name])
    history["seconds"] = round(seconds + time.perf_counter() - started, 1)
    return history


# ---------------------------------------------------------------------------------------------- main


def parse_arguments():
    def positive(kind):
        def parse(text):
            value = kind(text)
            if not 0 < value < math.inf:
                raise ValueError
            return value

        parse.__name__ = f"positive {kind.__name__}"
        return parse

    base = locate.default_model()
    parser = argparse.ArgumentParser(description="Tune Gemma 3 with QLoRA on chat rows.", allow_abbrev=False)
    parser.add_argument("--model", help=f"folder or hub name of the base model (default: {base})")
    parser.add_argument("--data", default=DATA_PATH, help="chat rows (default: %(default)s)")
    parser.add_argument("--output", default=OUTPUT_DIR, help="folder for the adapter (default: %(default)s)")
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], default=BITS, help="of the base (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=positive(int), default=EPOCHS, help="(default: %(default)s)")
    parser.add_argument(
        "--learning-rate",
        type=positive(float),
        help=f"(default: {LEARNING_RATE:g}, with --rehearse {REHEARSAL_LEARNING_RATE:g})",
    )
    parser.add_argument(
        "--memory",
        type=positive(float),
        metavar="GIB",
        help=f"GPU memory that may be reserved (default: {memory_plan.MEMORY_FRACTION:.0%}% of what is free)",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help=f"train on the CPU, by default the small Gemma 3 in ./{folders.SMALL_FOLDER}",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the output folder"
    )
    choice.add_argument(
        "--overwrite", action="store_true", help="start afresh where the output folder has an unfinished run"
    )
    args = parser.parse_args()
    if args.rehearse and args.memory:
        parser.error("--memory is a GPU's, and --rehearse uses none")
    args.model = args.model or (f"./{folders.SMALL_FOLDER}" if args.rehearse else base)
    args.learning_rate = args.learning_rate or (REHEARSAL_LEARNING_RATE if args.rehearse else LEARNING_RATE)
    return args


def main():
    args = parse_arguments()
    try:
        run(args)
    except UserError as error:
        if console.is_main_process():
            print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped before training began", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not scripts.is_out_of_memory(error):
            raise
        cure = "close what else runs on it (nvidia-smi), shorten the longest rows, or take a larger card"
        cure = f"train with --bits 4, {cure}" if args.bits == 8 else cure
        print(f"the GPU's memory is full; {cure}; no adapter was written", file=sys.stderr)
        sys.exit(1)


def run(args):
    rows = load_data(args.data)
    adapter_folder.check_output(args.output, args.resume)
    with atomic.exclusive_lock(args.output) if console.is_main_process() else nullcontext():
        if console.is_main_process():
            adapter_folder.clear(args.output)
        if args.resume and adapter_folder.is_finished(args.output):
            console.print_main(f"finished   the run in {args.output} is done: there is nothing to resume")
            args.bits = adapter_folder.read_adapter(args.output)[1].get("bits", args.bits)
            console.print_main(f"next       {next_command(args)}")
            return
        try:
            tune(args, rows)
        finally:
            if console.is_main_process():
                adapter_folder.remove_if_empty(args.output)


def tune(args, rows):
    facts = {
        "format": checkpoints.FORMAT,
        "data_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
        "settings": settings(args),
    }
    found = find_checkpoint(args, facts)
    calls = [chat_text.is_call(row["messages"]) for row in rows]
    training, validation = split_rows(rows)

    libraries.import_libraries("datasets", "accelerate")

    import torch
    from accelerate import PartialState

    devices.make_cpu_matmul_deterministic()
    dtype = getattr(torch, REHEARSAL_DTYPE) if args.rehearse else devices.gpu_dtype()
    state = PartialState(cpu=args.rehearse)
    devices.check_quantized_matmul(args.bits, state.device, dtype)
    teaching = sum(chat_text.has_call(row["messages"]) for row in rows)
    console.print_main(
        f"rows       {len(rows)} of {args.data}: {teaching} with a call, {len(rows) - teaching} without"
    )
    for mark, text in hardware.check_host_memory():
        if mark == "✗":
            console.print_main(f"warning    {text}")
    if not validation:
        console.print_main(
            "           too few to hold 10 % out: all are trained on, and the last step's adapter is kept"
        )

    with state.main_process_first():
        folder, revision = locate.find_model(args.model, args.rehearse)
    tokenizer = gemma_tokenizer.load_tokenizer(folder)
    examples = tokenise_rows(args.data, rows, tokenizer)
    facts["model_sha256"] = folders.weights_fingerprint(folder)
    facts["tokens_sha256"] = fingerprint_of_tokens(examples)
    if found:
        check_unchanged(args, found[0], facts)
    lengths = [len(ids) for ids in examples["input_ids"]]
    tokens, trained = sum(lengths), batching.trained_tokens(examples)
    console.print_main(f"tokens     {tokens} in all, {trained} trained, {max(lengths)} in the longest row")

    epoch = [[lengths[i] for i in numbers] for numbers in steps_of(1, training)]
    plan = None if args.rehearse else plan_memory(args, folder, epoch, max(lengths), trained, state)
    console.print_main(f"model      {args.model} in {args.bits} bits on {devices.device_name(state.device)}")
    started = time.perf_counter()
    torch.manual_seed(SEED)  # LoRA's first weights
    model = add_lora(loading.load_base(folder, args.bits, state.device, dtype, vision=False))
    model.peft_config["default"].base_model_name_or_path = args.model
    if not args.rehearse or REHEARSAL_CHECKPOINTING:
        loss_functions.checkpoint_layers(model)
    if console.is_main_process():
        model.print_trainable_parameters()
    if plan:
        fused.fuse_layers(model)
    loaded = time.perf_counter()
    console.print_main(
        f"training   {len(training)} rows, {ROWS_PER_STEP} a step; {len(validation)} rows for validation"
    )
    if found:
        console.print_main(f"resumed    after step {found[0]['step']} of {found[0]['history']['steps']}")
    elif console.is_main_process() and (earlier := adapter_folder.make_room(args.output)):
        console.print_main(f"earlier    the adapter that was in {args.output} is now in {earlier}")

    config = model.peft_config["default"]
    with signals.stop_requests() as asked:
        try:
            with checkpoints.writer(args.output, config, facts, console.print_main) as save:
                history = train(
                    *(model, examples, training, validation, calls, tokenizer, args, state),
                    *(found, save if console.is_main_process() else None, asked, plan),
                )
        except UserError as error:
            places = checkpoints.checkpoint_dirs(args.output)
            kept = f"the last checkpoint is {places[0]}" if places else "no checkpoint was written yet"
            raise UserError(f"{error}; {kept}") from error
        except Exception:
            if console.is_main_process() and checkpoints.checkpoint_dirs(args.output):
                print(f"the checkpoints are kept; go on with: {command(args)}", file=sys.stderr)
            raise
        state.destroy_process_group()
        if history is None:
            stop(args, asked)
        if not console.is_main_process():
            return
        seconds = {"loading": round(loaded - started, 1), "training": history.pop("seconds")}
        memory = devices.peak_memory(state.device)
        trainable, all_parameters = model.get_nb_trainable_parameters()
        record = {
            "model": args.model,
            "revision": revision,
            "bits": args.bits,
            "data": args.data,
            "data_sha256": facts["data_sha256"],
            "prompts_sha256": sorted(
                {
                    fingerprint
                    for row in rows
                    for fingerprint in chat_text.answer_fingerprints(row["messages"])
                }
            ),
            "rows": {"all": len(rows), "training": len(training), "validation": len(validation)},
            "tokens": tokens,
            "trained_tokens": trained,
            "settings": {"model": args.model, "data": args.data, "output": args.output, **facts["settings"]},
            "compute_dtype": str(dtype).removeprefix("torch."),
            "processes": state.num_processes,
            "device": devices.device_name(state.device),
            "versions": libraries.library_versions(),
            "trainable_parameters": trainable,
            "all_parameters": all_parameters,
            **history,
            "seconds": seconds,
            "peak_memory_gib": memory,
        }
        try:
            adapter_weights.write_adapter(args.output, model, folder, record)
        except OSError as error:
            raise UserError(
                f"{args.output}: the adapter could not be written ({error.strerror}); it takes "
                f"{adapter_weights.adapter_bytes(model, folder) / 1e6:.0f} MB, and "
                f"{shutil.disk_usage(args.output).free / 1e6:.0f} MB are free; free some, then go on with: "
                + command(args)
            ) from error
    console.print_main(f"memory     {devices.format_memory(memory)}")
    console.print_main(f"time       {seconds['loading']} s loading, {seconds['training']} s training")
    console.print_main(
        f"adapter    {args.output}, of step {history['kept_step']}; its curves: {args.output}/loss.png"
    )
    console.print_main(f"next       {next_command(args)}")


def plan_memory(args, folder, epoch, longest, trained, state):
    """Returns the Plan for --memory, and has the process take no more; raises UserError for too little.

    epoch: the rows' lengths of each step, in tokens; longest: of all rows; trained: how many tokens are. None
    on a GPU without bf16: its fp32 is trained the plain way.
    """
    import torch

    if devices.gpu_dtype() != torch.bfloat16:
        if not args.memory:
            return None
        raise UserError(
            "--memory needs a GPU with bf16: an L4, an A10, an RTX 30xx or newer; leave it out here"
        )
    free, total = torch.cuda.mem_get_info()
    budget = args.memory * 2**30 if args.memory else memory_plan.MEMORY_FRACTION * free
    if budget > free:
        there = f"{free / 2**30:.1f} GiB are free on this GPU"
        raise UserError(f"--memory {args.memory:g}: {there}; name less, or close what else runs (nvidia-smi)")
    d = memory_plan.read_dimensions(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    at_once = min(loss_functions.LOGITS_AT_ONCE, trained)
    plans = memory_plan.make_plans(d, args.bits, LORA_R, budget, at_once, longest)
    if max(plans[0].tokens, plans[0].checkpointed) < longest:
        least = memory_plan.least_bytes(d, args.bits, LORA_R, longest, at_once)
        needed = f"{args.bits} bits and a row of {longest} tokens take {least / 2**30:.1f}"
        cure = "name more with --memory" if args.memory else "close what else runs on it (nvidia-smi)"
        cure += f", take {'--bits 4, ' * (args.bits == 8)}shorter rows or a larger GPU"
        raise UserError(f"{budget / 2**30:.1f} GiB of GPU memory are too little: {needed}; {cure}")
    torch.cuda.set_per_process_memory_fraction(budget / total)
    plan = memory_plan.quickest_plan(plans, epoch, args.bits, state)
    how = f"{plan.tokens} tokens at once, as CUDA graphs" if plan.tokens else ""
    if plan.tokens < longest:
        how += "; longer rows " * bool(plan.tokens) + f"{plan.checkpointed} tokens at once, "
        how += "their layers computed anew for the gradient"
    console.print_main(f"memory     {budget / 2**30:.1f} GiB at most: {how}")
    return plan


def find_checkpoint(args, facts):
    """Returns the checkpoint to go on from, None to start afresh; raises UserError if neither may be done."""
    if args.resume:
        if found := checkpoints.newest(args.output, console.print_main):
            check_unchanged(args, found[0], facts)
            return found
        damaged = " --overwrite" if checkpoints.checkpoint_dirs(args.output) else ""
        raise UserError(f"{args.output} has nothing to resume; start with: {command(args, damaged)}")
    places = checkpoints.checkpoint_dirs(args.output)
    if places and not adapter_folder.is_finished(args.output) and not args.overwrite:
        raise UserError(
            f"{args.output} holds an unfinished run ({places[0].name}); go on with: {command(args)}; "
            "or add --overwrite to start afresh"
        )
    return None


def check_unchanged(args, manifest, facts):
    """Raises UserError that names what is other than when the run began."""
    if found := checkpoints.differences(manifest, facts):
        raise UserError(
            f"{args.output} cannot be resumed: {', '.join(found)}; give it what it began with, or start "
            "afresh with --overwrite"
        )


def fingerprint_of_tokens(examples):
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["input_ids"], example["labels"]]).encode())
    return digest.hexdigest()


def stop(args, asked):
    """Says how to go on, and exits as a process does that a signal ended."""
    places = checkpoints.checkpoint_dirs(args.output)
    console.print_main(
        f"stopped    the newest checkpoint is {places[0]}" if places else "stopped    with no checkpoint"
    )
    console.print_main(f"go on      {command(args)}")
    sys.exit(128 + (asked.signal if asked else signal.SIGINT))


def command(args, add=" --resume"):
    """Returns the command that was typed, with --resume."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    start = "accelerate launch" if "RANK" in os.environ else "python"
    return shlex.join([*start.split(), "train_qlora.py", *flags]) + add


def next_command(args):
    adapter = "" if args.output == OUTPUT_DIR else f" --adapter {shlex.quote(args.output)}"
    return f"python compare.py --bits {args.bits}{adapter}"


def settings(args):
    """Returns all that decides the result, by name."""
    return {name: getattr(args, name) for name in ("bits", "epochs", "learning_rate", "rehearse")} | recipe()


def recipe():
    """Returns the constants at the top that decide the result, for run.json."""
    names = "LORA_R LORA_ALPHA LORA_DROPOUT TARGET_MODULES EXCLUDE_MODULES ROWS_PER_STEP MAX_GRAD_NORM"
    names += " WARMUP_STEPS WARMUP_SHARE VALIDATION_SHARE SEED MAX_TOKENS"
    return {name.lower(): globals()[name] for name in names.split()}


if __name__ == "__main__":
    console.ignore_broken_pipes()
    main()

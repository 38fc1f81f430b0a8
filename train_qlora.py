"""QLoRA tuning of Gemma-3-4b-it: rows → labels → quantised model → LoRA → an adapter in qlora_output.

    python train_qlora.py               on a CUDA GPU
    python train_qlora.py --rehearse    the same on the CPU with the small Gemma 3 (270M)

torch and the libraries around it are imported by the functions that need them: a mistake in the rows or
in a flag is then told at once, not after ten seconds of imports.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import chat_rows
import download_model

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

# What decides memory and speed, and changes no result.
TOKENS_PER_MICRO_BATCH = 2048  # rows × longest row; 16 short rows, or one of MAX_TOKENS, at once
LOGITS_AT_ONCE = 512  # trained tokens; one row of logits is 262,208 wide, the largest tensor of the run

# What differs in the rehearsal, and why.
REHEARSAL_LEARNING_RATE = 1e-3  # 270M parameters want larger steps; measured, F1 1.00 on 40 unseen rows
REHEARSAL_OPTIMIZER = "AdamW"  # bitsandbytes pages its 8-bit optimizer between GPU and host only
REHEARSAL_DTYPE = "float32"  # a CPU without AVX512-BF16 multiplies bf16 some 200 times slower than fp32
REHEARSAL_CHECKPOINTING = False  # a CPU's memory is not the limit; recomputing would cost a third more time
REHEARSAL_TOKENS_PER_MICRO_BATCH = 256  # a CPU gains nothing from a large one, and a small one pads less

CALL_START = "<tool_call"  # a row whose last answer begins so is a call row
END_OF_TURN = "<end_of_turn>"
MIN_COMPUTE_CAPABILITY = (7, 5)  # Turing: the oldest GPU with the int8 units that 8-bit training uses


class RunError(Exception):
    """Something that the user can mend; its text is one line with the cure."""


# ---------------------------------------------------------------------------------------------- rows


def load_data(data_path):
    """Returns the rows of a Chat Messages JSON file, in order, each {"messages": [{role, content}, …]}.

    Raises chat_rows.DataError that lists every row in error as `file:line: what is wrong; what to do`.
    """
    return [row for _, row in chat_rows.read(data_path)]


def is_call(messages):
    return chat_rows.text_of(messages[-1]).startswith(CALL_START)


def split_rows(rows):
    """Returns (training, validation): lists of row numbers, in order.

    Seeded, stratified by call / no call; equal rows stay on one side. Validation is empty where the set is
    too small to hold a row of each kind out.
    """
    kinds = {True: {}, False: {}}
    for i, row in enumerate(rows):
        kinds[is_call(row["messages"])].setdefault(json.dumps(row, sort_keys=True), []).append(i)
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
    kinds_in = {is_call(rows[i]["messages"]) for i in validation}
    if kinds_in != {kind for kind, groups in kinds.items() if groups}:
        validation = []
    return sorted(set(range(len(rows))) - set(validation)), sorted(validation)


# -------------------------------------------------------------------------------------------- labels


def preprocess_function(examples, tokenizer):
    """Turns a batch {"messages": [row, …]} into lists input_ids, attention_mask, labels, not padded.

    A label is its token where the assistant speaks, `<end_of_turn>` included, and −100 elsewhere. Where the
    assistant begins to speak is where the template's own generation prompt ends.
    """
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def tokenise(messages, **kwargs):
        # add_special_tokens=False: the template has written <bos> already.
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for messages in examples["messages"]:
        messages = [{"role": m["role"], "content": chat_rows.text_of(m)} for m in messages]
        ids = tokenise(messages)
        labels = [-100] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenise(messages[:i], add_generation_prompt=True)
                assert ids[: len(prompt)] == prompt, "the generation prompt is no prefix of the row's tokens"
                end = ids.index(end_of_turn, len(prompt)) + 1
                labels[len(prompt) : end] = ids[len(prompt) : end]
        assert ids.count(tokenizer.bos_token_id) == 1, "a row has exactly one <bos>"
        batch["input_ids"].append(ids)
        batch["attention_mask"].append([1] * len(ids))
        batch["labels"].append(labels)
    return batch


def tokenise_rows(data_path, rows, tokenizer):
    """Returns the rows as a datasets.Dataset of token ids; raises DataError for rows over MAX_TOKENS."""
    import datasets

    datasets.disable_progress_bars()  # the bar of the run is the training's
    # "use_json": a content may be a string in one row and a list of parts in the next.
    dataset = datasets.Dataset.from_list(rows, on_mixed_types="use_json").map(
        preprocess_function,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=["messages"],
        new_fingerprint="tokens",  # nothing is cached, and a tokenizer has no stable hash
    )
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if max(lengths) > MAX_TOKENS:
        lines = [line for line, _ in chat_rows.read(data_path)]
        raise chat_rows.DataError(
            data_path,
            [
                (line, f"the row has {length} tokens, more than {MAX_TOKENS}; shorten it or split it in two")
                for line, length in zip(lines, lengths, strict=True)
                if length > MAX_TOKENS
            ],
        )
    return dataset


def micro_batches(examples, processes=1, process=0):
    """Cuts a step's examples into this process's micro-batches of at most TOKENS_PER_MICRO_BATCH tokens.

    Sorted by length, so that little is padded; dealt out in turn, so that processes get equal work.
    """
    batches = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"]))[process::processes]:
        longest = len(batches[-1][0]["input_ids"]) if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= TOKENS_PER_MICRO_BATCH:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def pad(examples, pad_id, device):
    """Returns input_ids, attention_mask, labels as tensors (rows, longest row); pads are masked in both."""
    import torch

    longest = max(len(e["input_ids"]) for e in examples)

    def tensor(key, filler):
        rows = [list(e[key]) + [filler] * (longest - len(e[key])) for e in examples]
        return torch.tensor(rows, device=device)

    return tensor("input_ids", pad_id), tensor("attention_mask", 0), tensor("labels", -100)


# --------------------------------------------------------------------------------------------- model


def find_gpu():
    """Raises RunError if torch sees no CUDA GPU that can train, and returns the type to compute in."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here (an old driver) is said below
        available = torch.cuda.is_available()
    if not available:
        cure = "or rehearse on this CPU: python train_qlora.py --rehearse"
        driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            raise RunError(
                f"torch {torch.__version__} is built for CPUs only, but this machine has an NVIDIA driver; "
                f"install torch's CUDA build (see pytorch.org), {cure}"
            )
        if driver:
            raise RunError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU; look at "
                f"nvidia-smi: a driver older than CUDA {torch.version.cuda} needs an older torch, {cure}"
            )
        raise RunError(f"no CUDA GPU on this machine; run on one that has one, {cure}")
    if torch.cuda.get_device_capability() < MIN_COMPUTE_CAPABILITY:
        raise RunError(
            f"the {torch.cuda.get_device_name()} is too old (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}); take a GPU with "
            f"{'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or newer: a T4, an RTX 20xx, an L4, an A10 …"
        )
    # Never fp16: Gemma 3 overflows in it. A T4 has no bf16 and computes in fp32.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def load_model(folder, bits, device, dtype):
    """Returns the base model, its linear layers quantised to 4 or 8 bits, frozen, on one device."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantisation,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise RunError(
            f"{folder} lacks weights ({names[0]} and {len(names) - 1} more); fetch it anew: python download_model.py"
        )
    model.config.get_text_config().use_cache = False
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and torch.device(device).type == "cpu":
            # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks the weights at the first evaluation, and
            # the packed kernel has no autograd: later gradients lose two thirds of their norm in silence.
            module.support_avx512bf16_for_cpu = False
    return model


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
        # The text-only class has none, and PEFT warns of a pattern that excludes nothing.
        exclude_modules=EXCLUDE_MODULES if hasattr(model.config, "vision_config") else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def losses_and_guesses(model, batch):
    """Returns the summed cross entropy of a batch's trained tokens, and the most likely token for each.

    Logits are computed for trained positions only, LOGITS_AT_ONCE at a time; with gradient checkpointing
    they are computed again in the backward pass instead of kept. The guesses are in the order of labels[:, 1:][labels[:, 1:] != -100].
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    input_ids, attention_mask, labels = batch
    base = model.get_base_model()
    head = base.get_output_embeddings()
    # The text model alone: the multimodal class around it would ask for the type of every token.
    hidden = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    trained = labels[:, 1:] != -100
    hidden, targets = hidden[:, :-1][trained], labels[:, 1:][trained]

    def chunk(hidden, targets):
        logits = head(hidden).float()
        return cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(-1)

    chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    if base.is_gradient_checkpointing:
        results = [checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks]
    else:
        results = [chunk(*pair) for pair in chunks]
    return sum(loss for loss, _ in results), torch.cat([guesses for _, guesses in results])


# ------------------------------------------------------------------------------------------ training


def trained_tokens(examples):
    return sum(label != -100 for e in examples for label in e["labels"][1:])


def add_gradients(model, examples, pad_id, state):
    """Adds the gradient of a step's mean loss to the LoRA weights, and returns that loss.

    The loss is summed and divided by the trained tokens of the whole step, so micro-batches and processes
    of any size give the same gradient.
    """
    import torch

    total = trained_tokens(examples)
    loss = torch.zeros((), device=state.device)
    for batch in micro_batches(examples, state.num_processes, state.process_index):
        part = losses_and_guesses(model, pad(batch, pad_id, state.device))[0] / total
        part.backward()
        loss += part.detach()
    if state.num_processes > 1:
        torch.distributed.all_reduce(loss)
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # this process had no row in the step
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
    return loss.item()


def evaluate(model, examples, calls, call_token, pad_id, state):
    """Returns the mean loss of the examples' trained tokens, and how many rows are decided right.

    A call row is decided right if every token of its last answer is the most likely one, a general row if
    its last answer's first token is not a call's. Read from the logits of the loss, without generating.
    """
    import torch

    was_training = model.training
    model.eval()
    examples = [{**example, "is_call": call} for example, call in zip(examples, calls, strict=True)]
    sums = torch.zeros(2, dtype=torch.float64, device="cpu" if state.device.type == "cpu" else state.device)
    with torch.no_grad():
        for batch in micro_batches(examples, state.num_processes, state.process_index):
            loss, guesses = losses_and_guesses(model, pad(batch, pad_id, state.device))
            sums[0] += loss
            guesses = iter(guesses.tolist())
            for example in batch:
                guess = [next(guesses) if label != -100 else None for label in example["labels"][1:]]
                last = answer_span(example["labels"][1:])
                right = guess[last] == example["labels"][1:][last]
                sums[1] += right if example["is_call"] else guess[last.start] != call_token
    if state.num_processes > 1:
        torch.distributed.all_reduce(sums)
    model.train(was_training)
    return sums[0].item() / trained_tokens(examples), int(sums[1])


def answer_span(labels):
    """Returns the slice of the last assistant turn: the last run of labels that are not −100."""
    end = max(i for i, label in enumerate(labels) if label != -100) + 1
    start = end - 1
    while start and labels[start - 1] != -100:
        start -= 1
    return slice(start, end)


def train(model, examples, training, validation, calls, tokenizer, args, state):
    """Trains the LoRA weights and leaves those in the model that decided most validation rows right.

    Returns what happened: steps, losses by step, evaluations by epoch, the kept step.
    """
    import torch
    from tqdm import tqdm
    from transformers import get_cosine_schedule_with_warmup

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    call_token = tokenizer(CALL_START, add_special_tokens=False)["input_ids"][0]
    weights = [p for p in model.parameters() if p.requires_grad]
    if state.device.type == "cuda":
        import bitsandbytes

        optimizer = bitsandbytes.optim.PagedAdamW8bit(weights, lr=args.learning_rate, weight_decay=0.0)
    else:
        optimizer = getattr(torch.optim, REHEARSAL_OPTIMIZER)(weights, lr=args.learning_rate, weight_decay=0.0)
    steps = math.ceil(len(training) / ROWS_PER_STEP) * args.epochs
    warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * steps))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    history = {"steps": steps, "warmup_steps": warmup, "losses": [], "evaluations": [], "kept_step": steps}
    best = None
    bar = tqdm(total=steps, desc="training", unit="step", disable=not state.is_main_process, dynamic_ncols=True)
    model.train()
    for epoch in range(1, args.epochs + 1):
        order = list(training)
        random.Random(f"{SEED} epoch {epoch}").shuffle(order)
        for start in range(0, len(order), ROWS_PER_STEP):
            step = len(history["losses"]) + 1
            # A step's dropout depends on nothing that came before it, an evaluation least of all.
            torch.manual_seed(SEED + step * state.num_processes + state.process_index)
            loss = add_gradients(
                model, [examples[i] for i in order[start : start + ROWS_PER_STEP]], pad_id, state
            )
            norm = torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            if not math.isfinite(loss) or not torch.isfinite(norm):
                bar.close()
                raise RunError(
                    f"step {step}: the loss ({loss}) or its gradient ({norm:.3g}) is not finite, no adapter was "
                    f"written; most likely the learning rate {args.learning_rate:g} is too high: try "
                    f"--learning-rate {args.learning_rate / 10:g}"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history["losses"].append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
        line = f"epoch {epoch:>2}/{args.epochs}  step {step:>3}  training loss {loss:.3f}"
        if validation:
            held_out = [examples[i] for i in validation]
            loss, right = evaluate(model, held_out, [calls[i] for i in validation], call_token, pad_id, state)
            history["evaluations"].append({"epoch": epoch, "step": step, "loss": loss, "right": right})
            line += f"  validation loss {loss:.3f}  decided right {right}/{len(validation)}"
            if best is None or (-right, loss) < best[0]:
                best = (-right, loss), [w.detach().to("cpu", copy=True) for w in weights]
                history["kept_step"] = step
        if state.is_main_process:
            bar.write(line, file=sys.stdout)
    bar.close()
    if best:
        with torch.no_grad():
            for weight, kept in zip(weights, best[1], strict=True):
                weight.copy_(kept)
    return history


# -------------------------------------------------------------------------------------------- result


def plot(history, validation_rows, path):
    """Draws training and validation loss and the rows decided right over steps; the kept step is marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(1, len(history["losses"]) + 1), history["losses"], color="tab:blue", label="training loss")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    if history["evaluations"]:
        steps = [e["step"] for e in history["evaluations"]]
        axes.plot(steps, [e["loss"] for e in history["evaluations"]], "o-", color="tab:orange", label="validation loss")
        right = axes.twinx()
        right.plot(steps, [e["right"] for e in history["evaluations"]], "s--", color="tab:green", label="decided right")
        right.set(ylabel=f"validation rows decided right, of {validation_rows}", ylim=(0, validation_rows * 1.05))
        right.yaxis.get_major_locator().set_params(integer=True)
        axes.plot([], [], "s--", color="tab:green", label="validation rows decided right")
    axes.axvline(history["kept_step"], color="gray", linestyle=":", label=f"kept: step {history['kept_step']}")
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_output(output):
    """Raises RunError if the output folder cannot be written, or holds something that is not an adapter's."""
    output = Path(output)
    if output.exists() and not (output / "adapter_config.json").is_file() and not is_empty_folder(output):
        raise RunError(f"{output} is there and holds no adapter; name another folder with --output")
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"{parent} cannot be written to; name another folder with --output")


def is_empty_folder(path):
    return path.is_dir() and not any(path.iterdir())


def save(model, tokenizer, run, history, validation_rows, output):
    """Writes adapter, tokenizer, plot and run.json aside, reads the adapter back, and moves all into place.

    An earlier adapter of the same name is kept as output.1, output.2, …; returns its new path, or None.
    Raises RunError if a LoRA weight read back differs from the trained one, or an expected lora_B is zero.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    output = Path(output)
    aside = output.with_name(output.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, safe_serialization=True, save_embedding_layers=False)
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form that nobody filled in
    tokenizer.save_pretrained(aside)
    (aside / "run.json").write_text(json.dumps(run, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    plot(history, validation_rows, aside / "loss.png")

    read_back = load_file(aside / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model)
    targets = [name for name, module in model.named_modules() if hasattr(module, "lora_B")]
    if set(read_back) != set(trained) or sum("lora_B" in name for name in read_back) != len(targets):
        raise RunError(f"{aside}: the adapter read back lacks weights; free the disk and run again")
    for name, tensor in read_back.items():
        if not torch.equal(tensor, trained[name].cpu()):
            raise RunError(f"{aside}: {name} read back differs from what was trained; check the disk")
        if "lora_B" in name and not tensor.any():
            raise RunError(f"{aside}: {name} is all zeros, nothing was learned there; train for more steps")

    earlier = None
    if output.exists() and not is_empty_folder(output):
        number = next(n for n in range(1, 10**6) if not output.with_name(f"{output.name}.{n}").exists())
        earlier = output.rename(output.with_name(f"{output.name}.{number}"))
    aside.replace(output)
    return earlier


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

    local = not download_model.missing_files(download_model.BASE_FOLDER)
    base = f"./{download_model.BASE_FOLDER}" if local else download_model.BASE_MODEL
    parser = argparse.ArgumentParser(description="Tune Gemma 3 with QLoRA on chat rows.")
    parser.add_argument("--model", help=f"folder or hub name of the base model (default: {base})")
    parser.add_argument("--data", default=DATA_PATH, help="chat rows (default: %(default)s)")
    parser.add_argument("--output", default=OUTPUT_DIR, help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=BITS, help="of the base (default: %(default)s)")
    parser.add_argument("--epochs", type=positive(int), default=EPOCHS, help="(default: %(default)s)")
    parser.add_argument(
        "--learning-rate",
        type=positive(float),
        help=f"(default: {LEARNING_RATE:g}, with --rehearse {REHEARSAL_LEARNING_RATE:g})",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help=f"train on the CPU, by default the small Gemma 3 in ./{download_model.SMALL_FOLDER}",
    )
    args = parser.parse_args()
    args.model = args.model or (f"./{download_model.SMALL_FOLDER}" if args.rehearse else base)
    args.learning_rate = args.learning_rate or (REHEARSAL_LEARNING_RATE if args.rehearse else LEARNING_RATE)
    return args


def find_model(model, rehearse):
    """Returns (folder, revision) of a base model: as it lies there, made on the spot, or fetched."""
    small = rehearse and Path(model) == Path(download_model.SMALL_FOLDER)
    if small and not Path(model).exists():
        download_model.build_small(model)
    if not Path(model).exists() and not model.startswith((".", "/", "~")):
        return download_model.fetch(model)
    missing = download_model.missing_files(model)
    if missing:
        raise RunError(f"{model} is no complete model ({missing[0]} is missing); python download_model.py brings one")
    return model, local_revision(model)


def local_revision(folder):
    """Returns the commit that download_model.py brought into a folder, or None where nothing tells."""
    note = Path(folder, ".cache", "huggingface", "download", "config.json.metadata")
    return note.read_text().split("\n")[0] if note.is_file() else None


def main():
    args = parse_arguments()
    try:
        run(args)
    except (RunError, chat_rows.DataError, download_model.ModelError) as error:
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; no adapter was written", file=sys.stderr)
        sys.exit(130)


def run(args):
    rows = load_data(args.data)
    calls = [is_call(row["messages"]) for row in rows]
    training, validation = split_rows(rows)
    check_output(args.output)

    import torch
    from accelerate import PartialState

    quiet_libraries()
    dtype = torch.bfloat16 if args.rehearse else find_gpu()
    state = PartialState(cpu=args.rehearse)
    say = print if state.is_main_process else lambda *_: None
    say(f"rows       {len(rows)} of {args.data}: {sum(calls)} with a call, {len(rows) - sum(calls)} without")
    if not validation:
        say("           too few to hold 10 % out: all are trained on, and the last step's adapter is kept")

    with state.main_process_first():
        folder, revision = find_model(args.model, args.rehearse)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, args.model)
    examples = list(tokenise_rows(args.data, rows, tokenizer))
    lengths = [len(e["input_ids"]) for e in examples]
    say(
        f"tokens     {sum(lengths)}, {trained_tokens(examples)} of them trained; "
        f"rows of {min(lengths)} to {max(lengths)}"
    )

    say(f"model      {args.model} in {args.bits} bits on {device_name(state.device)}")
    started = time.perf_counter()
    torch.manual_seed(SEED)  # LoRA's first weights
    model = add_lora(load_model(folder, args.bits, state.device, dtype))
    model.peft_config["default"].base_model_name_or_path = args.model
    model.peft_config["default"].revision = revision
    if not (args.rehearse and not REHEARSAL_CHECKPOINTING):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seconds_loading = time.perf_counter() - started
    trainable, all_parameters = model.get_nb_trainable_parameters()
    if state.is_main_process:
        model.print_trainable_parameters()
    say(f"training   {len(training)} rows, {len(validation)} for validation, {ROWS_PER_STEP} a step")

    started = time.perf_counter()
    # Masters of the LoRA weights are fp32; autocast makes their products in the type of the rest.
    with torch.autocast(state.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        history = train(model, examples, training, validation, calls, tokenizer, args, state)
    seconds_training = time.perf_counter() - started
    if not state.is_main_process:
        return
    memory = peak_memory(state.device)
    record = {
        "model": args.model,
        "revision": revision,
        "bits": args.bits,
        "data": {
            "path": str(args.data),
            "sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(),
            "rows": len(rows),
            "training_rows": len(training),
            "validation_rows": len(validation),
            "tokens": sum(lengths),
            "trained_tokens": trained_tokens(examples),
        },
        "settings": {
            "rehearse": args.rehearse,
            "epochs": args.epochs,
            "learning_rate": args.learning_rate,
            "rows_per_step": ROWS_PER_STEP,
            "max_grad_norm": MAX_GRAD_NORM,
            "lora": {"r": LORA_R, "alpha": LORA_ALPHA, "dropout": LORA_DROPOUT, "targets": TARGET_MODULES},
            "validation_share": VALIDATION_SHARE,
            "seed": SEED,
            "max_tokens": MAX_TOKENS,
            "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "gradient_checkpointing": model.is_gradient_checkpointing,
            "processes": state.num_processes,
        },
        "versions": versions(),
        "device": device_name(state.device),
        "trainable_parameters": trainable,
        "all_parameters": all_parameters,
        **history,
        "seconds": {"loading": round(seconds_loading, 1), "training": round(seconds_training, 1)},
        "peak_memory_gib": memory,
    }
    earlier = save(model, tokenizer, record, history, len(validation), args.output)
    say("memory     " + ", ".join(f"{kind} {gib:.2f} GiB at most" for kind, gib in memory.items()))
    say(f"time       loading {seconds_loading:.1f} s, training {seconds_training:.1f} s")
    if earlier:
        say(f"earlier    the adapter that was in {args.output} is now in {earlier}")
    say(f"adapter    {args.output}, of step {history['kept_step']}; its curves are in {args.output}/loss.png")
    say(f"next       python compare.py{'' if args.output == OUTPUT_DIR else ' --adapter ' + args.output}")


def quiet_libraries():
    """Silences by name what the libraries say that no user of this script can act on."""
    import logging
    import warnings

    import transformers

    # "inputs will be cast from bfloat16 to float16", at every call: 8-bit kernels are made so.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # The progress bar of loading stays; its reports on keys are checked in load_model.
    transformers.logging.set_verbosity_error()
    del warnings


def check_tokenizer(tokenizer, model):
    """Raises RunError unless the tokenizer is Gemma 3's, with a chat template."""
    if tokenizer.chat_template is None:
        raise RunError(f"{model} has no chat template; take an instruction-tuned model such as {download_model.BASE_MODEL}")
    if END_OF_TURN not in tokenizer.get_vocab():
        raise RunError(f"{model} is no Gemma 3: its tokenizer has no {END_OF_TURN}; name one with --model")


def device_name(device):
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def peak_memory(device):
    """Returns peak memory in GiB: allocated and reserved on a GPU, resident on a CPU."""
    import resource

    import torch

    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"allocated": allocated / 2**30, "reserved": reserved / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def versions():
    from importlib.metadata import version

    names = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface-hub"]
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()

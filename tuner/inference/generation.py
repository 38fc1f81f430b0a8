"""Load base and adapter, and answer conversations greedily."""

import torch
from tqdm import tqdm
from transformers import StoppingCriteriaList

from tuner.inference import cuda_decoding
from tuner.inference.judging import Answer
from tuner.inference.probes import MAX_NEW_TOKENS
from tuner.inference.row_decoding import RowDecoder
from tuner.model import gemma_folder, gemma_tokenizer, loading
from tuner.system import devices
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights

TOKENS_PER_BATCH = 8192  # rows × (longest prompt + longest answer) of a batch: 1.1 GB of cache on 4B
WEIGHTS_ROOM = 1.2  # of the weights' size: activations and cache of a batch beside them, measured on 4B
FAST_DEVICE = "cuda"  # the kind of device that decodes by graphs


def load_tuned(adapter, bits, quantization_config, base=None):
    """Return (model, tokenizer, run): the adapter's base with the adapter on, and its run.json.

    base: the base's folder or hub name, None for the one that the adapter records; the model's peft_config
    names the one that is used. Compute in bf16 on a GPU that has it and in fp32 on a CPU, where bf16 is some
    200 times slower. quantization_config: train_qlora's function of (bits, dtype).
    Raise UserError if adapter or base are missing, damaged or do not match, or the GPU is too small.
    """
    _, run = adapter_folder.read_adapter(adapter)
    folder, _, name = adapter_weights.find_base(adapter, base)
    model, tokenizer = load_model(folder, name, bits, quantization_config)
    tuned = adapter_weights.add_adapter(model, adapter)
    tuned.peft_config["default"].base_model_name_or_path = name
    return tuned, tokenizer, run


def load_model(folder, name, bits, quantization_config):
    """Return (model, tokenizer) of a model folder, called `name` in messages; raise as load_base does."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda:0", devices.gpu_dtype()) if on_gpu else ("cpu", devices.CPU_DTYPE)
    if on_gpu and bits is None:
        needed = WEIGHTS_ROOM * gemma_folder.bf16_bytes(folder) * dtype.itemsize / torch.bfloat16.itemsize
        free, _ = torch.cuda.mem_get_info()
        if needed > free:
            raise UserError(
                f"{name} unquantized needs {needed / 2**30:.1f} GiB of GPU memory, "
                f"{free / 2**30:.1f} GiB are free; add --bits 4"
            )
    model = loading.load_base(folder, quantization_config(bits, dtype), device, dtype, vision=False)
    return model.eval(), gemma_tokenizer.load_tokenizer(folder)


def prompt_ids(tokenizer, messages):
    """Return the tokens of a conversation up to where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model):
    """Return the ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def pad_left(tokenizer, prompts, device):
    """Return the input_ids and attention_mask of tokenized prompts.

    Padded on the left, so that every answer begins where its prompt ends.
    """
    return tokenizer.pad(
        {"input_ids": prompts},
        padding_side="left",
        pad_to_multiple_of=8,  # fp32 on an H100, torch 2.11: padded to 33, all went wrong
        return_tensors="pt",
    ).to(device)


def generate(model, tokenizer, prompts, on_token, **settings):
    """Continue tokenized prompts, greedily unless `settings` differ; return the new tokens of each.

    on_token(the newest token of each) is called at every step, and ends all by returning True, or some by
    returning a list of bools; what is after the end of one means nothing.
    """

    def stop(input_ids, scores, **_):
        stopped = torch.tensor(on_token(input_ids[:, -1].tolist()) or False, device=input_ids.device)
        return stopped.expand(len(input_ids))

    inputs = pad_left(tokenizer, prompts, model.device)
    settings = {
        "do_sample": False,
        "top_k": None,  # what Gemma's own generation config asks for when it samples
        "top_p": None,
        "use_cache": True,
        "eos_token_id": end_tokens(model),
        **settings,
    }
    with torch.inference_mode(), devices.without_cudnn_attention():
        output = model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([stop]))
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def row_decoder(model):
    """Return what answers single prompts faster than `generate` does; None if nothing does on this device."""
    return RowDecoder(model) if model.device.type == FAST_DEVICE else None


def split_batches(prompts, limits):
    """Return the numbers of tokenized prompts in batches of at most TOKENS_PER_BATCH, padding included.

    limits: the most tokens of each answer. Those with long answers are in one batch as far as they fit, for a
    batch takes as many steps as its longest.
    """
    batches = []
    for i in sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i])), reverse=True):
        batch = [*batches[-1], i] if batches else []
        longest = max((len(prompts[j]) for j in batch), default=0)
        if batch and len(batch) * (longest + limits[batch[0]]) <= TOKENS_PER_BATCH:
            batches[-1] = batch
        else:
            batches.append([i])
    return batches


def answer_all(model, tokenizer, conversations, title="answering", limits=None):
    """Answer conversations, each a list of messages that ends with the user's, greedily; return Answers.

    limits: the most tokens of each answer, None for MAX_NEW_TOKENS of all. One that has not ended within its
    own is cut there, however long the others of its batch go on.
    """
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    limits = [MAX_NEW_TOKENS] * len(prompts) if limits is None else limits
    ends = end_tokens(model)
    answers = [None] * len(prompts)
    batches = split_batches(prompts, limits)
    steps = [max(limits[i] for i in batch) for batch in batches]
    bar = tqdm(total=sum(steps), desc=title, unit="token", leave=False, disable=None)
    with bar:
        for number, batch in enumerate(batches, 1):
            pairs = [(prompts[i], limits[i]) for i in batch]
            outputs = continue_batch(model, tokenizer, pairs, bar)
            for i, ids in zip(batch, outputs, strict=True):
                ids = ids[: limits[i]]
                end = next((position for position, token in enumerate(ids) if token in ends), None)
                ids = ids[:end]
                answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=False), end is not None, ids)
            bar.update(sum(steps[:number]) - bar.n)
    return answers


def continue_batch(model, tokenizer, pairs, bar):
    """Return the new tokens of each tokenized prompt, at least up to its end or limit.

    pairs: [(prompt, limit), …]; bar: tqdm's, moved on at each step.
    """
    prompts, limits = zip(*pairs, strict=True)
    if model.device.type == FAST_DEVICE:
        inputs = pad_left(tokenizer, list(prompts), model.device)
        return cuda_decoding.decode(model, inputs, limits, end_tokens(model), on_step=bar.update)
    steps = 0

    def advance(_):
        nonlocal steps
        steps += 1
        bar.update()
        return [steps >= limit for limit in limits]

    return generate(model, tokenizer, list(prompts), advance, max_new_tokens=max(limits))

"""Load base and adapter, and answer conversations greedily."""

import torch
from tqdm import tqdm
from transformers import StoppingCriteriaList

from tuner.data import batching
from tuner.inference import cuda_decoding
from tuner.inference.judging import MAX_NEW_TOKENS, Answer
from tuner.model import gemma_folder, gemma_tokenizer, loading
from tuner.system import devices
from tuner.system.errors import UserError
from tuner.training import adapter_folder, adapter_weights

TOKENS_PER_BATCH = 8192  # rows × (longest prompt + MAX_NEW_TOKENS) of a batch: 1.1 GB of cache on 4B
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

    on_token(the newest token of each) is called at every step, and ends all by returning True.
    """

    def stop(input_ids, scores, **_):
        stopped = bool(on_token(input_ids[:, -1].tolist()))
        return torch.full((len(input_ids),), stopped, device=input_ids.device)

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


def split_batches(prompts):
    """Return the numbers of tokenized prompts in batches of at most TOKENS_PER_BATCH, longest first."""

    def length(i):
        return len(prompts[i]) + MAX_NEW_TOKENS

    ordered = sorted(range(len(prompts)), key=length, reverse=True)
    return batching.group_padded(ordered, length, TOKENS_PER_BATCH)


def answer_all(model, tokenizer, conversations, title="answering"):
    """Answer conversations, each a list of messages that ends with the user's, greedily; return Answers."""
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations]
    ends = end_tokens(model)
    answers = [None] * len(prompts)
    batches = split_batches(prompts)
    bar = tqdm(total=MAX_NEW_TOKENS * len(batches), desc=title, unit="token", leave=False, disable=None)

    def advance(*_):
        bar.update()

    with bar:
        for number, batch in enumerate(batches, 1):
            batch_prompts = [prompts[i] for i in batch]
            if model.device.type == FAST_DEVICE:
                inputs = pad_left(tokenizer, batch_prompts, model.device)
                output = cuda_decoding.decode(model, inputs, MAX_NEW_TOKENS, ends, on_step=advance)
            else:
                output = generate(model, tokenizer, batch_prompts, advance, max_new_tokens=MAX_NEW_TOKENS)
            for i, ids in zip(batch, output, strict=True):
                end = next((position for position, token in enumerate(ids) if token in ends), None)
                ids = ids[:end]
                answers[i] = Answer(tokenizer.decode(ids, skip_special_tokens=False), end is not None, ids)
            bar.update(number * MAX_NEW_TOKENS - bar.n)
    return answers

"""Greedy answers as fast as the GPU is: the next token of all rows as one CUDA graph.

As in training, the GPU waits for kernels that are launched one by one from Python: 160 tokens of 46 rows took
31 s, and as graphs 5 s (Gemma-3-4b in bf16, H100, torch 2.11).
"""

from functools import partial

import bitsandbytes
import torch
from transformers.cache_utils import Cache, StaticLayer

from tuner.model import attention, quantized
from tuner.system import devices
from tuner.training import cuda_graphs


def multiply_without_sync(decoder):
    """Make 8-bit layers multiply as training by graphs does: bitsandbytes itself waits for the GPU."""

    def multiply(product, values):
        return product(values.flatten(0, -2)).unflatten(0, values.shape[:-1])

    for layer in decoder.modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            layer.forward = partial(multiply, quantized.Int8Linear(layer).forward)


def decode(model, inputs, limits, ends, on_step):
    """Continue prompts greedily; return the new tokens of each, in equal numbers.

    inputs: input_ids and attention_mask, each (rows, tokens), padded on the left. Decoding goes on until each
    row has had one of the tokens `ends`, or as many as its own of the `limits`, one for each row; what a row
    has after that means nothing. on_step() is called at every step.
    """
    input_ids, max_new_tokens = inputs["input_ids"], max(limits)
    rows, prompt_length = input_ids.shape
    decoder, head, device = model.get_decoder(), model.get_output_embeddings(), model.device
    cache = Cache(layers=[StaticLayer(prompt_length + max_new_tokens) for _ in decoder.layers])
    cache_positions = torch.arange(prompt_length + max_new_tokens, device=device)
    starts = prompt_length - inputs["attention_mask"].sum(1)  # where a row's padding ends
    ends, limits = torch.tensor(ends, device=device), torch.tensor(limits, device=device)
    # What a step reads and writes, always in the same memory: the last token, its position, whether each row
    # has ended.
    token = torch.zeros_like(input_ids[:, :1])
    position = torch.full((1,), prompt_length - 1, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    new_tokens = torch.zeros((rows, max_new_tokens), dtype=torch.long, device=device)

    def step(ids, query_positions):
        """Write the token that follows ids, (rows, n), which stand at query_positions, (n,)."""
        not_padding = (cache_positions >= starts[:, None])[:, None]
        masks = attention.attention_masks(model, not_padding, query_positions[:, None] - cache_positions)
        position_ids = (query_positions - starts[:, None]).clamp(min=0)
        states = decoder(
            input_ids=ids, position_ids=position_ids, attention_mask=masks, past_key_values=cache
        ).last_hidden_state
        token.copy_(head(states[:, -1]).argmax(-1, keepdim=True))
        position.add_(1)
        new_tokens.index_copy_(1, position - prompt_length, token)
        ended.logical_or_(torch.isin(token[:, 0], ends) | (position - prompt_length + 1 >= limits))

    def next_step():
        step(token, position)

    multiply_without_sync(decoder)
    with torch.inference_mode(), devices.without_cudnn_attention():
        step(input_ids, cache_positions[:prompt_length])
        graph = None
        for number in range(1, max_new_tokens):
            on_step()
            if ended.all():
                break
            if number == 2 and device.type == "cuda":  # the first one loads what a capture must not
                graph, _ = cuda_graphs.capture(next_step)
            (graph.replay if graph else next_step)()
        on_step()
        return new_tokens[:, : position.item() - prompt_length + 1].tolist()

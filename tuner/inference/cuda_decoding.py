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

PREFILL = 1024  # tokens of a prompt that are read at once: masks of all 8192 would take 1 GB


def multiply(product, values):
    return product(values.flatten(0, -2)).unflatten(0, values.shape[:-1])


def multiply_without_sync(decoder):
    """Make 8-bit layers multiply as training by graphs does: bitsandbytes itself waits for the GPU.

    Those that do so already are left alone: graphs hold the addresses of what they multiply by.
    """
    for layer in decoder.modules():
        if not isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            continue
        if getattr(layer.forward, "func", None) is not multiply:
            layer.forward = partial(multiply, quantized.Int8Linear(layer).forward)


class Step:
    """Read tokens and write the one that follows, always from and to the same memory, as a graph must."""

    def __init__(self, model, rows, capacity):
        """capacity: how many tokens of each row are kept, prompt and answer."""
        self.model, self.decoder, self.head = model, model.get_decoder(), model.get_output_embeddings()
        multiply_without_sync(self.decoder)
        self.cache = Cache(layers=[StaticLayer(capacity) for _ in self.decoder.layers])
        self.cache_positions = torch.arange(capacity, device=model.device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=model.device)  # where a row's padding ends
        self.token = torch.zeros((rows, 1), dtype=torch.long, device=model.device)  # the last one
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)  # of token

    def prefill(self, prompts):
        """Forget all tokens and read prompts, (rows, n); return the logits of what follows, (rows, ids)."""
        self.cache.reset()  # all to 0: a mask hides numbers, but no NaN
        positions = self.cache_positions[: prompts.shape[1]]
        for chunk in zip(prompts.split(PREFILL, 1), positions.split(PREFILL), strict=True):
            logits = self.read(*chunk)
        return logits

    def read(self, ids, positions):
        """Read ids, (rows, n), at positions, (n,), write the likeliest next token, and return the logits."""
        not_padding = (self.cache_positions >= self.starts[:, None])[:, None]
        distance = positions[:, None] - self.cache_positions
        states = self.decoder(
            input_ids=ids,
            position_ids=(positions - self.starts[:, None]).clamp(min=0),
            attention_mask=attention.attention_masks(self.model, not_padding, distance),
            past_key_values=self.cache,
        ).last_hidden_state
        logits = self.head(states[:, -1])
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.copy_(positions[-1:] + 1)
        return logits

    def next(self):
        """Read the last token; return the logits of what follows."""
        return self.read(self.token, self.position)


def decode(model, inputs, limits, ends, on_step):
    """Continue prompts greedily; return the new tokens of each, in equal numbers.

    inputs: input_ids and attention_mask, each (rows, tokens), padded on the left. Decoding goes on until each
    row has had one of the tokens `ends`, or as many as its own of the `limits`, one for each row; what a row
    has after that means nothing. on_step() is called at every step.
    """
    input_ids, max_new_tokens = inputs["input_ids"], max(limits)
    rows, prompt_length = input_ids.shape
    step, device = Step(model, rows, prompt_length + max_new_tokens), model.device
    step.starts.copy_(prompt_length - inputs["attention_mask"].sum(1))
    ends, limits = torch.tensor(ends, device=device), torch.tensor(limits, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    new_tokens = torch.zeros((rows, max_new_tokens), dtype=torch.long, device=device)

    def keep_token():
        number = step.position - prompt_length
        new_tokens.index_copy_(1, number, step.token)
        ended.logical_or_(torch.isin(step.token[:, 0], ends) | (number + 1 >= limits))

    def next_step():
        step.next()
        keep_token()

    with torch.inference_mode(), devices.without_cudnn_attention():
        step.prefill(input_ids)
        keep_token()
        graph = None
        for number in range(1, max_new_tokens):
            on_step()
            if ended.all():
                break
            if number == 2 and device.type == "cuda":  # the first one loads what a capture must not
                graph, _ = cuda_graphs.capture(next_step)
            (graph.replay if graph else next_step)()
        on_step()
        return new_tokens[:, : step.position.item() - prompt_length + 1].tolist()

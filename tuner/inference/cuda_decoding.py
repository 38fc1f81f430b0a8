"""Greedy answers as fast as the GPU is: the next token of all rows as one CUDA graph."""

from functools import partial

from tuner.model import attention, quantized
from tuner.system import devices
from tuner.training import cuda_graphs


def multiply_without_sync(decoder):
    """Has layers of 8 bits multiply as training by graphs does: bitsandbytes itself waits for the GPU."""
    import bitsandbytes

    def multiply(product, values):
        return product(values.flatten(0, -2)).unflatten(0, values.shape[:-1])

    for layer in decoder.modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            layer.forward = partial(multiply, quantized.eight_bits(layer).product)


def decode(model, input_ids, attention_mask, new, ends, on_step):
    """Continues prompts greedily; returns the new tokens of each, at most `new`, as lists of equal length.

    input_ids, attention_mask: (rows, tokens), padded on the left; it goes on until every row has had one of
    the tokens `ends`, and what a row has after its own means nothing. on_step() is called at every step.
    """
    import torch
    from transformers.cache_utils import Cache, StaticLayer

    rows, prompt = input_ids.shape
    decoder, head, device = model.get_decoder(), model.get_output_embeddings(), model.device
    cache = Cache(layers=[StaticLayer(prompt + new) for _ in decoder.layers])
    places = torch.arange(prompt + new, device=device)
    starts = prompt - attention_mask.sum(1)  # where a row's padding ends
    ends = torch.tensor(ends, device=device)
    # What a step reads and leaves, always in the same memory: the last token, its place, whether a row ended.
    token, place = torch.zeros_like(input_ids[:, :1]), torch.full((1,), prompt - 1, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    written = torch.zeros((rows, new), dtype=torch.long, device=device)

    def step(ids, asking):
        """Writes the token that follows ids, (rows, n), whose places are `asking`, (n,)."""
        own = (places >= starts[:, None])[:, None]
        masks = attention.attention_masks(model, own, asking[:, None] - places)
        positions = (asking - starts[:, None]).clamp(min=0)
        states = decoder(
            input_ids=ids, position_ids=positions, attention_mask=masks, past_key_values=cache
        ).last_hidden_state
        token.copy_(head(states[:, -1]).argmax(-1, keepdim=True))
        place.add_(1)
        written.index_copy_(1, place - prompt, token)
        ended.logical_or_(torch.isin(token[:, 0], ends))

    def launch():
        step(token, place)

    multiply_without_sync(decoder)
    with torch.inference_mode(), devices.without_cudnn_attention():
        step(input_ids, places[:prompt])
        graph = None
        for number in range(1, new):
            on_step()
            if ended.all():
                break
            if number == 2 and device.type == "cuda":  # the first one loads what a capture must not
                graph, _ = cuda_graphs.capture(launch)
            (graph.replay if graph else launch)()
        on_step()
        return written[:, : place.item() - prompt + 1].tolist()

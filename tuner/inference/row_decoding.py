"""One answer at a time, token by token, as fast as the GPU is: graphs that are captured once and kept.

A batch of compare.py is worth a capture of its own; a request of 20 tokens is not.
"""

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tuner.inference.cuda_decoding import Step
from tuner.system import devices
from tuner.training import cuda_graphs

MIN_CAPACITY = 1024  # tokens, prompt and answer: those of most requests; 143 MB of cache on 4B
CAPTURE_BYTES = 2**28  # of memory that has to be free for a capture, beside the copies of keys and values
WARM_UP_TOKENS = 64  # of a prompt: as many as a short question has


def sampler(temperature, top_p):
    """Return a function that draws a token, (1, 1), from logits, (1, ids), as transformers does."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(logits):
        return torch.multinomial(warpers(None, logits.float()).softmax(-1), 1)

    return sample


class RowDecoder:
    """Continue one prompt at a time; for each power of two of tokens there is a cache, and graphs of a step.

    Which of them a prompt gets depends on nothing but its own length and limit, nor does the answer.
    """

    def __init__(self, model):
        self.model = model
        self.captures = model.device.type == "cuda"
        self.steps = {}  # by capacity, in tokens
        self.graphs = {}  # by capacity and variant: functions that return the next logits, as Step.next does

    def warm_up(self, variant):
        """Capture what most requests of a variant need."""
        self.generate([0] * WARM_UP_TOKENS, 3, lambda _: False, variant)

    def generate(self, prompt, max_new_tokens, on_token, variant, sample=None):
        """Continue a tokenized prompt.

        on_token([the newest token]) is called at every step, and ends the answer by returning True. variant:
        a name for what the model is during the call, as with its adapter off; each has its own graphs.
        sample: a sampler; None for the likeliest tokens.
        """
        capacity = max(MIN_CAPACITY, 1 << (len(prompt) + max_new_tokens - 1).bit_length())
        with torch.inference_mode(), devices.without_cudnn_attention():
            step, logits = self._prefill(prompt, capacity)
            for number in range(1, max_new_tokens + 1):
                if sample:
                    step.token.copy_(sample(logits))
                if on_token(step.token[0].tolist()) or number == max_new_tokens:
                    return
                if number == 2:  # the first one loads what a capture must not
                    self._capture(step, (capacity, variant))
                logits = self.graphs.get((capacity, variant), step.next)()

    def _prefill(self, prompt, capacity):
        """Return (a Step that has read the prompt, the logits of what follows); if need be, free all else."""
        prompts = torch.tensor([prompt], device=self.model.device)

        def prefill():
            step = self.steps.get(capacity) or Step(self.model, 1, capacity)
            logits = step.prefill(prompts)
            self.steps[capacity] = step
            return step, logits

        try:
            return prefill()
        except torch.OutOfMemoryError:
            if not self.steps:
                raise
            self.graphs.clear()
            self.steps.clear()
        return prefill()  # not above: there the error keeps what had no room

    def _capture(self, step, key):
        """Capture the next step; if the GPU has no room for that, kernels are launched one by one."""
        if not self.captures or key in self.graphs:
            return
        config, (capacity, _) = self.model.config.get_text_config(), key
        heads = config.num_attention_heads * config.head_dim * step.cache.layers[0].keys.itemsize
        try:
            cuda_graphs.check_free_memory(CAPTURE_BYTES + 4 * capacity * heads, self.model.device)
            graph, logits = cuda_graphs.capture(step.next)
        except torch.OutOfMemoryError:
            return

        def replay():
            graph.replay()
            return logits

        self.graphs[key] = replay

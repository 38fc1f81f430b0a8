"""A server whose model says what the user said: a tiny one of random weights writes no calls.

At every step the likeliest token is the next one of that; all else (template, generation, streaming) is real.
"""

import contextlib
import threading
import time
from types import SimpleNamespace

import torch

from train_qlora import quantization_config
from tuner.data.tool_call import format_call
from tuner.inference import generation
from tuner.serving import http_server, listening

CALL = format_call("get_sensitive_data", {})
ORDER = format_call("get_order", {"номер": 5, "note": 'a "b" <c>'})
START, END = 105, 106  # of a turn


def echo(folder):
    """Return the (model, tokenizer) of a folder that answer with model.says, or what the user said last.

    model.delay: seconds that a token takes.
    """
    model, tokenizer = generation.load_model(folder, "tiny", None, quantization_config)
    script = []

    def say(module, args, kwargs, output):
        ids = kwargs["input_ids"][0].tolist()
        if len(ids) > 1:  # a prompt: <start_of_turn>user\n … <end_of_turn>\n<start_of_turn>model\n
            newline = tokenizer.convert_tokens_to_ids("\n")
            last = len(ids) - 1 - ids[::-1].index(END)
            turn = last - 1 - ids[:last][::-1].index(START)
            said = ids[ids.index(newline, turn) + 1 : last]
            script[:] = [*(tokenizer.encode(model.says, add_special_tokens=False) or said), END]
        time.sleep(model.delay)
        output.logits = torch.full_like(output.logits, -100.0)
        output.logits[..., script.pop(0)] = 100.0
        return output

    model.register_forward_hook(say, with_kwargs=True)
    model.delay, model.says = 0, ""
    return model, tokenizer


@contextlib.contextmanager
def serving(served, key="", names=("tuned",), probes=None):
    """Give a server's url, and its generations: those that are asked for and not finished."""
    service = http_server.ChatService(*served, list(names), key, probes)
    with listening.listen("127.0.0.1", 0, key) as listener:
        server = http_server.Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield SimpleNamespace(url=url, generations=service.generations)
        finally:
            server.should_exit = True
            thread.join()


def eventually(condition, seconds=20):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")

"""A server whose model says what the user said: a tiny one of random weights writes no calls.

At every step the likeliest token is the next one of that, and all else (template, generation, streaming) is
as ever.
"""

import contextlib
import threading
import time
from types import SimpleNamespace

import torch

from tuner.data.tool_call import format_call
from tuner.inference import generation
from tuner.serving import http_server

CALL = format_call("get_sensitive_data", {})
ORDER = format_call("get_order", {"номер": 5, "note": 'a "b" <c>'})
START, END = 105, 106  # of a turn


def echo(folder):
    """Returns the (model, tokenizer) of a folder that answer with model.says, or what the user said last.

    model.delay: seconds that a token takes.
    """
    model, tokenizer = generation.load_model(folder, "tiny", None)
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
def serving(served, key="", names=("tuned",)):
    """Gives a server's address and the jobs in its hand."""
    jobs = {}
    with http_server.listen("127.0.0.1", 0, key) as listening:
        server = http_server.make_server(http_server.make_app(*served, list(names), key, jobs), jobs)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}", jobs=jobs)
        finally:
            server.should_exit = True
            thread.join()


def eventually(condition, seconds=20):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")

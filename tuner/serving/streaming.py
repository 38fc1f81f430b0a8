"""Generate one answer, and pass its text on while it is written."""

import re

import torch

from tuner.inference import generation as decoding
from tuner.serving.chat_completions import Finish

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character, or of several


class TextStream:
    """Turn tokens into text, and emit each piece of it once nothing that follows can change it."""

    def __init__(self, tokenizer, stops, emit):
        self.tokenizer, self.stops, self.emit = tokenizer, stops, emit
        self.undecoded = []  # tokens
        self.held_back = ""  # text that may begin a stop string
        self.stopped = False  # by a stop string

    def add(self, token):
        self.undecoded.append(token)
        # What bytes stand for is settled by the first token after them that is none.
        if not BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""):
            self.decode()

    def decode(self):
        text = self.held_back + self.tokenizer.decode(self.undecoded, skip_special_tokens=False)
        self.undecoded.clear()
        settled, self.held_back, self.stopped = split_at_stop(text, self.stops)
        if settled:
            self.emit(settled)

    def finish(self):
        if self.undecoded:
            self.decode()
        if self.held_back:
            self.emit(self.held_back)


def split_at_stop(text, stops):
    """Return (text that is settled, text that may begin a stop string, whether it held a whole one)."""
    positions = [text.find(stop) for stop in stops if stop in text]
    if positions:
        return text[: min(positions)], "", True
    beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
    held_back = max((len(b) for b in beginnings if text.endswith(b)), default=0)
    return text[: len(text) - held_back], text[len(text) - held_back :], False


def stream_answer(model, tokenizer, generation, emit):
    """Generate an answer and emit(text) its pieces as they are settled; return the Finish."""
    request, ends = generation.request, decoding.end_tokens(model)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    stream = TextStream(tokenizer, stops, emit)
    count, ended = 0, False

    def on_token(tokens):
        nonlocal count, ended
        count += 1
        ended = tokens[0] in ends
        if not ended:
            stream.add(tokens[0])
        return ended or stream.stopped or generation.disconnected.is_set()

    settings = {"max_new_tokens": generation.max_new_tokens}
    if request.temperature:
        settings |= {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        torch.seed() if request.seed is None else torch.manual_seed(request.seed)
    decoding.generate(model, tokenizer, [generation.prompt_ids], on_token, **settings)
    stream.finish()
    return Finish("stop" if ended or stream.stopped else "length", count)

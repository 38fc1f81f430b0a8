"""Generate one answer, and pass its text on while it is written."""

import re

import torch

from tuner.data.call_stream import CallStream
from tuner.inference import generation as decoding
from tuner.inference.row_decoding import sampler
from tuner.serving.chat_completions import Finish

# Below it an answer is greedy, which sampling comes to: divided by 1e-40, logits are infinite in fp32.
MIN_TEMPERATURE = 1e-5
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
    settled = min((stop_beginning(text, stop) for stop in stops), default=len(text))
    return text[:settled], text[settled:], False


def stop_beginning(text, stop):
    """Return where the longest end of text starts that a stop string begins with, its length if none does."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0 and not stop.startswith(text[start:]):
        start += 1
    return start if start >= 0 else len(text)


def stream_answer(model, tokenizer, generation, emit, decoder=None):
    """Generate an answer, emit(part) its text (str) and calls (Call) as they are settled; return the Finish.

    Calls are looked for if the request has tools that may be called. decoder: the model's row_decoder.
    """
    request, ends = generation.request, decoding.end_tokens(model)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    calls = CallStream()

    def emit_parts(text):
        for part in calls.add(text):
            emit(part)

    parses_calls = request.tools and request.tool_choice != "none"
    stream = TextStream(tokenizer, stops, emit_parts if parses_calls else emit)
    count, ended = 0, False

    def on_token(tokens):
        nonlocal count, ended
        count += 1
        ended = tokens[0] in ends
        if not ended:
            stream.add(tokens[0])
        return ended or stream.stopped or generation.disconnected.is_set()

    samples = bool(request.temperature) and request.temperature >= MIN_TEMPERATURE
    sampling = {"temperature": request.temperature, "top_p": request.top_p}
    if samples:
        torch.seed() if request.seed is None else torch.manual_seed(request.seed)
    prompt, limit = generation.prompt_ids, generation.max_new_tokens
    if decoder:
        sample = sampler(**sampling) if samples else None
        decoder.generate(prompt, limit, on_token, generation.model, sample)
    else:
        settings = {"do_sample": True, **sampling} if samples else {}
        decoding.generate(model, tokenizer, [prompt], on_token, max_new_tokens=limit, **settings)
    stream.finish()
    for part in calls.finish():
        emit(part)
    return Finish("stop" if ended or stream.stopped else "length", count)

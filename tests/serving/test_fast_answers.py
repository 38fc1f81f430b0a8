"""The server as on a GPU, but for its graphs: it answers as on a CPU, whole and streamed, tuned and base."""

import openai
import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.support.chat_client import ask, join_stream
from tests.support.echo_server import eventually, serving
from train_qlora import quantization_config
from tuner.inference import generation

NAMES = ("tuned", "base")
REQUESTS = [
    {"max_tokens": 40},
    {"max_tokens": 12, "temperature": 0.8, "seed": 1},
    {"max_tokens": 12, "temperature": 1.5, "top_p": 0.3, "seed": 2},
    {"max_tokens": 12, "temperature": 1e-40, "seed": 3},
    {"max_tokens": 1},
]


@pytest.fixture(scope="module")
def served(adapter):
    return generation.load_tuned(adapter, None, quantization_config)[:2]


@pytest.fixture
def fast(served, monkeypatch):
    """A server that has nothing but the way of a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(generation, "FAST_DEVICE", "cpu")
        patch.setattr(generation, "generate", None)
        with serving(served, names=NAMES) as server:
            ask(server, "a", max_tokens=1)  # it has started
            yield server


def answers(server, **more):
    pairs = [(name, request) for request in REQUESTS for name in NAMES]
    return [ask(server, "Привет", model=name, **request, **more) for name, request in pairs]


def summary(answer):
    choice = answer.choices[0]
    return choice.message.content, choice.finish_reason, answer.usage.completion_tokens


@pytest.fixture(scope="module")
def wanted(served):
    """What a server on a CPU answers."""
    with serving(served, names=NAMES) as server:
        return [summary(answer) for answer in answers(server)]


def test_answers_are_those_of_the_other_way_whole_and_streamed(fast, wanted):
    assert [summary(answer) for answer in answers(fast)] == wanted
    streams = answers(fast, stream=True, stream_options={"include_usage": True})
    for stream, (content, reason, tokens) in zip(streams, wanted, strict=True):
        text, calls, ended, usage = join_stream(stream)
        assert (text, calls, ended, usage.completion_tokens) == (content, [], reason, tokens)
    assert len({text for text, *_ in wanted}) > len(REQUESTS)


def test_a_stop_string_and_an_end_token_end_an_answer(fast, wanted, served, monkeypatch):
    model, tokenizer = served
    text = wanted[0][0]
    middle = len(text) // 2
    stopped = summary(ask(fast, "Привет", max_tokens=40, stop=text[middle : middle + 4]))
    assert stopped[:2] == (text[: text.index(text[middle : middle + 4])], "stop")
    assert stopped[2] < 40
    ids = generation.answer_all(model, tokenizer, [[{"role": "user", "content": "Привет"}]])[0].ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, ids[5]])
    ended = summary(ask(fast, "Привет", max_tokens=40))
    assert ended == (tokenizer.decode(ids[: ids.index(ids[5])]), "stop", ids.index(ids[5]) + 1)


def test_one_who_hangs_up_is_dropped_and_the_next_is_answered(fast, wanted, capfd):
    stream = ask(fast, "Привет", max_tokens=4000, stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: not fast.generations)
    assert summary(ask(fast, "Привет", max_tokens=40)) == wanted[0]
    assert ", client disconnected\n" in capfd.readouterr().out


def test_full_memory_is_an_error_and_the_next_is_answered(fast, wanted, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory …")

    with monkeypatch.context() as patch:
        patch.setattr("tuner.inference.cuda_decoding.Step.prefill", full)
        with pytest.raises(openai.InternalServerError, match="GPU out of memory"):
            ask(fast, "Привет", max_tokens=40)
    assert summary(ask(fast, "Привет", max_tokens=40)) == wanted[0]


def test_graphs_of_every_model_are_captured_before_the_first_request(served, monkeypatch):
    warmed = []

    def warm_up(decoder, name):
        lora = next(module for module in decoder.model.modules() if isinstance(module, LoraLayer))
        warmed.append((name, lora.disable_adapters))

    monkeypatch.setattr(generation, "FAST_DEVICE", "cpu")
    monkeypatch.setattr(generation.RowDecoder, "warm_up", warm_up)
    with serving(served, names=NAMES) as server:
        ask(server, "Привет", max_tokens=1)
        assert warmed == [("tuned", False), ("base", True)]

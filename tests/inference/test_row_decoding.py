"""One answer at a time, with what is kept between them: as transformers continues, whatever came before."""

from contextlib import nullcontext
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from tests.support.tiny_models import write_tiny_adapter
from train_qlora import quantization_config
from tuner.inference import cuda_decoding, generation, row_decoding
from tuner.training import cuda_graphs

CAPACITY = 64
# Tokens of prompts and limits of answers: 64, 256, 64, 128 and 64 tokens of cache, beyond the window of 16.
SHAPES = [(30, 20), (140, 40), (3, 61), (64, 1), (30, 20)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(row_decoding, "MIN_CAPACITY", CAPACITY)
    monkeypatch.setattr(row_decoding, "WARM_UP_TOKENS", 5)
    monkeypatch.setattr(cuda_decoding, "PREFILL", 50)


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory):
    """(model, tokenizer) with an adapter, in both of Gemma's classes."""
    adapter = write_tiny_adapter(tmp_path_factory.mktemp("tuned") / "adapter", tiny_model)
    return generation.load_tuned(adapter, None, quantization_config)[:2]


@pytest.fixture
def captured(monkeypatch):
    """Make a capture do what CUDA's does, on a CPU: nothing; a replay writes where the capture's result is.

    Gives the capacities that were captured, and a log of what was done.
    """
    capacities, log, real = [], [], cuda_decoding.Step.next

    def capture(work):
        step = work.__self__
        logits = torch.full((1, step.head.out_features), torch.nan)
        capacities.append(len(step.cache_positions))
        log.append("capture")

        def replay():
            logits.copy_(real(step))
            log.append("replay")

        return SimpleNamespace(replay=replay), logits

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "check_free_memory", lambda *_: None)
    monkeypatch.setattr(cuda_decoding.Step, "next", lambda step: log.append("launch") or real(step))
    return SimpleNamespace(capacities=capacities, log=log)


def prompt_of(length):
    return torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def continued(decoder, prompt, limit, variant="tuned", sample=None):
    tokens = []
    decoder.generate(prompt, limit, lambda newest: tokens.extend(newest), variant, sample)
    return tokens


def expected(served, prompt, limit, **settings):
    """What model.generate continues with, an end token no end."""
    tokens = []
    settings = {"max_new_tokens": limit, "eos_token_id": None, **settings}
    generation.generate(*served, [prompt], lambda newest: tokens.extend(newest), **settings)
    return tokens


@pytest.mark.parametrize("graphs", [False, True])
def test_it_continues_as_transformers_does_whatever_was_asked_before(tuned, captured, graphs):
    model, _ = tuned
    decoder = row_decoding.RowDecoder(model)
    decoder.captures = graphs
    answers = []
    for name in ("tuned", "base", "tuned"):
        with nullcontext() if name == "tuned" else model.disable_adapter():
            for length, limit in SHAPES:
                prompt = prompt_of(length)
                answers.append(continued(decoder, prompt, limit, name))
                assert answers[-1] == expected(tuned, prompt, limit)
                assert len(answers[-1]) == limit
    assert answers[0] != answers[len(SHAPES)]
    assert list(decoder.steps) == [64, 256, 128]
    assert captured.capacities == ([64, 256] * 2 if graphs else [])  # once each; 64 + 1 tokens ended before


def test_the_cache_has_room_for_the_longest_that_may_be_asked_and_no_more(tuned):
    decoder = row_decoding.RowDecoder(tuned[0])
    for length, limit in ((60, 4), (1, 63), (61, 4), (127, 1), (100, 29)):
        assert continued(decoder, prompt_of(length), limit) == expected(tuned, prompt_of(length), limit)
        assert list(decoder.steps)[-1] == {64: 64, 65: 128, 128: 128, 129: 256}[length + limit]


def test_an_answer_ends_when_told_and_takes_no_step_after_its_last_token(tuned, monkeypatch):
    decoder, steps = row_decoding.RowDecoder(tuned[0]), []
    real = cuda_decoding.Step.next
    monkeypatch.setattr(cuda_decoding.Step, "next", lambda step: steps.append(1) or real(step))
    tokens = []

    def stop(newest):
        tokens.extend(newest)
        return len(tokens) == 7

    decoder.generate(prompt_of(9), 30, stop, "tuned")
    assert tokens == expected(tuned, prompt_of(9), 7)
    assert len(steps) == 6
    assert len(continued(decoder, prompt_of(9), 3)) == 3
    assert len(steps) == 6 + 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.4, None), (1.5, 0.3), (1.0, 1.0)])
def test_tokens_are_drawn_as_transformers_draws_them(tuned, captured, temperature, top_p):
    decoder = row_decoding.RowDecoder(tuned[0])
    decoder.captures = True
    answers, wanted = [], []
    sampling = {"temperature": temperature, "top_p": top_p}
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        answers.append(continued(decoder, prompt_of(9), 20, sample=row_decoding.sampler(**sampling)))
        torch.manual_seed(seed)
        wanted.append(expected(tuned, prompt_of(9), 20, do_sample=True, **sampling))
    assert answers == wanted
    assert answers[0] != answers[1]
    assert captured.capacities == [64]


def test_warming_up_captures_what_the_first_request_needs(tuned, captured):
    decoder = row_decoding.RowDecoder(tuned[0])
    decoder.captures = True
    decoder.warm_up("tuned")
    assert captured.log == ["launch", "capture", "replay"]  # launched once: a capture must load nothing
    captured.log.clear()
    assert continued(decoder, prompt_of(30), 20) == expected(tuned, prompt_of(30), 20)
    assert captured.log == ["replay"] * 19
    with tuned[0].disable_adapter():
        decoder.warm_up("base")
    assert captured.log[19:] == ["launch", "capture", "replay"]


def test_a_cache_that_has_no_room_gets_that_of_the_others(tuned, captured, monkeypatch):
    decoder = row_decoding.RowDecoder(tuned[0])
    decoder.captures = True
    assert continued(decoder, prompt_of(30), 20) == expected(tuned, prompt_of(30), 20)
    room, real = [False, True], cuda_decoding.Step.prefill

    def prefill(step, prompts):
        logits = real(step, prompts)
        if room and not room.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory …")
        return logits

    monkeypatch.setattr(cuda_decoding.Step, "prefill", prefill)
    assert continued(decoder, prompt_of(140), 40) == expected(tuned, prompt_of(140), 40)
    assert list(decoder.steps) == [256]
    room[:] = [False, False]
    with pytest.raises(torch.OutOfMemoryError):
        continued(decoder, prompt_of(30), 20)
    assert not decoder.steps
    assert not decoder.graphs
    room[:] = [False]
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing to free
        continued(decoder, prompt_of(30), 20)
    assert not room
    assert continued(decoder, prompt_of(30), 20) == expected(tuned, prompt_of(30), 20)
    assert captured.capacities == [64, 256, 64]


@pytest.mark.parametrize("full", ["check_free_memory", "capture"])
def test_without_room_for_a_graph_kernels_are_launched_one_by_one(tuned, captured, monkeypatch, full):
    decoder = row_decoding.RowDecoder(tuned[0])
    decoder.captures = True

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory …")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, full, fail)
        assert continued(decoder, prompt_of(30), 20) == expected(tuned, prompt_of(30), 20)
    assert not decoder.graphs
    assert continued(decoder, prompt_of(30), 20) == expected(tuned, prompt_of(30), 20)
    assert captured.capacities == [64]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_stay_what_a_graph_has_captured(adapter, bits):
    model, tokenizer, _ = generation.load_tuned(adapter, bits, quantization_config)
    decoder = row_decoding.RowDecoder(model)
    answers = [continued(decoder, prompt_of(length), limit) for length, limit in SHAPES]
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear8bitLt)]
    forwards = [layer.forward for layer in layers]
    assert bool(forwards) == (bits == 8)
    assert all(forward.func is cuda_decoding.multiply for forward in forwards)
    again = row_decoding.RowDecoder(model)
    assert [continued(again, prompt_of(length), limit) for length, limit in SHAPES] == answers
    assert [layer.forward for layer in layers] == forwards
    wanted = [expected((model, tokenizer), prompt_of(length), limit) for length, limit in SHAPES]
    assert answers == wanted


def test_only_a_gpu_has_graphs(tuned, monkeypatch):
    assert generation.row_decoder(tuned[0]) is None
    monkeypatch.setattr(generation, "FAST_DEVICE", "cpu")
    decoder = generation.row_decoder(tuned[0])
    assert not decoder.captures

"""Answers of base and tuned model: batches, end tokens, the adapter off, decoding as on a GPU."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import write_tiny_adapter, write_tiny_model
from train_qlora import quantization_config
from tuner.inference import generation
from tuner.inference.judging import MAX_NEW_TOKENS
from tuner.model import loading
from tuner.system.errors import UserError


def conversations(*prompts):
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def test_a_batch_answers_as_one_at_a_time_and_stops_on_every_end_token(adapter, monkeypatch):
    model, tokenizer, _ = generation.load_tuned(adapter, None, quantization_config)
    questions = conversations("Привет", "Какой у меня остаток на счёте? " * 3, "a", "Сколько будет 2 и 2")
    questions[2] = [
        *questions[2],
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c" * 50},
    ]
    batch = generation.answer_all(model, tokenizer, questions)
    assert batch == [generation.answer_all(model, tokenizer, [one])[0] for one in questions]
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 200)
    assert batch == generation.answer_all(model, tokenizer, questions)
    assert not any(a.ended for a in batch)
    assert {len(a.ids) for a in batch} == {MAX_NEW_TOKENS}
    # Any token that it does write can be made an end token, and then the answer stops there.
    end = batch[0].ids[5]
    model.generation_config.eos_token_id = [1, end]
    stopped = generation.answer_all(model, tokenizer, questions[:1])[0]
    assert stopped.ended
    assert stopped.ids == batch[0].ids[: batch[0].ids.index(end)]
    assert stopped.text == tokenizer.decode(stopped.ids)


@pytest.mark.parametrize("fast_device", ["cuda", "cpu"])
def test_each_answer_is_cut_at_its_own_limit_and_nobody_waits_for_more(adapter, monkeypatch, fast_device):
    monkeypatch.setattr(generation, "FAST_DEVICE", fast_device)
    model, tokenizer, _ = generation.load_tuned(adapter, None, quantization_config)
    questions = conversations("Привет", "Какой у меня остаток на счёте?", "a", "c" * 50)
    whole = generation.answer_all(model, tokenizer, questions)
    assert len({tuple(answer.ids) for answer in whole}) == 4
    steps, limits = [], [5, 30, 1, 11]
    monkeypatch.setattr(generation.tqdm, "update", lambda _, number=1: steps.append(number))
    cut = generation.answer_all(model, tokenizer, questions, limits=limits)
    assert [answer.ids for answer in cut] == [
        answer.ids[:limit] for answer, limit in zip(whole, limits, strict=True)
    ]
    assert [answer.text for answer in cut] == [tokenizer.decode(answer.ids) for answer in cut]
    assert not any(answer.ended for answer in cut)
    # An end that comes only with the batch is no end within an answer's own limit.
    model.generation_config.eos_token_id = [1, whole[0].ids[5]]
    position = whole[0].ids.index(whole[0].ids[5])
    for limit, ended in ((position, False), (position + 1, True)):
        first, _ = generation.answer_all(model, tokenizer, questions[:2], limits=[limit, 30])
        assert (first.ids, first.ended) == (whole[0].ids[:position], ended)
    # The first has ended and the second is at its limit: nobody waits for the first one's.
    steps.clear()
    generation.answer_all(model, tokenizer, questions[:2], limits=[60, 20])
    assert len(steps[:-1]) in (20, 21)


def test_the_base_is_the_model_with_the_adapter_off(adapter, tiny_text_model):
    model, tokenizer, _ = generation.load_tuned(adapter, None, quantization_config)
    questions = conversations("Привет")
    tuned = generation.answer_all(model, tokenizer, questions)
    with model.disable_adapter():
        base = generation.answer_all(model, tokenizer, questions)
    plain = AutoModelForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32)
    assert base == generation.answer_all(plain, tokenizer, questions) != tuned


def test_the_vision_tower_is_not_loaded_and_nothing_warns_of_that(tmp_path, recwarn):
    base = write_tiny_model(tmp_path / "base", multimodal=True)
    folder = write_tiny_adapter(tmp_path / "qlora_output", base)
    model, tokenizer, _ = generation.load_tuned(folder, None, quantization_config)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    assert not any("vision_tower" in name and ".layers." in name for name, _ in model.named_parameters())
    whole = loading.load_base(base, None, "cpu", torch.float32)
    whole = PeftModel.from_pretrained(whole, folder).eval()
    assert any("vision_tower" in name and ".layers." in name for name, _ in whole.named_parameters())
    questions = conversations("Привет", "Какой у меня остаток на счёте?")
    tuned = generation.answer_all(model, tokenizer, questions)
    assert tuned == generation.answer_all(whole, tokenizer, questions)
    with model.disable_adapter():
        assert tuned != generation.answer_all(model, tokenizer, questions)


@pytest.mark.parametrize("bits", [None, 8])
def test_what_decodes_on_a_gpu_answers_as_transformers_does(adapter, monkeypatch, bits):
    model, tokenizer, _ = generation.load_tuned(adapter, bits, quantization_config)
    questions = conversations("Привет", "Какой у меня остаток на счёте? " * 3, "a", "Сколько будет 2 и 2")
    assert model.config.sliding_window < MAX_NEW_TOKENS
    model.generation_config.eos_token_id = [
        1,
        generation.answer_all(model, tokenizer, questions[:1])[0].ids[5],
    ]

    def answers(prompts):
        tuned = generation.answer_all(model, tokenizer, prompts)
        with model.disable_adapter():
            return tuned, generation.answer_all(model, tokenizer, prompts)

    batch, one = answers(questions), answers(questions[:1])
    monkeypatch.setattr(generation, "FAST_DEVICE", "cpu")
    monkeypatch.setattr(generation, "generate", None)
    assert answers(questions) == batch
    assert answers(questions[:1]) == one
    assert one[0][0].ended
    assert not all(answer.ended for answer in batch[0])
    assert batch[0] != batch[1]


def test_batches_hold_every_prompt_once_within_their_tokens(monkeypatch):
    monkeypatch.setattr(generation, "TOKENS_PER_BATCH", 3 * (20 + MAX_NEW_TOKENS))
    prompts = [[0] * length for length in (5, 20, 7, 19, 3, 500, 20)]
    for limits in ([MAX_NEW_TOKENS] * 7, [MAX_NEW_TOKENS, 9, 40, 500, 41, 3, 5]):
        batches = generation.split_batches(prompts, limits)
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        for batch in batches:
            longest = max(len(prompts[i]) for i in batch) + max(limits[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= generation.TOKENS_PER_BATCH
        assert len(batches) == (3 if limits[0] == limits[1] else 4)


def test_an_unquantized_model_that_does_not_fit_the_gpu_names_the_bits(adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**5, 10**9))
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"unquantized needs .* 0\.0 GiB are free; add --bits 4"):
        generation.load_tuned(adapter, None, quantization_config)

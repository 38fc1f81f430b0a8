"""Labels, split, batches, gradients and what a run leaves behind, on a tiny random Gemma 3."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import train_qlora
from benchmarks import random_gemma_4b
from tuner.data import chat_text
from tuner.model import loading
from tuner.system import devices, hardware
from tuner.system.errors import UserError
from tuner.training import adapter_folder, collate, flat_weights, loss_functions

ROOT = Path(__file__).resolve().parents[2]
CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True)


@pytest.fixture(scope="module")
def rows():
    return train_qlora.load_data(ROOT / "examples.json")


@pytest.fixture(scope="module")
def examples(rows, tokenizer):
    return list(train_qlora.tokenise_rows(ROOT / "examples.json", rows, tokenizer))


def labelled(tokenizer, *messages):
    """The row's text with «» around what is trained, worked out from the labels alone."""
    batch = train_qlora.preprocess_function({"messages": [list(messages)]}, tokenizer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert batch["attention_mask"][0] == [1] * len(ids)
    assert len(labels) == len(ids)
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    text, open_mark = "", False
    for token, label in zip(ids, labels, strict=True):
        if open_mark != (label != -100):
            open_mark = not open_mark
            text += "«" if open_mark else "»"
        text += tokenizer.decode([token])
    return text


def turn(role, content):
    return {"role": role, "content": content}


# -------------------------------------------------------------------------------------------- labels


def test_labels_of_one_turn(tokenizer):
    call = '<tool_call name="get_sensitive_data" arguments="{}"/>'
    assert labelled(tokenizer, turn("user", "Мой баланс?"), turn("assistant", call)) == (
        f"<bos><start_of_turn>user\nМой баланс?<end_of_turn>\n<start_of_turn>model\n«{call}<end_of_turn>»\n"
    )


def test_labels_of_a_conversation_with_a_system_message_and_parts(tokenizer):
    parts = [{"type": "text", "text": " Да"}, {"type": "text", "text": ", могу. "}]
    assert labelled(
        tokenizer,
        turn("system", "Будь краток."),
        turn("user", " Привет\n"),
        turn("assistant", "\nПривет!\n\nЧто нужно? "),
        turn("user", "Помоги"),
        turn("assistant", parts),
    ) == (
        "<bos><start_of_turn>user\nБудь краток.\n\nПривет<end_of_turn>\n"
        "<start_of_turn>model\n«Привет!\n\nЧто нужно?<end_of_turn>»\n"
        "<start_of_turn>user\nПомоги<end_of_turn>\n"
        "<start_of_turn>model\n«Да, могу.<end_of_turn>»\n"
    )


def test_labels_of_calls_and_results(tokenizer, tmp_path):
    """Calls are trained, results never; a row in OpenAI's shape has the ids and labels of the text it is."""
    call = {"id": "a", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
    rate = {"id": "b", "type": "function", "function": {"name": "f", "arguments": {"of": "USD"}}}
    path = tmp_path / "rows.json"
    messages = [
        turn("user", "Мой баланс?"),
        {"role": "assistant", "content": "Секунду.", "tool_calls": [call, rate]},
        {**turn("tool", "<b>"), "tool_call_id": "b"},
        {**turn("tool", "5 & 7"), "tool_call_id": "a"},
        turn("user", "И что?"),
        turn("assistant", "Пять."),
    ]
    path.write_text(json.dumps({"messages": messages}))
    first = '<tool_call name="get_sensitive_data" arguments="{}"/>'
    second = '<tool_call name="f" arguments="{&quot;of&quot;: &quot;USD&quot;}"/>'
    results = '<tool_result name="get_sensitive_data">5 &amp; 7</tool_result>\n'
    results += '<tool_result name="f">&lt;b&gt;</tool_result>\nИ что?'
    assert labelled(tokenizer, *train_qlora.load_data(path)[0]["messages"]) == (
        "<bos><start_of_turn>user\nМой баланс?<end_of_turn>\n"
        f"<start_of_turn>model\n«Секунду.\n{first}\n{second}<end_of_turn>»\n"
        f"<start_of_turn>user\n{results}<end_of_turn>\n"
        "<start_of_turn>model\n«Пять.<end_of_turn>»\n"
    )
    text = [
        turn("user", "Мой баланс?"),
        turn("assistant", f"Секунду.\n{first}\n{second}"),
        turn("user", results),
        turn("assistant", "Пять."),
    ]
    path.write_text(f"{path.read_text()}\n{json.dumps({'messages': text})}")
    rows = train_qlora.load_data(path)
    shaped, plain = train_qlora.tokenise_rows(path, rows, tokenizer)
    assert shaped == plain
    prompts = [chat_text.answer_fingerprints(row["messages"]) for row in rows]
    assert prompts[0] == prompts[1] == [chat_text.fingerprint(text[:1]), chat_text.fingerprint(text[:3])]


def test_a_template_whose_prompt_is_no_prefix_is_refused(tokenizer):
    from copy import deepcopy

    odd = deepcopy(tokenizer)
    odd.chat_template = odd.chat_template.replace(
        '"<start_of_turn>model\\n" if', '"<start_of_turn>model:\\n" if'
    )
    assert odd.chat_template != tokenizer.chat_template
    with pytest.raises(AssertionError, match="no prefix"):
        labelled(odd, turn("user", "a"), turn("assistant", "b"))


def test_every_shipped_row_trains_its_answer_and_nothing_else(rows, examples, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for row, example in zip(rows, examples, strict=True):
        trained = [label for label in example["labels"] if label != -100]
        assert trained[-1] == end
        assert trained.count(end) == 1
        assert tokenizer.decode(trained[:-1]) == row["messages"][1]["content"]
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_pads_are_masked_and_never_the_end_token(examples):
    few = sorted(examples, key=lambda e: len(e["input_ids"]))[:3]
    ids, mask, labels = collate.collate_padded(few, 0, "cpu")
    assert ids.shape == mask.shape == labels.shape == (3, len(few[2]["input_ids"]))
    for row, example in enumerate(few):
        length = len(example["input_ids"])
        assert ids[row].tolist() == example["input_ids"] + [0] * (ids.shape[1] - length)
        assert mask[row].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        assert labels[row].tolist() == example["labels"] + [-100] * (ids.shape[1] - length)


def test_where_the_end_token_pads_its_labels_are_kept():
    example = {"input_ids": [2, 7, 1], "attention_mask": [1, 1, 1], "labels": [-100, 7, 1]}
    ids, mask, labels = collate.collate_padded([example, {k: v * 2 for k, v in example.items()}], 1, "cpu")
    assert ids[0].tolist() == [2, 7, 1, 1, 1, 1]
    assert mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert labels[0].tolist() == [-100, 7, 1, -100, -100, -100]


def test_a_row_over_the_limit_is_an_error_with_its_line(tmp_path, tokenizer):
    path = tmp_path / "rows.json"
    long = {"messages": [turn("user", "я" * 2040), turn("assistant", "да")]}
    short = {"messages": [turn("user", "я"), turn("assistant", "да")]}
    path.write_text("\n" + json.dumps(short) + "\n" + json.dumps(long) + "\n")
    with pytest.raises(UserError) as caught:
        train_qlora.tokenise_rows(path, train_qlora.load_data(path), tokenizer)
    assert str(caught.value) == (
        f"{path}:3: the row has 2060 tokens, more than 2048; shorten it or split it in two"
    )


def test_tokens_of_many_rows_are_read_again_and_not_of_others(rows, tokenizer, monkeypatch, tmp_path):
    from copy import deepcopy

    import datasets

    monkeypatch.setattr(train_qlora, "CACHED_ROWS", 70)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"

    def tokens(rows, tokenizer):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(train_qlora.tokenise_rows(path, rows, tokenizer)), len(
            list((tmp_path / "cache").glob("*"))
        )

    plain = list(train_qlora.tokenise_rows(ROOT / "examples.json", rows[:69], tokenizer))
    first, files = tokens(rows, tokenizer)
    assert (first[:69], files) == (plain, 1)
    cached = next((tmp_path / "cache").iterdir())
    written = cached.stat().st_mtime_ns
    assert tokens(rows, tokenizer) == (first, 1)
    assert cached.stat().st_mtime_ns == written
    assert tokens([rows[1], *rows[1:]], tokenizer)[0] == [first[1], *first[1:]]
    other = deepcopy(tokenizer)
    other.chat_template = "{# another #}" + other.chat_template
    tokens(rows, other)
    # What a file's rows are read as may change while the file does not.
    again = train_qlora.tokenise_rows(path, [rows[2], *rows[1:]], other)
    assert next(iter(again)) == first[2]
    assert len(list((tmp_path / "cache").glob("*"))) == 4
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "no folder")
    assert tokens(rows, tokenizer)[0] == first


# --------------------------------------------------------------------------------------------- split


def call_row(i):
    return {"messages": [turn("user", f"мой баланс {i}"), turn("assistant", "<tool_call/>")]}


def general_row(i):
    return {"messages": [turn("user", f"привет {i}"), turn("assistant", "Здравствуйте!")]}


def test_the_split_is_a_seeded_tenth_of_both_kinds(rows):
    training, validation = train_qlora.split_rows(rows)
    assert sorted(training + validation) == list(range(70))
    assert len(validation) == 7
    assert sum(chat_text.is_call(rows[i]["messages"]) for i in validation) in (3, 4)
    assert train_qlora.split_rows(rows) == (training, validation)


@pytest.mark.parametrize(
    ("calls", "general", "held_out"), [(90, 10, (9, 1)), (40, 40, (4, 4)), (30, 0, (3, 0))]
)
def test_the_split_keeps_the_proportion(calls, general, held_out):
    rows = [call_row(i) for i in range(calls)] + [general_row(i) for i in range(general)]
    _, validation = train_qlora.split_rows(rows)
    kinds = [chat_text.is_call(rows[i]["messages"]) for i in validation]
    assert (kinds.count(True), kinds.count(False)) == held_out


def test_equal_rows_stay_on_one_side():
    rows = [call_row(i % 20) for i in range(60)] + [general_row(i % 20) for i in range(60)]
    training, validation = train_qlora.split_rows(rows)
    assert len(validation) == 12
    texts = [{json.dumps(rows[i]) for i in side} for side in (training, validation)]
    assert not texts[0] & texts[1]


def test_equal_rows_in_two_shapes_stay_on_one_side(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    texts = [
        [turn("user", f"{i}"), turn("assistant", '<tool_call name="f" arguments="{}"/>')] for i in range(20)
    ]
    shaped = [[asked, {"role": "assistant", "content": None, "tool_calls": [call]}] for asked, _ in texts]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in texts + shaped))
    rows = train_qlora.load_data(path)
    assert all(chat_text.is_call(row["messages"]) for row in rows)
    training, validation = train_qlora.split_rows(rows)
    assert len(validation) == 4
    assert not {i % 20 for i in training} & {i % 20 for i in validation}


def test_words_before_a_call_leave_it_a_call():
    assert chat_text.is_call([turn("user", "?"), turn("assistant", "Секунду.\n<tool_call/>")])
    assert not chat_text.is_call([turn("user", "<tool_call/>"), turn("assistant", "Да.")])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_set_too_small_to_split_is_all_trained(count):
    rows = [call_row(i) for i in range(count)] + [general_row(i) for i in range(count)]
    assert train_qlora.split_rows(rows) == (list(range(2 * count)), [])


# --------------------------------------------------------------------------------------------- model


def loaded(folder, bits=4, lora=True):
    torch.manual_seed(train_qlora.SEED)
    model = loading.load_base(
        folder, train_qlora.quantization_config(bits, torch.float32), "cpu", torch.float32
    )
    return train_qlora.add_lora(model) if lora else model


def awake(model):
    """Gives every lora_B weights that are not zero, so that all gradients are alive."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def gradient(model):
    parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.grad = None
    return torch.cat(parts)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_frozen_and_lora_on_the_text_model_alone(tiny_model, bits):
    import bitsandbytes

    model = loaded(tiny_model, bits)
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    with_lora = {name for name, module in model.named_modules() if hasattr(module, "lora_B")}
    assert len(with_lora) == 2 * 7
    assert not any("vision" in name for name in with_lora)
    assert all(isinstance(model.get_submodule(name).base_layer, kind) for name in with_lora)
    assert {n.rsplit(".", 1)[1] for n in with_lora} == set(train_qlora.TARGET_MODULES)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if bits == 4:
        state = model.get_submodule(min(with_lora)).base_layer.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
    else:
        assert model.get_submodule(min(with_lora)).base_layer.state.threshold == 6.0
    config = model.get_base_model().config
    assert config.get_text_config().use_cache is False


def test_the_embedding_is_not_cast(tiny_model):
    model = train_qlora.add_lora(
        loading.load_base(
            tiny_model, train_qlora.quantization_config(4, torch.bfloat16), "cpu", torch.bfloat16
        )
    )
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


def test_without_the_vision_towers_layers_the_adapter_is_the_whole_models(tiny_model, tmp_path):
    from peft import PeftModel

    config = train_qlora.quantization_config(4, torch.float32)
    models = [loading.load_base(tiny_model, config, "cpu", torch.float32, vision=v) for v in (True, False)]
    layers = [sum("vision" in name and ".layers." in name for name, _ in m.named_modules()) for m in models]
    if "multimodal" in str(tiny_model):
        assert layers[0] > 0
    assert layers[1] == 0
    adapters = [awake(train_qlora.add_lora(model)) for model in models]
    configs = [adapter.peft_config["default"].to_dict() for adapter in adapters]
    assert configs[0] == configs[1]
    adapters[1].save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(loaded(tiny_model, lora=False), tmp_path)
    found = {name: p for name, p in whole.named_parameters() if "lora_" in name}
    trained = {name: p for name, p in adapters[1].named_parameters() if "lora_" in name}
    assert list(found) == list(trained)
    assert all(torch.equal(found[name], p) for name, p in trained.items())


def test_weights_in_one_are_the_models_own_and_so_are_their_gradients(tiny_text_model, examples):
    apart, together = (awake(loaded(tiny_text_model)).eval() for _ in range(2))
    parameters = [p for p in together.parameters() if p.requires_grad]
    whole = flat_weights.flatten_parameters(parameters)
    assert whole.numel() == sum(p.numel() for p in parameters)
    for model in (apart, together):
        train_qlora.add_gradients(model, examples[:4], 0, CPU)
    assert torch.equal(whole.grad, gradient(apart))
    copies = flat_weights.copy_to_cpu(dict(enumerate(parameters)), whole)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        whole.add_(1)
    assert all(torch.equal(p, b + 1) for p, b in zip(parameters, before, strict=True))
    assert all(torch.equal(copies[i], b) for i, b in enumerate(before))


def test_libraries_are_imported_with_garbage_left_alone_and_looked_for_again_after_it():
    script = (
        "import gc; from tuner.system import libraries; libraries.import_libraries('datasets'); import sys; "
    )
    script += "print('datasets' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 10_000)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True", "True"]


def test_the_trainable_line_is_ours_and_the_articles_is_explained():
    from transformers import Gemma3ForConditionalGeneration

    def count(exclude):
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(random_gemma_4b.config())
        train_qlora.EXCLUDE_MODULES, kept = exclude, train_qlora.EXCLUDE_MODULES
        try:
            return train_qlora.add_lora(model).get_nb_trainable_parameters()
        finally:
            train_qlora.EXCLUDE_MODULES = kept

    assert count(train_qlora.EXCLUDE_MODULES) == (29_802_496, 4_300_079_472 + 29_802_496)
    trainable, everything = count(None)
    assert (trainable, everything) == (32_788_480, 4_332_867_952)
    assert f"{100 * trainable / everything:.4f}" == "0.7567"


def test_the_random_model_of_the_benchmarks_is_whole_and_tied(tiny_text_model, tmp_path):
    from safetensors.torch import load_file

    from tests.conftest import tiny_config

    folder = tmp_path / "random"
    random_gemma_4b.write(folder, tiny_text_model, "cpu", tiny_config(multimodal=True))
    names = load_file(folder / "model.safetensors")
    assert not any("lm_head" in name for name in names)
    assert all(tensor.dtype == torch.bfloat16 for tensor in names.values())
    model = loaded(str(folder), lora=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_text_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_text_model, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights \(model.layers.1.mlp.up_proj.weight"):
        loaded(str(folder))


def test_loss_and_guesses_are_those_of_the_whole_models_logits(tiny_model, examples):
    model = awake(loaded(tiny_model)).eval()
    ids, mask, labels = collate.collate_padded(examples[:5], 0, "cpu")
    with torch.no_grad():
        loss, guesses = loss_functions.loss_and_predictions(model, (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert guesses.tolist() == logits[:, :-1].argmax(-1)[labels[:, 1:] != -100].tolist()


def test_logits_in_chunks_and_checkpointing_give_the_same_gradient(tiny_model, examples, monkeypatch):
    model = awake(loaded(tiny_model)).eval()  # no dropout
    train_qlora.add_gradients(model, examples[:6], 0, CPU)
    want = gradient(model)
    monkeypatch.setattr(loss_functions, "LOGITS_AT_ONCE", 7)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss_functions.checkpoint_layers(model)
    train_qlora.add_gradients(model, examples[:6], 0, CPU)
    assert torch.allclose(gradient(model), want, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------- batches


def test_a_micro_batch_is_as_large_as_its_tokens_allow(examples, monkeypatch):
    sizes = {}
    for tokens in (100, 600, 10**6):
        monkeypatch.setattr(train_qlora, "TOKENS_PER_MICRO_BATCH", tokens)
        batches = train_qlora.micro_batches(examples[:16], CPU)
        for batch in batches:
            longest = max(len(e["input_ids"]) for e in batch)
            assert len(batch) == 1 or len(batch) * longest <= tokens
        assert sum(map(len, batches)) == 16
        sizes[tokens] = len(batches)
    assert sizes[100] == 16 > sizes[600] > sizes[10**6] == 1


def test_processes_share_a_step_out_among_them(examples):
    states = [SimpleNamespace(num_processes=4, process_index=rank) for rank in range(4)]
    parts = [train_qlora.micro_batches(examples[:15], state) for state in states]
    assert [len(part[0]) for part in parts] == [4, 4, 4, 3]
    dealt = [tuple(e["input_ids"]) for part in parts for e in part[0]]
    assert sorted(dealt) == sorted(tuple(e["input_ids"]) for e in examples[:15])
    assert train_qlora.micro_batches(examples[:1], states[1]) == []


def test_the_gradient_does_not_depend_on_the_micro_batch(tiny_model, examples, monkeypatch):
    model = awake(loaded(tiny_model)).eval()  # no dropout
    sixteen = sorted(examples, key=lambda e: len(e["input_ids"]))[-16:]
    # The mean over the step's trained tokens, worked out row by row in float64.
    total = sum(label != -100 for e in sixteen for label in e["labels"])
    want_loss, gradients = 0.0, {}
    for rows in (1, 4, 16):
        monkeypatch.setattr(
            train_qlora, "micro_batches", lambda e, *_, n=rows: [e[i : i + n] for i in range(0, 16, n)]
        )
        loss = train_qlora.add_gradients(model, sixteen, 0, CPU).item()
        gradients[rows] = gradient(model)
        if not want_loss:
            for e in sixteen:
                ids, labels = torch.tensor([e["input_ids"]]), torch.tensor(e["labels"])
                with torch.no_grad():
                    logits = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits[0].double()
                want_loss += cross_entropy(logits[:-1], labels[1:], reduction="sum").item() / total
        assert loss == pytest.approx(want_loss, rel=1e-5)
    for rows in (4, 16):
        difference = (gradients[rows] - gradients[1]).norm() / gradients[1].norm()
        assert difference < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_changes_nothing_about_the_training_after_it(tiny_model, examples, bits):
    model = awake(loaded(tiny_model, bits)).train()

    def step():
        torch.manual_seed(3)
        train_qlora.add_gradients(model, examples[:8], 0, CPU)
        return gradient(model)

    before = step()
    first = train_qlora.evaluate(model, examples[8:16], [True, False] * 4, 5, 0, CPU)
    assert model.training
    assert torch.equal(step(), before)
    assert train_qlora.evaluate(model, examples[8:16], [True, False] * 4, 5, 0, CPU) == first


def test_an_evaluation_does_without_the_attention_that_is_compiled_for_each_shape(
    tiny_text_model, examples, monkeypatch
):
    real, allowed = loss_functions.loss_and_predictions, []

    def losses_and_guesses(*args):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", losses_and_guesses)
    train_qlora.evaluate(loaded(tiny_text_model, 4), examples[:4], [True, False] * 2, 5, 0, CPU)
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_no_linear_layer_repacks_its_weights_on_a_cpu(tiny_text_model, monkeypatch):
    """The trap itself needs AVX512-BF16; here every layer is told that the CPU has it."""
    import bitsandbytes.nn.modules as layers

    monkeypatch.setattr(layers, "has_avx512bf16", lambda: True)
    model = loaded(tiny_text_model)
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, layers.Linear4bit)]
    assert flags == [False] * 14


# ---------------------------------------------------------------------------------------- evaluation


def test_rows_decided_right_are_counted_as_a_reader_would(monkeypatch):
    call, hello = 50, 60
    rows = [  # label, guess for each position after the first
        ([-100, call, 51, 106, -100], [0, call, 51, 106, 0], True, True),
        ([-100, call, 51, 106, -100], [0, call, 51, 107, 0], True, False),  # the call does not end
        ([-100, hello, 61, 106, -100], [0, hello, 9, 9, 0], False, True),
        ([-100, hello, 61, 106, -100], [0, call, 61, 106, 0], False, False),
        ([70, 106, -100, call, 106], [9, 9, 0, call, 106], True, True),  # only the last turn decides
        ([call, 106, -100, hello, 106], [call, 106, 0, 7, 7], False, True),
    ]
    examples = [
        {"input_ids": [1] * 6, "attention_mask": [1] * 6, "labels": [-100, *labels]} for labels, *_ in rows
    ]
    guesses = {id(e): guess for e, (_, guess, *_) in zip(examples, rows, strict=True)}

    def fake(model, batch, at_once):
        labels = batch[2]
        flat = [
            g
            for e in order
            for g, label in zip(guesses[e], by_id[e]["labels"][1:], strict=True)
            if label != -100
        ]
        assert len(flat) == int((labels[:, 1:] != -100).sum())
        return torch.tensor(12.0), torch.tensor(flat)

    order = [id(e) for e in examples]
    by_id = {id(e): e for e in examples}
    monkeypatch.setattr(loss_functions, "loss_and_predictions", fake)
    model = torch.nn.Linear(1, 1)
    loss, right = train_qlora.evaluate(model, examples, [r[2] for r in rows], call, 0, CPU)
    assert right == sum(r[3] for r in rows)
    assert loss == pytest.approx(12.0 / sum(label != -100 for labels, *_ in rows for label in labels))


def test_the_step_that_decides_most_rows_right_is_kept_then_the_lower_loss(
    tiny_text_model, examples, monkeypatch
):
    script = iter([(0.9, 1), (0.5, 3), (0.7, 3), (0.4, 3), (0.1, 2)])
    snapshots = []
    model = loaded(tiny_text_model)

    def fake(model, *_):
        snapshots.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return next(script)

    monkeypatch.setattr(train_qlora, "evaluate", fake)
    args = SimpleNamespace(learning_rate=1e-2, epochs=5)
    history = train_qlora.train(
        model, examples, list(range(20)), [20, 21], [True] * 70, _tokenizer(tiny_text_model), args, CPU
    )
    assert history["kept_step"] == 8
    assert [e["step"] for e in history["evaluations"]] == [2, 4, 6, 8, 10]
    assert all(torch.equal(p, snapshots[3][n]) for n, p in model.named_parameters() if p.requires_grad)


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("count", "epochs", "warmup"), [(63, 10, 10), (63, 2, 2), (16, 3, 0)])
def test_the_warm_up_takes_ten_steps_and_never_more_than_a_quarter(
    tiny_text_model, examples, monkeypatch, count, epochs, warmup
):
    model = loaded(tiny_text_model)
    rates = []

    class Watched(torch.optim.SGD):
        def __init__(self, weights, lr, weight_decay):
            super().__init__(weights, lr=lr)

        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim, "Watched", Watched, raising=False)
    monkeypatch.setattr(train_qlora, "REHEARSAL_OPTIMIZER", "Watched")
    monkeypatch.setattr(
        train_qlora,
        "add_gradients",
        lambda model, *_, **__: (
            [setattr(p, "grad", torch.ones_like(p)) for p in model.parameters() if p.requires_grad]
            and torch.tensor(1.0)
        ),
    )
    args = SimpleNamespace(learning_rate=2.0, epochs=epochs)
    history = train_qlora.train(
        model, examples, list(range(count)), [], [True] * 70, _tokenizer(tiny_text_model), args, CPU
    )
    steps = math.ceil(count / 16) * epochs
    assert history["warmup_steps"] == warmup
    assert history["steps"] == len(rates) == steps
    for step, rate in enumerate(rates):
        if step < warmup:
            want = 2.0 * step / warmup
        else:
            want = 1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup))
        assert rate == pytest.approx(want)


# ------------------------------------------------------------------------------------------- machine


def fake_cuda(monkeypatch, available=True, capability=(8, 9), bf16=True, cuda="13.0"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_bf16_where_the_gpu_has_it_and_fp32_on_a_t4(monkeypatch):
    fake_cuda(monkeypatch)
    assert devices.gpu_dtype() == torch.bfloat16
    fake_cuda(monkeypatch, capability=(7, 5), bf16=False)
    assert devices.gpu_dtype() == torch.float32


@pytest.mark.parametrize(
    ("cuda", "driver", "says"),
    [
        (None, False, "no CUDA GPU on this machine"),
        (None, True, "is built for CPUs only, but this machine has an NVIDIA driver"),
        ("13.0", True, "cannot use this machine's GPU"),
    ],
)
def test_without_a_usable_gpu_one_line_names_the_cures(monkeypatch, cuda, driver, says):
    fake_cuda(monkeypatch, available=False, cuda=cuda)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(hardware.os.path, "exists", lambda path: False)
    with pytest.raises(UserError, match=says) as caught:
        devices.gpu_dtype()
    assert "\n" not in str(caught.value)
    assert "python train_qlora.py --rehearse" in str(caught.value)


def test_a_gpu_too_old_is_refused(monkeypatch):
    fake_cuda(monkeypatch, capability=(6, 1))
    with pytest.raises(UserError, match=r"too old \(compute capability 6.1\)"):
        devices.gpu_dtype()


def test_what_fits_the_memory_is_said_and_what_does_not_is_refused(monkeypatch, tmp_path, capsys):
    fake_cuda(monkeypatch)
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (22 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    random_gemma_4b.config().save_pretrained(tmp_path)

    def plan(memory, longest, bits=4):
        args = SimpleNamespace(memory=memory, bits=bits)
        return train_qlora.plan_memory(args, tmp_path, [[20] * 8, [20] * 7 + [longest]], longest, 128, CPU)

    assert plan(12, 49).tokens > plan(6, 49).tokens > 49
    assert shares == [0.5, 0.25]
    assert plan(None, 49).tokens == plan(0.9 * 22, 49).tokens
    assert plan(6, 49).tokens > plan(6, 2048).tokens > 0 == plan(3.8, 153).tokens
    again = "tokens at once, their layers computed anew for the gradient"
    lines = capsys.readouterr().out.splitlines()
    graphs = "6.0 GiB at most: 256 tokens at once, as CUDA graphs"
    assert lines[-2] == f"memory     {graphs}; longer rows 2048 {again}"
    assert re.fullmatch(rf"memory     3\.8 GiB at most: \d+ {again}", lines[-1])
    for arguments, says in [
        ((23, 49), r"--memory 23: 22.0 GiB are free on this GPU; name less"),
        ((3, 49), r"3.0 GiB of GPU memory are too little: 4 bits and a row of 49 tokens take 3.6; name more"),
        ((5, 49, 8), r"5.0 GiB .* 8 bits and a row of 49 tokens take 5.2; .*, take --bits 4, shorter rows"),
        ((None, 49), r"2.7 GiB .* take 3.6; close what else runs on it \(nvidia-smi\), take shorter rows or"),
    ]:
        if arguments[0] is None:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 24 * 2**30))
        with pytest.raises(UserError, match=says):
            plan(*arguments)
    fake_cuda(monkeypatch, capability=(7, 5), bf16=False)
    assert plan(None, 49) is None
    with pytest.raises(UserError, match="--memory needs a GPU with bf16"):
        plan(12, 49)


# ------------------------------------------------------------------------------------------ commands


def command(*arguments, folder, check=True, **environment):
    """Runs train_qlora.py in a folder of its own; returns what a user sees."""
    result = subprocess.run(
        [sys.executable, ROOT / "train_qlora.py", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert "Traceback" not in result.stderr, result.stderr
    if check:
        assert result.returncode == 0, result.stderr
    return result


def typed(*arguments, folder, script=train_qlora):
    """The same within this process, which spares the imports; returns (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    argv, cwd = sys.argv, os.getcwd()
    sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
    os.chdir(folder)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main()
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv = argv
        os.chdir(cwd)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished_run(tiny_text_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = command(
        *["--rehearse", "--model", tiny_text_model, "--data", ROOT / "examples.json"],
        *["--epochs", 2, "--bits", 8, "--learning-rate", 3e-3, "--output", "out"],
        folder=folder,
    )
    return folder, result


def test_a_run_tells_what_it_does_and_where_the_result_is(finished_run, tiny_text_model):
    _, result = finished_run
    for line in (
        rf"rows       70 of {ROOT}/examples.json: 35 with a call, 35 without",
        r"tokens     \d+ in all, \d+ trained, \d+ in the longest row",
        rf"model      {tiny_text_model} in 8 bits on the CPU",
        r"trainable params: 32,768 \|\| all params: 139,968 \|\| trainable%: 23.4111",
        r"training   63 rows, 16 a step; 7 rows for validation",
        r"epoch  1/2  step   4  training loss \d\.\d+  validation loss \d\.\d+  decided right \d/7",
        r"epoch  2/2  step   8  training loss \d\.\d+  validation loss \d\.\d+  decided right \d/7",
        r"memory     peak RAM \d\.\d\d GiB",
        r"time       [\d.]+ s loading, [\d.]+ s training",
        r"adapter    out, of step [48]; its curves: out/loss.png",
        r"next       python compare.py --bits 8 --adapter out",
    ):
        assert re.search(f"^{line}$", result.stdout, re.M), line
    assert "warn" not in (result.stderr + result.stdout).lower()


def test_a_run_leaves_a_whole_folder(finished_run, tiny_text_model):
    import hashlib

    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, _ = finished_run
    assert {path.name for path in (folder / "out").iterdir()} >= {
        *["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"],
        *["run.json", "loss.png"],
    }
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert (folder / "out/loss.png").read_bytes()[:4] == b"\x89PNG"
    weights = load_file(folder / "out/adapter_model.safetensors")
    assert len(weights) == 2 * 14
    assert all(tensor.any() for tensor in weights.values())
    config = json.loads((folder / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_text_model
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (
        16,
        32,
        0.1,
        "none",
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_text_model)
    ids = torch.tensor([[2, 105, 8, 9]])
    plain = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, folder / "out")(ids).logits, plain)

    run = json.loads((folder / "out/run.json").read_text())
    assert run["model"] == tiny_text_model
    assert run["revision"] is None
    assert run["bits"] == 8
    assert run["data_sha256"] == hashlib.sha256((ROOT / "examples.json").read_bytes()).hexdigest()
    assert run["rows"] == {"all": 70, "training": 63, "validation": 7}
    assert run["tokens"] > run["trained_tokens"] > 0
    assert len(run["losses"]) == run["steps"] == 8
    assert [e["step"] for e in run["evaluations"]] == [4, 8]
    assert run["kept_step"] in (4, 8)
    assert run["trainable_parameters"] == 32_768
    assert run["settings"]["learning_rate"] == 3e-3
    assert run["settings"]["lora_dropout"] == 0.1
    assert run["device"] == "the CPU"
    assert set(run["versions"]) >= {"python", "torch", "transformers", "peft", "bitsandbytes"}
    assert run["seconds"]["training"] > 0
    assert run["peak_memory_gib"]["resident"] > 0


def test_a_second_run_keeps_the_first_ones_adapter_and_repeats_its_losses(finished_run, tiny_text_model):
    folder, _ = finished_run
    first = (folder / "out/adapter_model.safetensors").read_bytes()
    losses = json.loads((folder / "out/run.json").read_text())["losses"]
    output = command(
        *["--rehearse", "--model", tiny_text_model, "--data", ROOT / "examples.json"],
        *["--epochs", 2, "--bits", 8, "--learning-rate", 3e-3, "--output", "out"],
        folder=folder,
    ).stdout
    assert "earlier    the adapter that was in out is now in out.1" in output
    assert (folder / "out.1/adapter_model.safetensors").read_bytes() == first
    assert (folder / "out/adapter_model.safetensors").read_bytes() == first
    assert json.loads((folder / "out/run.json").read_text())["losses"] == losses
    shutil.rmtree(folder / "out.1")


def test_in_bf16_every_step_uses_the_weights_of_the_one_before(finished_run, tiny_text_model, monkeypatch):
    """Autocast around more than a step would go on with the first step's weights, and the loss would stay."""
    folder, _ = finished_run
    monkeypatch.setattr(train_qlora, "REHEARSAL_DTYPE", "bfloat16")
    code, _, _ = typed(
        *["--rehearse", "--model", tiny_text_model, "--data", ROOT / "examples.json"],
        *["--epochs", 2, "--bits", 8, "--learning-rate", 3e-3, "--output", "bf16"],
        folder=folder,
    )
    assert code == 0
    fp32, bf16 = (json.loads((folder / n / "run.json").read_text())["losses"] for n in ("out", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.01)
    assert fp32[-1] < 0.95 * fp32[0]
    shutil.rmtree(folder / "bf16")


def test_two_processes_give_the_losses_of_one(tiny_text_model, tmp_path):
    """Without dropout, whose masks belong to a process, the losses are the same numbers."""
    script = tmp_path / "undropped.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_qlora; train_qlora.LORA_DROPOUT = 0.0; train_qlora.main()\n"
    )
    arguments = ["--rehearse", "--model", tiny_text_model, "--data", str(ROOT / "examples.json")]
    arguments += ["--epochs", "2", "--learning-rate", "3e-3", "--output"]
    # --multi_gpu starts the processes as on GPUs; with --cpu accelerate starts just one, without MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    runs = {}
    for name, start in (("one", [sys.executable]), ("two", launch)):
        result = subprocess.run(
            [*start, str(script), *arguments, name],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("epoch  2/2") == 1
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())
    assert (runs["one"]["processes"], runs["two"]["processes"]) == (1, 2)
    assert runs["two"]["losses"] == pytest.approx(runs["one"]["losses"], rel=1e-4)
    for one, two in zip(runs["one"]["evaluations"], runs["two"]["evaluations"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["right"] == one["right"]


def test_a_learning_rate_that_explodes_stops_with_the_step_and_writes_nothing(tiny_text_model, tmp_path):
    code, _, errors = typed(
        *["--rehearse", "--model", tiny_text_model, "--data", ROOT / "examples.json"],
        *["--epochs", 3, "--learning-rate", 1e30],
        folder=tmp_path,
    )
    assert code == 1
    assert re.search(
        r"^step [2-4]: the (loss|gradient|validation loss) .* (explodes|is not finite); most likely the "
        r"learning rate 1e\+30 is too high: .* --learning-rate 1e\+29; no checkpoint was written yet$",
        errors,
        re.M,
    )
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_told_at_once_and_nothing_is_loaded(tmp_path):
    (tmp_path / "rows.json").write_text('{"messages": []}\n\n{"messages": [}\n')
    result = command("--rehearse", "--data", "rows.json", folder=tmp_path, check=False)
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == ["rows.json:1", "rows.json:3"]
    assert result.stdout == ""


def test_without_a_gpu_one_line_and_exit_1(tmp_path):
    result = command("--data", ROOT / "examples.json", folder=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "--rehearse" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "5"], "--bits: invalid choice: 5"),
        (["--epochs", "0"], "--epochs: invalid positive int value: '0'"),
        (["--learning-rate", "nan"], "--learning-rate: invalid positive float value: 'nan'"),
        (["--memory", "-1"], "--memory: invalid positive float value: '-1'"),
        (["--memory", "8", "--rehearse"], "--memory is a GPU's, and --rehearse uses none"),
        (["--fp16"], "unrecognized arguments: --fp16"),
    ],
)
def test_wrong_arguments_exit_2(tmp_path, arguments, says):
    result = command(*arguments, folder=tmp_path, check=False)
    assert result.returncode == 2
    assert says in result.stderr


def test_an_output_that_is_no_adapters_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letters.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    (tmp_path / "other/letters.txt").write_text("dear")
    (tmp_path / "theirs/checkpoints/epoch-1").mkdir(parents=True)
    for output in ("mine", "file", "other", "theirs"):
        code, _, errors = typed(
            *["--rehearse", "--data", ROOT / "examples.json", "--overwrite", "--output", output],
            folder=tmp_path,
        )
        assert code == 1
        assert errors == f"{output} is there and holds no adapter; name another folder with --output\n"
    result = command(
        *["--rehearse", "--data", ROOT / "examples.json", "--output", "no/such/place"],
        folder=tmp_path,
        check=False,
    )
    assert "no/such cannot be written to" in result.stderr
    assert (tmp_path / "mine/letters.txt").read_text() == "dear"
    assert (tmp_path / "other/letters.txt").read_text() == "dear"


def test_a_model_that_is_not_whole_is_refused(tmp_path):
    (tmp_path / "half").mkdir()
    code, _, errors = typed(
        *["--rehearse", "--model", "./half", "--data", ROOT / "examples.json"], folder=tmp_path
    )
    assert code == 1
    assert "./half is not a complete model folder (config.json missing); check --model" in errors


def test_a_model_whose_weights_are_cut_is_refused(tmp_path, tiny_text_model):
    folder = Path(shutil.copytree(tiny_text_model, tmp_path / "cut"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    code, _, errors = typed(
        *["--rehearse", "--model", "./cut", "--data", ROOT / "examples.json"], folder=tmp_path
    )
    assert code == 1
    assert re.search(r"^\./cut cannot be loaded as a model \(.*\); download it again$", errors, re.M)


def test_a_hub_model_that_cannot_be_fetched_is_one_line(tmp_path):
    result = command(
        *["--rehearse", "--model", "google/gemma-3-4b-it", "--data", ROOT / "examples.json"],
        folder=tmp_path,
        check=False,
        HF_HOME=str(tmp_path / "cache"),
    )
    assert result.returncode == 1
    assert result.stderr.startswith("google/gemma-3-4b-it: HF_HUB_OFFLINE")
    assert result.stderr.count("\n") == 1


def test_too_little_disk_and_a_full_gpu_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"0.10 GB of free disk, the run may need 1.5"):
            adapter_folder.check_output("out", resume=False)
        adapter_folder.check_output("out", resume=True)

    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_qlora, "run", full)
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--bits", "8"])
    with pytest.raises(SystemExit) as caught:
        train_qlora.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("the GPU's memory is full; train with --bits 4, ")


def test_the_default_model_is_the_folder_if_it_is_there_else_the_hubs(tmp_path, tiny_text_model):
    def help_text():
        return " ".join(command("--help", folder=tmp_path).stdout.split())

    assert "(default: google/gemma-3-4b-it)" in help_text()
    (tmp_path / "gemma-3-4b-it").symlink_to(tiny_text_model)
    assert "(default: ./gemma-3-4b-it)" in help_text()

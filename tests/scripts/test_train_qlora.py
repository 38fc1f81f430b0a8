"""The five functions at the top of the script: labels above all, and the settings of a recipe."""

import json
from copy import deepcopy

import pytest
import torch

import train_qlora
from tests.support.training import recipe, shipped_examples, shipped_rows, tokenize, turn
from tuner.data import chat_text
from tuner.system.errors import UserError


def labelled(tokenizer, *messages):
    """The row's text with «» around what is trained, worked out from the labels alone."""
    batch = preprocess(tokenizer, list(messages))
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
    """Calls are trained, results never."""
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
    fingerprints = chat_text.answer_fingerprints(train_qlora.load_data(path)[0]["messages"])
    assert len(set(fingerprints)) == 2


def test_a_turn_of_weight_0_is_read_and_not_trained(tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    wrong, right = (
        {**turn("assistant", "Пароль 0000"), "weight": 0},
        {**turn("assistant", "Сто."), "weight": 1},
    )
    messages = [turn("user", "Баланс?"), wrong, turn("user", "Нет!"), right, turn("user", "Да"), wrong]
    path.write_text(json.dumps({"messages": messages}))
    rows = train_qlora.load_data(path)
    assert labelled(tokenizer, *rows[0]["messages"]) == (
        "<bos><start_of_turn>user\nБаланс?<end_of_turn>\n<start_of_turn>model\nПароль 0000<end_of_turn>\n"
        "<start_of_turn>user\nНет!<end_of_turn>\n<start_of_turn>model\n«Сто.<end_of_turn>»\n"
    )
    unmarked = preprocess(tokenizer, [{k: v for k, v in m.items() if k != "weight"} for m in messages[:4]])
    example = tokenize(path, rows, tokenizer)[0]
    assert example["input_ids"] == unmarked["input_ids"][0]
    assert sum(label != -100 for label in example["labels"]) < sum(x != -100 for x in unmarked["labels"][0])
    prompts = chat_text.answer_fingerprints(rows[0]["messages"])
    assert prompts == [chat_text.fingerprint(rows[0]["messages"][:3])]


def preprocess(tokenizer, messages):
    return train_qlora.preprocess_function({"messages": [messages]}, tokenizer)


def test_a_template_whose_prompt_is_no_prefix_is_refused(tokenizer):
    odd = deepcopy(tokenizer)
    odd.chat_template = odd.chat_template.replace(
        '"<start_of_turn>model\\n" if', '"<start_of_turn>model:\\n" if'
    )
    assert odd.chat_template != tokenizer.chat_template
    with pytest.raises(UserError, match="no prefix"):
        labelled(odd, turn("user", "a"), turn("assistant", "b"))


def test_every_shipped_row_trains_its_answers_and_nothing_else(tokenizer):
    rows, examples = shipped_rows(), shipped_examples(tokenizer)
    for row, example in zip(rows, examples, strict=True):
        trained = [label for label in example["labels"] if label != -100]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{answer}<end_of_turn>" for answer in answers)
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1


# ------------------------------------------------------------------------------------------- the recipe


def test_settings_are_the_names_and_values_that_run_json_and_checkpoints_have():
    settings = train_qlora.RECIPE.settings()
    assert settings == {
        "bits": 4,
        "epochs": 10,
        "learning_rate": 1e-4,
        "rehearse": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "exclude_modules": ".*vision_tower.*",
        "rows_per_step": 16,
        "max_grad_norm": 0.3,
        "warmup_steps": 10,
        "warmup_share": 0.25,
        "validation_share": 0.1,
        "seed": 42,
        "max_tokens": 2048,
    }
    assert json.loads(json.dumps(settings)) == settings  # a resumed run compares them with what was written


def test_a_base_is_quantized_to_nf4_or_int8_or_not_at_all():
    four = train_qlora.quantization_config(4, torch.bfloat16)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (four.load_in_4bit, four.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    eight = train_qlora.quantization_config(8, torch.bfloat16)
    assert (eight.load_in_8bit, eight.llm_int8_threshold) == (True, 6.0)
    assert train_qlora.quantization_config(None, torch.float32) is None


def test_lora_is_as_the_recipe_has_it():
    config = train_qlora.lora_config(recipe(lora_r=8, lora_alpha=4, lora_dropout=0.2))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 4, 0.2, "none")
    assert config.target_modules == set(train_qlora.RECIPE.target_modules)
    assert config.exclude_modules == ".*vision_tower.*"
    assert config.task_type == "CAUSAL_LM"

"""Held-out rows: their loss, what is decided rightly, and that training is as it was after them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.training import CPU, add_gradient, awaken, load_with_lora, memory_for, take_gradient
from tuner.system.errors import UserError
from tuner.training import collate, loss_functions
from tuner.training.evaluation import Evaluation, Evaluator, summary


def evaluator(model, tokenizer, examples, is_call, **options):
    examples = [{**e, "is_call": call} for e, call in zip(examples, is_call, strict=True)]
    return Evaluator(model, examples, tokenizer, CPU, **options)


@pytest.mark.parametrize("checkpointed", [False, True])  # as on a CPU, and as on a GPU
def test_loss_and_predictions_are_those_of_the_whole_models_logits(tiny_model, examples, checkpointed):
    model = awaken(load_with_lora(tiny_model)).eval()
    if checkpointed:
        loss_functions.checkpoint_layers(model)
    ids, mask, labels = collate.collate_padded(examples[:5], 0, "cpu")
    with torch.no_grad():
        loss, predictions = loss_functions.loss_and_predictions(model, (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert predictions.tolist() == logits[:, :-1].argmax(-1)[labels[:, 1:] != -100].tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_changes_nothing_about_the_training_after_it(tiny_model, tokenizer, examples, bits):
    model = awaken(load_with_lora(tiny_model, bits)).train()
    held_out = evaluator(model, tokenizer, examples[8:16], [True, False] * 4)

    def step():
        torch.manual_seed(3)
        add_gradient(model, examples[:8])
        return take_gradient(model)

    before = step()
    first = held_out.evaluate()
    assert model.training
    assert torch.equal(step(), before)
    assert held_out.evaluate() == first


def test_an_evaluation_does_without_the_attention_that_is_compiled_for_each_shape(
    tiny_text_model, tokenizer, examples, monkeypatch
):
    real, allowed = loss_functions.loss_and_predictions, []

    def loss_and_predictions(*args):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", loss_and_predictions)
    evaluator(load_with_lora(tiny_text_model), tokenizer, examples[:4], [True, False] * 2).evaluate()
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_evaluation_that_runs_out_of_memory_is_done_again_and_leaves_dropout_on(
    tiny_text_model, tokenizer, examples, monkeypatch, capsys
):
    model = awaken(load_with_lora(tiny_text_model)).train()
    held_out = evaluator(model, tokenizer, examples[:4], [True, False] * 2)
    want = held_out.evaluate()
    longest = max(len(e["input_ids"]) for e in examples[:4])
    with memory_for(monkeypatch, 2 * longest):
        evaluation = held_out.evaluate()
    assert evaluation.right == want.right
    assert evaluation.loss == pytest.approx(want.loss, rel=1e-5)
    assert held_out.tokens <= 2 * longest
    assert all(module.training for module in model.modules())
    assert "memory     GPU out of memory at" in capsys.readouterr().out
    with memory_for(monkeypatch, 10), pytest.raises(UserError, match="out of memory with one row of"):
        held_out.evaluate()
    assert all(module.training for module in model.modules())


def test_an_evaluation_that_is_to_stop_says_nothing_and_leaves_dropout_on(
    tiny_text_model, tokenizer, examples
):
    model = load_with_lora(tiny_text_model).train()
    assert evaluator(model, tokenizer, examples[:4], [True, False] * 2).evaluate(stop_request=True) is None
    assert all(module.training for module in model.modules())


def test_rows_decided_right_are_counted_as_a_reader_would(tokenizer, monkeypatch):
    call = tokenizer("<tool_call", add_special_tokens=False)["input_ids"][0]
    hello = call + 1
    rows = [  # label, prediction for each position after the first
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

    def fake(model, batch, at_once):
        labels = batch[2]
        flat = [
            prediction
            for row_labels, predictions, *_ in rows
            for prediction, label in zip(predictions, row_labels, strict=True)
            if label != -100
        ]
        assert len(flat) == int((labels[:, 1:] != -100).sum())
        return torch.tensor(12.0), torch.tensor(flat)

    monkeypatch.setattr(loss_functions, "loss_and_predictions", fake)
    model = torch.nn.Linear(1, 1)
    result = evaluator(model, tokenizer, examples, [row[2] for row in rows]).evaluate()
    assert result.right == sum(row[3] for row in rows)
    assert result.general == sum(row[3] for row in rows if not row[2])
    assert result.loss == pytest.approx(12.0 / sum(label != -100 for labels, *_ in rows for label in labels))


F = '<tool_call name="f" arguments="{&quot;x&quot;: 1}"/>'
G = '<tool_call name="g" arguments="{}"/>'
DEVIATING = """<tool_call arguments='{"x": "a name=1"}' name='f'></tool_call>"""
MALFORMED = '<tool_call name="f" arguments="{x: 1}"/>'
OTHER_FORM = 'Да.\n<tool_call>{"name": "f"}</tool_call>'
NONE, DECIDED, NAMED, RIGHT = (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)
JUDGED = [  # a row's answer, what is said instead, token by token, and what of it is right
    (F, F, RIGHT),
    (F, F.replace("1", "2"), NAMED),
    (F, F.replace("x", "y"), NAMED),
    (F, F.replace('"f"', '"g"'), DECIDED),
    (F, F.replace('f" ', "fg ").replace("1", "2"), DECIDED),  # the name does not end
    (F, F.replace("ool", "uol"), DECIDED),
    (F, "O" + F[2:], NONE),
    (F, F.replace("/>", "//"), NAMED),
    (F, F + "<start_of_turn>", NAMED),  # the answer does not end
    (G, G, RIGHT),
    (G, G.replace("g", "f"), DECIDED),
    (G, G.replace("{", "["), NAMED),
    (f"Да, да.\n{F}", f"Нет.... {F}", RIGHT),  # words beside a call are not counted
    (f"Да, да.\n{F}", f"Нет.... {F.replace('1', '2')}", NAMED),
    (f"Да, да.\n{F}", f"Да, да.\nO{F[2:]}", NONE),
    (f"{F} Вот.", f"{F} Ага.", RIGHT),
    (f"{F}\n{G}", f"{F}\n{G}", RIGHT),
    (f"{F}\n{G}", f"{F}\n{G}".replace("g", "f"), DECIDED),
    (f"{F}\n{G}", f"{F}\n{G}".replace("{}", "[}"), NAMED),
    (f"{F}\n{G}", f"{F}<end_of_turn>{G}<end_of_turn>", DECIDED),  # the second call is not made
    (f"{F}\nи\n{G}", f"{F}\nа\n{G}", RIGHT),
    (f"< {G[1:]}\n{G}", f"< {G[1:]}\n{G}", RIGHT),
    (f"< {G[1:]}\n{G}", f"<t {G[1:]}\n{G}", DECIDED),  # begun as calls are, where the row has another token
    (DEVIATING, DEVIATING, RIGHT),
    (DEVIATING, DEVIATING.replace("a name", "b name"), NAMED),
    (DEVIATING, DEVIATING.replace("'f'", "'g'"), DECIDED),
    (MALFORMED, MALFORMED, RIGHT),
    (MALFORMED, MALFORMED.replace("1", "2"), NAMED),
    (MALFORMED, MALFORMED.replace("f", "g"), DECIDED),
    (OTHER_FORM, OTHER_FORM, RIGHT),
    (OTHER_FORM, OTHER_FORM.replace(">{", ">["), DECIDED),
    (OTHER_FORM, OTHER_FORM.replace("Да", "Но"), DECIDED),
    (OTHER_FORM, OTHER_FORM.replace("<tool", "Oool"), NONE),
    ("Привет!", "Пока...", RIGHT),
    ("Привет!", "<tривет!", NONE),
    ("Привет, <т>!", "Привет, <b>!", RIGHT),
    ("<b>да</b>", "<tb>да</b>", NONE),
    ("<tt>да</tt>", "<tt>да</tt>", RIGHT),  # the first token is a call's, the second is not
    ("<tt>да</tt>", "<to>да</tt>", NONE),
    ("<tt>да</tt>", "Ot>да</tt>", RIGHT),
]


def tokens_of(tokenizer, text):
    text += "" if "_of_turn>" in text else "<end_of_turn>"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("answer", "said", "want"), JUDGED)
def test_a_row_is_right_as_far_as_a_reader_would_say(tokenizer, monkeypatch, answer, said, want):
    ids, said = tokens_of(tokenizer, answer), tokens_of(tokenizer, said)
    assert len(ids) == len(said)
    earlier = tokens_of(tokenizer, F)  # an answer that is not the last one
    labels = [-100, -100, *earlier, -100, -100, *ids, -100]
    example = {"input_ids": [1] * len(labels), "attention_mask": [1] * len(labels), "labels": labels}
    predictions = torch.tensor([3] * len(earlier) + said)
    monkeypatch.setattr(loss_functions, "loss_and_predictions", lambda *_: (torch.tensor(1.0), predictions))
    result = evaluator(torch.nn.Linear(1, 1), tokenizer, [example], ["<tool_call" in answer]).evaluate()
    assert (result.decided, result.named, result.right) == want
    assert result.general == (result.right if "<tool_call" not in answer else 0)


def test_what_calls_the_rows_have_decides_what_is_shown(tokenizer):
    def shown(*answers):
        examples = [{"labels": [-100, *tokens_of(tokenizer, answer)]} for answer in answers]
        calls = evaluator(None, tokenizer, examples, ["<tool_call" in answer for answer in answers]).calls
        return calls, summary(Evaluation(1.5, 8, 7, 6, 5)._asdict(), 9, calls)

    whole = [("accuracy (call/text)", 6, 9)]
    assert shown(G, "Да", G) == ({"rows": 2, "tools": 1, "arguments": False}, whole)
    assert shown("Да") == ({"rows": 0, "tools": 0, "arguments": False}, whole)
    assert shown(f"{G}\n{G}", MALFORMED) == ({"rows": 2, "tools": 1, "arguments": False}, whole)

    def apart(calls):
        return [("decision", 8, 9), ("name", 2, calls), ("arguments", 1, calls)]

    assert shown(F, "Да") == ({"rows": 1, "tools": 1, "arguments": True}, apart(1))
    other = G.replace('"g"', '"ж"')
    assert shown(G, other, "Да") == ({"rows": 2, "tools": 2, "arguments": False}, apart(2))
    assert shown(f"Да.\n{G}\n{F}", "Да") == ({"rows": 1, "tools": 2, "arguments": True}, apart(1))

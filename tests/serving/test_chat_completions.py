"""Chat completions: OpenAI's own client against a real server; prompts, sampling, stop strings, limits."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat_client import TOOLS, ask, client_of, join_stream
from tests.support.docs import client_example
from tests.support.echo_server import CALL, END, ORDER, serving
from tuner.data.call_stream import CallStream
from tuner.data.tool_call import Call
from tuner.inference import generation
from tuner.serving import chat_completions, streaming

# -------------------------------------------------------------------------------------------- answers

SENSITIVE = ("get_sensitive_data", {})
ANSWERS = [
    ("Здравствуйте! 5 < 6.", "Здравствуйте! 5 < 6.", []),
    ("два\n\nабзаца 😀 и 日本", "два\n\nабзаца 😀 и 日本", []),  # in bytes, each a token of its own
    (CALL, None, [SENSITIVE]),
    (f"Сейчас. {CALL} Готово", "Сейчас.  Готово", [SENSITIVE]),
    (CALL + ORDER, None, [SENSITIVE, ("get_order", {"номер": 5, "note": 'a "b" <c>'})]),
    (f"{CALL}\n{CALL}", None, [SENSITIVE, SENSITIVE]),
    ('<tool_call nome="x"/>', '<tool_call nome="x"/>', []),
    (CALL[:-2], CALL[:-2], []),
    ("<", "<", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_answers_whole_and_streamed_with_calls_and_without(echoing, text, content, calls):
    answer = ask(echoing, text, tools=TOOLS)
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert message.content == content
    made = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]
    assert made == calls
    assert len({call.id for call in message.tool_calls or []}) == len(calls)
    assert reason == ("tool_calls" if calls else "stop")
    text_streamed, calls_streamed, reason_streamed, usage = join_stream(
        ask(echoing, text, tools=TOOLS, stream=True, stream_options={"include_usage": True})
    )
    assert (text_streamed.strip(), calls_streamed, reason_streamed) == (
        (content or "").strip(),
        calls,
        reason,
    )
    assert usage == answer.usage


@pytest.mark.parametrize("more", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_is_passed_on_as_it_was_written(echoing, more):
    text = f"Сейчас. {CALL}"
    choice = ask(echoing, text, **more).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    stream = list(ask(echoing, text, stream=True, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert len(stream) > len(CALL), "a token is passed on as soon as it is there"
    assert stream[-1].usage is None


def test_the_client_in_the_docs_prints_what_they_say(echo, echoing, monkeypatch, capsys):
    monkeypatch.setattr(echo[0], "says", CALL)
    program, prints = client_example()
    assert "http://127.0.0.1:8000/v1" in program
    exec(program.replace("http://127.0.0.1:8000", echoing.url), {})
    assert capsys.readouterr().out.endswith(f" s, stop\n{prints}")


def test_an_answer_of_nothing(echo, echoing, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *args, **more: args[3]([END]))
    assert ask(echoing, "a").choices[0].message.content == ""
    content, calls, reason, _ = join_stream(ask(echoing, "a", stream=True))
    assert (content, calls, reason) == ("", [], "stop")


def run_parts(pieces):
    """Return (the parts settled by each of these pieces, the parts that the end settles)."""
    stream = CallStream()
    return [stream.add(piece) for piece in pieces], stream.finish()


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_pieces_cut_at_any_place_say_and_call_the_same(text, content, calls):
    for place in range(1, len(text)):
        settled, last = run_parts([text[:place], text[place:]])
        parts = [*itertools.chain(*settled), *last]
        assert "".join(p for p in parts if isinstance(p, str)).strip() == (content or "").strip()
        assert [(p.name, p.arguments) for p in parts if isinstance(p, Call)] == calls
        assert "" not in parts


def test_text_is_held_back_only_where_a_call_may_begin():
    assert run_parts(["5 <", " 6 <tool", "box>"]) == ([["5 "], ["< 6 "], ["<toolbox>"]], [])


# ----------------------------------------------------------------------------- prompts and generation

TALK = [
    {"role": "developer", "content": "Коротко."},
    {"role": "user", "content": [{"type": "text", "text": "Баланс?"}]},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_sensitive_data", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "<100> рублей"},
    {"role": "assistant", "content": "Сто."},
    {"role": "user", "content": "Точно?"},
]
TALK_TEXT = (
    "<bos><start_of_turn>user\nКоротко.\n\nБаланс?<end_of_turn>\n"
    f"<start_of_turn>model\n{CALL}<end_of_turn>\n"
    '<start_of_turn>user\n<tool_result name="get_sensitive_data">&lt;100&gt; рублей</tool_result>'
    "<end_of_turn>\n<start_of_turn>model\nСто.<end_of_turn>\n"
    "<start_of_turn>user\nТочно?<end_of_turn>\n<start_of_turn>model\n"
)


def test_the_prompt_is_what_the_template_gives_of_calls_and_results(plain, monkeypatch):
    _, tokenizer = plain
    prompts, generate = [], generation.generate

    def spy(model, tokenizer, asked, *more, **settings):
        prompts.extend(asked)
        return generate(model, tokenizer, asked, *more, **settings)

    monkeypatch.setattr(generation, "generate", spy)
    with serving(plain) as server:
        answer = client_of(server).chat.completions.create(model="tuned", messages=TALK, max_tokens=3)
        client_of(server).chat.completions.create(model="tuned", messages=TALK[:4], max_tokens=3)
    wanted = tokenizer(TALK_TEXT, add_special_tokens=False)["input_ids"]
    assert prompts[0] == wanted
    assert prompts[0].count(2) == 1, "one <bos>"
    assert tokenizer.decode(prompts[1]).endswith("</tool_result><end_of_turn>\n<start_of_turn>model\n")
    assert answer.usage.prompt_tokens == len(wanted)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == len(wanted) + 3
    assert answer.choices[0].finish_reason == "length"


def test_the_true_generation_is_compares_word_for_word_whole_and_streamed(plain):
    prompts = ["Привет", "Какой у меня остаток на счёте?", "a" * 60]
    wanted = generation.answer_all(*plain, [[{"role": "user", "content": prompt}] for prompt in prompts])
    with serving(plain) as server:
        for prompt, answer in zip(prompts, wanted, strict=True):
            given = ask(server, prompt, max_tokens=generation.MAX_NEW_TOKENS)
            assert given.choices[0].message.content == answer.text
            content, _, reason, _ = join_stream(
                ask(server, prompt, max_completion_tokens=generation.MAX_NEW_TOKENS, stream=True)
            )
            assert (content, reason) == (answer.text, "length")


def test_the_end_token_ends_an_answer_and_is_not_in_it(plain):
    model, tokenizer = plain
    whole = generation.answer_all(model, tokenizer, [[{"role": "user", "content": "Привет"}]])[0]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [1, whole.ids[5]]
    try:
        with serving(plain) as server:
            answer = ask(server, "Привет")
    finally:
        model.generation_config.eos_token_id = before
    place = whole.ids.index(whole.ids[5])
    assert answer.choices[0].message.content == tokenizer.decode(whole.ids[:place])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == place + 1


def sampled(model, ids, count, temperature, top_p, seed):
    """Draw tokens by hand: from the fewest likeliest tokens that have top_p together, renormalized."""
    torch.manual_seed(seed)
    new = []
    with torch.inference_mode():
        while len(new) < count:
            probabilities = (model(torch.tensor([ids + new])).logits[0, -1].float() / temperature).softmax(-1)
            ordered, places = probabilities.sort()
            ordered[ordered.cumsum(-1) <= 1 - top_p] = 0
            kept = torch.zeros_like(probabilities).scatter(-1, places, ordered)
            new.append(torch.multinomial(kept / kept.sum(), 1).item())
    return new


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.4, 1.0), (1.5, 0.3)])
def test_temperature_top_p_and_seed_draw_what_is_drawn_by_hand(plain, temperature, top_p):
    model, tokenizer = plain
    ids = generation.prompt_ids(tokenizer, [{"role": "user", "content": "Привет"}])
    more = {"temperature": temperature, "max_tokens": 12, **({"top_p": top_p} if top_p < 1 else {})}
    with serving(plain) as server:
        one, other = (ask(server, "Привет", seed=seed, **more).choices[0].message.content for seed in (1, 2))
        again = ask(server, "Привет", seed=1, **more).choices[0].message.content
        free = {ask(server, "Привет", **more).choices[0].message.content for _ in range(3)}
        greedy = {ask(server, "Привет", temperature=0, max_tokens=12).choices[0].message.content}
        greedy |= {ask(server, "Привет", seed=s, max_tokens=12).choices[0].message.content for s in (1, 2)}
    assert one == tokenizer.decode(sampled(model, ids, 12, temperature, top_p, 1))
    assert other == tokenizer.decode(sampled(model, ids, 12, temperature, top_p, 2))
    assert one == again != other
    assert len(free) == 3
    assert len(greedy) == 1


@pytest.mark.parametrize(
    ("stop", "content_before"),
    [
        ("мир", "Привет, "),
        (["x", "т, м"], "Приве"),
        (["мири"], "Привет, мир!"),
        ("!", "Привет, мир"),
        ("!!", "Привет, мир!"),
    ],
)
def test_stop_strings_end_an_answer_before_them(echoing, stop, content_before):
    choice = ask(echoing, "Привет, мир!", stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (content_before, "stop")
    streamed, _, reason, usage = join_stream(
        ask(echoing, "Привет, мир!", stop=stop, stream=True, stream_options={"include_usage": True})
    )
    assert (streamed, reason) == (content_before, "stop")
    assert usage.completion_tokens <= len("Привет, мир!") + 1
    if content_before == "Приве":
        assert usage.completion_tokens == len("Привет, м"), "and the model writes no more"


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_stop_string_is_never_emitted_and_nothing_else_is_lost(text, stops):
    emitted = held_back = ""
    for letter in text:
        new, held_back, stopped = streaming.split_at_stop(held_back + letter, stops)
        emitted += new
        if stopped:
            break
    else:
        emitted += held_back
        assert emitted == text
        assert not any(stop in text for stop in stops)
        return
    assert text.startswith(emitted)
    assert not any(stop in emitted for stop in stops)
    assert any(text.startswith(emitted + stop) for stop in stops)


BORDER_NUMBERS = [
    {"temperature": 1e-40},
    {"temperature": 5e-324, "top_p": 5e-324},
    {"temperature": 1e-5, "top_p": 1e-300},
    {"temperature": 1, "top_p": 1, "seed": -(2**63)},
    {"temperature": 2.0, "top_p": 1 - 2**-53, "seed": 2**63 - 1},
    {"temperature": -0.0, "top_p": 1e-40},
    {"temperature": 2, "max_tokens": 3.0, "seed": 1e18, "n": 1.0},
]


@pytest.mark.parametrize("more", BORDER_NUMBERS)
def test_numbers_at_the_border_of_what_may_be_asked_give_an_answer(plain, plain_server, more):
    choice = ask(plain_server, "Привет", **{"max_tokens": 3, **more})
    assert choice.usage.completion_tokens == 3
    if more["temperature"] < 1:  # so small that only the likeliest token is drawn
        greedy = generation.answer_all(*plain, [[{"role": "user", "content": "Привет"}]])[0].ids[:3]
        assert choice.choices[0].message.content == plain[1].decode(greedy)


def test_how_many_tokens_an_answer_may_have(echoing, monkeypatch):
    monkeypatch.setattr(chat_completions, "MAX_COMPLETION_TOKENS", 7)
    text = "0123456789"
    for more, length in [
        ({}, 7),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 50}, 11),
    ]:
        answer = ask(echoing, text, **more)
        assert answer.usage.completion_tokens == length
        assert answer.choices[0].message.content == text[:length]
        assert answer.choices[0].finish_reason == ("length" if length < 11 else "stop")


@pytest.mark.parametrize("more", [{}, {"max_tokens": 5000}, {"max_completion_tokens": 10**400}])
def test_an_answer_may_not_be_longer_than_what_is_left_of_the_context(echoing, more):
    answer = ask(echoing, "ъ" * 4060, **more)
    assert answer.usage.prompt_tokens > 4096 - chat_completions.MAX_COMPLETION_TOKENS
    assert answer.usage.total_tokens == 4096
    assert answer.choices[0].finish_reason == "length"

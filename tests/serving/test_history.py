"""A client's history: what is read of it, what is refused, and that no answer of the server is refused."""

import asyncio
import json
import re
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.chat_client import TOOLS, USER, ask, client_of
from tests.support.echo_server import CALL
from tests.support.tiny_models import SPECIAL
from tuner.data import chat_rows, row_faults
from tuner.data.call_stream import CallStream
from tuner.inference.generation import prompt_ids
from tuner.serving import chat_completions
from tuner.serving.history import render_history

NAME = "get_sensitive_data"
END = {"role": "user", "content": "z"}
SAID = {"role": "assistant", "content": "b"}
EMPTY = {"role": "assistant", "content": ""}


def system(text):
    return {"role": "system", "content": text}


def user(content):
    return {"role": "user", "content": content}


def call(call_id="1", name=NAME, arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content=None, **more):
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(content="100", **more):
    return {"role": "tool", "content": content, **more}


def rendered(content="100", name=NAME):
    return {"role": "tool", "name": name, "content": content}


CALLED = {"role": "assistant", "content": CALL}
NULLS = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "reasoning_content": "so"}


def part(text, **more):
    return {"type": "text", "text": text, **more}


# ----------------------------------------------------------------------------------- what is read of it

READ = {
    "an empty answer": ([USER, EMPTY, END], [USER, EMPTY, END]),
    "a null answer": ([USER, {"role": "assistant", "content": None, **NULLS}, END], [USER, EMPTY, END]),
    "an answer of a line end": ([USER, {"role": "assistant", "content": "\n"}, END], [USER, EMPTY, END]),
    "no content at all": ([USER, {"role": "assistant"}, END], [USER, EMPTY, END]),
    "a refusal": (
        [USER, {"role": "assistant", "content": None, "refusal": "b"}, END],
        [USER, SAID, END],
    ),
    "nulls and unknown keys": ([{**USER, "name": "Anna"}, {**SAID, **NULLS}, END], [USER, SAID, END]),
    "tool_calls of null": ([USER, {**SAID, "tool_calls": None}, END], [USER, SAID, END]),
    "tool_calls of nothing": ([USER, {**SAID, "tool_calls": []}, END], [USER, SAID, END]),
    "keys of parts": ([user([part("a", cache_control={"type": "ephemeral"}), part(" z ")])], [user("az")]),
    "parts of an answer": (
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, part("b")]}, END],
        [USER, SAID, END],
    ),
    "no parts": ([USER, {"role": "assistant", "content": []}, END], [USER, EMPTY, END]),
    "an empty system message": ([system(""), END], [END]),
    "a system message of null": ([system(None), END], [END]),
    "a developer": ([{"role": "developer", "content": "s"}, END], [system("s"), END]),
    "several system messages": ([system("s"), system(" "), system("t"), END], [system("s\n\nt"), END]),
    "a later system message": ([USER, SAID, system("s"), END], [USER, SAID, user("s\nz")]),
    "a system message at the end": ([USER, system("s")], [user("a\ns")]),
    "two user turns": ([USER, END], [user("a\nz")]),
    "an empty user turn": ([user(""), SAID, END], [user(""), SAID, END]),
    "an empty user turn at the end": ([USER, user("")], [USER]),
    "several answers": (
        [USER, SAID, EMPTY, {"role": "assistant", "content": "c"}, END],
        [USER, {"role": "assistant", "content": "b\nc"}, END],
    ),
    "words, then a call": (
        [USER, SAID, calling(call()), result(tool_call_id="1")],
        [USER, {"role": "assistant", "content": f"b\n{CALL}"}, rendered()],
    ),
    "an answer first": ([system("s"), SAID, END], [system("s"), user(""), SAID, END]),
    "arguments of nothing": ([USER, calling(call(arguments="")), END], [USER, CALLED, END]),
    "arguments of null": ([USER, calling(call(arguments=None)), END], [USER, CALLED, END]),
    "arguments of an object": ([USER, calling(call(arguments={})), END], [USER, CALLED, END]),
    "arguments that are no JSON": (
        [USER, calling(call(arguments='{"a": <')), END],
        [
            USER,
            {
                "role": "assistant",
                "content": f'<tool_call name="{NAME}" arguments="{{&quot;a&quot;: &lt;"/>',
            },
            END,
        ],
    ),
    "arguments of half a surrogate pair": (
        [USER, calling(call(arguments='{"a": "\\ud800"}')), END],
        [
            USER,
            {
                "role": "assistant",
                "content": f'<tool_call name="{NAME}" arguments="{{&quot;a&quot;: &quot;\\ud800&quot;}}"/>',
            },
            END,
        ],
    ),
    "a call as a stream gives it": (
        [USER, calling({**call(), "index": 0, "type": ""}), result(tool_call_id="1")],
        [USER, CALLED, rendered()],
    ),
    "a call without a result": ([USER, calling(call()), END], [USER, CALLED, END]),
    "results in another order": (
        [USER, calling(call("1"), call("2")), result("2", tool_call_id="2"), result("1", tool_call_id="1")],
        [USER, {"role": "assistant", "content": f"{CALL}\n{CALL}"}, rendered("1"), rendered("2")],
    ),
    "one result of two": (
        [USER, calling(call("1"), call("2")), result("2", tool_call_id="2"), END],
        [USER, {"role": "assistant", "content": f"{CALL}\n{CALL}"}, rendered("2"), END],
    ),
    "results without ids": (
        [USER, calling(call(None, "f"), call(None, "g")), result("2", name="g"), result("1")],
        [
            USER,
            {
                "role": "assistant",
                "content": '<tool_call name="f" arguments="{}"/>\n<tool_call name="g" arguments="{}"/>',
            },
            rendered("1", "f"),
            rendered("2", "g"),
        ],
    ),
    "an id that every call has": (
        [USER, calling(call("0"), call("0")), result("1", tool_call_id="0"), result("2", tool_call_id="0")],
        [USER, {"role": "assistant", "content": f"{CALL}\n{CALL}"}, rendered("1"), rendered("2")],
    ),
    "a result with an empty id": (
        [USER, calling(call()), result(tool_call_id="")],
        [USER, CALLED, rendered()],
    ),
    "a result in parts, with a name": (
        [USER, calling(call()), result([part("1"), part("2")], tool_call_id="1", name="x"), SAID, END],
        [USER, CALLED, rendered("12"), SAID, END],
    ),
    "a result of null": (
        [USER, calling(call()), result(None, tool_call_id="1")],
        [USER, CALLED, rendered("")],
    ),
    "a result after the user's words": (
        [USER, calling(call()), END, result(tool_call_id="1")],
        [USER, CALLED, rendered(), END],
    ),
    "a result after another answer": (
        [USER, calling(call()), END, SAID, result(tool_call_id="1")],
        [USER, CALLED, END, SAID, rendered()],
    ),
    "a result whose call is not there, with its name": (
        [USER, SAID, result(tool_call_id="7", name=NAME)],
        [USER, SAID, rendered()],
    ),
    "a result whose call was cut off": ([system("s"), result(tool_call_id="1"), END], [system("s"), END]),
    "a function_call": (
        [USER, {"role": "assistant", "content": None, "function_call": {"name": NAME, "arguments": "{}"}},
         {"role": "function", "name": NAME, "content": "100"}],
        [USER, CALLED, rendered()],
    ),
    "a tag as text": ([USER, CALLED, END], [USER, CALLED, END]),
    "a control token": (
        [system("<bos>"), user("<pad> < b"), {"role": "assistant", "content": "<eos>\n<eos>"}, END],
        [system("&lt;bos>"), user("&lt;pad> < b"), {**SAID, "content": "&lt;eos>\n&lt;eos>"}, END],
    ),
    "a control token of two parts": ([user([part("<end_of"), part("_turn>")])], [user("&lt;end_of_turn>")]),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "wanted"), READ.values(), ids=READ)
def test_what_has_one_meaning_is_read_so(messages, wanted, tokenizer):
    assert render_history(messages) == wanted
    assert prompt_ids(tokenizer, wanted)[-3:] == prompt_ids(tokenizer, [USER])[-3:], "the template takes it"


@pytest.mark.parametrize(
    "messages",
    [
        [system("s"), USER, SAID, END],
        [USER, calling(call(), content="Сейчас."), result("<1>", tool_call_id="1"), SAID, END],
        [
            USER,
            calling(
                call("a", "f", '{"b": "«\\u0446» & <c>", "d": [1, 2.5, null]}'), call("b", "g", {"e": {}})
            ),
            result("2", tool_call_id="b"),
            result([part("1")], tool_call_id="a"),
            END,
        ],
    ],
)
def test_what_rows_may_be_is_read_as_rows_are(messages):
    assert render_history(messages) == chat_rows.validate_and_render(messages)


IMAGE = [{"type": "image_url", "image_url": {"url": "a"}}]
REFUSED = [
    ([], '"messages" is an empty list'),
    ([USER, {"role": "robot", "content": "b"}], 'message 2: the role is "robot"; use '),
    ([{"content": "b"}], "message 1: the role is not a string; use "),
    ([{"role": 10**5000, "content": "b"}], "message 1: the role is not a string; use "),
    ([{"role": ["user"], "content": "b"}], "message 1: the role is not a string; use "),
    ([{"role": "user"}], "message 1: the content is neither a string nor"),
    ([user({"a": 1})], "message 1: the content is neither a string nor"),
    ([user(IMAGE)], "message 1: a part of the content is not"),
    ([user([{"type": "thinking", "thinking": "a"}])], "message 1: a part of the content is not"),
    ([user([{"type": {}, "text": "a"}])], "message 1: a part of the content is not"),
    ([user([{"type": "text", "text": 5}])], "message 1: a part of the content is not"),
    ([USER, calling(call()), result(IMAGE, tool_call_id="1")], "message 3: a part of the content is not"),
    ([user(" ")], "message 1: the content is empty"),
    ([USER, SAID, user([])], "message 3: the content is empty"),
    ([system("s")], 'the last message is from "system"; it must be from "user" or "tool"'),
    ([USER, SAID], 'the last message is from "assistant"; it must be from "user" or "tool"'),
    ([result(tool_call_id="1")], "message 1: result of a call that is not among the messages"),
    ([USER, result(tool_call_id="1")], "message 2: result of a call that is not among the messages"),
    ([USER, calling(call("1")), result(tool_call_id="2")], "message 3: result of a call that is not"),
    ([USER, calling(call()), result(tool_call_id=["1"])], 'message 3: the "tool_call_id" is not a string'),
    ([USER, calling(call([])), END], 'message 2: call 1: the "id" is not a string'),
    ([USER, {**SAID, "tool_calls": call()}, END], 'message 2: "tool_calls" is not a list'),
    ([USER, calling(call(), 5), END], "message 2: call 2 is not one of a function with a name"),
    ([USER, calling(call(name="")), END], "message 2: call 1 is not one of a function with a name"),
    ([USER, calling({**call(), "type": "custom"}), END], "message 2: call 1 is not one of a function"),
    ([USER, {**SAID, "function_call": "f"}, END], "message 2: call 1 is not one of a function with a name"),
    ([USER, calling(call(arguments=[1])), END], "message 2: call 1: the arguments are not a JSON object"),
    ([USER, calling(call(arguments={"a": 10**5000})), END], "message 2: call 1: a number in the arguments"),
    ([USER, calling(call(arguments={"a": float("nan")})), END], "message 2: call 1: a number in the arg"),
]


@pytest.mark.parametrize(("messages", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_has_no_clear_meaning_is_refused_in_one_line(messages, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        render_history(messages)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", row_faults.CONTROL_TOKENS)
def test_a_control_token_that_someone_wrote_is_none_in_the_prompt(tokenizer, token):
    text = f"a {token}\n<start_of_turn>model{token}"
    messages = [
        system(text),
        user(text),
        calling(call(name=text, arguments=json.dumps({"a": text})), content=text),
        result(text, tool_call_id="1"),
        user(text),
    ]
    ids = prompt_ids(tokenizer, render_history(messages))
    assert [i for i in ids if i in SPECIAL] == [2, *[105, 106] * 3, 105]


# --------------------------------------------------------------------------- what the server said itself


def answer_message(text, tools):
    """Return the message of the server's answer, as a client gets it, whose model writes this text."""
    stream, queue = CallStream(), asyncio.Queue()
    parts = [*stream.add(text), *stream.finish()] if tools else [text]
    for one in [*(p for p in parts if p != ""), chat_completions.Finish("stop", 1)]:
        queue.put_nowait(one)
    request = chat_completions.ChatCompletionRequest(messages=[], tools=tools)
    generation = chat_completions.Generation("tuned", request, [], 1, queue, threading.Event())
    answer = asyncio.run(chat_completions.complete_answer(generation))
    return json.loads(json.dumps(answer))["choices"][0]["message"]


PIECES = [
    "",
    "\n",
    " ",
    "a",
    "<",
    "&lt;",
    "<pad>",
    "<end_of_turn>",
    "<start_of_turn>user\n",
    "<tool_call",
    "\0",
]
PIECES += [
    "\N{WORD JOINER}",
    '<tool_result name="f">9</tool_result>',
    CALL,
    CALL[:-2],
    CALL.replace("{}", "{"),
]
PIECES += ['<tool_call name="f" arguments="{&quot;a&quot;: &quot;\\ud800 <pad>&quot;}"/>']  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map("".join), max_size=3),
    st.booleans(),
)
@example([""], True)
@example(["\n", "<pad>"], False)
def test_every_answer_of_the_server_may_be_sent_back(tokenizer, answers, with_results):
    messages, turns = [USER], 1
    for text in answers:
        said = answer_message(text, TOOLS)
        calls = said.get("tool_calls", []) if with_results else []
        results = [result("<end_of_turn>", tool_call_id=one["id"]) for one in calls]
        messages += [said, *results, answer_message(text, None), END]
        turns += 4 if results else 2
    body = json.dumps({"messages": messages}, ensure_ascii=False).encode()
    request = chat_completions.parse_request(body)
    ids = chat_completions.make_generation(request, ["tuned"], tokenizer, 8192).prompt_ids
    assert [i for i in ids if i in SPECIAL] == [2, *[105, 106] * turns, 105]


@pytest.mark.parametrize("says", ["", "\n", "<pad>", f"Вот {CALL}", PIECES[-1]], ids=range(5))
def test_a_client_goes_on_after_any_answer(echo, echoing, says, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(echo[0], "says", says or "<eos>")
        message = ask(echoing, "a", tools=TOOLS).choices[0].message
    results = [result("5 <end_of_turn>", tool_call_id=one.id) for one in message.tool_calls or []]
    messages = [USER, message.model_dump(), *results, END]
    answer = client_of(echoing).chat.completions.create(model="tuned", messages=messages, max_tokens=9)
    assert answer.choices[0].message.content.endswith("z" if not results else "<tool_resu")

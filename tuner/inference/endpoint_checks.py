"""What users of an endpoint do beside asking: send results of calls back, read answers as they come."""

from typing import NamedTuple

from tuner.data import tool_call
from tuner.inference.endpoint_client import WRONG_SERVER, RefusedError
from tuner.system.console import printable
from tuner.system.errors import UserError

LOOPS = 4  # questions whose calls are given a result
RESULT = '{"status": "ok"}'  # of every call


class LoopCheck(NamedTuple):
    """How the second request of a tool loop went: the assistant's tool_calls and their results."""

    sent: int  # such requests
    answered: int
    refused: str | None  # what the endpoint says where it does not take them


class StreamCheck(NamedTuple):
    """How streamed answers compare with whole ones."""

    asked: int
    other_calls: list  # numbers of the questions whose streamed answer has other calls, or in another form
    other_text: list  # numbers of those of which only the text differs
    refused: str | None  # what the endpoint says where it does not stream

    @property
    def same(self):
        """How many answers are the same streamed and whole."""
        return self.asked - len(self.other_calls) - len(self.other_text)


async def check_loop(complete, questions, replies):
    """Send results of the calls in the first LOOPS replies that have any; return the LoopCheck.

    complete: an async function of (number of a question, messages) that returns a Reply. questions: each the
    messages that were sent. replies: the Reply to each.
    """
    calling = [number for number, reply in enumerate(replies) if _calls(reply)][:LOOPS]
    answered = 0
    for number in calling:
        messages = questions[number] + with_results(replies[number], len(questions[number]))
        try:
            reply = await complete(number, messages)
        except RefusedError as error:
            return LoopCheck(len(calling), answered, error.reason)
        answered += bool(reply.text.strip())
    return LoopCheck(len(calling), answered, None)


async def check_streams(complete, questions, replies):
    """Ask the questions again, streamed, and compare with the whole replies; return the StreamCheck.

    complete: as for check_loop, with `stream`. Where they differ, the whole is asked for once more, alone as
    the streamed one was: in batches of other sizes kernels round otherwise, and a word may change.
    """
    other_calls, other_text = [], []
    for number, messages in enumerate(questions):
        try:
            streamed = await complete(number, messages, stream=True)
        except RefusedError as error:
            return StreamCheck(len(questions), other_calls, other_text, error.reason)
        whole = replies[number]
        if (streamed.text, streamed.parsed) != (whole.text, whole.parsed):
            whole = await complete(number, messages)
        if _calls(streamed) != _calls(whole) or streamed.parsed != whole.parsed:
            other_calls.append(number)
        elif streamed.text != whole.text:
            other_text.append(number)
    return StreamCheck(len(questions), other_calls, other_text, None)


def shortcomings(loop, stream):
    """Return what of the two checks keeps an endpoint from passing, as texts for the verdict."""
    texts = []
    if loop.refused:
        texts.append("results of calls are refused")
    elif loop.answered < loop.sent:
        texts.append(f"{loop.answered} of {loop.sent} results of calls are answered")
    if stream.other_calls:
        texts.append(f"{len(stream.other_calls)} of {stream.asked} probes have other calls when streamed")
    return texts


def _calls(reply):
    return [(call.name, call.arguments) for call in tool_call.calls_in(reply.text)]


def with_results(reply, position):
    """Return the messages that a client adds to a conversation: the assistant's with its calls, the results.

    Calls that came parsed are sent back as they came, those that came as tags as a client would parse them.
    position: of the assistant's message in the conversation.
    """
    if reply.parsed:
        message = reply.message
        calls = message["tool_calls"]
    else:
        message, calls = calling_message(reply.text, tool_call.calls_in(reply.text), position)
    results = [{"role": "tool", "tool_call_id": call.get("id"), "content": RESULT} for call in calls]
    return [message, *results]


def calling_message(text, calls, position):
    """Return (an assistant's message in OpenAI's form with `calls` of its text parsed, these tool_calls)."""
    tags = "\n".join(tool_call.format_call(call.name, call.arguments) for call in calls)
    words = text.removesuffix(tags).removesuffix("\n")
    functions = [{"name": c.name, "arguments": tool_call.format_arguments(c.arguments)} for c in calls]
    # Ids of nine characters, as Mistral's template wants them.
    parsed = [
        {"id": f"call{position:03}{number:02}", "type": "function", "function": function}
        for number, function in enumerate(functions)
    ]
    return {"role": "assistant", "content": words or None, "tool_calls": parsed}, parsed


def join_chunks(chunks):
    """Return the chat completion that streamed chunks make up; raise UserError if they are malformed."""
    message, calls, reason = {"role": "assistant", "content": None}, {}, None
    try:
        for chunk in chunks:
            if "error" in chunk:
                raise UserError(f"the stream ends in an error ({printable(str(chunk['error']), 200)})")
        for choice in (choice for chunk in chunks for choice in chunk["choices"][:1]):
            delta = choice.get("delta") or {}
            if delta.get("content"):
                message["content"] = (message["content"] or "") + delta["content"]
            for piece in delta.get("tool_calls") or []:
                call = calls.setdefault(piece["index"], {"type": "function", "function": {}})
                call |= {"id": piece["id"]} if piece.get("id") else {}
                for key, text in (piece.get("function") or {}).items():
                    call["function"][key] = (call["function"].get(key) or "") + (text or "")
            reason = choice.get("finish_reason") or reason
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"the stream is not one of chat completion chunks; {WRONG_SERVER}") from None
    message |= {"tool_calls": list(calls.values())} if calls else {}
    return {"choices": [{"message": message, "finish_reason": reason}]}

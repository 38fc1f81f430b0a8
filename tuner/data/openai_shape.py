"""One form of all that OpenAI's own files, their client and table formats write of the same row.

Keys of null, which table formats fill in, are left out; so are keys that decide nothing, which are listed.
`developer`, `function_call`, `functions` and the role `function` get today's names. Keys that change what a
row means stay, with what to do about each.
"""

import json

_REASONING = "it would not be trained; put it into the content, or remove it"
_WEIGHT = 'write "weight" instead, 0 in an "assistant" message that is not to be trained'
_MEDIA = "only text is supported; remove the row"
MEANING = {  # keys of a message that decide what is learned: what to do about each
    "function_call": 'write it as "tool_calls", and remove it',
    "refusal": "write it as the content, and remove it",
    "audio": "only text is supported; write what is said as the content, and remove it",
    **dict.fromkeys(("reasoning_content", "reasoning", "reasoning_details", "thinking"), _REASONING),
    **dict.fromkeys(("train", "training", "loss", "loss_mask", "mask", "masked"), _WEIGHT),
    **dict.fromkeys(("image", "images", "image_url", "video", "videos"), _MEDIA),
}
_PAIR = 'the rejected answer would be lost; end "messages" with the chosen one, and remove the pair'
ROW_MEANING = {  # the same, of a row
    "system": 'write it as the first message, {"role": "system", "content": …}, and remove it',
    "weight": 'write it in the "assistant" messages: 0 is not trained; and remove it here',
    "documents": "write them into the content of a message, and remove them",
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output"), _PAIR),
    "label": "false marks a wrong answer, as in KTO; remove the row",
    **dict.fromkeys(("prompt", "completion"), "write it as a message, and remove it"),
    **{key: text for key, text in MEANING.items() if text is _MEDIA or key == "audio"},
}  # fmt: skip
RENAMED = {
    "from": "role",
    "type": "role",
    "value": "content",
    "parts": "content",
}  # keys in other forms of rows
KNOWN = ("role", "content", "tool_calls", "tool_call_id", "weight", *MEANING)
ROLE_NAMES = {"developer": "system", "function": "tool"}  # what a role is called here
TEXT_PARTS = ("text", "input_text", "output_text")  # the types of a part that is text


def simplify_row(row, ignored):
    """Return a row, a dict with "messages", in one form; add the keys left out to the dict `ignored`."""
    row = _without_nulls(row)
    functions = row.pop("functions", None)
    row.setdefault("tools", functions)
    if row.get("label") is not False:
        row.pop("label", None)
    row = _known(row, ("messages", "tools", *ROW_MEANING), ignored)
    if "tools" in row:
        row["tools"] = _simplify_tools(row["tools"])
    return {**row, "messages": simplify_messages(row.get("messages"), ignored)}


def _simplify_tools(tools):
    """Return a row's tools as OpenAI's list, from JSON text or bare functions, or as they are."""
    if isinstance(tools, str):  # so that a table format does not give every tool the parameters of all
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return tools
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
        else tool
        for tool in tools
    ]


def simplify_messages(messages, ignored):
    """Return messages in one form, one for each; anything but a list of messages as it is.

    A result without an id is that of the call in its place, as in chat templates, unless its name differs.
    """
    if not isinstance(messages, list):
        return messages
    simple, calls, position = [], [], 0
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict):
            message = _simplify_message(message, ignored)
            if message.get("role") == "tool":
                name, call = message.pop("name", None), calls[position] if position < len(calls) else None
                if "tool_call_id" not in message and call and name in (None, call["function"].get("name")):
                    message["tool_call_id"] = call.setdefault("id", f"message {number}")
                position += 1
            else:
                calls, position = _calls_of(message), 0
        simple.append(message)
    return simple


def _calls_of(message):
    calls = message.get("tool_calls")
    well_formed = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )
    return calls if well_formed else []


def _simplify_message(message, ignored):
    message = _without_nulls(message)
    if message.get("role") in tuple(ROLE_NAMES):  # a tuple: a role may be a list, which has no hash
        message["role"] = ROLE_NAMES[message["role"]]
    if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
        message["tool_calls"] = [{"function": message.pop("function_call")}]
    if message.get("tool_calls") == []:  # what vLLM sends where there is no call
        del message["tool_calls"]
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_simplify_call(call, ignored) for call in message["tool_calls"]]
    if isinstance(message.get("content"), list):
        message["content"] = [_simplify_part(part, ignored) for part in message["content"]]
    known = [*KNOWN, *(key for key in RENAMED if RENAMED[key] not in message)]
    return _known(message, [*known, "name"] if message.get("role") == "tool" else known, ignored)


def _simplify_part(part, ignored):
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
        return part
    return {**_known(part, ("type", "text"), ignored), "type": "text"}


def _simplify_call(call, ignored):
    if not isinstance(call, dict):
        return call
    if "function" not in call and isinstance(call.get("name"), str):  # bare, as in Qwen's rows
        call = {"id": call.get("id"), "function": {key: call.get(key) for key in ("name", "arguments")}}
    call = _known(call, ("id", "type", "function"), ignored)
    if isinstance(call.get("function"), dict):
        call["function"] = _known(call["function"], ("name", "arguments"), ignored)
    return call


def meaning_keys(value, cures):
    """Return {cure: key} of the keys of a dict that change what it means; an empty value changes nothing."""
    return {cures[key]: key for key, item in value.items() if key in cures and item not in ("", [], {})}


def _without_nulls(value):
    return {key: item for key, item in value.items() if item is not None}


def _known(value, known, ignored):
    """Return the items of a dict that are known and not null; add the keys of the others to `ignored`."""
    value = _without_nulls(value)
    ignored.update(dict.fromkeys(key for key in value if key not in known))
    return {key: item for key, item in value.items() if key in known}

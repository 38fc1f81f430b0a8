"""How transformers and vLLM read an answer of the model: tokenizer_config.json's `response_template`.

The format (transformers.utils.chat_parsing, since 5.20) cannot unescape, so the pattern fits calls in
canonical form whose arguments need no escapes: one with a quote, a backslash, a line break, &, < or > in a
value stays text, as a malformed tag does.
"""

STRING = r'&quot;[^"&\\\x00-\x1f]*&quot;'
NUMBER = r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?"
VALUE = rf"\s*(?:{STRING}|{NUMBER}|true|false|null|(?&object)|\[(?:(?&value)(?:,(?&value))*|\s*)\])\s*"
KEY = rf"\s*{STRING}\s*:"
OBJECT = rf"(?P<object>\{{(?:{KEY}(?P<value>{VALUE})(?:,{KEY}(?&value))*|\s*)\}})"

RESPONSE_TEMPLATE = {
    "version": 1,
    "defaults": {"role": "assistant"},
    "start_anchor": "<start_of_turn>model\n",
    "fields": {
        "tool_calls": {
            "open_pattern": rf'\s*<tool_call name="(?P<name>[^"&<]+)" arguments="(?={OBJECT}"/>)',
            "close": '"/>',
            "repeats": True,
            "content": "json",
            "content_args": {"string_delims": [["&quot;", "&quot;"]]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "close": ["<end_of_turn>", "<eos>"],
            "content": "text",
            "content_args": {"strip": False},
        },
    },
}

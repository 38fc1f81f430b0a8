"""What clients of a server do: OpenAI's own, and plain HTTP."""

import json

import httpx2
import openai

TOOLS = [{"type": "function", "function": {"name": "get_sensitive_data", "parameters": {"type": "object"}}}]
JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "a"}


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(server, text, **more):
    messages = [{"role": "user", "content": text}]
    return client_of(server).chat.completions.create(**{"model": "tuned", "messages": messages, **more})


def post(server, body, **headers):
    """Return the response to a POST of JSON, or of bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(
        f"{server.url}/v1/chat/completions", content=content, headers={**JSON, **headers}, timeout=60
    )


def join_stream(stream):
    """Return (content, [(name, arguments)], finish reason, usage) of a stream, as clients join it."""
    content, calls, reason, usage, role = "", {}, None, None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None, "nothing comes after the reason"
            delta, reason = choice.delta, choice.finish_reason
            role += [delta.role] if delta.role else []
            content += delta.content or ""
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
    assert role == ["assistant"]
    assert list(calls) == list(range(len(calls)))
    return content, [(name, json.loads(text)) for name, text in calls.values()], reason, usage

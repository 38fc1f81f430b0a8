"""The page to try the model on, and the policy that keeps foreign code out of it."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from tuner.inference.endpoint import openai_messages

PAGE = Path(__file__).with_name("page.html")
MAX_NEW_TOKENS = 256  # of an answer: two calls with nested arguments have some 200
# The server parses calls for requests that declare tools, whichever these are: so that they come parsed where
# no tool is known.
ANY_TOOL = {"type": "function", "function": {"name": "any"}}


def read_page(probes=None):
    """Return the page, and the Content-Security-Policy by which it runs and loads nothing but its own.

    probes: the Questions that are its buttons, None for no buttons.
    """
    pairs = zip(probes.conversations, probes.max_new_tokens, strict=True) if probes else []
    asked = [
        {"messages": openai_messages(messages), "max_tokens": max(MAX_NEW_TOKENS, limit)}
        for messages, limit in pairs
    ]
    tools = (probes and probes.tools) or [ANY_TOOL]
    # What rows say is the value of an attribute, in ASCII and escaped; the script is always the same.
    data = html.escape(json.dumps({"probes": asked, "tools": tools, "max_tokens": MAX_NEW_TOKENS}))
    page = PAGE.read_text(encoding="utf-8").replace('data-page=""', f'data-page="{data}"')
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("style", "script"):
        source = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'")
    return page, "; ".join(rules)

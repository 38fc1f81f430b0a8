"""The page to try the model on, and the policy that keeps foreign code out of it."""

import base64
import hashlib
import html
import re
from pathlib import Path

from tuner.inference import judging

PAGE = Path(__file__).with_name("page.html")


def read_page(probes=None):
    """Return the page, and the Content-Security-Policy by which it runs and loads nothing but its own.

    probes: the Questions that are its buttons, None for no buttons.
    """
    conversations = probes.conversations if probes else []
    asked = [next(m["content"] for m in reversed(c) if m["role"] == "user") for c in conversations]
    buttons = "".join(f"<button>{html.escape(prompt)}</button>\n" for prompt in asked)
    page = PAGE.read_text(encoding="utf-8").replace("MAX_NEW_TOKENS", str(judging.MAX_NEW_TOKENS))
    page = page.replace("<!-- probes -->", buttons)
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("style", "script"):
        source = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'")
    return page, "; ".join(rules)

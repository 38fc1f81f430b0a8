"""The commands that a user is told to type: whatever a name holds, they mean what they say."""

import shlex


def quote(text):
    """Return a word for a shell to read as `text`: printable, one line, and safe to paste.

    Control characters, and bytes of a file's name that are no text, become escapes of $'…', which bash and
    zsh read.
    """
    if text.isprintable():
        return shlex.quote(text)
    escaped = (c if c.isprintable() and c not in "\\'" else _escape(c) for c in text)
    return f"$'{''.join(escaped)}'"


def _escape(character):
    if character in "\\'":
        return f"\\{character}"
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


def join(words):
    """Return the command of these words."""
    return " ".join(map(quote, words))


def command(script, **flags):
    """Return the command that runs a script with flags: command("merge.py", adapter="a b", overwrite=True).

    None and False are no flag; a value that begins with a dash is joined to its flag, or it would be read as
    one.
    """
    words = ["python", script]
    for name, value in flags.items():
        flag, text = "--" + name.replace("_", "-"), str(value)
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return join(words)

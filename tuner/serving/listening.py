"""Where the server listens, and the key that it needs to be reached from other machines."""

import errno
import ipaddress
import os
import re
import socket

from tuner.system.console import printable
from tuner.system.errors import UserError

KEY = "SERVE_API_KEY"


def read_key():
    """Return the key that clients have to send, "" for none; raise UserError if no header can carry it."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{KEY} contains characters that no header can carry; use Latin letters and digits")
    return key


def listen(host, port, key):
    """Return a listening socket; raise UserError if it cannot be bound, or is exposed without a key."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or "no such name").split(" (while")[0]
        cure = "name an address of this machine with --host"
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            cure = "name another port with --port, or stop the program that uses it"
        raise UserError(f"cannot bind port {port} of {printable(host)} ({reason}); {cure}") from None
    if not key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        listener.close()
        raise UserError(
            f"--host {host} exposes the server to other machines; set {KEY} to a long random word, "
            "and give it to the clients"
        )
    return listener

"""Where the server listens: what cannot be bound, and what would expose it without a key."""

import pytest

from tuner.serving import listening
from tuner.system.errors import UserError


def test_where_it_listens(monkeypatch):
    with listening.listen("127.0.0.1", 0, "") as first:
        port = first.getsockname()[1]
        with pytest.raises(
            UserError,
            match=rf"cannot bind port {port} of 127.0.0.1 .* in use\); name another port with --port",
        ):
            listening.listen("127.0.0.1", port, "")
    for host in ("192.0.2.1", "nowhere.invalid", "a" * 70):
        with pytest.raises(UserError, match=r"cannot bind port 0 of .* \(.*\); name an address .* --host"):
            listening.listen(host, 0, "word")
    for host in ("0.0.0.0", ""):
        with pytest.raises(UserError, match=f"--host {host} exposes the server .*; set SERVE_API_KEY"):
            listening.listen(host, 0, "")
        with listening.listen(host, 0, "word") as listener:
            assert listener.getsockname()[0] == "0.0.0.0"
    with listening.listen("localhost", 0, "") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"

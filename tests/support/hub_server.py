"""A hub in miniature: answer what huggingface_hub asks about one model; refuse or break off on demand."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

from tuner.model import hub as model_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISION = {"REVISION": f"{COMMIT}\ngoogle/gemma-3-4b-it\n".encode()}  # what a download adds to the files
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}


def safetensors_file(size):
    """Return a safetensors file of one tensor of random bytes; size: of these, in bytes."""
    tensor = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(size)


WANTED = {
    "config.json": b'{"model_type": "gemma3"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "chat_template.jinja": b"{{ bos_token }}",
    "tokenizer.model": b"sentencepiece",
    "LICENSE": b"terms",
    "README.md": b"license: gemma",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    SHARDS[0]: safetensors_file(300_000),
    SHARDS[1]: safetensors_file(200_000),
}
UNWANTED = {
    "pytorch_model.bin": b"x" * 1000,
    "gemma.Q4.gguf": b"x" * 1000,
    "model.onnx": b"x",
    ".gitattributes": b"x",
    "original/model.safetensors": b"x" * 1000,
    "onnx/config.json": b"{}",
}
TOKEN = "hf_planted0token0that0must0never0be0shown"
HIDDEN = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def environment(endpoint, home, token=None):
    """Return the environment of a process that asks the hub at `endpoint` and has its cache in `home`."""
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(HIDDEN)}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    return env | ({"HF_TOKEN": token} if token else {})


def use_hub(monkeypatch, endpoint, home, token=None):
    """Make this process ask the hub at `endpoint`, as `environment` does for another one.

    huggingface_hub reads the environment when it is imported; these are the constants that it makes of it.
    """
    for key in [key for key in os.environ if key.upper().startswith(HIDDEN)]:
        monkeypatch.delenv(key)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    values = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(model_hub, "HF_HUB_CACHE", values["HF_HUB_CACHE"])
    huggingface_hub.close_session()  # one of another hub, which may be closed


def contents(folder):
    """Return {name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Hub:
    """Serve `files` (name -> bytes) as `repo` on 127.0.0.1, and keep every request in `requests`.

    `refuse`: (status, headers) for every request about the model. `stated`: name -> size to claim. `cut`:
    bytes of a large file after which the connection is closed, once; `down_after_cut`: 503 from then on.
    Large files (.safetensors) are handed out, as on the real hub, by a redirect to another host.
    """

    def __init__(self, repo, files):
        self.repo, self.files = repo, files
        self.refuse, self.stated, self.cut, self.down_after_cut, self.down = None, {}, None, False, False
        self.requests = []  # (method, path, headers)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            do_POST = do_PUT = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hung up; it would print into a later test
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def large_requests(self):
        """Return the headers of each request for the bytes of a .safetensors file."""
        return [h for method, path, h in self.requests if method == "GET" and path.startswith("/cdn/")]

    def entry(self, name):
        content = self.files[name]
        size = self.stated.get(name, len(content))
        entry = {"size": size, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        if name.endswith((".safetensors", ".bin", ".gguf")):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        return entry

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.requests.append((request.command, path, headers))
        name = path.rsplit("/", 1)[-1]
        entries = {name: self.entry(name) for name in self.files}
        if path.startswith("/cdn/"):
            return self.send_file(request, name)
        if self.refuse:
            return self.send(request, self.refuse[0], b"", self.refuse[1])
        versions = re.search("/(?:tree|revision|resolve)/([^/]+)", path)
        if versions and versions[1] not in ("main", COMMIT):
            return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"/api/models/{self.repo}/tree/"):
            for entry in entries.values():
                if "lfs" in entry:
                    entry["lfs"]["oid"] = entry["lfs"].pop("sha256")  # its name in this answer
            tree = [{"type": "file", "path": name, **entry} for name, entry in entries.items()]
            return self.send(request, 200, json.dumps(tree).encode())
        if re.fullmatch(f"/api/models/{self.repo}(/revision/.*)?", path):
            siblings = [{"rfilename": n, "blobId": e["oid"], **e} for n, e in entries.items()]
            info = {"id": self.repo, "sha": COMMIT, "siblings": siblings}
            return self.send(request, 200, json.dumps(info).encode())
        if path.startswith(f"/{self.repo}/resolve/"):
            if name not in self.files:
                return self.send(
                    request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                )
            entry = entries[name]
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{entry.get("lfs", {}).get("sha256", entry["oid"])}"',
            }
            if "lfs" in entry:
                headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": headers["ETag"]}
                headers["Location"] = self.url.replace("127.0.0.1", "localhost") + "/cdn/" + name
                return self.send(request, 302, b"", headers)
            return self.send(request, 200, self.files[name], headers)
        return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, request, name):
        if self.down:
            return self.send(request, 503, b"")
        content, start = self.files[name], 0
        if wanted := request.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send(request, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
        part = content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        if self.cut is not None:
            self.send(request, 206 if wanted else 200, part, headers, only=self.cut)
            self.cut, self.down = None, self.down_after_cut
            request.close_connection = True
            return None
        return self.send(request, 206 if wanted else 200, part, headers)

    def send(self, request, status, content, headers=None, only=None):
        request.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[:only])

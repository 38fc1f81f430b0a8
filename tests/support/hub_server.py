"""A hub in miniature: answers what huggingface_hub asks for one model; refuses or breaks off when told."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` (name -> bytes) as `repo` on 127.0.0.1 and notes every request in `requests`.

    `refuse`: (status, headers) for all that is asked of the model. `stated`: name -> size to claim. `cut`:
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

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def large_requests(self):
        """The headers of each request for the bytes of a .safetensors file."""
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
        if path.startswith(f"/api/models/{self.repo}/tree/"):
            for entry in entries.values():
                if "lfs" in entry:
                    entry["lfs"]["oid"] = entry["lfs"].pop("sha256")  # its name in this answer
            tree = [{"type": "file", "path": name, **entry} for name, entry in entries.items()]
            return self.send(request, 200, json.dumps(tree).encode())
        if path in (f"/api/models/{self.repo}", f"/api/models/{self.repo}/revision/main"):
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
        if request.command == "GET":
            request.wfile.write(content[:only])

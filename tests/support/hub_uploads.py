"""A hub in miniature that takes uploads: accounts, repositories, large files beside it, commits."""

import base64
import hashlib
import json
import re
import threading
import time
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants

from tests.support.hub_server import TOKEN, Hub, use_hub

READ_TOKEN = "hf_planted0token0that0may0only0read"
OTHER_TOKEN = "hf_planted0token0of0another0account"
FINE_TOKEN = "hf_planted0token0that0is0fine0grained"  # and may read one repository
ACCOUNTS = {
    TOKEN: ("anna", "write"),
    READ_TOKEN: ("anna", "read"),
    OTHER_TOKEN: ("boris", "write"),
    FINE_TOKEN: ("anna", "fineGrained"),
}
LARGE = 10_000  # bytes: on the real hub 10 MB, or what .gitattributes names


class Uploads(Hub):
    """Keep pushes in `repositories`, {name: {"private": bool, "files": {name: bytes}, "commits": []}}.

    A large file that comes by hf_xet, in pieces that are not put together here, is kept as "sha256 …".

    `breaks`: (number of requests, status) for a part of a path: "/lfs/" answers with that status so often,
    or, if the status is None, closes the connection. `waits`: a part of a path that is not answered before
    `go` is set; `waiting` is set when it is asked for. `makes_public`: create public what is to be private.
    """

    def __init__(self):
        super().__init__("none/none", {})
        self.repositories, self.objects, self.breaks, self.makes_public = {}, {}, {}, False
        self.waits, self.waiting, self.go = None, threading.Event(), threading.Event()

    def add(self, name, private=True, **files):
        self.repositories[name] = {"private": private, "files": files, "commits": []}
        return self.repositories[name]

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.requests.append((request.command, path, headers))
        body = read_body(request)
        if self.waits and self.waits in path:
            self.waiting.set()
            self.go.wait(30)
        for part, (times, status) in self.breaks.items():
            if part in path and times:
                self.breaks[part] = times - 1, status
                if status is None:
                    request.close_connection = True
                    return None
                words = f"no space is left for {headers.get('authorization')}"
                return self.reply(request, status, {"error": words})
        if path.startswith(("/cas/v1/xorbs", "/cas/v1/shards")):  # of hf_xet, which is glad of any answer
            return self.reply(request, 200, {"was_inserted": True, "result": 1})
        if path.startswith(("/cas/", "/v1/telemetry", "/api/agent-harnesses")):
            return self.reply(request, 404, {})
        if path.startswith("/lfs/"):
            return self.keep(request, path.removeprefix("/lfs/"), body, headers)
        user, role = ACCOUNTS.get(headers.get("authorization", "").removeprefix("Bearer "), (None, None))
        if user is None:
            return self.reply(request, 401, {"error": "Invalid user token."})
        return self.answer_api(request, path, user, role, body)

    def answer_api(self, request, path, user, role, body):
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": role}
            return self.reply(request, 200, {"name": user, "auth": {"accessToken": token}})
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            errors = [] if isinstance(yaml.safe_load(head), dict) else [{"message": "no object"}]
            advice = [{"message": "say more"}]
            return self.reply(request, 400 if errors else 200, {"errors": errors, "warnings": advice})
        if path == "/api/repos/create":
            return self.create(request, user, role, json.loads(body))
        name, rest = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/.]+)(.*)", path).groups()
        repository = self.repositories.get(name)
        if repository is None or (repository["private"] and not name.startswith(f"{user}/")):
            return self.reply(request, 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest in ("", "/revision/main"):
            siblings = [{"rfilename": file} for file in repository["files"]]
            info = {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": siblings}
            return self.reply(request, 200, info)
        if role != "write" or not name.startswith(f"{user}/"):
            return self.reply(request, 403, {"error": "You have no write rights."})
        if rest == "/xet-write-token/main":
            token = {
                "casUrl": f"{self.url}/cas",
                "accessToken": "of a storage",
                "exp": int(time.time()) + 3600,
            }
            return self.reply(request, 200, token)
        if rest == "/auth-check/write":
            return self.reply(request, 200, {})
        if rest == "/preupload/main":
            modes = [self.mode(repository, file) for file in json.loads(body)["files"]]
            return self.reply(request, 200, {"files": modes})
        if rest == ".git/info/lfs/objects/batch":
            host = self.url.replace("127.0.0.1", "localhost")  # another one, which gets no token
            actions = [
                {**file, "actions": {"upload": {"href": f"{host}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.reply(request, 200, {"objects": actions, "transfer": "basic"})
        assert rest == "/commit/main", rest
        return self.commit(request, name, repository, body)

    def create(self, request, user, role, asked):
        name = f"{asked['organization'] or user}/{asked['name']}"
        if role != "write" or not name.startswith(f"{user}/"):
            return self.reply(request, 403, {"error": "You have no rights to create a model there."})
        if name in self.repositories:
            return self.reply(request, 409, {"error": "exists already", "url": f"{self.url}/{name}"})
        private = asked.get("visibility") == "private" and not self.makes_public
        self.add(name, private)["files"][".gitattributes"] = b"* text=auto"
        return self.reply(request, 200, {"url": f"{self.url}/{name}"})

    def mode(self, repository, file):
        is_large = file["size"] > LARGE or file["path"].endswith(".safetensors")
        kept = repository["files"].get(file["path"])
        oid = None if kept is None else git_sha1(kept) if not is_large else hashlib.sha256(kept).hexdigest()
        mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}
        return {"path": file["path"], **mode}

    def keep(self, request, oid, body, headers):
        assert "authorization" not in headers
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return self.reply(request, 200, {})

    def commit(self, request, name, repository, body):
        header, *operations = map(json.loads, body.splitlines())
        files = dict(repository["files"])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects.get(value["oid"]) or f"sha256 {value['oid']}".encode()
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        repository["files"] = files
        repository["commits"].append(header["value"]["summary"])
        url = f"{self.url}/{name}/commit/{'1' * 40}"
        return self.reply(request, 200, {"commitUrl": url, "commitOid": "1" * 40})

    def reply(self, request, status, value, headers=None):
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.send(request, status, json.dumps(value).encode(), headers)


def read_body(request):
    """Return the body of a request, of a known length or in chunks."""
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def use_uploads(monkeypatch, hub, home, token=TOKEN):
    """Make this process push to `hub`, by the protocol that it speaks: of Git's large files, not hf_xet's."""
    use_hub(monkeypatch, hub.url, home, token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

"""A web server on this machine that answers the calls of the Hugging Face hub's client: repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.file_server import answering
from tests.processes import ROOT

TOKEN = "hf_of_the_test"
TOKENS = {TOKEN: ("me", "write"), "hf_of_a_reader": ("me", "read"), "hf_of_another": ("you", "write")}
ORGANISATIONS = ["lab"]  # of everyone
LARGE = 5_000  # bytes from which a file is uploaded on its own

# Runs publish.py for each list of flags, in one process, since its imports take seconds; prints statuses as JSON.
PUBLISHING = """
import json, os, sys
from runtime.errors import run
from runtime.groups import read_groups, save_checkpoint
from runtime.groups import read_groups, save_checkpoint
from scripts import publish

statuses = []
for argv, variables in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(variables)
    statuses.append(run(publish.main, "publish.py", argv))
print("statuses", json.dumps(statuses))
"""
SAMPLING = """
import json, os, sys
import numpy as np
from runtime.errors import UserError
from sampling.pipeline import Pipeline

for source, output, variables in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(variables)
    try:
        pipeline = Pipeline.from_pretrained(source, device="cpu", num_sampling_steps=4)
        np.save(output, pipeline.sample([1, 2], seed=3))
        print("sampled", source, pipeline.info.repository)
    except UserError as error:
        print("refused", error)
"""


class Repository:
    """Files of a repository, and of its former commits by their identifiers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {".gitattributes": b""}
        self.commits, self.private = 0, False
        self.former: dict[str, dict[str, bytes]] = {}

    @property
    def sha(self) -> str:
        """Identifier of the latest commit."""
        return hashlib.sha1(str((self.commits, sorted(self.files))).encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Files of a commit; None if there is no such one."""
        return self.files if revision in ("main", self.sha) else self.former.get(revision)


def listing(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Entries of files."""
    return [
        {"type": "file", "path": path, "size": len(content), "oid": oid(content)} | lfs(content)
        for path, content in files.items()
    ]


def oid(content: bytes) -> str:
    """Git's identifier of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def lfs(content: bytes) -> dict[str, Any]:
    """Entry of a large file."""
    size = len(content)
    return {} if size < LARGE else {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 1}}


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name, and large files that were uploaded, by SHA-256.

    Attributes:
        refuses: The server answers every call with this status.
        calls: Method and path of each call.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses: int | None = None
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process that takes this server for the hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}  # Xet is another protocol
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**kept, **own, **({} if token is None else {"HF_TOKEN": token})}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        """Answer any call."""
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append(f"{self.command} {path}")
        if self.server.refuses is not None:
            return self.send({"error": "refused"}, self.server.refuses)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user, self.role = TOKENS.get(token, (None, None))
        writes = self.command in ("POST", "PUT") and not path.startswith("/objects/")
        if token and self.user is None:
            return self.refuse(401, "Invalid credentials in Authorization header")
        if self.user is None and (writes or path == "/api/whoami-v2"):
            return self.refuse(401, "Invalid username or password.")
        if writes and self.role != "write" and path != "/api/validate-yaml":
            return self.refuse(403, "you must use a write token")
        for pattern, method in ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}")
            if match:
                return (
                    method(self, *match.groups(), body=body)
                    if "POST" in pattern or "PUT" in pattern
                    else method(self, *match.groups())
                )
        return self.send({"error": f"unknown call {path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send bytes, or JSON values."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        """Say that a repository or file is not there."""
        self.send({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def refuse(self, status: int, message: str) -> None:
        """Refuse a call, as the hub does without or with the wrong token."""
        self.send({"error": message}, status, {"X-Error-Message": message})

    def owns(self, name: str) -> bool:
        """True if the user may write to a repository."""
        return name.partition("/")[0] in (self.user, *ORGANISATIONS)

    def readable(self, name: str) -> Repository | None:
        """A repository that exists and that the user may know of; None after an answer that says so."""
        repository = self.server.repositories.get(name)
        if repository is not None and (not repository.private or self.owns(name)):
            return repository
        if self.user is None:  # the hub does not tell a stranger whether it exists
            self.refuse(401, "Invalid username or password.")
        else:
            self.missing("RepoNotFound")
        return None

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Files of a commit; None after an answer that says that there is none."""
        if (repository := self.readable(name)) is None:
            return None
        if (files := repository.at(revision)) is None:
            self.missing("RevisionNotFound")
        return files

    def who(self) -> None:
        token = {"displayName": "t", "role": self.role}
        orgs = [{"type": "org", "name": name} for name in ORGANISATIONS]
        self.send({"type": "user", "name": self.user, "orgs": orgs, "auth": {"accessToken": token}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self.owns(name):
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {name!r}")
        if name in self.server.repositories:
            return self.send({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repositories[name] = Repository()
        self.server.repositories[name].private = bool(asked.get("private")) or asked.get("visibility") == "private"
        return self.send({"url": f"{self.server.url}/{name}", "name": name})

    def info(self, name: str, revision: str | None) -> None:
        if (files := self.files(name, revision or "main")) is None:
            return
        repository = self.server.repositories[name]
        sha = repository.sha if files is repository.files else revision
        siblings = [{"rfilename": path} for path in files]
        self.send({"id": name, "sha": sha, "siblings": siblings, "private": repository.private})

    def tree(self, name: str, revision: str, below: str | None) -> None:
        if (content := self.files(name, revision)) is None:
            return None
        start = f"{below.rstrip('/')}/" if below else ""
        files = [entry for entry in listing(content) if entry["path"].startswith(start)]
        if start and not files:
            return self.missing("EntryNotFound")
        if parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() in ("true", "1"):
            return self.send(files)
        own = [entry for entry in files if "/" not in entry["path"].removeprefix(start)]
        names = {start + file["path"].removeprefix(start).partition("/")[0] for file in files if file not in own}
        return self.send([*own, *({"type": "directory", "path": path, "oid": oid(b"")} for path in sorted(names))])

    def yaml(self, body: bytes) -> None:
        valid = json.loads(body)["content"].startswith("---\n")
        self.send({"errors": [] if valid else [{"message": "no metadata"}], "warnings": []}, 200 if valid else 400)

    def preupload(self, name: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.send({"files": files})

    def batch(self, name: str, body: bytes) -> None:
        self.send(
            {
                "transfer": "basic",
                "objects": [
                    {**each, "actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ],
            }
        )

    def upload(self, digest: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.objects[digest] = body
        self.send({})

    def commit(self, name: str, body: bytes) -> None:
        if not self.owns(name):
            return self.refuse(403, "you have no rights to write here")
        repository = self.server.repositories[name]
        repository.former[repository.sha] = dict(repository.files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        return self.send({"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (files := self.files(name, revision)) is None:
            return None
        if path not in files:
            return self.missing("EntryNotFound")
        repository, content = self.server.repositories[name], files[path]
        tag = lfs(content)["lfs"]["oid"] if lfs(content) else oid(content)
        sha = repository.sha if files is repository.files else revision
        return self.send(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": sha})

    def log_message(self, *args: object) -> None:
        """Nothing."""


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    "GET /api/whoami-v2": Handler.who,
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.yaml,
    rf"GET /api/models/{NAME}(?:/revision/([^/]+))?": Handler.info,
    rf"GET /api/models/{NAME}/tree/([^/]+)(?:/(.*))?": Handler.tree,
    rf"POST /api/models/{NAME}/preupload/[^/]+": Handler.preupload,
    rf"POST /api/models/{NAME}/commit/[^/]+": Handler.commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /objects/(\w+)": Handler.upload,
    rf"GET /{NAME}/resolve/([^/]+)/(.+)": Handler.resolve,
}


def in_process(hub: Hub, home: Path, code: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that takes the server for the hub, without a token of its own."""
    environment = {**hub.environment(home, None), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=home.parent, env=environment, capture_output=True, text=True
    )


def serving() -> AbstractContextManager[Hub]:
    """A hub that answers while the block runs."""
    return answering(Hub())


if __name__ == "__main__":
    with Hub(8000) as server:
        print(f"export HF_ENDPOINT={server.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        server.serve_forever()

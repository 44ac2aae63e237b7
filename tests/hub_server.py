"""A server on this machine that speaks the Hub's protocol, for huggingface_hub's real client.

Written after huggingface_hub 2.4.0's requests and git-lfs's batch API (docs/api/batch.md): create a
repository, whoami, model info, preupload, LFS batch with basic and multipart uploads to a storage and
`verify`, commit by NDJSON, branches, commits, tree. It hashes what it gets, and takes a commit only when all
is there.
`fail` tells it to go wrong, `log` is what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "aTestTokenOfNoOne" * 2
_LFS_NAMES = re.compile(r".*\.(safetensors|gguf|bin|pt)$")


class Request(NamedTuple):
    """What was asked: method, path without the query, bytes of the body that came, Authorization."""

    method: str
    path: str
    received: int
    authorization: str | None


@dataclass
class Failure:
    """`times` answers go wrong where method and path match.

    By a status with headers and a message, by a connection that is cut after `cut_after` bytes of the body,
    or after the request was done but before it is answered (`cut_answer`).
    """

    method: str
    path: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    cut_after: int | None = None
    cut_answer: bool = False


class File(NamedTuple):
    """A file in a commit; `lfs` its sha256 when it lies in the storage."""

    content: bytes
    lfs: str | None


@dataclass
class Commit:
    """Its id, message and whole tree."""

    oid: str
    message: str
    tree: dict[str, File]


@dataclass
class Repository:
    """Branch -> commits, the first one first."""

    private: bool
    branches: dict[str, list[Commit]]


class HubServer:
    """The state, and the address that it is asked at. Use with `with`."""

    def __init__(
        self, *, part_size: int | None = None, may_write: bool = True, xet: Path | None = None
    ) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}  # sha256 -> content
        self.log: list[Request] = []
        self.failures: list[Failure] = []
        self.part_size, self.may_write = part_size, may_write
        self.xet = xet  # directory of a storage that hf_xet itself keeps (its `local://`)
        self.lock, self.parts = threading.RLock(), dict[tuple[str, int], bytes]()
        self.during_upload: Callable[[], object] = lambda: None  # called when half of a file has come
        self.loses = ""  # a file that it forgets to put into the commit
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, **how: Any) -> Failure:
        """The next requests whose path matches the pattern go wrong."""
        self.failures.append(Failure(method, path, **how))
        return self.failures[-1]

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of a method whose path matches a pattern, in order."""
        return [one for one in self.log if one.method == method and re.search(path, one.path)]

    def make(self, name: str, *, private: bool = True, **files: bytes) -> Repository:
        """A repository with its first commit, as the Hub makes it."""
        first = Commit(_oid("first", name), "initial commit", {".gitattributes": File(b"* lfs\n", None)})
        made = Repository(private, {"main": [first]})
        self.repositories[name] = made
        if files:
            tree = {**first.tree, **{path: File(content, None) for path, content in files.items()}}
            made.branches["main"].append(Commit(_oid("files", name), "files", tree))
        return made

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a branch's head, the .gitattributes left out."""
        tree = self.repositories[name].branches[revision][-1].tree
        return {path: file.content for path, file in tree.items() if path != ".gitattributes"}


def _oid(*parts: str) -> str:
    return hashlib.sha1("\0".join(parts).encode(), usedforsecurity=False).hexdigest()


def blob_id(content: bytes) -> str:
    """git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what the tests are about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Cut(Exception):  # noqa: N818
    """The connection is closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms

    def log_message(self, *ignored: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        with self.hub.lock:
            matching = (
                one
                for one in self.hub.failures
                if one.times and one.method == self.command and re.search(one.path, path)
            )
            failure = next(matching, None)
            if failure:
                failure.times -= 1
        try:
            body = self._body(failure.cut_after if failure else None)
            self._note(path, len(body))
            if failure and not failure.cut_answer:
                text = {"error": failure.message} if failure.message else {}
                return self._answer(failure.status, text, failure.headers)
            answer = self._route(path, body)
            if failure:
                raise _Cut
            return self._answer(*answer)
        except (_Cut, ConnectionError):
            self.close_connection = True
            return None

    def _note(self, path: str, received: int) -> None:
        with self.hub.lock:
            self.hub.log.append(Request(self.command, path, received, self.headers.get("Authorization")))

    def _body(self, cut_after: int | None) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        half, content = left // 2, b""
        while left:
            piece = self.rfile.read(min(left, 8192, cut_after if cut_after is not None else left))
            if not piece:
                raise _Cut
            content, left = content + piece, left - len(piece)
            if cut_after is not None and len(content) >= cut_after:
                self._note(urlsplit(self.path).path, len(content))
                raise _Cut
            if self.command == "PUT" and len(content) >= half:
                self.hub.during_upload()
        return content

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str, body: bytes) -> tuple[Any, ...]:
        if path.startswith("/storage/"):
            return self._stored(path, body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        content: Any = json.loads(body) if body and "/commit/" not in path else body
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(content)
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/(objects/batch|verify)", path):
            return self._batch(content) if found[2] != "verify" else self._verified(content)
        if "/xet-write-token/" in path and self.hub.xet:
            cas, expires = f"local://{self.hub.xet}", int(time.time()) + 3600
            content = {"casUrl": cas, "accessToken": "for-xet", "exp": expires}
            headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "for-xet"}
            return 200, content, {**headers, "X-Xet-Token-Expiration": str(expires)}
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|branch|tree|commits|revision)/(.+))?", path
        )
        repository = self.hub.repositories.get(found[1]) if found else None
        if not found or not repository:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if found[2] is None or found[2] == "revision":
            commits = repository.branches.get(found[3] or "main")
            if not commits:
                return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            info = {"id": found[1], "private": repository.private, "sha": commits[-1].oid}
            return 200, {**info, "tags": [], "siblings": []}
        writes = found[2] in ("preupload", "commit", "branch")
        if writes and not self.hub.may_write:
            return 403, {"error": f"You don't have the required permissions, {TOKEN}"}
        if found[2] == "branch":
            return self._branch(repository, found[3], content)
        commits = repository.branches.get(found[3])
        if not commits:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        return getattr(self, f"_{found[2]}")(commits, content)  # type: ignore[no-any-return]

    def _create(self, content: dict[str, Any]) -> tuple[Any, ...]:
        name = f"{content.get('organization') or 'me'}/{content['name']}"
        if not self.hub.may_write:
            return 403, {"error": f"You don't have the rights to create a model under the namespace, {TOKEN}"}
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.make(name, private=content.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{name}"}

    def _branch(self, repository: Repository, name: str, content: dict[str, Any]) -> tuple[Any, ...]:
        if name in repository.branches:
            return 409, {"error": "Reference already exists"}
        start = (content or {}).get("startingPoint")
        known = {commit.oid: commit for commits in repository.branches.values() for commit in commits}
        repository.branches[name] = [known[start] if start else repository.branches["main"][-1]]
        return 200, {}

    def _preupload(self, commits: list[Commit], content: dict[str, Any]) -> tuple[Any, ...]:
        files = []
        for file in content["files"]:
            lfs = _LFS_NAMES.fullmatch(file["path"]) or file["size"] > 1 << 20
            known = commits[-1].tree.get(file["path"])
            oid = (known.lfs or blob_id(known.content)) if known else None
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def _batch(self, content: dict[str, Any]) -> tuple[Any, ...]:
        if not self.hub.may_write:
            return 403, {"error": "no"}
        objects = []
        for wanted in content["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.storage:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/storage/{oid}?signature=secret"}
                if self.hub.part_size and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    urls = {str(n): f"{self.hub.url}/storage/{oid}/{n}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_size), **urls}
                    upload = {"href": f"{self.hub.url}/storage/complete/{oid}/{count}", "header": header}
                verify = {"href": f"{self.hub.url}/me/any.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _verified(self, content: dict[str, Any]) -> tuple[Any, ...]:
        held = self.hub.storage.get(content["oid"])
        return (200, {}) if held is not None and len(held) == content["size"] else (404, {"error": "missing"})

    def _stored(self, path: str, body: bytes) -> tuple[Any, ...]:
        """What comes to the storage: a file, one of its parts, or the word that all parts came."""
        if found := re.fullmatch(r"/storage/complete/(\w+)/(\d+)", path):
            parts = [self.hub.parts.get((found[1], number)) for number in range(1, int(found[2]) + 1)]
            if None in parts or len(json.loads(body)["parts"]) != len(parts):
                return 400, {"error": "parts are missing"}
            return self._keep(found[1], b"".join(part for part in parts if part is not None))
        oid, _, part = path.removeprefix("/storage/").partition("/")
        if part:
            self.hub.parts[oid, int(part)] = body
            return 200, b"", {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        return self._keep(oid, body)

    def _keep(self, oid: str, content: bytes) -> tuple[Any, ...]:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "these bytes hash to something else"}
        self.hub.storage[oid] = content
        return 200, b""

    def _commit(self, commits: list[Commit], content: bytes) -> tuple[Any, ...]:
        lines = [json.loads(line) for line in content.splitlines()]
        tree, message = dict(commits[-1].tree), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), None)
            elif line["key"] == "lfsFile":
                held = self.hub.storage.get(value["oid"])
                if held is None and self.hub.xet:  # in Xet's own storage, of which this server knows nothing
                    held = bytes(value["size"])
                if held is None:
                    return 400, {"error": f"{value['path']} was never uploaded"}
                tree[value["path"]] = File(held, value["oid"])
        tree.pop(self.hub.loses, None)
        commits.append(Commit(_oid(message, commits[-1].oid, repr(sorted(tree))), message, tree))
        return 200, {"commitUrl": f"{self.hub.url}/c/{commits[-1].oid}", "commitOid": commits[-1].oid}

    def _commits(self, commits: list[Commit], content: bytes) -> tuple[Any, ...]:
        date = "2026-01-01T00:00:00.000Z"
        told = [
            {"id": one.oid, "title": one.message, "message": "", "authors": [], "date": date}
            for one in reversed(commits)
        ]
        return 200, told

    def _tree(self, commits: list[Commit], content: bytes) -> tuple[Any, ...]:
        entries = []
        for path, file in sorted(commits[-1].tree.items()):
            size = len(file.content)
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": blob_id(file.content)}
            if file.lfs:
                entry["oid"] = blob_id(file.lfs.encode())  # of the pointer, not of the content
                entry["lfs"] = {"oid": file.lfs, "size": size, "pointerSize": 130}
            entries.append(entry)
        # in pages, as the Hub does
        begin, count = int(self.query.get("cursor", ["0"])[0]), 3
        link = f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={begin + count}>; rel="next"'
        more = {"Link": link} if begin + count < len(entries) else {}
        return 200, entries[begin : begin + count], more

"""A model hub on this machine, with what can go wrong with the real one: it speaks the part of the protocol that
downloading needs. Repository answers come from 127.0.0.1, large files from "another host", localhost, as with a CDN."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a-token-that-may-read"
_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)")
_SENT_AT_ONCE = 16 << 10


@dataclass
class Repo:
    """A repository; files ending like `in_git` are not in LFS. `listing` overrides entries of the API's answer."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    in_git: tuple[str, ...] = (".json", ".md", ".txt")
    listing: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: object = None  # what the hub has read of config.json

    def is_lfs(self, name: str) -> bool:
        return not name.endswith(self.in_git)

    def oid(self, name: str) -> str:
        content = self.files[name]
        if self.is_lfs(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def siblings(self) -> list[dict[str, Any]]:
        found = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": self.oid(name)[:40]}
            if self.is_lfs(name):
                entry["lfs"] = {"sha256": self.oid(name), "size": len(content), "pointerSize": 130}
            found.append(entry | self.listing.get(name, {}))
        return found


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of a large file's answer, then the connection ends
    cuts: int = 1 << 30  # how many answers are cut
    ranges: bool = True
    delay: float = 0.0  # seconds before each 16 KiB
    etags: dict[str, str] = field(default_factory=dict)  # by file, instead of the true one
    sizes: dict[str, int] = field(default_factory=dict)  # X-Linked-Size
    totals: dict[str, int] = field(default_factory=dict)  # in Content-Range
    contents: dict[str, bytes] = field(default_factory=dict)  # sent instead of the true content
    failures: int = 0  # large-file requests that are answered by 503
    shift: int = 0  # bytes by which a part is another than was asked for
    extra: bytes = b""  # sent behind what was asked for
    answer: bytes | None = None  # of the API, instead of the true one
    port: int = 0
    served: int = 0  # bytes of large files
    requests: list[str] = field(default_factory=list)
    authorized_elsewhere: bool = False  # a token has reached the other host
    open_now: int = 0
    open_most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, cache: object) -> dict[str, str]:
        """What makes huggingface_hub in a child process speak to this server."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what tests do."""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` until the block ends."""

    class Handler(_Handler):
        state = hub

    server = _Server(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if match := _API.fullmatch(path):
            self._api(match[1], match[2] or "main")
        elif path.startswith("/cdn/"):
            self._large(path)
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._fail(404, "")

    def _api(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision, needs_access=False)
        if repo is None:
            return
        content = {"id": name, "modelId": name, "sha": repo.commit, "gated": "auto" if repo.gated else False}
        rest = {"private": repo.private, "tags": [], "config": repo.config, "siblings": repo.siblings()}
        body = json.dumps(content | rest).encode()
        self._send(200, self.state.answer or body, {"Content-Type": "application/json"})

    def _repo(self, name: str, revision: str, *, needs_access: bool) -> Repo | None:
        repo = self.state.repos.get(name)
        given = self.headers.get("Authorization", "")
        authorized = given == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not authorized):
            self._fail(401 if not given else 404, "RepoNotFound")
        elif revision not in (*repo.branches, repo.commit):
            self._fail(404, "RevisionNotFound")
        elif repo.gated and needs_access and not authorized:
            self._fail(403 if given else 401, "GatedRepo")
        else:
            return repo
        return None

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision, needs_access=True)
        if repo is None:
            return
        if file not in repo.files:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
            return
        etag = self.state.etags.get(file, repo.oid(file))
        if not repo.is_lfs(file):
            self._file(file, repo.files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit})
            return
        headers = {
            "Location": f"http://localhost:{self.state.port}/cdn/{name}/{file}",
            "X-Repo-Commit": repo.commit,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(self.state.sizes.get(file, len(repo.files[file]))),
        }
        self._send(302, b"", headers)

    def _large(self, path: str) -> None:
        owner, repo, file = path.removeprefix("/cdn/").split("/", 2)
        self.state.authorized_elsewhere |= "Authorization" in self.headers
        with self.state.lock:
            self.state.failures -= 1
            fails = self.state.failures >= 0
            self.state.open_now += 1
            self.state.open_most = max(self.state.open_most, self.state.open_now)
        try:
            if fails:
                self._fail(503, "")
            else:
                self._file(file, self.state.repos[f"{owner}/{repo}"].files[file], {}, large=True)
        finally:
            with self.state.lock:
                self.state.open_now -= 1

    def _file(self, name: str, true: bytes, headers: dict[str, str], *, large: bool = False) -> None:
        content = self.state.contents.get(name, true)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not self.state.ranges:
            self._send(200, content, headers, large=large)
            return
        start, end = int(asked[1]) + self.state.shift, min(int(asked[2] or len(content)) + 1, len(content))
        total = self.state.totals.get(name, len(content))
        headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        self._send(206, content[start:end] + self.state.extra, headers, large=large)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, large: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.state.lock:
            cut = self.state.cut_after if large and self.state.cuts > 0 else None
            self.state.cuts -= cut is not None
        for at in range(0, len(body) if cut is None else min(cut, len(body)), _SENT_AT_ONCE):
            piece = body[at : min(at + _SENT_AT_ONCE, len(body) if cut is None else cut)]
            if large and self.state.delay:
                time.sleep(self.state.delay)
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has had enough
                self.close_connection = True
                return
            if large:
                with self.state.lock:
                    self.state.served += len(piece)
        if cut is not None and cut < len(body):
            self.close_connection = True

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

"""One file from the hub to the disk: in parallel parts, taken up where a stopped run left off, checked by its hash.

huggingface_hub itself keeps nothing of a download that was stopped, reads one stream, and does not compare hashes; so
the bytes come through its session and its authorization, but are written here:

    OID.koala.incomplete    the file in its full length, filled part by part
    OID.koala.state         JSON: how many bytes of each part are there

Both lie in the folder of the finished file. Its hash is computed from the disk, so a torn state file costs a second
download at worst.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from koala_local.errors import KoalaError
from koala_local.wording import first_line

PART = 64 << 20  # bytes
WORKERS = 4
_READ = 1 << 20
_SAVE_S = 1.0
_PAUSE_S = 1.0  # before a request is sent again; twice as long after each try that brings nothing
_TRIES = 5  # that bring not one byte
_SHOWN = 120

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


class HubError(KoalaError):
    """A model that the hub does not have or does not give, or an answer of it that cannot be right."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes come from, and which they must be. `oid`: their SHA-256, or git's SHA-1 of them."""

    url: str
    headers: Mapping[str, str]
    name: str  # for messages
    size: int
    oid: str


def fetch(source: Source, destination: Path, progress: Progress) -> None:
    """Make `destination` hold the bytes of `source`. Stopped by an exception it keeps what has come, and goes on from
    there when called again. Raises HubError, HfHubHTTPError, httpx2.TransportError or OSError."""
    partial = _Partial(destination, source.size)
    try:
        _fill(source, partial, progress)
    except _NoRanges:
        partial.start_anew(part=max(source.size, 1))
        _fill(source, partial, progress)
    _check(source, partial, progress)
    partial.finish(destination)


def bytes_kept(destination: Path, size: int) -> int:
    """How much of it a stopped run has left."""
    return _Partial(destination, size).total


def remove_partial(path: Path) -> None:
    """Remove a half-finished download, named by either of its files."""
    stem = path.name.partition(".koala.")[0]
    for suffix in (".koala.incomplete", ".koala.state", ".koala.state.partial"):
        path.with_name(stem + suffix).unlink(missing_ok=True)


class _Partial:
    """A file that is being filled. `done[i]`: bytes of part i that are there; its writers are threads."""

    def __init__(self, destination: Path, size: int) -> None:
        self.path = destination.with_name(f"{destination.name}.koala.incomplete")
        self.state = destination.with_name(f"{destination.name}.koala.state")
        self.size = size
        self.part, self.done = self._read() or (PART, _empty(size, PART))

    @property
    def total(self) -> int:
        return sum(self.done)

    def length(self, number: int) -> int:
        return min(self.part, self.size - number * self.part)

    def start_anew(self, part: int) -> None:
        self.part, self.done = part, _empty(self.size, part)

    def prepare(self) -> None:
        """Make the file, in its full length; the disk fills with its content only."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self.size)

    def save(self) -> None:
        state = {"size": self.size, "part": self.part, "done": list(self.done)}
        temporary = self.state.with_name(f"{self.state.name}.partial")
        with suppress(OSError):  # a full disk has its own error; without this note the download begins anew
            try:
                temporary.write_text(json.dumps(state))
                temporary.replace(self.state)
            finally:
                temporary.unlink(missing_ok=True)

    def finish(self, destination: Path) -> None:
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
        self.path.replace(destination)
        self.state.unlink(missing_ok=True)

    def _read(self) -> tuple[int, list[int]] | None:
        """What the state file says, None where it says nothing that can be so."""
        try:
            found = json.loads(self.state.read_bytes())
            part, done = found["part"], found["done"]
            usable = found["size"] == self.size == self.path.stat().st_size and type(part) is int and part > 0
            usable = usable and len(done) == len(_empty(self.size, part))
            usable = usable and all(
                type(count) is int and 0 <= count <= min(part, self.size - number * part)
                for number, count in enumerate(done)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (part, done) if usable else None


def _empty(size: int, part: int) -> list[int]:
    return [0] * -(-size // part)


class _NoRanges(Exception):
    """The server sends the whole file, whichever part is asked for."""


def _fill(source: Source, partial: _Partial, progress: Progress) -> None:
    """Bring all parts, WORKERS at a time. On any exception the workers stop and what is there is noted."""
    partial.prepare()
    left = deque(number for number, count in enumerate(partial.done) if count < partial.length(number))
    errors: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set() and left:
                with suppress(IndexError):
                    _bring_part(source, partial, left.popleft(), stop)
        except BaseException as error:  # raised again by the thread that waits
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(left)))]
    for worker in workers:
        worker.start()
    try:
        _wait(workers, partial, progress)
    finally:
        stop.set()
        for worker in workers:
            worker.join(2)  # a worker that waits for a silent server must not keep the user waiting, too
        if partial.total:
            partial.save()
        else:
            remove_partial(partial.path)
    if errors:
        raise errors[0]


def _wait(workers: list[threading.Thread], partial: _Partial, progress: Progress) -> None:
    saved = time.monotonic()
    for worker in workers:
        while worker.is_alive():
            worker.join(0.1)
            progress(partial.total, partial.size, "")
            if time.monotonic() - saved > _SAVE_S:
                partial.save()
                saved = time.monotonic()


def _bring_part(source: Source, partial: _Partial, number: int, stop: threading.Event) -> None:
    """Ask for the rest of a part until it is there. Raises when _TRIES requests in a row bring nothing."""
    tries = 0
    while partial.done[number] < partial.length(number) and not stop.is_set():
        before = partial.done[number]
        problem: Exception | None = None
        try:
            _request(source, partial, number, stop)
        except httpx2.TransportError as error:
            problem = error
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code not in (408, 429):
                raise
            problem = error
        if stop.is_set() or partial.done[number] == partial.length(number):
            return
        tries = 0 if partial.done[number] > before else tries + 1
        if tries == _TRIES:
            what = f"the connection fails again and again before {source.name} is complete"
            reason = f" ({first_line(problem, _SHOWN)})" if problem else ""
            raise HubError(what + reason, "give the same command again later: it goes on from here")
        stop.wait(_PAUSE_S * 2**tries)


def _request(source: Source, partial: _Partial, number: int, stop: threading.Event) -> None:
    start = number * partial.part + partial.done[number]
    end = number * partial.part + partial.length(number)
    headers = {**source.headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    stream = get_session().stream(
        "GET", source.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    )
    with stream as response, partial.path.open("r+b") as file:
        hf_raise_for_status(response)
        _check_unchanged(source, response)
        _check_range(source, response, start, whole=len(partial.done) == 1)
        file.seek(start)
        for chunk in response.iter_bytes():
            if stop.is_set():
                return
            wanted = chunk[: partial.length(number) - partial.done[number]]
            file.write(wanted)
            file.flush()
            partial.done[number] += len(wanted)
            if len(wanted) < len(chunk):
                raise HubError(f"the server sends more of {source.name} than was asked for", _LIES)


_LIES = "the server cannot be trusted with this file; try another repository"


def _check_unchanged(source: Source, response: httpx2.Response) -> None:
    """Raise where the hub, in what it says before it sends elsewhere for a large file, names another hash or size."""
    for answer in response.history:
        etag, size = answer.headers.get("X-Linked-Etag", ""), answer.headers.get("X-Linked-Size", "")
        if etag.removeprefix("W/").strip('"') not in ("", source.oid) or size not in ("", str(source.size)):
            what = f"{source.name} on the hub has changed: other size or hash than its listing says"
            raise HubError(what, "try again; if it stays so, the server is at fault")


def _check_range(source: Source, response: httpx2.Response, start: int, *, whole: bool) -> None:
    """Raise unless the answer holds the file's bytes from `start` on."""
    if response.status_code == 200:
        if start or not whole:
            raise _NoRanges
        total = response.headers.get("Content-Length", "")
    else:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(start):
            raise HubError(f"the server sends another part of {source.name} than was asked for", _LIES)
    if total.isdecimal() and int(total) != source.size:
        what = f"{source.name} should have {source.size} bytes, the server says {total}"
        raise HubError(what, "the file was changed, or the server is at fault: try again later")


def _check(source: Source, partial: _Partial, progress: Progress) -> None:
    """Raise HubError, with nothing left on the disk, unless the file has the hash that the hub names."""
    digest: Any = hashlib.sha256()
    if len(source.oid) == 40:  # how git names a file's content
        digest = hashlib.sha1(b"blob %d\0" % source.size, usedforsecurity=False)
    with partial.path.open("rb") as file:
        done = 0
        while data := file.read(_READ):
            digest.update(data)
            done += len(data)
            progress(done, source.size, "checking")
    if digest.hexdigest() != source.oid:
        remove_partial(partial.path)
        what = f"{source.name} is not what the hub says it is: its hash is {digest.hexdigest()}, not {source.oid}"
        raise HubError(what, "the download was removed; give the same command again")

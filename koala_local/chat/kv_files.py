"""Saved KV caches: one file per session, and beside it a record that says for what it is good.

llama.cpp dies on a damaged KV file, or loads it with other tokens. So nothing is loaded before the record is whole and
was made for this model and these settings, and the file has the length and the SHA-256 that the record gives.

The order of a save makes `kill -9` harmless at any moment:
 1. the engine writes to a temporary name, which is flushed to disk and hashed;  killed here: the old pair stays
 2. the old record is removed;                                                   killed here: no record, so none saved
 3. the temporary file gets the final name;                                      killed here: no record, so none saved
 4. the record is written to a temporary name, flushed, and renamed;             killed after it: the new pair
A power cut may undo step 2 and keep step 3: the old record then meets a file of another hash, and is refused.
A temporary file stays locked while it is written; the next save removes those that nobody holds (see disk.py).
The checksums tell accidents apart from good files; they are no signature, and the folder is private for that.

By default all files together take at most 8 GiB: four full 7B conversations (f16, 4096 tokens: 2 GiB each), or
hundreds of short ones. The oldest leave first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from koala_local.disk import PRIVATE, remove_leftovers, replacing, write_whole
from koala_local.engine.base import Engine
from koala_local.errors import SessionError
from koala_local.paths import private_folder, session_file

LIMIT_BYTES = 8 << 30
_FORMAT = 2
_RECORD_LIMIT = 64 << 20  # a record of a million tokens takes 8 MB
_YOUNG_S = 60.0
_HINT = "the conversation itself is saved; only resuming it will take longer"


class CacheMiss(Exception):
    """There is no saved KV cache that can be used; the text says why. The conversation must be evaluated again."""


class SavedCache(NamedTuple):
    """A checked file, and the tokens whose KV it holds."""

    ids: tuple[int, ...]
    path: Path


class _Record(NamedTuple):
    format: int
    length: int  # of the file, in bytes
    sha256: str  # of the file
    cache_key: str
    vocabulary: str
    saved: str  # UTC
    ids: list[int]


class KvFiles:
    """The saved KV caches in one folder. Nothing is written before the first `save`."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder, self._limit = folder, limit_bytes

    def save(self, session_id: str, engine: Engine, slot: int, ids: Sequence[int]) -> None:
        """Write the KV of a slot, whose tokens are `ids`, in place of what was saved for the session. Raises
        SessionError when it cannot be written or alone exceeds the limit; what was saved before then stays, or nothing.
        """
        data, record = self._pair(session_id)
        try:
            private_folder(self._folder)
            remove_leftovers(self._folder)
            with replacing(data, mode=PRIVATE) as temporary:
                engine.save(slot, ids, temporary)
                length, sha256 = _flush(temporary)
                content = _encode(_record(engine, ids, length, sha256))
                self._check_size(length + len(content))
                record.unlink(missing_ok=True)
            write_whole(record, [content], mode=PRIVATE)
        except OSError as error:
            if not record.exists():  # what remains of the pair is of no use, and may fill the disk
                _delete(data)
            reason = error.strerror or error
            raise SessionError(f"the KV cache cannot be written to {self._folder}: {reason}", _HINT) from error
        self.prune(keep=session_id)

    def check(self, session_id: str, engine: Engine) -> SavedCache:
        """What is saved for a session, whole and made for this engine. Raises CacheMiss; a damaged pair is removed."""
        data, path = self._pair(session_id)
        try:
            record = _read(path)
            _compare(record, engine)
            with data.open("rb") as file:
                whole = os.fstat(file.fileno()).st_size == record.length and _sha256(file) == record.sha256
        except FileNotFoundError:
            raise CacheMiss("no KV cache was saved") from None
        except OSError as error:
            raise CacheMiss(f"the saved KV cache cannot be read: {error.strerror or error}") from error
        except ValueError:
            whole = False
        if not whole:
            _delete(path, data)
            raise CacheMiss("the saved KV cache is damaged")
        return SavedCache(tuple(record.ids), data)

    def restore(self, session_id: str, engine: Engine, slot: int) -> list[int]:
        """Load what is saved for a session into a slot and return its tokens. Raises CacheMiss; the slot is then empty
        if the engine had begun to load."""
        saved = self.check(session_id, engine)
        try:
            ids = engine.load(slot, saved.path)
        except OSError as error:
            engine.crop(slot, 0)
            raise CacheMiss(f"the saved KV cache cannot be loaded: {error}") from error
        if tuple(ids) != saved.ids:  # another program has just saved the same session
            engine.crop(slot, 0)
            raise CacheMiss("another program has just replaced the saved KV cache")
        return ids

    def remove(self, session_id: str) -> None:
        """Delete what is saved for a session, if anything is. Raises SessionError when it cannot be deleted."""
        data, record = self._pair(session_id)
        try:
            record.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        except OSError as error:
            raise SessionError(f"{data} cannot be deleted: {error.strerror}", "delete it by hand") from error

    def prune(self, keep: str = "") -> None:
        """Delete halves of pairs and leftovers, then the oldest pairs until the rest keeps the limit; never that of the
        session `keep`. What cannot be deleted stays."""
        remove_leftovers(self._folder)
        sizes: dict[tuple[int, str], int] = {}
        for session_id in {path.stem for pattern in ("*.kv", "*.json") for path in self._folder.glob(pattern)}:
            pair = [self._folder / f"{session_id}.kv", self._folder / f"{session_id}.json"]
            try:
                sizes[pair[0].stat().st_mtime_ns, session_id] = sum(path.stat().st_size for path in pair)
            except OSError:
                if not any(_is_young(path) for path in pair):  # another program may be between its two renames
                    _delete(*reversed(pair))
        total = sum(sizes.values())
        for (_, session_id), size in sorted(sizes.items()):
            if total > self._limit and session_id != keep:
                _delete(self._folder / f"{session_id}.json", self._folder / f"{session_id}.kv")
                total -= size

    def _pair(self, session_id: str) -> tuple[Path, Path]:
        return session_file(self._folder, session_id, ".kv"), session_file(self._folder, session_id, ".json")

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            have, most = size / (1 << 30), self._limit / (1 << 30)
            raise SessionError(f"the KV cache takes {have:.3g} GiB, saved ones may take {most:.3g} in all", _HINT)


def _record(engine: Engine, ids: Sequence[int], length: int, sha256: str) -> _Record:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return _Record(_FORMAT, length, sha256, engine.cache_key, engine.vocabulary.key, now, list(ids))


def _encode(record: _Record) -> bytes:
    return _with_checksum(json.dumps(record._asdict(), separators=(",", ":")).encode())


def _with_checksum(line: bytes) -> bytes:
    """A line of JSON, and a second one with its SHA-256: any changed byte shows, before anything is parsed."""
    return b'%b\n"%b"\n' % (line, hashlib.sha256(line).hexdigest().encode())


def _read(path: Path) -> _Record:
    """Raises OSError, and ValueError when it is not exactly what `_encode` writes."""
    with path.open("rb") as file:
        content = file.read(_RECORD_LIMIT)
    line = content.partition(b"\n")[0]
    if content != _with_checksum(line):
        raise ValueError("the checksum does not match")
    fields: Any = json.loads(line)
    if fields.get("format") != _FORMAT:
        raise CacheMiss("the KV cache was saved by another version of this program")
    return _Record(**fields)


def _compare(record: _Record, engine: Engine) -> None:
    """Raises CacheMiss with the first difference between the engine that saved and this one."""
    if record.vocabulary != engine.vocabulary.key:
        raise CacheMiss("it was made with another model: the vocabulary differs")
    if record.cache_key == engine.cache_key:
        return
    then, now = _settings(record.cache_key), _settings(engine.cache_key)
    changed = [name for name in now if then.get(name) != now[name]]
    if not changed or changed[0] == "model" or changed[0] not in then:
        raise CacheMiss("the model file changed")
    name = {"kv": "KV type", "flash": "flash attention setting"}.get(changed[0], changed[0])
    raise CacheMiss(f"the {name} is {now[changed[0]]} now, was {then[changed[0]]}")


def _settings(cache_key: str) -> dict[str, str]:
    """`name=value` words by their names."""
    return dict(word.partition("=")[::2] for word in cache_key.split())


def _flush(path: Path) -> tuple[int, str]:
    """Bring a file to the disk; returns its length and SHA-256."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, _sha256(file)


def _sha256(file: BufferedReader | BufferedRandom) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _is_young(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < _YOUNG_S
    return False


def _delete(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()

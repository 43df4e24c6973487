"""Where the program keeps its files: the platform's own folders, or all of them below KOALA_HOME.

    data_folder()    sessions.db, locks/ and kv/: what a user would miss
    cache_folder()   what can be fetched or computed again

These functions only name folders. Whoever writes makes them, with `private_folder`: nobody else may look inside.
"""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

import platformdirs

from koala_local.errors import KoalaError, SessionError

_APP = "koala"
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def data_folder() -> Path:
    """Sessions and their KV caches."""
    return _below_home("data") or platformdirs.user_data_path(_APP, appauthor=False)


def kv_folder() -> Path:
    """One saved KV cache per session."""
    return data_folder() / "kv"


def cache_folder() -> Path:
    """What can be fetched or computed again."""
    return _below_home("cache") or platformdirs.user_cache_path(_APP, appauthor=False)


def typed_path(text: str) -> Path:
    """The path that someone typed; ~ is the home folder. Raises KoalaError as `unquoted` does."""
    return Path(os.path.expanduser(unquoted(text)))


def unquoted(text: str) -> str:
    """The name that someone typed, or pasted as a shell takes it: without quotes and backslashes, unless a file is
    called `text` itself. Raises KoalaError where the system does not take it, or the folder may not be looked into."""
    word = _shell_word(text)
    for name in (text, word):
        try:
            os.stat(os.path.expanduser(name))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            raise KoalaError(f"{name[:80]!r} cannot be used: {reason}", "check the name and its folders") from None
        return name
    return word


def _shell_word(text: str) -> str:
    """What a shell takes `text` for, if for one word, else `text`."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without its second
        return text
    return words[0] if len(words) == 1 and words[0] else text


def private_folder(folder: Path) -> Path:
    """Make `folder` with its missing parents, open to its owner only (0700), and return it. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if folder.stat().st_mode & 0o077:
        with suppress(OSError):  # on a file system without modes, or in another user's folder
            folder.chmod(0o700)
    return folder


def session_file(folder: Path, session_id: str, suffix: str) -> Path:
    """The file of one session in `folder`. Raises SessionError for an id that could lead out of it."""
    if not _SESSION_ID.fullmatch(session_id):
        raise SessionError(f"{session_id[:80]!r} is no session id", "`koala sessions` lists them")
    return folder / f"{session_id}{suffix}"


def _below_home(name: str) -> Path | None:
    home = os.environ.get("KOALA_HOME")
    return Path(home).expanduser().absolute() / name if home else None

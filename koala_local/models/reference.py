"""Names that come from a user or from the hub, checked before any path or address is built from them.

owner/repo[:TYPE or FILE][@REVISION]     a model on the hub; an alias may stand for owner/repo
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9](?:[\w./-]*\w)?", re.ASCII)
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 255
PREFIX = "models--"  # of a repository's folder in the cache


class HubReference(NamedTuple):
    """A model on the hub. `choice`: a type such as Q4_K_M, or a file; None leaves it open."""

    repository: str
    choice: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        choice = f":{self.choice}" if self.choice else ""
        return f"{self.repository}{choice}{f'@{self.revision}' if self.revision else ''}"


def split(text: str) -> tuple[str, str | None, str | None]:
    """(name, choice, revision), none of them checked."""
    name, at, revision = text.partition("@")
    name, colon, choice = name.partition(":")
    return name, choice if colon else None, revision if at else None


def parse(text: str, repository: str | None = None) -> HubReference | None:
    """What `text` names on the hub, in `repository` where its name was an alias; None when it has another form, or
    holds a part that could lead anywhere else."""
    name, choice, revision = split(text)
    name = repository or name
    if not is_repository(name):
        return None
    if (choice is not None and not is_safe_name(choice)) or (revision is not None and not is_revision(revision)):
        return None
    return HubReference(name, choice, revision)


def is_repository(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and len(name) <= 96 and ".." not in name and "--" not in name


def is_revision(name: str) -> bool:
    """A branch, a tag, a commit or `refs/pr/1`. It becomes a file name in the cache."""
    return bool(_REVISION.fullmatch(name)) and len(name) <= _LONGEST and ".." not in name and "//" not in name


def is_commit(name: object) -> bool:
    return isinstance(name, str) and bool(_COMMIT.fullmatch(name))


def is_oid(name: object) -> bool:
    """A SHA-256, or the SHA-1 of a git blob. It becomes a file name in the cache."""
    return isinstance(name, str) and bool(_OID.fullmatch(name))


def is_safe_name(name: object) -> bool:
    """Whether a file of this name lies inside the folder that the name is joined to, on any system."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return False
    if not name.isprintable() or "\\" in name or ":" in name:
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def repository_of(path: Path) -> str | None:
    """The repository whose snapshot `path` is; None for any other folder."""
    home = path.parent.parent
    if path.parent.name != "snapshots" or not home.name.startswith(PREFIX):
        return None
    return home.name.removeprefix(PREFIX).replace("--", "/", 1)


def name_of(path: Path) -> str:
    """The name that tells what the model at `path` is: a snapshot in the cache is called after its commit."""
    return (repository_of(path) or path.name).rpartition("/")[2]

"""A conversation as a file: markdown to read, JSON with everything."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from koala_local.chat.conversation import Conversation
from koala_local.disk import write_whole
from koala_local.engine.text_stream import plain
from koala_local.errors import KoalaError
from koala_local.paths import typed_path


def export(conversation: Conversation, model_name: str, reference: str, *, overwrite: bool) -> Path:
    """Write the conversation to the file `reference` (.md or .json; .md where it has no suffix), and return its path.
    Raises KoalaError."""
    path = typed_path(reference)
    if path.is_dir():
        raise KoalaError(f"{str(path)!r} is a folder", "add a file name to it")
    path = path if path.suffix else path.with_name(f"{path.name}.md")
    if path.suffix not in (".md", ".json"):
        raise KoalaError(f"a conversation cannot be written as {path.suffix[:20]}", "choose a name in .md or .json")
    if path.exists() and not overwrite:
        raise KoalaError(f"{str(path)!r} exists already", "add ! behind the name to overwrite it")
    if path.suffix == ".md":
        text = plain(as_markdown(conversation, model_name))
    else:
        text = json.dumps(as_json(conversation, model_name), indent=2) + "\n"
    try:
        write_whole(path, [text.encode("utf-8", "replace")])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise KoalaError(f"{str(path)!r} cannot be written: {reason}", "try another folder") from None
    return path


def as_markdown(conversation: Conversation, model_name: str) -> str:
    """The turns of the current path."""
    lines = [
        f"# {conversation.title or 'Conversation'}",
        "",
        f"{model_name}, prompt format {conversation.ledger.format.name}",
        "",
    ]
    if conversation.system:
        lines += ["## System", "", conversation.system, ""]
    for node in conversation.path():
        lines += ["## You", "", node.user, "", "## Reply", "", node.reply, ""]
    return "\n".join(lines)


def as_json(conversation: Conversation, model_name: str) -> dict[str, Any]:
    """The messages of the current path, and the whole tree of turns."""
    session = conversation.session
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for node in conversation.path():
        messages += [{"role": "user", "content": node.user}, {"role": "assistant", "content": node.reply}]
    return {
        "title": conversation.title,
        "session": session.id if session else None,
        "model": model_name,
        "format": conversation.ledger.format.name,
        "exported": _time(time.time()),
        "messages": messages,
        "system": conversation.system,
        "head": conversation.head,
        "turns": [
            {
                "id": node.id,
                "parent": node.parent,
                "user": node.user,
                "reply": node.reply,
                "finish": node.finish,
                "name": node.name,
                "created": _time(node.created),
            }
            for node in conversation.nodes.values()
        ],
    }


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

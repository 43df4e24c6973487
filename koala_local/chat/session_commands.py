"""Slash commands about sessions, the model, the prompt and files. Each gets the front and what follows its name."""

from __future__ import annotations

from koala_local.chat import clipboard, prompt_views, views
from koala_local.chat.attach import attachment, name_of
from koala_local.chat.export import export as write_file
from koala_local.chat.front import Front, change_model
from koala_local.dialogue import Dialogue, Turn
from koala_local.engine.sampling import with_setting
from koala_local.engine.text_stream import one_line, plain
from koala_local.errors import KoalaError
from koala_local.paths import unquoted

_LONGEST_LIST = 20


def sessions(front: Front, _: str) -> None:
    conversation = front.conversation
    saved = conversation.history.sessions()
    if not saved:
        front.show("no session is saved yet")
        return
    front.show(views.sessions_table(saved[:_LONGEST_LIST], conversation.session.id if conversation.session else None))
    if len(saved) > _LONGEST_LIST:
        front.show(f"{len(saved) - _LONGEST_LIST} older ones: koala sessions")


def resume(front: Front, session_id: str) -> None:
    conversation = front.conversation
    current = conversation.session.id if conversation.session else None
    if not session_id:
        others = [session.id for session in conversation.history.sessions() if session.id != current]
        if not others:
            raise KoalaError("there is no other session to go on with", "/sessions lists what is saved")
        session_id = others[0]
    conversation.resume(session_id)
    front.last = None
    found = conversation.session.id if conversation.session else session_id
    turns = len(conversation.path())
    front.show(f"resumed {found}: {conversation.title} ({turns} {'turn' if turns == 1 else 'turns'})")
    front.show(views.recap(conversation))


def rename(front: Front, title: str) -> None:
    if not title:
        raise KoalaError("a title is missing", "/rename TITLE")
    front.conversation.rename(one_line(title))
    front.show(f"this conversation is called {front.conversation.title}")


def export(front: Front, argument: str) -> None:
    name = argument.removeprefix("--force ").strip()
    overwrite = name != argument
    if name.endswith("!"):
        name, overwrite = name[:-1].rstrip(), True
    if not name:
        raise KoalaError("a file name is missing", "/export FILE.md or /export FILE.json")
    path = write_file(front.conversation, front.model.name, name, overwrite=overwrite)
    front.show(f"written: {plain(str(path))}")


def model(front: Front, reference: str) -> None:
    if reference:
        change_model(front, unquoted(reference))
        front.last = None
    front.show(views.model_table(front.model))


def set_sampling(front: Front, argument: str) -> None:
    conversation = front.conversation
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if name and not value.strip():
        raise KoalaError(f"a value for {name} is missing", "/set NAME VALUE; /set alone shows all")
    if name:
        conversation.sampling = with_setting(conversation.sampling, name, value.strip())
    front.show(views.sampling_table(conversation.sampling))


def stats(front: Front, _: str) -> None:
    front.show(views.stats_table(front.conversation, front.last))


def tokens(front: Front, argument: str) -> None:
    if argument and not (argument.isdecimal() and int(argument[:6]) > 0):
        raise KoalaError(f"{argument[:40]} is no number of turns", "/tokens 3 shows the last three turns")
    front.show(prompt_views.tokens_view(front.conversation, int(argument[:6]) if argument else None))


def attach(front: Front, reference: str) -> None:
    if reference == "none":
        front.attachments.clear()
    elif reference:
        text = attachment(reference)
        count = len(front.conversation.ledger.engine.tokenize(text))
        size = front.conversation.ledger.engine.context_size
        if count >= size:
            raise KoalaError(f"{name_of(text)} takes {count} tokens, the context holds {size}", "attach a part of it")
        front.attachments.append(text)
        front.show(f"{name_of(text)}: {count} tokens, sent in front of your next message")
        return
    names = ", ".join(name_of(text) for text in front.attachments)
    front.show(f"attached: {names}; /attach none takes them off" if names else "nothing is attached; /attach FILE")


def copy(front: Front, _: str) -> None:
    path = front.conversation.path()
    if not path:
        raise KoalaError("there is no reply to copy yet", "type a message first")
    front.show(f"copied with {clipboard.copy(plain(path[-1].reply))}")


def template(front: Front, reference: str) -> None:
    if reference:
        format, reason = front.model.choose_format(reference)
        format.segments(Dialogue((Turn("hello"),), front.conversation.system))  # one that fails is not adopted
        front.conversation.use_format(format)
        front.model = front.model._replace(format=format, format_reason=reason)
        front.options = front.options._replace(template=reference)
    front.show(f"{plain(front.model.format.name)} ({plain(front.model.format_reason)})")
    front.show(prompt_views.prompt_view(front.conversation))

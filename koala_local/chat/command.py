"""`koala chat` and `koala sessions`: options in, a conversation out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any

import click

from koala_local import console
from koala_local.engine.sampling import Sampling, with_setting
from koala_local.errors import KoalaError

if TYPE_CHECKING:
    from koala_local.chat.conversation import Conversation
    from koala_local.chat.history import History, Session
    from koala_local.chat.loader import LoadedModel, LoadOptions

_SILENCE_S = 2.0  # how long a pipe may say nothing before the user is told what the program waits for


def _setting(_: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """One funnel for every sampling number: a bad one is a usage error that names the range."""
    if value is not None:
        try:
            with_setting(Sampling(), str(option.name), value)
        except KoalaError as error:
            raise click.BadParameter(f"{error.message}: {error.hint}") from None
    return value


def _gpu_layers(_: click.Context, __: click.Parameter, value: str) -> int | None:
    if value in ("auto", "all"):
        return None if value == "auto" else 999
    if value.isdecimal() and int(value) < 1000:
        return int(value)
    raise click.BadParameter("it is auto, all, or a whole number from 0 to 999")


def _context(_: click.Context, __: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if value.isdecimal() and len(value) < 8 and 256 <= int(value) <= 1 << 20:
        return int(value)
    raise click.BadParameter(f"it is auto, or a whole number from 256 to {1 << 20}")


def _sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, kind, text in reversed(
        (
            ("temperature", float, "0 always takes the likeliest token; default 0.7."),
            ("top-k", int, "Draw among the K likeliest tokens; 0: all. Default 40."),
            ("top-p", float, "Draw among the likeliest tokens that have this share together. Default 0.95."),
            ("min-p", float, "Leave out tokens less likely than this share of the likeliest. Default 0.05."),
            ("repeat-penalty", float, "Above 1: recent tokens become less likely. Default 1."),
            ("max-tokens", int, "End a reply after this many tokens; 0: when the model ends it. Default 0."),
        )
    ):
        command = click.option(f"--{name}", type=kind, callback=_setting, help=text)(command)
    return command


@click.command(short_help="Talk to a model in the terminal.")
@click.argument("model", required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="One reply to TEXT, then exit.")
@click.option("--system", metavar="TEXT", help="A system text for the whole conversation.")
@click.option("--resume", is_flag=True, help="Go on with the last session.")
@click.option("--session", metavar="ID", help="Go on with this session (see `koala sessions`).")
@click.option(
    "--context",
    default="auto",
    metavar="auto|N",
    callback=_context,
    help="Tokens of context; auto: the model's, at most 4096, and less where memory is short.",
)
@click.option(
    "--gpu-layers",
    default="auto",
    metavar="auto|all|N",
    callback=_gpu_layers,
    help="Layers on the GPU; auto: as many as fit.",
)
@click.option(
    "--kv-type",
    type=click.Choice(["auto", "f16", "q8_0", "q4_0"]),
    default="auto",
    help="KV cache precision; auto: f16, and q8_0 where memory is short.",
)
@click.option("--template", default="auto", metavar="auto|NAME|FILE", help="Prompt format, or a Jinja chat template.")
@_sampling_options
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes a run repeatable.")
@click.option(
    "--overflow",
    type=click.Choice(["exact", "shift"]),
    default="exact",
    help="When the context is full: evaluate what stays anew (exact), or move its KV (faster, approximate).",
)
@click.option("--json", "as_json", is_flag=True, help="Speak JSON lines: requests on stdin, replies on stdout.")
def chat(model: str | None, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Talk to MODEL: an alias such as koala-13b, OWNER/REPO[:TYPE or :FILE] on the Hugging Face hub, a GGUF file, or a
    GPTQ folder; by default the last one used, else the bundled miniature. At a terminal, what is not here yet is
    downloaded first.

    With -p, or with text on stdin, one reply is written and the program exits; with both, TEXT follows the text there.
    """
    if options["resume"] and options["session"]:
        raise click.UsageError("--resume and --session exclude each other")
    text = _message(prompt, as_json)
    if text is not None and not text.strip():
        raise KoalaError("there is no message", "give one with -p, on stdin, or start without either to chat")
    from koala_local.chat.terminal import silent_keys

    talks = text is None and not as_json
    with silent_keys() if talks else nullcontext():  # at once: people type while a model is loaded
        _start(model, text, as_json, options)


def _message(prompt: str | None, as_json: bool) -> str | None:
    """What gets one reply: the prompt, behind what is piped in. None where a conversation begins."""
    if as_json:
        return prompt
    if prompt is None:
        return _piped_text()
    piped = ""
    with suppress(OSError):  # nohup leaves a stdin that cannot be read
        piped = _piped_text() or ""
    return f"{piped}\n\n{prompt}" if piped else prompt


def _piped_text() -> str | None:
    """What stands on stdin when it is no terminal. Raises KoalaError where it is not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    if not select([sys.stdin], [], [], _SILENCE_S)[0]:
        console.note("waiting for what is piped in; Ctrl-D ends it, and </dev/null says that there is nothing")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").lstrip("\r\n").rstrip()
    except UnicodeDecodeError as error:
        raise KoalaError(
            f"stdin is not UTF-8 text (byte {error.start})", "convert it first, for example with iconv -t utf-8"
        ) from None


def _start(model: str | None, text: str | None, as_json: bool, options: dict[str, Any]) -> None:
    from koala_local.chat.history import History
    from koala_local.chat.loader import LoadOptions
    from koala_local.paths import data_folder

    load = LoadOptions(
        options["context"],
        options["gpu_layers"],
        options["kv_type"],
        options["template"],
        options["overflow"],
        quiet=text is not None,
    )
    history = History.open(data_folder())
    with closing(history):
        if history.warning:
            console.warn(history.warning)
        saved = history.load(options["session"])[0] if options["session"] else None
        if options["resume"]:
            saved = history.latest()
            if saved is None:
                console.note(f"there is no session to resume{'' if history.warning else ' yet'}: this is a new one")
        _fetch_missing(model)
        front = "pipe" if as_json or text is not None else "repl"  # imported while the model is loaded
        importing = partial(import_module, f"koala_local.chat.{front}")
        loaded, conversation = _open(model, saved, history, load, options, importing)
        try:
            _talk(conversation, loaded, load, text, as_json)
        finally:
            conversation.close()


def _open(
    model: str | None,
    saved: Session | None,
    history: History,
    load: LoadOptions,
    options: dict[str, Any],
    meanwhile: Callable[[], object],
) -> tuple[LoadedModel, Conversation]:
    """Load the model and begin, or take up, the conversation."""
    from koala_local.chat.conversation import LAST_MODEL, Conversation
    from koala_local.chat.kv_files import KvFiles
    from koala_local.chat.loader import open_model
    from koala_local.paths import kv_folder

    last = _last_model(history, saved.model if saved else None, asked=model is not None)
    loaded = open_model(model, last, load, console.note, meanwhile)
    try:
        sampling = Sampling()
        for name in Sampling._fields:
            if options.get(name) is not None:
                sampling = with_setting(sampling, name, options[name])
        conversation = Conversation(
            loaded.ledger(load.overflow),
            history,
            KvFiles(kv_folder()),
            model=str(loaded.path),
            sampling=sampling,
            note=console.note,
            seed=options["seed"],
            system="" if saved else options["system"] or "",
        )
        if saved:
            conversation.resume(saved.id)
            if options["system"] is not None and options["system"] != saved.system:
                conversation.set_system(options["system"])
            if load.template != "auto":
                conversation.use_format(loaded.format)
        if model is not None:
            with suppress(KoalaError):  # a chat does not hang on it
                history.set_setting(LAST_MODEL, str(loaded.path))
    except BaseException:
        loaded.engine.close()
        raise
    return loaded, conversation


def _fetch_missing(model: str | None) -> None:
    """Download a model of the hub that is not here yet. Raises NotHereError where nobody sits at a terminal to see how
    much that is."""
    from koala_local.models.resolve import NotHereError, resolve

    try:
        resolve(model, None)
    except NotHereError as error:
        if not (model and sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
            raise
        from koala_local.models.command import fetch

        fetch(model, error.wanted, to_run=True)


def _last_model(history: History, of_session: str | None, *, asked: bool) -> str | None:
    """Which model goes on where none is named: the session's, else the last one used."""
    from koala_local.chat.conversation import LAST_MODEL

    if of_session and Path(of_session).exists():
        return of_session
    if of_session and not asked:
        console.note(f"the session's model is gone ({of_session}): another one goes on with it")
    try:
        return history.setting(LAST_MODEL)
    except KoalaError:
        return None


def _talk(conversation: Conversation, loaded: LoadedModel, load: LoadOptions, text: str | None, as_json: bool) -> None:
    if as_json:
        from koala_local.chat.pipe import json_lines

        json_lines(conversation, loaded, load, text)
    elif text is not None:
        from koala_local.chat.pipe import one_reply

        one_reply(conversation, text)
    else:
        from prompt_toolkit.application import create_app_session
        from prompt_toolkit.output import create_output

        from koala_local.chat.repl import Repl

        with create_app_session(output=create_output(always_prefer_tty=True)):  # the prompt stays there
            Repl(conversation, loaded, load).run()


@click.group(invoke_without_command=True, short_help="List or remove saved sessions.")
@click.pass_context
def sessions(context: click.Context) -> None:
    """The saved sessions: `list` (the default) or `rm ID`."""
    if context.invoked_subcommand is None:
        context.invoke(list_sessions)


@sessions.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_sessions(as_json: bool = False) -> None:
    """Newest first: id, when it was last used, turns, title."""
    import time

    from koala_local.chat.history import History
    from koala_local.paths import data_folder

    with closing(History.open(data_folder())) as history:
        if history.warning:
            console.warn(history.warning)
        found = history.sessions()
    for session in found:
        if as_json:
            console.json_line(session._asdict())
        else:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.updated))
            turns = f"{session.turns:>4} {'turn ' if session.turns == 1 else 'turns'}"
            console.out(f"{session.id}  {when}  {turns}  {session.title}")
    if not found and not as_json and not history.warning:
        console.note("there are no saved sessions yet")


@sessions.command("rm")
@click.argument("session_id", metavar="ID")
def remove_session(session_id: str) -> None:
    """Remove a session with its KV cache."""
    from koala_local.chat.history import History
    from koala_local.chat.kv_files import KvFiles
    from koala_local.paths import data_folder, kv_folder

    with closing(History.open(data_folder())) as history:
        session, _ = history.load(session_id)
        lock = history.lock(session.id)
        if lock is None:
            raise KoalaError(f"{session.id} is open in another window", "leave it there first")
        with lock:
            history.remove(session.id)
    KvFiles(kv_folder()).remove(session.id)
    console.note(f"removed {session.id}: {session.title or 'no title'}")

"""The slash commands: their names, what they take, and how a line becomes one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from koala_local.chat import session_commands as session
from koala_local.chat import turn_commands as turn
from koala_local.chat.front import Front, say
from koala_local.errors import KoalaError


@dataclass(frozen=True, slots=True)
class Command:
    """`usage` is what follows the name; `run` gets that part of the line without spaces around it."""

    name: str
    usage: str
    help: str
    run: Callable[[Front, str], None]


def run_line(front: Front, line: str) -> None:
    """Run `/name argument`; a line that begins with `//` is a message that begins with one slash. Raises KoalaError,
    also for an unknown command, and Interrupted."""
    if line.startswith("//"):
        say(front, line[1:])
        return
    words = line.removeprefix("/").split(maxsplit=1)
    name = words[0].lower() if words else "help"
    command, argument = _find(_ALIASES.get(name, name)), words[1].strip() if len(words) > 1 else ""
    if argument and not command.usage:
        raise KoalaError(f"/{command.name} takes nothing behind it", f"/{command.name} alone: {command.help}")
    command.run(front, argument)


def _find(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    near = [f"/{match}" for match in difflib.get_close_matches(name, COMMANDS, 3, 0.5)]
    guess = f"did you mean {' or '.join(near)}?" if near else "/help lists the commands."
    raise KoalaError(f"there is no command /{name[:40]}", f"{guess} // begins a message with a slash")


def _help(front: Front, name: str) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    chosen = [_find(name.removeprefix("/"))] if name else COMMANDS.values()
    for command in chosen:
        table.add_row(Text(f"/{command.name} ", "bold").append(command.usage, "not bold cyan"), command.help)
    front.show(table if name else Group(table, Text(_KEYS, "dim")))


def _quit(front: Front, _: str) -> None:
    front.quit()


_KEYS = """
Enter sends, Alt-Enter or Ctrl-J begins a new line, Ctrl-X Ctrl-E opens your editor, Ctrl-R searches what you said.
Ctrl-C stops a reply and keeps what is written. Ctrl-D leaves."""
_ALIASES = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit"}
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("help", "[COMMAND]", "what there is", _help),
        Command("regen", "", "another reply to your last message", turn.regen),
        Command("edit", "[N] [TEXT]", "say something else at turn N", turn.edit),
        Command("undo", "", "step back behind the last turn", turn.undo),
        Command("branch", "[N] [NAME]", "go on behind turn N on a new line", turn.branch),
        Command("switch", "[N|NAME]", "go to another branch", turn.switch),
        Command("tree", "", "all turns and branches", turn.tree),
        Command("new", "", "begin another conversation", turn.new),
        Command("sessions", "", "saved conversations", session.sessions),
        Command("resume", "[ID]", "go on with a saved one", session.resume),
        Command("rename", "TITLE", "give this one a title", session.rename),
        Command("export", "FILE [!]", "write it as .md or .json; ! overwrites", session.export),
        Command("copy", "", "the last reply to the clipboard", session.copy),
        Command("attach", "[FILE|none]", "a text file for your next message", session.attach),
        Command("system", "[TEXT|none]", "show or set the system text", turn.system),
        Command("model", "[REF]", "show or change the model", session.model),
        Command("set", "[NAME VALUE]", "show or change the sampling", session.set_sampling),
        Command("template", "[NAME|FILE]", "show or change the prompt format", session.template),
        Command("tokens", "[N]", "the tokens of the last N turns", session.tokens),
        Command("stats", "", "speed, context and KV cache", session.stats),
        Command("quit", "", "leave; everything is saved", _quit),
    )
}

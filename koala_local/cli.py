"""The command `koala`. It knows each subcommand's name and help; the code behind one is imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from koala_local import __version__, console
from koala_local.errors import Interrupted, KoalaError

# name: (where its click command is, what `koala --help` says of it)
COMMANDS = {
    "bench": ("koala_local.chat.bench_command:bench", "Measure how fast a model is here."),
    "chat": ("koala_local.chat.command:chat", "Talk to a model in the terminal."),
    "data": ("koala_local.finetune.data.command:data", "Build a training corpus from raw dialogues, and look into it."),
    "doctor": ("koala_local.models.doctor_command:doctor", "Look for what is misconfigured, and measure."),
    "finetune": ("koala_local.finetune.command:finetune", "Train a model on dialogues."),
    "list": ("koala_local.models.command:list_models", "List the models that are here."),
    "pull": ("koala_local.models.command:pull", "Download a model, or register one of your own."),
    "quantize": ("koala_local.convert.command:quantize", "Make a model of 2 to 8 bits a weight from a checkpoint."),
    "recover": ("koala_local.convert.command:recover", "Add Koala's published weight difference to LLaMA."),
    "rm": ("koala_local.models.command:remove", "Remove a model from the cache, or forget one of your own."),
    "sessions": ("koala_local.chat.command:sessions", "List or remove saved conversations."),
    "show": ("koala_local.models.show_command:show", "Tell what a model is, and what memory it takes here."),
}
_TRACEBACK = click.Option(["--traceback"], is_flag=True, expose_value=False, help="Show where an error came from.")


class _LazyGroup(click.Group):
    """A group that lists its commands by name and help, and imports the one that is called."""

    def __init__(self) -> None:
        super().__init__(
            "koala",
            commands=[click.Command(name, short_help=text) for name, (_, text) in COMMANDS.items()],
            params=[_TRACEBACK],
            help="Koala on your own hardware: train a dialogue model, quantize it, and talk to it.",
            context_settings={"help_option_names": ["-h", "--help"]},
            invoke_without_command=True,
            callback=_show_help,
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load(command.name or ""), rest


def load(name: str) -> click.Command:
    """Import the command called `name`."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    _accept_traceback(command)
    return command


def _accept_traceback(command: click.Command) -> None:
    """`--traceback` may stand behind any subcommand. `main` reads it; click only needs to let it pass."""
    if _TRACEBACK not in command.params:
        command.params.append(_TRACEBACK)
    for subcommand in command.commands.values() if isinstance(command, click.Group) else ():
        _accept_traceback(subcommand)


@click.pass_context
def _show_help(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        console.out(context.get_help())


koala = click.version_option(__version__, message="koala %(version)s")(_LazyGroup())


def main() -> int:
    """Run `koala` with the program's arguments and return its exit status."""
    return console.run(_invoke, tracebacks="--traceback" in sys.argv)


def _invoke() -> int:
    """What `click.Group.main` does, but for its own answers to Ctrl-C, to a closed pipe and to errors."""
    try:
        with koala.make_context("koala", sys.argv[1:]) as context:
            result = koala.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        raise Interrupted from None
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "koala"
        raise console.UsageError(error.format_message(), f"{path} --help lists what there is") from None
    except click.ClickException as error:
        raise KoalaError(error.format_message()) from None
    return result if isinstance(result, int) else console.Exit.OK

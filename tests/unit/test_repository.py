"""What holds for the repository as a whole."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from koala_local import __version__
from koala_local.cli import COMMANDS, load

ROOT = Path(__file__).parents[2]
FOLDERS = ("koala_local", "convert", "finetune", "tests", "tools", "benchmarks", "examples", "docs", ".ci")
PROGRAM = ("koala_local", "convert", "finetune", "tools", "benchmarks")
LONGEST_FILE = 400  # lines, of the program


def source_files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt") or path.name == "Makefile")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".sh"):
                yield path


def dependencies() -> list[str]:
    """The names of all that pyproject.toml asks for, extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = [match[0] for name in asked if (match := re.match(r"[\w-]+", name))]
    return [name for name in names if name != project["name"]]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def all_commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, subcommand in command.commands.items():
            yield from all_commands(subcommand, f"{path} {name}")


def test_nothing_is_left_to_do() -> None:
    left = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")
    found = [str(path) for path in source_files() if left.search(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_no_file_of_the_program_is_too_long() -> None:
    files = [path for folder in PROGRAM for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 20
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    for path, command in all_commands(load(name), f"koala {name}"):
        assert command.help, path
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{path} {option.name}"


def test_every_dependency_is_locked_and_explained() -> None:
    pins = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    explained = re.findall(r"^\| `?([\w.-]+)`? \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    wanted = set(map(normal, dependencies()))
    assert wanted
    assert wanted - set(map(normal, pins)) == set()
    assert wanted - set(map(normal, explained)) == set()


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()

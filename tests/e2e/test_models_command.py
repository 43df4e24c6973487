"""The installed `koala` getting models from a hub on this machine: pull, list, rm, and chat with what was pulled."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.checkpoint_maker import make_hf
from tests.e2e.terminal import CTRL_D, ENTER, Terminal
from tests.e2e.test_chat_command import KOALA, koala
from tests.gguf_maker import make_model
from tests.hub_server import Hub, Repo, running

NAME = "owner/tiny-GGUF"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=512).read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[Hub]:
    files = {"tiny.Q4_K_M.gguf": content, "tiny.Q8_0.gguf": content + bytes(3_000_000), "README.md": b"a card"}
    repos = {NAME: Repo(files), "mradermacher/koala-13B-HF-GGUF": Repo({"koala-13B-HF.Q4_K_M.gguf": content})}
    with running(Hub(repos)) as hub:
        yield hub


class Machine:
    """A home folder, a cache, and a hub to reach."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.home, self.cache, self.hub = folder / "home", folder / "hub", hub
        self.environment = hub.environment(self.cache) | {"HF_HOME": str(folder / "hf")}

    def koala(self, *arguments: str | Path, **environment: str) -> Any:
        return koala(self.home, *arguments, stdin=None, **(self.environment | environment))

    def terminal(self, *arguments: str) -> Terminal:
        return Terminal(self.home, *arguments, columns=120, **self.environment)


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub)


def test_pull_list_chat_and_rm(machine: Machine) -> None:
    pulled = machine.koala("pull", NAME)
    assert pulled.returncode == 0, pulled.stderr.decode()
    path = Path(pulled.stdout.decode().strip())
    assert path.name == "tiny.Q4_K_M.gguf" and path.is_relative_to(machine.cache)
    shown = pulled.stderr.decode()
    assert "TYPE" in shown and "Q8_0" in shown and "->" in shown and "downloading" in shown
    again = machine.koala("pull", f"{NAME}:Q4_K_M")
    assert again.stdout == pulled.stdout and b"all of it is here" in again.stderr

    reply = machine.koala("chat", f"{NAME}:Q4_K_M", "-p", "hello", "--json", "--max-tokens", "4", HF_HUB_OFFLINE="1")
    assert json.loads(reply.stdout)["stats"]["generated_tokens"] <= 4
    default = machine.koala("chat", "-p", "hello", "--json", "--max-tokens", "4", HF_ENDPOINT="http://127.0.0.1:9")
    assert default.returncode == 0, default.stderr.decode()

    bundled, tiny = (json.loads(line) for line in machine.koala("list", "--json").stdout.splitlines())
    assert bundled["model"] == "nano" and bundled["last_used"] is None
    assert tiny["model"] == f"{NAME}:Q4_K_M" and tiny["path"] == str(path)
    assert (tiny["context"], tiny["type"], tiny["problem"]) == (512, "Q4_K_M", None)
    assert abs(tiny["last_used"] - time.time()) < 120
    table = machine.koala("list").stdout.decode().splitlines()
    assert table[0].split() == ["MODEL", "SIZE", "TYPE", "CONTEXT", "LAST", "USED"]
    assert len(table) == 3

    asked = machine.koala("rm", NAME)
    assert asked.returncode == 1 and b"--yes" in asked.stderr and path.exists()
    removed = machine.koala("rm", NAME, "--yes")
    assert removed.returncode == 0, removed.stderr.decode()
    assert not path.exists()
    assert len(machine.koala("list").stdout.splitlines()) == 2
    again = machine.koala("rm", NAME)
    assert again.returncode == 1 and b"not in the cache" in again.stderr


def test_an_older_commit_goes_alone(machine: Machine, content: bytes) -> None:
    old = Path(machine.koala("pull", f"{NAME}:Q4_K_M").stdout.decode().strip())
    repo = machine.hub.repos[NAME]
    machine.hub.repos[NAME] = Repo({"tiny.Q4_K_M.gguf": content + b"more"}, commit="c" * 40)
    new = Path(machine.koala("pull", f"{NAME}:Q4_K_M").stdout.decode().strip())
    removed = machine.koala("rm", f"{NAME}:Q4_K_M@{repo.commit}", "--yes")
    assert removed.stderr.startswith(f"removed {NAME}:Q4_K_M@{repo.commit} (".encode())
    assert removed.stderr.count(b"Q4_K_M") == 1
    assert new.exists() and not old.exists()


def test_a_checkpoint_is_pulled_for_the_converter_and_not_for_chat(machine: Machine, tmp_path: Path) -> None:
    files = make_hf(tmp_path / "hf", kind="bin", shards=2)
    contents = {path.name: path.read_bytes() for path in files.iterdir()}
    machine.hub.repos["TheBloke/koala-13B-HF"] = Repo(contents)
    terminal = machine.terminal("chat", "koala-13b-hf")
    assert terminal.end() == 1
    assert "unquantized checkpoint" in terminal.text and machine.hub.served == 0
    pulled = machine.koala("pull", "koala-13b-hf")
    folder = pulled.stdout.decode().strip()
    assert f"koala quantize {folder} --bits 4".encode() in pulled.stderr
    listed = json.loads(machine.koala("list", "--json").stdout.splitlines()[1])
    assert (listed["model"], listed["type"], listed["runs"]) == ("koala-13b-hf", "PYTORCH", False)
    refused = machine.koala("chat", "koala-13b-hf", "-p", "hi")
    assert refused.returncode == 1 and b"chat runs GGUF and GPTQ models" in refused.stderr
    shown = machine.koala("show", "koala-13b-hf").stdout.decode()
    assert shown.startswith("TheBloke/koala-13B-HF\n") and "koala quantize" in shown
    made = machine.koala("quantize", folder, "-o", tmp_path / "koala.gguf", "--type", "Q8_0", "--no-verify")
    assert made.returncode == 0, made.stderr.decode()
    named = json.loads(machine.koala("show", tmp_path / "koala.gguf", "--json").stdout)
    assert named["name"] == "koala-13B-HF"


def test_only_the_list_of_types(machine: Machine) -> None:
    result = machine.koala("pull", NAME, "--list")
    assert result.returncode == 0 and result.stdout == b""
    assert b"Q8_0" in result.stderr
    assert machine.hub.served == 0


def test_show_of_what_is_not_here_says_how_to_look_first(machine: Machine) -> None:
    missing = machine.koala("show", "koala-13b")
    assert missing.returncode == 1 and b"koala pull koala-13b --list" in missing.stderr


def test_an_alias_is_pulled_and_talked_to(machine: Machine) -> None:
    missing = machine.koala("chat", "koala-13b", "-p", "hi")
    assert missing.returncode == 1
    assert b"hint: download it: koala pull koala-13b\n" in missing.stderr
    assert machine.hub.served == 0
    assert machine.koala("pull", "koala-13b").returncode == 0
    assert machine.koala("chat", "koala-13b", "-p", "hi", "--max-tokens", "4").returncode == 0


def test_a_split_model_is_pulled_and_talked_to(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=9))
    make_model(tmp_path / "whole.Q6_K.gguf", context=512)
    parts = {path.name: path.read_bytes() for path in tmp_path.glob("whole*.gguf")}
    assert len(parts) == 3
    machine.hub.repos[NAME].files |= parts
    assert machine.koala("pull", f"{NAME}:Q6_K").returncode == 0
    reply = machine.koala("chat", f"{NAME}:Q6_K", "-p", "hi", "--json", "--max-tokens", "4")
    assert json.loads(reply.stdout)["stats"]["generated_tokens"] > 0
    listed = [json.loads(line) for line in machine.koala("list", "--json").stdout.splitlines()]
    assert listed[1]["size"] == sum(map(len, parts.values()))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_then_the_rest(machine: Machine, content: bytes, sent: signal.Signals, status: int) -> None:
    machine.hub.delay = 0.01
    environment = os.environ | {"KOALA_HOME": str(machine.home)} | machine.environment
    arguments = [KOALA, "pull", f"{NAME}:Q8_0"]
    child = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while machine.hub.served < 500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(sent)
    _, told = child.communicate(timeout=20)
    assert child.returncode == status and b"the same command goes on" in told
    machine.hub.delay, first = 0.0, machine.hub.served
    rest = machine.koala("pull", f"{NAME}:Q8_0")
    assert rest.returncode == 0, rest.stderr.decode()
    assert b"are missing" in rest.stderr
    whole = len(content) + 3_000_000
    assert Path(rest.stdout.decode().strip()).stat().st_size == whole
    assert 500_000 <= first < whole
    assert machine.hub.served < whole + 400_000  # what was under way when it stopped comes twice


def test_killed_and_then_the_rest(machine: Machine, content: bytes) -> None:
    machine.hub.delay = 0.02
    environment = os.environ | {"KOALA_HOME": str(machine.home)} | machine.environment
    child = subprocess.Popen([KOALA, "pull", f"{NAME}:Q8_0"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while machine.hub.served < 1_500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    machine.hub.delay = 0.0
    assert machine.koala("pull", f"{NAME}:Q8_0").returncode == 0
    assert machine.hub.served < 2 * (len(content) + 3_000_000) - 300_000  # at least a second's worth is kept


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        ("owner/nothing", b"no model owner/nothing"),
        (f"{NAME}:Q5_K_M", b"Q4_K_M, Q8_0"),
        (f"{NAME}:../../x", b"names no model on the hub"),
        ("koala13b", b"did you mean 'koala-13b'"),
    ],
)
def test_what_cannot_be_pulled(machine: Machine, reference: str, what: bytes) -> None:
    result = machine.koala("pull", reference)
    assert result.returncode == 1
    assert result.stderr.startswith(b"koala: error: ") and b"\nhint: " in result.stderr
    assert what in result.stderr
    assert not machine.cache.exists()


def test_without_a_network_what_is_here_is_used(machine: Machine) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    failed = machine.koala("pull", NAME, **nowhere)
    assert failed.returncode == 1 and b"cannot be reached" in failed.stderr
    first = machine.koala("pull", NAME).stdout
    again = machine.koala("pull", NAME, **nowhere)
    assert again.returncode == 0 and again.stdout == first
    assert b"in the cache already" in again.stderr
    assert machine.koala("chat", NAME, "-p", "hi", "--max-tokens", "4", **nowhere).returncode == 0


def test_a_model_of_ones_own(machine: Machine, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "Mine.gguf"
    path.write_bytes(content)
    assert machine.koala("pull", path).returncode == 0
    assert b"mine" in machine.koala("list").stdout
    assert machine.koala("chat", "mine", "-p", "hi", "--max-tokens", "4").returncode == 0
    result = machine.koala("rm", "mine")
    assert result.returncode == 0 and b"stay" in result.stderr
    assert path.exists()
    assert b"mine" not in machine.koala("list").stdout
    assert machine.koala("rm", "nano").returncode == 1


def test_a_folder_of_ones_own(machine: Machine, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "one.gguf").write_bytes(content)
    assert machine.koala("pull", folder, "--list").returncode == 2
    assert b"one" not in machine.koala("list").stdout
    assert machine.koala("pull", folder).returncode == 0
    for name in ("one", folder / "one.gguf"):
        refused = machine.koala("rm", name)
        assert refused.returncode == 1 and f"koala rm {folder} forgets all".encode() in refused.stderr
    other = tmp_path / "other" / "models"
    other.mkdir(parents=True)
    (other / "two.gguf").write_bytes(content)
    assert machine.koala("pull", other).returncode == 0
    refused = machine.koala("rm", "models")
    assert refused.returncode == 1 and b"names 2 registered" in refused.stderr
    assert machine.koala("rm", other).returncode == 0
    assert machine.koala("rm", "x" * 300).returncode == 1
    assert machine.koala("rm", "models").returncode == 0
    assert b"one" not in machine.koala("list").stdout


def test_at_a_terminal_chat_downloads_first(machine: Machine) -> None:
    terminal = machine.terminal("chat", f"{NAME}:Q4_K_M")
    terminal.ready()
    assert f"downloading {NAME}:Q4_K_M" in terminal.text
    terminal.keys(CTRL_D)
    assert terminal.end() == 0


def test_rm_asks_at_a_terminal(machine: Machine) -> None:
    path = Path(machine.koala("pull", NAME).stdout.decode().strip())
    for answer, stays in (("n", True), ("y", False)):
        terminal = machine.terminal("rm", NAME)
        terminal.wait_for("[y/N]")
        terminal.keys(answer + ENTER)
        assert terminal.end() == 0
        assert path.exists() is stays

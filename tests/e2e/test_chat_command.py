"""The installed `koala`, without a person at the keyboard: one reply, JSON lines, sessions, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gguf_maker import make_model

KOALA = shutil.which("koala", path=str(Path(sys.executable).parent)) or "koala"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=512)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def koala(home: Path, *arguments: str | Path, stdin: bytes | None = None, **environment: str) -> Any:
    return subprocess.run(
        [KOALA, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=os.environ | {"KOALA_HOME": str(home)} | environment,
        timeout=60,
        check=False,
    )


def chat(home: Path, model: Path, requests: list[dict[str, str]], *options: str) -> list[dict[str, Any]]:
    stdin = "".join(json.dumps(request) + "\n" for request in requests).encode()
    result = koala(home, "chat", model, "--json", "--seed", "3", "--max-tokens", "12", *options, stdin=stdin)
    assert result.returncode == 0, result.stderr.decode()
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_one_reply_from_an_option_and_from_stdin(home: Path, model: Path) -> None:
    options = ("--seed", "5", "--max-tokens", "8")
    by_option = koala(home, "chat", model, "-p", "hello", *options)
    by_stdin = koala(home, "chat", model, *options, stdin=b"hello\n")
    assert by_option.returncode == by_stdin.returncode == 0
    assert by_option.stdout == by_stdin.stdout
    assert by_option.stdout.strip()
    assert b"\x1b" not in by_option.stdout


def test_a_prompt_follows_what_is_piped_in(home: Path, model: Path, tmp_path: Path) -> None:
    for piped in (b"a cat\na dog\n", b"\n"):
        assert koala(home, "chat", model, "-p", "Name them.", "--max-tokens", "2", stdin=piped).returncode == 0
        export = json.dumps({"command": f"/export {tmp_path / 'said.json'} !"}).encode()
        assert koala(home, "chat", model, "--json", "--resume", stdin=export).returncode == 0
        said = (tmp_path / "said.json").read_text()
        assert ("a cat\\na dog\\n\\nName them." in said) == (b"cat" in piped)
        assert '"Name them."' in said or b"cat" in piped


def test_a_stdin_that_cannot_be_read_holds_nothing(home: Path, model: Path) -> None:
    """As nohup leaves it."""
    with open(os.devnull, "wb") as unreadable:
        command = [KOALA, "chat", str(model), "-p", "hello", "--max-tokens", "2"]
        environment = os.environ | {"KOALA_HOME": str(home)}
        assert subprocess.run(command, stdin=unreadable, env=environment, check=False).returncode == 0


def test_a_silent_pipe_is_told_of(home: Path, model: Path) -> None:
    command = [KOALA, "chat", str(model), "-p", "hello", "--max-tokens", "2"]
    environment = os.environ | {"KOALA_HOME": str(home)}
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert program.stderr is not None
    assert b"waiting for what is piped in" in program.stderr.readline()
    program.communicate(b"")
    assert program.returncode == 0


def test_json_turns_reuse_the_cache(home: Path, model: Path) -> None:
    first, second, again = chat(home, model, [{"user": "hello"}, {"user": "more"}, {"command": "/regen"}])
    assert set(first) == {"reply", "finish", "stats"}
    for answer in (first, second, again):
        stats = answer["stats"]
        assert stats["prompt_tokens"] == stats["reused_tokens"] + stats["evaluated_tokens"]
        assert answer["finish"] in ("stop", "length")
    assert second["stats"]["reused_tokens"] >= first["stats"]["prompt_tokens"] + first["stats"]["generated_tokens"]
    assert again["stats"]["evaluated_tokens"] == 1
    assert again["reply"] != second["reply"]


def test_json_commands_and_errors(home: Path, model: Path) -> None:
    requests = {"user": "one"}, {"command": "/undo"}, {"command": "/nope"}, {"sure": "no"}, {"command": "/tree"}
    lines = chat(home, model, [*requests, {"user": "two", "seed": "1"}, {"user": " "}])
    assert "reply" in lines[0]
    assert "shown" in lines[1]
    assert "/nope" in lines[2]["error"]
    assert lines[2]["hint"]
    assert "no request" in lines[3]["error"]
    assert "one" in lines[4]["shown"]
    assert "'seed'" in lines[5]["error"]
    assert "empty" in lines[6]["error"]


def test_json_with_a_prompt_is_one_turn(home: Path, model: Path) -> None:
    result = koala(home, "chat", model, "--json", "-p", "hello", "--max-tokens", "4")
    assert json.loads(result.stdout)["stats"]["generated_tokens"] <= 4


def test_invalid_utf8_on_stdin(home: Path, model: Path) -> None:
    result = koala(home, "chat", model, stdin=b"hello \xff\xfe")
    assert result.returncode == 1
    assert b"not UTF-8" in result.stderr
    result = koala(home, "chat", model, "--json", stdin=b'{"user": "\xff"}\n{"user": "fine"}\n')
    bad, good = (json.loads(line) for line in result.stdout.splitlines())
    assert "error" in bad
    assert "reply" in good


def test_resume_reuses_and_says_why_not(home: Path, model: Path) -> None:
    (first,) = chat(home, model, [{"user": "hello"}])
    (second,) = chat(home, model, [{"user": "more"}], "--resume")
    assert second["stats"]["reused_tokens"] >= first["stats"]["prompt_tokens"] + first["stats"]["generated_tokens"]
    stdin = b'{"user": "again"}\n'
    other = koala(home, "chat", model, "--json", "--resume", "--context", "256", "--max-tokens", "4", stdin=stdin)
    assert b"evaluates the conversation again" in other.stderr
    assert b"context is 256 now, was 512" in other.stderr
    assert json.loads(other.stdout)["stats"]["reused_tokens"] == 0


def test_sessions_list_and_rm(home: Path, model: Path) -> None:
    chat(home, model, [{"user": "a title to find"}])
    listed = koala(home, "sessions").stdout.decode()
    assert "a title to find" in listed
    session = listed.split()[0]
    assert json.loads(koala(home, "sessions", "list", "--json").stdout)["id"] == session
    assert koala(home, "sessions", "rm", session).returncode == 0
    assert koala(home, "sessions").stdout == b""
    assert koala(home, "sessions", "rm", session).returncode == 1


def test_two_programs_on_one_session(home: Path, model: Path) -> None:
    chat(home, model, [{"user": "one"}])
    first = subprocess.Popen(
        [KOALA, "chat", model, "--json", "--resume", "--max-tokens", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"KOALA_HOME": str(home)},
    )
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(b'{"user": "first"}\n')
    first.stdin.flush()
    assert b"reply" in first.stdout.readline()
    second = koala(home, "chat", model, "--json", "--resume", "--max-tokens", "4", stdin=b'{"user": "second"}\n')
    assert b"another window" in second.stderr
    first.stdin.write(b'{"command": "/tree"}\n')
    first.stdin.close()
    assert b"shown" in first.stdout.readline()
    assert first.wait(20) == 0
    tree = chat(home, model, [{"command": "/tree"}], "--resume")[0]["shown"]
    assert "first" in tree
    assert "second" in tree


@pytest.mark.parametrize("number", ["-1", "2147483648", "9223372036854775808", "nan", "1e400", "x"])
@pytest.mark.parametrize(
    "option", ["--temperature", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--max-tokens", "--context"]
)
def test_hostile_numbers_are_usage_errors(home: Path, option: str, number: str) -> None:
    from click.testing import CliRunner

    from koala_local.chat.command import chat as command

    result = CliRunner().invoke(command, ["nowhere.gguf", option, number])
    assert result.exit_code == 2, result.output


def test_a_missing_model_is_one_line_and_a_hint(home: Path) -> None:
    result = koala(home, "chat", "no/such/model.gguf", "-p", "hi")
    assert result.returncode == 1
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("koala: error: ")
    assert lines[1].startswith("hint: ")
    assert result.stdout == b""


def test_a_renamed_file_is_still_a_model(home: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "model.txt")
    assert koala(home, "chat", tmp_path / "model.txt", "-p", "hi", "--max-tokens", "2").returncode == 0


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello, I am a text\n" * 50, b"\x80\x02}q\x00."])
def test_files_that_are_no_model(home: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    result = koala(home, "chat", tmp_path / "bad.gguf", "-p", "hi")
    assert result.returncode == 1
    assert result.stderr.startswith(b"koala: error: ")


def test_a_truncated_model(home: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-1000])
    result = koala(home, "chat", tmp_path / "cut.gguf", "-p", "hi")
    assert result.returncode == 1
    assert b"cut.gguf" in result.stderr


@pytest.mark.parametrize(
    "template", ["{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
                 "{{ 'a' * 10**9 }}", "{{ ''.__class__.__mro__ }}"]
)  # fmt: skip
def test_a_hostile_template_is_stopped(home: Path, tmp_path: Path, template: str) -> None:
    path = make_model(tmp_path / "hostile.gguf", chat_template=template)
    result = koala(home, "chat", path, "-p", "hi", "--max-tokens", "4")
    assert result.returncode == 1
    assert result.stderr.startswith(b"koala: error: ")
    assert koala(home, "chat", path, "-p", "hi", "--max-tokens", "4", "--template", "koala").returncode == 0


def test_too_long_texts(home: Path, model: Path) -> None:
    system = koala(home, "chat", model, "-p", "hi", "--system", "x" * 5000)
    assert system.returncode == 1
    assert b"system text" in system.stderr
    answers = chat(home, model, [{"user": "hi"}, {"user": "y" * 5000}, {"user": "still here?"}])
    assert "the message needs" in answers[1]["error"]
    assert answers[2]["stats"]["reused_tokens"] > 0


def test_a_read_only_data_folder(home: Path, model: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")  # works for root too, unlike a mode
    result = koala(blocked, "chat", model, "-p", "hi", "--max-tokens", "4")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert b"warning" in result.stderr


def test_a_corrupt_database_is_set_aside(home: Path, model: Path) -> None:
    chat(home, model, [{"user": "one"}])
    (database,) = home.rglob("sessions.db")
    for extra in home.rglob("sessions.db-*"):
        extra.unlink()
    database.write_bytes(b"no database" * 1000)
    result = koala(home, "chat", model, "-p", "hi", "--max-tokens", "4")
    assert result.returncode == 0
    assert b"warning" in result.stderr
    assert b"hi" in koala(home, "sessions").stdout


def test_a_damaged_kv_file_only_costs_time(home: Path, model: Path) -> None:
    chat(home, model, [{"user": "one"}])
    (saved,) = home.rglob("*.kv")
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    result = koala(home, "chat", model, "--json", "--resume", "--max-tokens", "4", stdin=b'{"user": "two"}\n')
    assert b"damaged" in result.stderr
    assert json.loads(result.stdout)["stats"]["reused_tokens"] == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_and_keeps_the_partial_reply(
    home: Path, tmp_path: Path, number: int, status: int
) -> None:
    slow = make_model(tmp_path / "slow.gguf", context=4096, embedding=512, layers=8, heads=8, feed_forward=2048)
    program = subprocess.Popen(
        [KOALA, "chat", slow, "-p", "go on", "--temperature", "3", "--min-p", "0", "--top-p", "1", "--seed", "5"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | {"KOALA_HOME": str(home)},
    )
    assert program.stdout is not None
    assert program.stdout.read(20)
    program.send_signal(number)
    assert program.wait(20) == status
    assert json.loads(koala(home, "sessions", "list", "--json").stdout)["turns"] == 1

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import install

PINS = "llama_cpp_python==0.3.36\n"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository in tmp_path where making .venv, compiling and pip only note that they were called."""
    made: list[str] = []
    venv = tmp_path / ".venv"

    def make_venv() -> None:
        (venv / "bin").mkdir(parents=True)
        for name in ("python", "pip", "koala"):
            (venv / "bin" / name).touch()
        made.append("venv")

    def build_llama(backend: str, why: str, replace: bool) -> None:
        (venv / "lib/python3.11/site-packages/llama_cpp_python-0.3.36.dist-info").mkdir(parents=True, exist_ok=True)
        made.append(f"{'rebuild' if replace else 'build'} {backend}")

    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text(PINS)
    for name, path in {"ROOT": tmp_path, "VENV": venv, "STAMP": venv / "stamp.json", "LOG": venv / "log"}.items():
        monkeypatch.setattr(install, name, path)
    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "build_llama", build_llama)
    monkeypatch.setattr(install, "find_gpus", dict)
    monkeypatch.setattr(install, "find_toolchains", list)
    monkeypatch.setattr(install, "pip", lambda what, arguments, settings: made.append(f"pip {arguments[-1]}"))
    monkeypatch.setenv("CXX", sys.executable)
    return made


def again(calls: list[str], *extras: str, backend: str = "") -> list[str]:
    """What one more installation does."""
    calls.clear()
    install.install(set(extras), backend)
    return list(calls)


def test_a_second_run_does_nothing(calls: list[str]) -> None:
    assert again(calls) == ["venv", "build cpu", "pip ."]
    assert again(calls) == []


def test_an_extra_is_added_once_and_kept(calls: list[str], tmp_path: Path) -> None:
    again(calls)
    assert again(calls, "test") == ["pip .[test]"]
    assert again(calls, "test") == []
    assert again(calls) == []
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert again(calls) == ["pip .[test]"]


def test_llama_is_rebuilt_for_another_backend_or_version_only(calls: list[str], tmp_path: Path) -> None:
    again(calls)
    (tmp_path / "constraints.txt").write_text(PINS + "rich==15.0.0\n")
    assert again(calls) == ["pip ."]
    assert again(calls, backend="cuda") == ["rebuild cuda", "pip ."]
    assert again(calls) == []
    (tmp_path / "constraints.txt").write_text("llama_cpp_python==0.3.37\n")
    assert again(calls) == ["build cuda", "pip ."]


def test_a_wished_backend_is_remembered_until_auto(calls: list[str]) -> None:
    assert "build vulkan" in again(calls, backend="vulkan")
    assert again(calls) == []
    assert again(calls, backend="auto") == ["rebuild cpu", "pip ."]


def test_a_toolchain_that_appears_is_used(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "find_gpus", lambda: {"nvidia": True})
    again(calls)
    assert "WARNING" in capsys.readouterr().err
    monkeypatch.setattr(install, "find_toolchains", lambda: ["cuda"])
    assert again(calls) == ["rebuild cuda", "pip ."]
    assert "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", '{"backend'])
def test_a_torn_stamp_is_mended(calls: list[str], damage: str) -> None:
    again(calls)
    install.STAMP.write_text(damage)
    assert again(calls) == ["pip ."]
    assert json.loads(install.STAMP.read_text())["backend"] == "cpu"


def test_a_missing_compiler_is_one_line_and_leaves_nothing_behind(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="1"):
        again(calls)
    assert capsys.readouterr().err == "koala: error: a C++ compiler is missing: install a C++ compiler\n"
    assert not install.VENV.exists()


def test_pip_that_fails_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nseq 1 40\necho it broke >&2\nexit 3\n")
    python.chmod(0o755)
    for name, value in {"ROOT": tmp_path, "VENV": tmp_path, "LOG": tmp_path / "log"}.items():
        monkeypatch.setattr(install, name, value)
    with pytest.raises(SystemExit, match="1"):
        install.pip("installing koala", ["-e", "."], {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "12"
    assert lines[-2] == "it broke"
    assert lines[-1] == f"koala: error: installing koala failed; the whole log is {tmp_path / 'log'}"

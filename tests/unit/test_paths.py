"""Where files go: the platform's folders or KOALA_HOME, made for the owner only."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from koala_local import paths
from koala_local.errors import KoalaError, SessionError


def test_one_variable_moves_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOALA_HOME", str(tmp_path))
    assert paths.data_folder() == tmp_path / "data"
    assert paths.kv_folder() == tmp_path / "data" / "kv"
    assert paths.cache_folder() == tmp_path / "cache"
    assert list(tmp_path.iterdir()) == []  # naming a folder makes none


def test_a_relative_home_does_not_follow_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOALA_HOME", "home")
    assert paths.data_folder() == tmp_path / "home" / "data"
    monkeypatch.setenv("KOALA_HOME", "~/koalas")
    assert paths.data_folder() == Path.home() / "koalas" / "data"


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_the_platform_decides(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("KOALA_HOME", raising=False)
    else:
        monkeypatch.setenv("KOALA_HOME", value)
    assert paths.data_folder() == Path(platformdirs.user_data_dir("koala", appauthor=False))
    assert paths.cache_folder() == Path(platformdirs.user_cache_dir("koala", appauthor=False))


def test_private_folder_is_private_with_the_parents_it_makes(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    folder = paths.private_folder(tmp_path / "one" / "two")
    assert folder == tmp_path / "one" / "two"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode & 0o777 == 0o755  # what was there before is not ours


def test_private_folder_closes_an_open_one(tmp_path: Path) -> None:
    open_folder = tmp_path / "data"
    open_folder.mkdir()
    open_folder.chmod(0o755)
    paths.private_folder(open_folder)
    assert open_folder.stat().st_mode & 0o777 == 0o700


def test_private_folder_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("here first")
    with pytest.raises(OSError):
        paths.private_folder(tmp_path / "data")
    with pytest.raises(OSError):
        paths.private_folder(tmp_path / "data" / "kv")
    assert (tmp_path / "data").read_text() == "here first"


def test_session_file(tmp_path: Path) -> None:
    assert paths.session_file(tmp_path, "k4q7zzab", ".kv") == tmp_path / "k4q7zzab.kv"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\n", "x" * 65, "a.b"])
def test_no_session_id_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(SessionError):
        paths.session_file(tmp_path, name, ".kv")


def test_a_typed_path_may_be_quoted() -> None:
    assert paths.typed_path("my notes.md") == paths.typed_path("'my notes.md'") == Path("my notes.md")
    assert paths.typed_path('"~/notes.md"') == Path.home() / "notes.md"
    assert paths.typed_path("'") == Path("'") and paths.typed_path("'a") == Path("'a")
    assert paths.typed_path("my\\ notes.md") == paths.typed_path("my notes.md") == Path("my notes.md")


def test_a_file_that_is_called_as_typed_comes_first(tmp_path: Path) -> None:
    for name in ("a\\b.md", "'quoted'", "Rock'n'Roll.md"):
        (tmp_path / name).touch()
        assert paths.typed_path(f"{tmp_path}/{name}") == tmp_path / name
    assert paths.unquoted("''") == "''"


def test_a_typed_path_that_the_system_does_not_take() -> None:
    with pytest.raises(KoalaError, match="too long"):
        paths.typed_path("a" * 300 + ".md")

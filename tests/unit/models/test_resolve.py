from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from koala_local.errors import ModelFileError
from koala_local.models.resolve import resolve
from koala_local.nano import MODEL_PATH


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which is the home folder too, with one model in `models`."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "koala-7b.Q4_K_M.gguf").touch()
    (tmp_path / "models" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refusal(reference: str) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        resolve(reference, None)
    assert caught.value.message.isprintable()
    assert caught.value.hint.isprintable()
    return caught.value


def test_nothing_named_is_the_last_used_model(folder: Path) -> None:
    last = folder / "models" / "koala-7b.Q4_K_M.gguf"
    assert resolve(None, str(last)) == last


@pytest.mark.parametrize("last_used", [None, "", "/gone/model.gguf", "/" + "x" * 300, "nul\0byte", "/"])
def test_nothing_named_and_nothing_left_is_the_bundled_model(last_used: str | None) -> None:
    assert resolve(None, last_used) == MODEL_PATH


def test_nano_is_the_bundled_model(folder: Path) -> None:
    assert resolve("nano", str(folder / "models" / "koala-7b.Q4_K_M.gguf")) == MODEL_PATH


def test_the_bundled_model_is_not_imported_for_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "koala_local.nano")
    resolve("models/notes.txt", None)
    assert "koala_local.nano" not in sys.modules


@pytest.mark.parametrize(
    "reference",
    [
        "models/koala-7b.Q4_K_M.gguf",
        "./models/koala-7b.Q4_K_M.gguf",
        "~/models/koala-7b.Q4_K_M.gguf",
        "models",
        "models/",
        "~/models",
    ],
)
def test_a_path_or_the_folder_of_a_single_model(folder: Path, reference: str) -> None:
    path = resolve(reference, None)
    assert path.is_absolute()
    assert path == folder / "models" / "koala-7b.Q4_K_M.gguf"


def test_a_file_may_have_any_extension(folder: Path) -> None:
    assert resolve("models/notes.txt", None) == folder / "models" / "notes.txt"


def test_a_missing_file_names_its_neighbours(folder: Path) -> None:
    error = refusal("models/koala-7b.Q4_K_S.gguf")
    assert "does not exist" in error.message
    assert error.hint == "did you mean 'koala-7b.Q4_K_M.gguf'?"
    assert "'koala-7b.Q4_K_M.gguf'" in refusal("models/zzz").hint
    assert "notes.txt" not in refusal("models/zzz").hint


def test_a_missing_file_in_a_missing_folder(folder: Path) -> None:
    error = refusal("./nowhere/model.gguf")
    assert repr(str(folder / "nowhere" / "model.gguf")) in error.message
    assert "'nano'" in error.hint


@pytest.mark.parametrize(
    "reference",
    [
        "mradermacher/koala-13B-HF-GGUF",
        "mradermacher/koala-13B-HF-GGUF:Q4_K_M",
        "mradermacher/koala-13B-HF-GGUF:koala-13B-HF.Q4_K_M.gguf",
        "owner/repo.gguf:file",
    ],
)
def test_a_name_on_the_hub_is_to_be_downloaded_first(folder: Path, reference: str) -> None:
    error = refusal(reference)
    assert "hub" in error.message
    assert "download" in error.hint


@pytest.mark.parametrize("reference", ["owner/model.GGUF", "models/koala", "./owner/repo", "a/b/c", "/owner/repo", "x"])
def test_what_is_a_path_rather_than_a_name_on_the_hub(folder: Path, reference: str) -> None:
    assert "does not exist" in refusal(reference).message


def test_a_folder_without_a_model_and_with_many(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "without a .gguf file" in refusal("empty").message
    for number in range(7):
        (folder / "empty" / f"{number}.gguf").touch()
    error = refusal("empty")
    assert "7 models" in error.message
    assert error.hint == "choose one: '0.gguf', '1.gguf', '2.gguf', '3.gguf', '4.gguf' and 2 more"


def test_a_name_keeps_its_quotes_and_backslashes(folder: Path) -> None:
    for name in ("Rock'n'Roll.gguf", "a\\b.gguf"):
        (folder / name).touch()
        assert resolve(name, None) == folder / name


def test_names_that_are_no_path(folder: Path) -> None:
    assert "no home folder" in refusal("~nobody-of-this-name/model.gguf").message
    for name in ("x" * 300, "nul\0byte", "\x1b[31mred.gguf", "\udcff.gguf"):
        assert "does not exist" in refusal(name).message
    assert "folder" in refusal("").message


def test_names_in_a_hint_are_free_of_escapes(folder: Path) -> None:
    os.rename("models/notes.txt", "models/koala-7b\x1b]0;x\x07.gguf")
    assert "koala-7b" in refusal("models/koala-7b.gguf").hint

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import pytest

from koala_local.errors import ModelFileError
from koala_local.models import load_probe
from koala_local.models.load_probe import probe
from tests.gguf_maker import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("probe") / "tiny.gguf", embedding=32, heads=2, layers=1, feed_forward=32)


@pytest.fixture
def changed(model: Path, tmp_path: Path) -> Callable[[bytes, bytes], Path]:
    def copy(old: bytes, new: bytes) -> Path:
        content = model.read_bytes()
        assert old in content
        path = tmp_path / "changed.gguf"
        path.write_bytes(content.replace(old, new, 1))
        return path

    return copy


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        probe(path)
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value.message


def children() -> set[str]:
    """The process ids of this process's children, ended ones that nobody has waited for included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {number for task in tasks for number in task.read_text().split()}


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Other tests of the session may have children of their own."""
    before = children()
    yield
    assert children() <= before


both_ways = pytest.mark.parametrize("forks", [pytest.param(True, id="fork"), pytest.param(False, id="new process")])


@both_ways
def test_a_sound_model_passes(model: Path, monkeypatch: pytest.MonkeyPatch, forks: bool) -> None:
    monkeypatch.setattr(load_probe, "_FORKS", forks)
    probe(model)


@both_ways
def test_a_refusal_gives_the_reason_of_llama_cpp(
    changed: Callable[[bytes, bytes], Path], monkeypatch: pytest.MonkeyPatch, forks: bool
) -> None:
    monkeypatch.setattr(load_probe, "_FORKS", forks)
    path = changed(
        b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0\x1b[2Jm"
    )
    message = refusal(path)
    assert repr(str(path)) in message
    assert "unknown model architecture: 'm'" in message


@both_ways
def test_an_abort_stays_in_the_child(
    changed: Callable[[bytes, bytes], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    forks: bool,
) -> None:
    monkeypatch.setattr(load_probe, "_FORKS", forks)
    layers = b"llama.block_count" + bytes([gguf.GGUFValueType.UINT32, 0, 0, 0])
    message = refusal(changed(layers + b"\1", layers + b"\0"))
    assert "crash (Aborted): llama-model.cpp:" in message
    assert "GGML_ASSERT(hparams.n_layer" in message
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_that_cannot_spell_every_byte_is_found(changed: Callable[[bytes, bytes], Path]) -> None:
    assert "crash" in refusal(changed(b"<0xF0>", b"<0xZ0>"))


def test_python_prints_no_traceback_of_the_child(changed: Callable[[bytes, bytes], Path]) -> None:
    path = changed(b"<0xF0>", b"<0xZ0>")
    code = "import pathlib, sys; from koala_local.models.load_probe import probe; probe(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ModelFileError" in done.stderr
    assert "Fatal Python error" not in done.stderr


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    assert "cannot load it" in refusal(tmp_path / "gone.gguf")


def test_a_child_that_does_not_end_is_killed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_probe, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(load_probe, "_load", lambda path: time.sleep(60))
    start = time.monotonic()
    assert "did not end" in refusal(model)
    assert time.monotonic() - start < 2


def test_a_child_that_says_a_great_deal_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> int:
        for _ in range(100):
            os.write(2, b"\x1b]0;title\x07 \xff word" * 1000 + b"\n")
        return load_probe._REFUSED

    monkeypatch.setattr(load_probe, "_load", load)
    assert len(refusal(model)) < 500 + len(str(model))


def test_ctrl_c_during_the_probe_leaves_no_child(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_probe, "_load", lambda path: time.sleep(60))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        probe(model)
    timer.join()


def test_probing_beside_a_loaded_model_and_from_a_thread(model: Path) -> None:
    loaded = llama.llama_model_load_from_file(os.fsencode(model), llama.llama_model_default_params())
    failures: list[BaseException] = []

    def run() -> None:
        try:
            probe(model)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    llama.llama_model_free(loaded)
    assert failures == []


def test_many_probes_leave_no_descriptor_open(model: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (model, tmp_path / "gone.gguf") * 3:
        try:
            probe(path)
        except ModelFileError:
            assert path != model
    assert len(os.listdir("/proc/self/fd")) == before

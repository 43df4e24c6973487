"""Loading: what the plan says, with less where that fails; and what models of the hub's cache are called."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from koala_local.chat import loader
from koala_local.chat.loader import LoadOptions, load_planned, open_model
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.errors import OutOfMemoryError
from koala_local.models.devices import Gpu, Machine
from koala_local.models.gguf_header import read_header
from koala_local.models.memory import Wish
from tests.gguf_maker import make_model
from tests.gptq_maker import make_gptq

CARD = Machine(8 << 30, 8 << 30, 0, (Gpu("CUDA0", "a card", 4 << 30, 4 << 30),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tiny.gguf", embedding=128, context=4096)


def test_the_plan_is_what_is_loaded(path: Path) -> None:
    notes: list[str] = []
    engine, plan = load_planned(path, read_header(path), Wish(1024), notes.append)
    try:
        assert engine.context_size == plan.choice.context == 1024
        assert engine.kv_type == plan.choice.kv_type == "f16"
        assert not notes
    finally:
        engine.close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_done_beside_the_load_has_a_thread_of_its_own(path: Path, fails: bool) -> None:
    begun: SimpleQueue[bool] = SimpleQueue()

    def beside() -> None:
        begun.put(threading.current_thread() is threading.main_thread())
        if fails:
            raise ImportError("whoever needs it says so")

    open_model(str(path), None, LoadOptions(context=512), lambda _: None, beside).engine.close()
    assert begun.get(timeout=10) is False


def test_a_load_that_fails_goes_on_with_less_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Placement] = []

    def load(path: Path, fingerprint: str, wanted: Placement) -> Any:
        tried.append(wanted)
        if len(tried) < 3:
            raise OutOfMemoryError("no memory", "take less")
        return LlamaEngine(path, fingerprint, Placement(wanted.context, 0, wanted.kv_type))

    monkeypatch.setattr(loader, "LlamaEngine", load)
    monkeypatch.setattr(loader, "this_machine", lambda: CARD)
    notes: list[str] = []
    engine, plan = load_planned(path, read_header(path), Wish(), notes.append)
    engine.close()
    assert [wanted.kv_type for wanted in tried] == ["f16", "q8_0", "q8_0"]
    assert tried[1].context == 4096 and tried[2].context < 4096
    assert len(notes) == 2 and all("not enough memory" in note for note in notes)
    assert "KV cache f16, 3 layers on the GPU; trying context 4096, KV cache q8_0, 3 layers" in notes[0]
    assert plan.concessions


def test_what_the_user_asked_for_is_not_retried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemoryError("no memory", "take less")

    monkeypatch.setattr(loader, "LlamaEngine", fail)
    with pytest.raises(OutOfMemoryError, match="no memory") as caught:
        load_planned(path, read_header(path), Wish(1024, "f16", 0), lambda _: None)
    assert caught.value.hint == "take less"
    with pytest.raises(OutOfMemoryError, match="no memory") as caught:
        load_planned(path, read_header(path), Wish(), lambda _: None)
    assert "smaller model" in caught.value.hint


@pytest.mark.parametrize(("ram", "swap", "refused"), [(1 << 20, 0, True), (1 << 20, 1 << 30, False)])
def test_a_model_that_cannot_fit_is_refused_and_one_that_barely_does_is_warned_of(
    path: Path, monkeypatch: pytest.MonkeyPatch, ram: int, swap: int, refused: bool
) -> None:
    monkeypatch.setattr(loader, "this_machine", lambda: Machine(ram, ram, swap))
    notes: list[str] = []
    if refused:
        with pytest.raises(OutOfMemoryError, match="does not fit this machine") as caught:
            load_planned(path, read_header(path), Wish(), notes.append)
        assert caught.value.hint
        return
    load_planned(path, read_header(path), Wish(), notes.append)[0].close()
    assert "does not fit well" in notes[0]


LIMITED = """
import re, resource, sys
from pathlib import Path
from koala_local.chat.loader import load_planned
from koala_local.models.gguf_header import read_header
from koala_local.models.memory import Wish
path = Path(sys.argv[1])
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
engine, plan = load_planned(path, read_header(path), Wish(kv_type="auto"), print)
print(engine.kv_type, engine.context_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_a_real_allocation_that_fails_is_stepped_down_from(tmp_path: Path) -> None:
    """The KV cache takes 128 MiB in f16 and 68 in q8_0; the limit on the address space lies between."""
    shape: dict[str, int] = {"embedding": 1024, "heads": 8, "layers": 8, "feed_forward": 32, "context": 4096}
    path = make_model(tmp_path / "wide.gguf", **shape)  # type: ignore[arg-type]
    room = path.stat().st_size + (110 << 20)
    command = [sys.executable, "-c", LIMITED, str(path), str(room)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else a thread may reserve 64 MiB of the room at any time
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "not enough memory" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].startswith("q8_0")


def test_a_gptq_snapshot_is_called_like_its_repository(tmp_path: Path) -> None:
    snapshots = tmp_path / "models--TheBloke--koala-13B-GPTQ" / "snapshots"
    folder = make_gptq(snapshots / ("0" * 40)).folder
    model = open_model(str(folder), None, LoadOptions(context=256), lambda _: None)
    try:
        assert model.name == "TheBloke/koala-13B-GPTQ"
        assert model.engine.name == model.name
        assert model.format is KOALA
        assert "research" in model.licence_notice()
    finally:
        model.engine.close()

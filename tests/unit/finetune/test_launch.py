"""Starting ranks: what is refused, what a rank's end comes to, and what others have started."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from koala_local.finetune import launch as launching
from koala_local.finetune.launch import (
    MEETING_FILE,
    LaunchError,
    Place,
    check_place,
    current_rank,
    first_node,
    is_lost,
    launch,
    take_given_rank,
)
from torch.distributed import FileStore  # type: ignore[attr-defined]

from koala_local.errors import KoalaError

HERE = "tests.unit.finetune.test_launch"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of what a launch sets, or of a cluster that the tests may run on, stays."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "KOALA_MEETING", "GLOO_", "NCCL_", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", MEETING_FILE, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    yield
    logging.disable(logging.NOTSET)


def two_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> Place:
    """As --gpus 2 would be, on the processor, where ranks may be forked from a process that has imported torch."""
    monkeypatch.setattr(launching, "check_place", lambda _: None)
    monkeypatch.setattr(launching, "START_METHOD", "forkserver")
    multiprocessing.set_forkserver_preload(["tests.finetune_preload", HERE])
    return Place(gpus=2)


def meet(folder: Path) -> int:
    rank = current_rank()
    store = FileStore(os.environ[MEETING_FILE], rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.world_size)
    total = torch.tensor(float(rank.number + 1))
    dist.all_reduce(total)
    (folder / f"rank-{rank.number}").write_text(f"{rank.world_size} {rank.local} {total:.0f}")
    return 40 + rank.number


def fail(how: str) -> int:
    """Rank 1 ends in some way while rank 0 waits for it."""
    rank = current_rank()
    store = FileStore(os.environ[MEETING_FILE], rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.world_size)
    dist.barrier()
    if rank.number == 1:
        if how == "koala":
            raise KoalaError("the data is gone", "look for it")
        if how == "bug":
            raise ZeroDivisionError("by nothing")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    return 0


def wait_for_signals(folder: Path) -> int:
    """Ends at the second signal, as a rank does; the first is written down."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, remember)
    (folder / f"ready-{current_rank().number}").touch()
    while not received:
        time.sleep(0.02)
    (folder / f"first-{current_rank().number}").touch()
    while (folder / "stay").exists():
        time.sleep(0.02)
    return 128 + received[0]


def test_two_ranks_meet_and_the_first_ones_status_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(f"{HERE}:meet", (tmp_path,), two_on_this_machine(monkeypatch)) == 40
    assert (tmp_path / "rank-0").read_text() == "2 0 3"
    assert (tmp_path / "rank-1").read_text() == "2 1 3"


@pytest.mark.parametrize(
    ("how", "kind", "what"),
    [
        ("koala", KoalaError, "the data is gone"),
        ("bug", RuntimeError, "rank 1: ZeroDivisionError: by nothing"),
        ("kill", LaunchError, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, how: str, kind: type[Exception], what: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=what) as caught:
        launch(f"{HERE}:fail", (how,), two_on_this_machine(monkeypatch))
    assert time.monotonic() - begun < 40
    if how == "koala":
        assert isinstance(caught.value, KoalaError) and caught.value.hint == "look for it"
    if how == "bug":
        assert "ZeroDivisionError" in caught.value.__notes__[0]


@pytest.mark.parametrize("second", [False, True])
def test_signals_reach_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bool) -> None:
    if second:
        (tmp_path / "stay").touch()
    place = two_on_this_machine(monkeypatch)

    def send() -> None:
        for name in ["ready", *(["first"] if second else [])]:
            while not all((tmp_path / f"{name}-{rank}").exists() for rank in range(2)):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    if second:
        with pytest.raises(SystemExit) as caught:
            launch(f"{HERE}:wait_for_signals", (tmp_path,), place)
        assert caught.value.code == 143
    else:
        assert launch(f"{HERE}:wait_for_signals", (tmp_path,), place) == 143


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[pair.cc:537] Read error [127.0.0.1]:4242: Connection reset by peer", True),
        ("[pair.cc:584] Connection closed by peer [127.0.0.1]:4242", True),
        ("Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("Timed out waiting 1800000ms for recv operation to complete", True),
        ("ncclRemoteError: a network error or a remote process exiting prematurely", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_connection_is_known_by_what_is_said_of_it(said: str, lost: bool) -> None:
    assert is_lost(RuntimeError(said)) is lost


def test_one_process_needs_no_other() -> None:
    assert launch("operator:add", (3, 4), Place(gpus=0)) == 7


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="--gpus 8, but this machine has none") as caught:
        check_place(Place(gpus=8))
    assert "--gpus 0" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    with pytest.raises(LaunchError, match=r"this machine has 1 \(NVIDIA H100\)") as caught:
        check_place(Place(gpus=8))
    assert "--gpus 1" in caught.value.hint
    check_place(Place(gpus=1))


def test_nodes_have_to_know_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="2 nodes do not know where to meet"):
        check_place(Place(gpus=0, nodes=2))
    check_place(Place(gpus=0, nodes=2, rendezvous="10.0.0.1:29400"))


def test_torchrun_gives_the_rank() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert take_given_rank(environ)
    rank = current_rank(environ)
    assert (rank.number, rank.world_size, rank.local, rank.first) == (3, 8, 1, False)


def slurm(**more: str) -> dict[str, str]:
    return {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "123456", **more,
    }  # fmt: skip


def test_slurm_gives_the_rank() -> None:
    environ = slurm()
    assert take_given_rank(environ)
    rank = current_rank(environ)
    assert (rank.number, rank.world_size, rank.local) == (5, 16, 1)
    assert environ["MASTER_ADDR"] == "gpu07"
    assert 1024 < int(environ["MASTER_PORT"]) < 65536
    assert environ["MASTER_PORT"] == {**(other := slurm(SLURM_PROCID="0")), **_taken(other)}["MASTER_PORT"]


def _taken(environ: dict[str, str]) -> dict[str, str]:
    take_given_rank(environ)
    return environ


def test_a_batch_script_or_a_single_task_is_no_rank() -> None:
    script = slurm()
    del script["SLURM_STEP_ID"]
    for environ in (script, slurm(SLURM_NTASKS="1"), {}):
        assert not take_given_rank(environ)
        assert "RANK" not in environ


def test_a_slurm_step_that_lacks_something() -> None:
    environ = slurm()
    del environ["SLURM_PROCID"]
    with pytest.raises(LaunchError, match="SLURM_PROCID"):
        take_given_rank(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[07-09,12],login", "gpu07"), ("gpu[3,5]", "gpu3"),
        ("a-b[1-2]-ib,c", "a-b1-ib"), ("rack1-n[001-100]", "rack1-n001"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first

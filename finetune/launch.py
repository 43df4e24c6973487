"""Start a run's processes: one for each GPU of this machine, through torch's elastic agent, or none, where this process
is already one of several (under torchrun or SLURM) or the only one.

On one machine the ranks meet through a file and talk over the loopback device. Several machines meet at a host and
port that the user names; see docs/multi-node.md.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from koala_local.console import note, quiet_libraries
from koala_local.disk import write_whole
from koala_local.errors import KoalaError

MEETING_FILE = "KOALA_MEETING_FILE"  # environment variable: where ranks of one machine find each other
START_METHOD = "spawn"  # some libraries touch CUDA when they are imported, and that does not survive a fork
_DEFAULT_PORT = 29_400
_LET_OTHERS_BE_SEEN = 1.0  # seconds
_WAIT_S = 900  # for all nodes
_BEGUN = "begun"  # a file: the machines have met, and ranks were started
_LOST = re.compile(
    "Connection (reset|closed|was likely closed)|Broken pipe|Timed out waiting|timeout caused pair closure"
    "|remote process exit|ncclRemoteError"
)


class LaunchError(KoalaError):
    """Processes that cannot be started, or one that died."""


class LostError(LaunchError):
    """The connection to another rank broke: what happened, happened there."""

    def __init__(self) -> None:
        hint = "what ended there says why; give the same command with --resume"
        super().__init__("the connection to another rank was lost: it ended, or its machine did", hint)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to run: `gpus` of each machine, 0 for the processor; `rendezvous` is HOST:PORT where nodes meet."""

    gpus: int
    nodes: int = 1
    rendezvous: str = ""

    @property
    def ranks(self) -> int:
        return max(self.gpus, 1) * self.nodes


@dataclass(frozen=True, slots=True)
class Rank:
    """Which one of the run's processes this is."""

    number: int = 0
    world_size: int = 1
    local: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        return self.number == 0


def is_lost(error: BaseException) -> bool:
    """Whether an error of gloo's or NCCL's says that the connection to another rank broke."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def launch(work: str, arguments: tuple[Any, ...], place: Place) -> int:
    """Call the function `work` ("module:function") with the arguments, which must be picklable, in every process of the
    run. Returns the status of this machine's first rank, or that of the signal that stopped it. Raises LaunchError, or
    the KoalaError that a rank ended with."""
    check_place(place)
    if take_given_rank(os.environ) or place.ranks == 1:
        return _function(work)(*arguments)
    return _run_agent(work, arguments, place)


def current_rank(environ: Mapping[str, str] = os.environ) -> Rank:
    """This process's, by torchrun's variables; the only one where there are none."""
    if "RANK" not in environ:
        return Rank()
    return Rank(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]))


def check_place(place: Place) -> None:
    """Raise LaunchError unless this machine has the GPUs and several nodes know where to meet."""
    given = take_given_rank(os.environ)
    if place.nodes > 1 and not place.rendezvous and not given:
        hint = "add --rendezvous HOST:PORT, the same on each machine, HOST being one of them"
        raise LaunchError(f"{place.nodes} nodes do not know where to meet", hint)
    if not place.gpus or place.gpus <= (there := gpus_here()):
        return
    import torch

    names = sorted({torch.cuda.get_device_name(number) for number in range(there)})
    have = f"{there} ({', '.join(names)})" if there else "none that torch can use"
    hint = f"use --gpus {there}" if there else "use --gpus 0 to train on the processor, or install torch for your GPU"
    raise LaunchError(f"--gpus {place.gpus}, but this machine has {have}", f"{hint}; --plan needs none")


def gpus_here() -> int:
    """How many GPUs this machine has that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def is_given_rank(environ: Mapping[str, str]) -> bool:
    """Whether something else started this process as one of several."""
    return "RANK" in environ or ("SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1)


def take_given_rank(environ: MutableMapping[str, str]) -> bool:
    """Whether this process is one of several already. SLURM's variables become torchrun's, which torch reads."""
    if "RANK" in environ:
        return True
    if not is_given_rank(environ):
        return False
    try:
        environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
        environ["WORLD_SIZE"] = environ["SLURM_NTASKS"]
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    except KeyError as error:
        environ.pop("RANK", None)
        raise LaunchError(f"SLURM gives no {error.args[0]}", "start it with srun") from None
    environ.setdefault("MASTER_ADDR", first_node(nodes))
    environ.setdefault("MASTER_PORT", str(20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000))
    return True


def first_node(nodes: str) -> str:
    """The first host of SLURM's list: "gpu[07-09,12],login" has gpu07."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise LaunchError(f"SLURM's list of nodes {nodes[:80]!r} has none", "start it with srun")
    return "".join(part or "" for part in found.groups())


def _function(work: str) -> Callable[..., int]:
    quiet_libraries()
    module, _, name = work.partition(":")
    function: Callable[..., int] = getattr(import_module(module), name)
    return function


def _run_agent(work: str, arguments: tuple[Any, ...], place: Place) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if place.nodes > 1:
        note(f"waiting for all {place.nodes} nodes at {_endpoint(place)}, {_WAIT_S // 60} minutes at most")
    with tempfile.TemporaryDirectory(prefix="koala-") as scratch, _forwarded_signals() as received, _quiet_agent():
        try:
            start = elastic_launch(_agent_settings(place, Path(scratch)), _rank)
            results = start(work, arguments, scratch, _environment(place, Path(scratch)))
        except ChildFailedError as error:
            if received:
                raise SystemExit(128 + received[0]) from None
            raise _cause(error, Path(scratch)) from None
        except Exception as error:  # the agent's own: no rendezvous, mostly
            if received:
                raise SystemExit(128 + received[0]) from None
            raise _agents(error, place, begun=(Path(scratch) / _BEGUN).exists()) from error
    return int(results[min(results)])


def _agents(error: Exception, place: Place, *, begun: bool) -> LaunchError:
    """What to tell of an error that is no rank's."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

    meets = isinstance(error, RendezvousError | DistError) and place.nodes > 1
    if meets and begun:
        return LostError()
    if isinstance(error, RendezvousTimeoutError):
        what = f"fewer than {place.nodes} nodes met at {_endpoint(place)} in {_WAIT_S // 60} minutes"
        return LaunchError(what, "give the same command on every machine; check --rendezvous and --nodes")
    if meets:
        return LaunchError(f"the ranks did not find together: {error}", "check --rendezvous and --nodes")
    return LaunchError(f"the ranks cannot be run: {error or type(error).__name__}", "go on with --resume")


def _endpoint(place: Place) -> str:
    return place.rendezvous if ":" in place.rendezvous else f"{place.rendezvous}:{_DEFAULT_PORT}"


def _agent_settings(place: Place, scratch: Path) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    endpoint, meeting = _endpoint(place), dict[str, Any](join_timeout=_WAIT_S, read_timeout=_WAIT_S)
    if place.nodes == 1:
        endpoint, meeting["store_type"] = str(scratch / "agent"), "file"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(place.gpus, 1))))
    return LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=max(place.gpus, 1),
        run_id="koala",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs=meeting,
        max_restarts=0,
        local_addr="127.0.0.1" if _is_local(place) else None,
        signals_to_handle="SIGQUIT",  # the others are forwarded
        start_method=START_METHOD,
    )


def _environment(place: Place, scratch: Path) -> dict[str, str]:
    """What ranks are told of where they meet, and that ranks of one machine talk over the loopback device alone."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if _is_local(place) else ()
    told = {name: os.environ.get(name, "lo") for name in names}
    return told | ({MEETING_FILE: str(scratch / "ranks")} if place.nodes == 1 else {})


def _is_local(place: Place) -> bool:
    if place.nodes == 1:
        return True
    host = place.rendezvous.rpartition(":")[0] or place.rendezvous
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Give SIGINT and SIGTERM to the ranks, which save and stop at the first one and end at the second. Yields the
    list of those received. Before there are ranks the first one ends this process."""
    received: list[int] = []
    others = multiprocessing.active_children()

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        ranks = [child for child in multiprocessing.active_children() if child not in others]
        for rank in ranks:
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, number)
        if not ranks:
            raise SystemExit(128 + number)

    with handled_signals(forward):
        yield received


@contextmanager
def handled_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to the handler until the block ends."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Without the agent's reports of what is said in one line here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _rank(work: str, arguments: tuple[Any, ...], scratch: str, environment: Mapping[str, str]) -> int:
    """What each process runs. How it failed is left in a file of `scratch`."""
    os.setpgid(0, 0)  # Ctrl-C reaches the launching process alone, which forwards it
    os.environ.update(environment)
    number = current_rank().number
    (Path(scratch) / _BEGUN).touch()
    try:
        return _function(work)(*arguments)
    except BaseException as error:
        _write_report(Path(scratch), number, error)
        if not isinstance(error, KoalaError) or isinstance(error, LostError):
            time.sleep(_LET_OTHERS_BE_SEEN)  # a lost connection: the agent should see first who was killed
        sys.stderr.flush()
        os._exit(1)  # threads may still wait for other ranks


def _write_report(scratch: Path, rank: int, error: BaseException) -> None:
    lost = isinstance(error, LostError)
    report = {
        "rank": rank,
        "time": time.time(),
        "known": isinstance(error, KoalaError) and not lost,
        "lost": lost,
        "message": error.message if isinstance(error, KoalaError) else f"{type(error).__name__}: {error}",
        "hint": error.hint if isinstance(error, KoalaError) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_whole(scratch / f"rank-{rank}.json", [json.dumps(report).encode()])


def _cause(error: Any, scratch: Path) -> Exception:
    """What to tell of a failed run: a rank's own KoalaError, else that one was killed, else what else it ended with."""
    reports = [json.loads(path.read_text()) for path in scratch.glob("rank-*.json")]
    reports.sort(key=lambda report: report["time"])  # others lose their connection to the first one
    for report in reports:
        if report["known"]:
            return KoalaError(report["message"], report["hint"])
    number, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "it may have run out of memory; go on with --resume"
        return LaunchError(f"rank {number} was killed by {name}", hint)
    for report in reports:
        if not report["lost"]:
            unknown = RuntimeError(f"rank {report['rank']}: {report['message']}")
            unknown.add_note(report["traceback"])
            return unknown
    if reports:
        return LostError()
    return LaunchError(f"rank {number} ended with status {failure.exitcode}", "go on with --resume")

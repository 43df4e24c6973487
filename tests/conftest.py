"""What every test gets: a home folder of its own, and no way to reach another machine."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("koala", deadline=None, database=None, print_blob=True)
settings.load_profile("koala")


if hasattr(os, "sched_setaffinity"):
    # llama.cpp's threads wait for each other by spinning: for tiny models, beside other programs, one core is faster
    # than two. Children inherit it.
    _cores = sorted(os.sched_getaffinity(0))
    _core = {_cores[os.getpid() % len(_cores)]}
    os.sched_setaffinity(0, _core)

# A shell that runs the tests in the background leaves SIGINT ignored, nohup SIGHUP; children would inherit it.
for _signal, _usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _usual)


# Read once, when huggingface_hub is imported: no test sees, or adds to, the models of whoever runs it.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="koala-hub-")
os.environ.pop("HF_HUB_CACHE", None)


@pytest.fixture(autouse=True)
def koala_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the user's data and cache folders, in this process and its children."""
    home = tmp_path_factory.mktemp("koala-home")
    monkeypatch.setenv("KOALA_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """All cores of the machine, for what is not llama.cpp and shares its work among them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores)
    yield
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _core)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and name look-ups beyond this machine fail."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_remote(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_remote(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        _refuse_remote((host,))
        return getaddrinfo(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


def _refuse_remote(address: Any) -> None:
    """Raise unless `address` is of this machine: a Unix socket's path, or a host that is loopback."""
    host = address[0] if isinstance(address, tuple) else None
    if host is None or host in ("", "localhost", b"localhost") or _is_loopback(host):
        return
    raise RuntimeError(f"a test tried to reach {host!r}")


def _is_loopback(host: str | bytes) -> bool:
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False

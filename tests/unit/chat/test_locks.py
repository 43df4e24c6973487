"""File locks: one holder at a time, also around the moment when a holder removes its file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from koala_local.chat.locks import lock_session, try_lock, waiting_lock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first = try_lock(path)
    assert first is not None and try_lock(path) is None
    assert path.stat().st_mode & 0o777 == 0o600
    os.close(first)
    second = try_lock(path)
    assert second is not None
    os.close(second)


def test_a_file_removed_between_opening_and_locking_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "x.lock", os.open
    removals = [True, True]

    def removed_after_opening(name: Path, flags: int, mode: int) -> int:
        descriptor = opened(name, flags, mode)
        if removals:
            removals.pop()
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed_after_opening)
    held = try_lock(path)
    assert held is not None and path.exists() and try_lock(path) is None
    os.close(held)


def test_waiting_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    held = try_lock(path)
    assert held is not None
    start = time.monotonic()
    with waiting_lock(path, 0.1):
        assert 0.1 <= time.monotonic() - start < 5
    os.close(held)
    with waiting_lock(path, 5):
        assert try_lock(path) is None
    assert time.monotonic() - start < 5


def test_where_nothing_can_be_written_it_is_granted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    held = lock_session(tmp_path / "file", "aaaa2222")
    assert held is not None
    held.release()

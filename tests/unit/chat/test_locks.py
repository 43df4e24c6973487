"""The lock of a session where it cannot be made; test_history.py has the rest."""

from __future__ import annotations

from pathlib import Path

from koala_local.chat.locks import lock_session


def test_where_nothing_can_be_written_it_is_granted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    held = lock_session(tmp_path / "file", "aaaa2222")
    assert held is not None
    held.release()

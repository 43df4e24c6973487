"""Models that come from the hub's cache: what they are called, and so which format they speak."""

from __future__ import annotations

from pathlib import Path

from koala_local.chat.loader import LoadOptions, open_model
from koala_local.dialogue import KOALA
from tests.gptq_maker import make_gptq


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

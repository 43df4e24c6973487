"""Processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.finetune.toy import TwoRanks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    two = TwoRanks(tmp_path_factory.mktemp("ranks") / "meeting")
    yield two
    two.close()

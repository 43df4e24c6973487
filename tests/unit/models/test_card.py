"""What a model's README.md states, of well-made ones and of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_local.models.card import Card, read_card


def card_of(folder: Path, text: str) -> Card:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return read_card(folder)


def test_name_and_licence_are_read(tmp_path: Path) -> None:
    assert card_of(tmp_path, "---\nlicense: mit\nmodel_name: Tiny\n---\n# Tiny\n") == Card("Tiny", "mit")
    assert card_of(tmp_path, "---\nlicense: other\nlicense_name: llama2\n---\n") == Card("", "llama2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Only a title\n",
        "---\nlicense: other\n---\n",
        "---\nlicense: other\nlicense_name: see-below\n---\n",
        "---\nlicense: " + "[" * 100_000 + "\n---\n",
        "---\nlicense: [mit, bsd]\nmodel_name: 3\n---\n",
        "---\nlicense: {\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    ],
)
def test_what_states_nothing_usable_is_empty(tmp_path: Path, text: str) -> None:
    assert card_of(tmp_path, text) == Card()


def test_long_and_broken_text_is_one_short_line(tmp_path: Path) -> None:
    card = card_of(tmp_path, f'---\nlicense: "a\\nb"\nmodel_name: {"x" * 1000}\n---\n')
    assert card.licence == "a b" and len(card.name) == 200


def test_no_file_and_no_text(tmp_path: Path) -> None:
    assert read_card(tmp_path) == Card()
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n")
    assert read_card(tmp_path) == Card()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n" + b" " * (1 << 20))
    assert read_card(tmp_path) == Card()

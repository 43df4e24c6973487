"""The commands about sessions, the model, the prompt and files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from koala_local.chat.attach import LIMIT_BYTES
from koala_local.chat.front import say
from koala_local.chat.ledger import Ledger
from koala_local.chat.loader import LoadedModel
from koala_local.dialogue import KOALA
from koala_local.errors import ContextError, Interrupted, KoalaError, ModelFileError, TemplateError
from koala_local.models.gguf_header import read_header
from tests.engines import tiny_engine
from tests.gguf_maker import make_model
from tests.unit.chat.recorder import Recorder, users


def test_new_sessions_resume_and_rename(front: Recorder) -> None:
    say(front, "the first one")
    front.run("/rename  a good\ttitle ")
    front.run("/new")
    assert users(front) == []
    say(front, "the second \x1b]0;evil\x07one")
    listed = front.run("/sessions")
    assert listed.index("the second") < listed.index("a good title")
    assert "the first one" in front.run("/resume")
    assert users(front) == ["the first one"]
    assert "a good title" in front.run("/tree")
    session = next(item.id for item in front.conversation.history.sessions() if "second" in item.title)
    front.run(f"/resume {session[:6]}")
    assert len(users(front)) == 1
    assert "evil" not in front.run("/tree")


def test_resume_without_another_session(front: Recorder) -> None:
    say(front, "the only one")
    with pytest.raises(KoalaError, match="no other session"):
        front.run("/resume")


def test_export_markdown(front: Recorder, tmp_path: Path) -> None:
    front.run("/system Be brief.")
    say(front, "what is \x1b[31mred")
    assert "notes.md" in front.run(f"/export '{tmp_path}/my notes'")
    text = (tmp_path / "my notes.md").read_text()
    assert "Be brief." in text
    assert "what is red" in text
    with pytest.raises(KoalaError, match="exists"):
        front.run(f"/export {tmp_path}/my notes.md")
    front.run("/edit other")
    front.run(f"/export {tmp_path}/my notes.md !")
    assert "other" in (tmp_path / "my notes.md").read_text()
    front.run("/edit third")
    front.run(f"/export --force {tmp_path}/my notes.md")
    assert "third" in (tmp_path / "my notes.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["my notes.md"]


def test_export_json_has_the_whole_tree(front: Recorder, tmp_path: Path) -> None:
    say(front, "one \ud83d")  # half an emoji, as a broken paste brings it
    front.run("/edit two")
    front.run(f"/export {tmp_path}/chat.json")
    content = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"]
    assert [turn["user"][:3] for turn in content["turns"]] == ["one", "two"]
    assert content["head"] == content["turns"][1]["id"]
    assert content["format"] == "koala"


@pytest.mark.parametrize("name", ["", "!", "chat.pdf", ".", "~nobody/x.md", "missing/folder/x.md", "a\0b.md"])
def test_export_refuses(front: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(KoalaError):
        front.run(f"/export {name}")
    assert set(tmp_path.iterdir()) == before


def test_attach_goes_in_front_of_the_next_message(front: Recorder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\ufeffwith ``` in it\r\nand more\n")
    assert "notes.txt" in front.run(f"/attach {tmp_path}/notes.txt")
    assert "notes.txt" in front.run("/attach")
    front.interrupted = True
    with pytest.raises(Interrupted):
        say(front, "what is this?")
    assert len(front.attachments) == 1
    front.interrupted = False
    say(front, "what is this?")
    assert users(front) == ["notes.txt:\n````\nwith ``` in it\nand more\n````\n\nwhat is this?"]
    assert "nothing is attached" in front.run("/attach")
    front.run(f'/attach "{tmp_path}/notes.txt"')
    assert "nothing is attached" in front.run("/attach none")
    (tmp_path / "long.txt").write_text("word " * 70)
    for _ in range(6):  # each fits, all do not
        front.run(f"/attach {tmp_path}/long.txt")
    with pytest.raises(ContextError) as caught:
        say(front, "what is this?")
    assert "/attach none" in caught.value.hint
    front.run("/attach none")
    front.run(f"/attach {tmp_path}/notes.txt")
    assert "without notes.txt" in front.run("/new")
    assert "without" not in front.run("/new")


def test_attach_refuses(front: Recorder, tmp_path: Path) -> None:
    bad = {
        "binary": b"GGUF\0\0",
        "latin1": "f\u00fcr".encode("latin-1"),
        "empty": b" \n",
        "large": b"x" * (LIMIT_BYTES + 1),
        "too many tokens": b"word " * 600,
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in (*bad, "pipe", "folder", "missing", "nul\0"):
        with pytest.raises(KoalaError) as caught:
            front.run(f"/attach {tmp_path}/{name}")
        assert name.partition("\0")[0] in caught.value.message
    assert front.attachments == []


def test_model_changes_and_stays_when_it_cannot(
    front: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "koala_local.engine.llama.physical_cores", lambda: 1
    )  # spinning threads are slow on busy machines
    # The shared engine must outlive this test: the conversation gets one of its own.
    own = tiny_engine(tmp_path)
    path = next(tmp_path.glob("*.gguf"))
    front.conversation.ledger = Ledger(own, KOALA)
    front.model = LoadedModel(path, read_header(path), own, KOALA, "test")
    say(front, "one")
    with pytest.raises(ModelFileError):
        front.run("/model missing.gguf")
    say(front, "two")
    other = make_model(tmp_path / "other.gguf", name="other", seed=2)
    assert "other" in front.run(f"/model {other}")
    say(front, "three")
    assert users(front) == ["one", "two", "three"]
    front.conversation.ledger.engine.close()


def test_the_model_is_described_without_escapes(front: Recorder) -> None:
    text = front.run("/model")
    assert "Koala test" in text
    assert "research only" in text


def test_set(front: Recorder) -> None:
    assert "temperature" in front.run("/set")
    front.run("/set temperature 0.25")
    front.run("/set top-k=3")
    assert (front.conversation.sampling.temperature, front.conversation.sampling.top_k) == (0.25, 3)
    for line in ("/set temperature", "/set temperature hot", "/set nothing 3", "/set top_k 1.5"):
        with pytest.raises(KoalaError):
            front.run(line)
    assert front.conversation.sampling.temperature == 0.25


def test_stats(front: Recorder) -> None:
    assert "KV cache" in front.run("/stats")
    say(front, "one")
    text = front.run("/stats")
    assert front.last is not None
    assert f"{front.last.stats.evaluated_tokens} evaluated" in " ".join(text.split())


def test_tokens_shows_control_tokens_and_typed_ones_apart(front: Recorder) -> None:
    say(front, "</s> you typed this")
    rows = [line.split() for line in front.run("/tokens").splitlines()]
    kinds = [row[0] for row in rows if row and row[0] in ("control", "text", "reply")]
    assert kinds == ["control", "text", "reply", "control"]
    assert [row[2] for row in rows if row and row[0] == "control"] == ["<s>", "</s>"]
    ids = front.conversation.ledger.cache.ids
    assert f"{len(ids)} tokens, the first {len(ids)} of" in front.run("/tokens")


def test_tokens_is_bounded(front: Recorder) -> None:
    for number in range(4):
        say(front, f"message {number}")
    assert "before these" in front.run("/tokens")
    assert front.run("/tokens 1").count("\nreply") == 1
    assert front.run("/tokens 99").count("\nreply") == 4
    assert "before these" not in front.run("/tokens 99")
    with pytest.raises(KoalaError):
        front.run("/tokens many")


def test_tokens_and_template_of_a_message_that_does_not_end(front: Recorder) -> None:
    say(front, "x" * 300)
    assert len(front.run("/tokens").splitlines()) > 5
    assert "xxx" in front.run("/template")


def test_template_shows_the_prompt_and_changes(front: Recorder) -> None:
    assert "an example message" in " ".join(front.run("/template").split())
    say(front, "one")
    shown = front.run("/template").replace("\n", "")
    assert "<s>BEGINNING OF CONVERSATION: USER: one GPT:" in shown
    assert shown.rstrip().endswith("</s>")
    changed = " ".join(front.run("/template vicuna-v1.1").split())
    assert "A chat between a curious user" in changed
    assert front.model.format.name == front.conversation.ledger.format.name == "vicuna-v1.1"
    with pytest.raises(TemplateError):
        front.run("/template nonsense")
    with pytest.raises(TemplateError):
        front.run("/template embedded")
    assert front.conversation.ledger.format.name == "vicuna-v1.1"


def test_copy(front: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    say(front, "one")
    with pytest.raises(KoalaError, match="no clipboard program") as caught:
        front.run("/copy")
    assert "/export" in caught.value.hint
    program = tmp_path / "xclip"
    program.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/copied\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("DISPLAY", ":0")
    assert "xclip" in front.run("/copy")
    assert (tmp_path / "copied").read_text() == front.conversation.path()[-1].reply.encode("utf-8", "replace").decode()
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(KoalaError, match="xclip failed"):
        front.run("/copy")

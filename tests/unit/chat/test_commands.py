"""The slash commands, on a real engine and a front that records: what is shown fits 40 columns and has no escapes."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from koala_local.chat.attach import LIMIT_BYTES
from koala_local.chat.commands import COMMANDS, Front, Unsent, run_line, say
from koala_local.chat.conversation import Conversation
from koala_local.chat.history import History
from koala_local.chat.kv_files import KvFiles
from koala_local.chat.ledger import Answer, Ledger
from koala_local.chat.loader import LoadedModel, LoadOptions, change_model
from koala_local.chat.streaming import Act
from koala_local.dialogue import KOALA
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling
from koala_local.engine.text_stream import plain
from koala_local.errors import ContextError, Interrupted, KoalaError, ModelFileError, TemplateError
from koala_local.models.gguf_header import read_header
from tests.engines import tiny_engine
from tests.gguf_maker import make_model

WIDTH = 40


class Recorder:
    """A front that keeps what it is shown. Satisfies `Front`."""

    def __init__(self, conversation: Conversation, model: LoadedModel) -> None:
        self.conversation, self.model, self.options = conversation, model, LoadOptions()
        self.attachments: list[str] = []
        self.last: Answer | None = None
        self.shown: list[str] = []
        self.replacement: str | None = None  # what the user makes of a text that they are asked to change
        self.asked = ""
        self.interrupted = self.done = False

    def answer(self, act: Act) -> None:
        if self.interrupted:
            raise Interrupted
        self.last = act(lambda text: None, lambda done, total: None)

    def show(self, content: RenderableType) -> None:
        if isinstance(content, str):
            self.shown.append(plain(content))  # as both fronts do
            return
        page = io.StringIO()
        Console(file=page, width=WIDTH, color_system=None, force_terminal=False).print(content)
        assert "\x1b" not in page.getvalue()
        assert max(map(cell_len, page.getvalue().splitlines())) <= WIDTH
        self.shown.append(page.getvalue())

    def ask_text(self, prompt: str, default: str) -> str | None:
        self.asked = default
        return self.replacement

    def change_model(self, reference: str) -> None:
        notes: list[str] = []
        self.model = change_model(self.conversation, self.model, reference, self.options, notes.append)

    def quit(self) -> None:
        self.done = True

    def run(self, line: str) -> str:
        """Run a line and return what it showed."""
        self.shown = []
        run_line(self, line)
        return "\n".join(self.shown)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(engine: LlamaEngine, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = make_model(tmp_path_factory.mktemp("header") / "koala-test.gguf", name="Koala \x1b[31mtest")
    return LoadedModel(path, read_header(path), engine, KOALA, "the model is called Koala")


@pytest.fixture
def front(engine: LlamaEngine, model: LoadedModel, tmp_path: Path) -> Iterator[Recorder]:
    history = History.open(tmp_path / "data")
    conversation = Conversation(
        Ledger(engine, KOALA),
        history,
        KvFiles(tmp_path / "kv"),
        model="tiny",
        sampling=Sampling(temperature=1.0, max_tokens=6),
        note=lambda text: None,
        seed=1,
    )
    yield Recorder(conversation, model)
    history.close()


def users(front: Recorder) -> list[str]:
    return [node.user for node in front.conversation.path()]


def test_the_recorder_is_a_front(front: Recorder) -> None:
    checked: Front = front
    assert checked.last is None


def test_help_names_every_command(front: Recorder) -> None:
    text = front.run("/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "/undo" not in front.run("/help regen")
    assert "/regen" in front.run("/")


@pytest.mark.parametrize(("typed", "meant"), [("/udno", "/undo"), ("/session", "/sessions"), ("/SWICH 2", "/switch")])
def test_an_unknown_command_names_the_likely_one(front: Recorder, typed: str, meant: str) -> None:
    with pytest.raises(KoalaError, match="no command") as caught:
        front.run(typed)
    assert meant in caught.value.hint
    assert "//" in caught.value.hint


def test_two_slashes_begin_a_message_with_one(front: Recorder) -> None:
    front.run("//etc/hosts is a file")
    assert users(front) == ["/etc/hosts is a file"]


@pytest.mark.parametrize("line", ["/regen", "/undo", "/edit 1 x", "/branch", "/copy", "/rename x"])
def test_nothing_to_work_on_yet(front: Recorder, line: str) -> None:
    with pytest.raises(KoalaError) as caught:
        front.run(line)
    assert caught.value.hint


@pytest.mark.parametrize("line", ["/tree", "/switch", "/stats", "/tokens", "/template", "/sessions", "/system", "/set"])
def test_what_only_shows_works_before_the_first_turn(front: Recorder, line: str) -> None:
    assert front.run(line).strip()


def test_system(front: Recorder) -> None:
    assert "no system text" in front.run("/system")
    assert "trained without" in front.run("/system Be brief.\nAlways.")
    assert front.conversation.system == "Be brief.\nAlways."
    assert front.run("/system") == "Be brief.\nAlways."
    assert "trained without" not in front.run("/system Be kind.")
    with pytest.raises(ContextError):
        front.run("/system " + "long " * 500)
    assert front.conversation.system == "Be kind."
    front.run("/system none")
    assert front.conversation.system == ""


def test_regen_edit_and_undo(front: Recorder) -> None:
    for text in ("one", "two", "three"):
        say(front, text)
    front.run("/regen")
    assert users(front) == ["one", "two", "three"]
    assert front.last is not None
    assert front.last.stats.evaluated_tokens == 1
    front.run("/edit 2 zwei\nund mehr")
    assert users(front) == ["one", "zwei\nund mehr"]
    front.run("/edit drei")
    assert users(front) == ["one", "drei"]
    assert "turn 2" in front.run("/undo")
    assert users(front) == ["one"]
    assert len(front.conversation.nodes) == 6


def test_edit_without_a_text_asks_with_the_old_one(front: Recorder) -> None:
    say(front, "one")
    say(front, "two")
    front.replacement = "uno"
    front.run("/edit 1")
    assert (front.asked, users(front)) == ("one", ["uno"])
    front.replacement = None
    with pytest.raises(KoalaError, match="nothing is changed"):
        front.run("/edit")
    assert users(front) == ["uno"]
    with pytest.raises(KoalaError, match="no turn 9"):
        front.run("/edit 9 x")


def test_an_interrupted_edit_can_be_typed_again(front: Recorder) -> None:
    say(front, "one")
    front.replacement, front.interrupted = "uno", True
    with pytest.raises(Unsent) as caught:
        front.run("/edit")
    assert caught.value.line == "/edit 1 uno"
    assert users(front) == ["one"]


def test_branch_switch_and_tree(front: Recorder) -> None:
    for text in ("one", "two"):
        say(front, text)
    assert "main line" in front.run("/branch 1 main line")
    say(front, "another two")
    tree = front.run("/tree")
    assert "[1 main line] two" in tree
    assert "> 2 [2] another two" in tree
    assert "* 1 one" in tree
    assert "main line: two" in front.run("/switch")
    assert "two" in front.run("/switch main line")
    assert users(front) == ["one", "two"]
    front.run("/switch 2")
    assert users(front) == ["one", "another two"]
    front.run("/branch 0")
    assert users(front) == []
    with pytest.raises(KoalaError):
        front.run("/switch nowhere")
    front.run("/switch 1")
    with pytest.raises(KoalaError, match="called"):
        front.run("/branch 1 7")


def test_branching_in_the_middle_of_a_line(front: Recorder) -> None:
    for text in ("one", "two", "three"):
        say(front, text)
    front.run("/undo")
    assert "behind turn 1" in front.run("/branch 1")
    assert users(front) == ["one"]


def test_a_tree_of_many_forks_fits(front: Recorder) -> None:
    conversation = front.conversation
    conversation.sampling = Sampling(max_tokens=1)
    for number in range(20):
        say(front, f"turn {number}")
        front.run("/regen")
    lines = front.run("/tree").splitlines()
    assert sum("-> " in line for line in lines) == 40
    assert next(line for line in lines if "turn 19" in line).startswith("├── ")


def test_what_forks_off_the_line_is_indented_below_its_turn(front: Recorder) -> None:
    for text in ("one", "two", "/edit 1 eins", "/regen", "zwei", "/regen", "/undo", "drei", "/switch 1", "three"):
        front.run(text) if text.startswith("/") else say(front, text)
    lines = [line for line in front.run("/tree").splitlines() if "──" in line]
    assert [line.index("──") // 4 for line in lines] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [line.split(" ->")[0].split()[-1] for line in lines] == [
        "eins",
        "eins",
        "zwei",
        "zwei",
        "drei",
        "one",
        "two",
        "three",
    ]


def test_a_tree_of_forks_upon_forks_fits(front: Recorder) -> None:
    front.conversation.sampling = Sampling(max_tokens=1)
    for number in range(10):
        say(front, f"turn {number}")
        say(front, "more")
        front.run("/undo")
        front.run("/regen")
    front.run("/branch 0")
    assert "turn 9" in front.run("/tree")


def test_new_sessions_resume_and_rename(front: Recorder) -> None:
    say(front, "the first one")
    front.run("/rename  a  good\ttitle ")
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
    assert "notes.md" in front.run(f"/export {tmp_path}/my notes")
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
    front.run(f"/attach {tmp_path}/notes.txt")
    assert "nothing is attached" in front.run("/attach none")


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


def test_model_changes_and_stays_when_it_cannot(front: Recorder, tmp_path: Path, engine: LlamaEngine) -> None:
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


@pytest.mark.parametrize("line", ["/quit", "/exit", "/q"])
def test_quit(front: Recorder, line: str) -> None:
    front.run(line)
    assert front.done

"""Which prompt format a model gets, and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from koala_local.chat.formats import pick_format
from koala_local.chat.template import SOURCE_CHARACTERS, JinjaFormat
from koala_local.dialogue import BOS, EOS, FORMATS, KOALA, KOALA_TEMPLATE, Control, Dialogue, PromptFormat, Text, Turn
from koala_local.engine.base import Vocabulary
from koala_local.errors import TemplateError

ECHO = "{{ bos_token }}{% for m in messages %}<|u|>{{ m.content }}{{ eos_token }}{% endfor %}"


def vocabulary(control: Iterable[str] = (), user_defined: Iterable[str] = ()) -> Vocabulary:
    return Vocabulary(
        key="0",
        size=1000,
        bos=1,
        eos=2,
        add_bos=True,
        adds_space=True,
        control={text: number for number, text in enumerate(("<s>", "</s>", *control), start=1)},
        user_defined={text: number for number, text in enumerate(user_defined, start=500)},
    )


PLAIN = vocabulary()


def pick(
    override: str = "auto",
    *,
    name: str = "",
    file: str = "model.gguf",
    template: str | None = None,
    known: Vocabulary = PLAIN,
) -> tuple[PromptFormat, str]:
    format, reason = pick_format(
        override,
        model_name=name,
        file_name=file,
        template=template,
        vocabulary=known,
        bos_text="<s>",
        eos_text="</s>",
    )
    assert reason
    assert reason.isprintable()
    return format, reason


def test_what_was_trained_here_keeps_koalas_format_whatever_its_name() -> None:
    format, reason = pick(name="mine", template=KOALA_TEMPLATE)
    assert format is KOALA
    assert "template" in reason


@pytest.mark.parametrize(("name", "file"), [("Koala 13B", "model.gguf"), ("", "TheBloke_KOALA-7b.q4.gguf")])
@pytest.mark.parametrize("template", [None, ECHO])
def test_koala_keeps_its_own_format(name: str, file: str, template: str | None) -> None:
    format, reason = pick(name=name, file=file, template=template)
    assert format is KOALA
    assert "Koala" in reason


def test_embedded_template_comes_before_names() -> None:
    format, reason = pick(name="vicuna-7b", template=ECHO)
    assert isinstance(format, JinjaFormat)
    assert format.name == "embedded"
    assert "template" in reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna-13b-v1.5", "vicuna-v1.1"),
        ("Alpaca 7B", "alpaca"),
        ("Llama-2-7b-chat-hf", "llama-2"),
        ("llama_2_13b_chat", "llama-2"),
        ("llama2-chat", "llama-2"),
        ("Llama-2-7b-hf", "vicuna-v1.1"),
        ("llama-7b", "vicuna-v1.1"),
        ("", "vicuna-v1.1"),
    ],
)
def test_names_tell_the_family(name: str, expected: str) -> None:
    assert pick(name=name)[0].name == expected
    assert pick(file=f"{name}.gguf")[0].name == expected


@pytest.mark.parametrize("known", [vocabulary(["<|im_start|>"]), vocabulary(user_defined=["<|im_start|>"])])
def test_chatml_by_its_token(known: Vocabulary) -> None:
    assert pick(known=known)[0].name == "chatml"
    assert pick(name="vicuna", known=known)[0].name == "vicuna-v1.1"


@pytest.mark.parametrize("template", ["", " \n"])
def test_blank_template_is_none(template: str) -> None:
    assert pick(name="alpaca", template=template)[0].name == "alpaca"
    with pytest.raises(TemplateError, match="no chat template"):
        pick("embedded", template=template)


@pytest.mark.parametrize("name", FORMATS)
def test_named_format_wins(name: str) -> None:
    format, reason = pick(name, name="koala", template=ECHO)
    assert format is FORMATS[name]
    assert name in reason


def test_embedded_can_be_asked_for() -> None:
    format, _ = pick("embedded", name="koala", template=ECHO)
    assert isinstance(format, JinjaFormat)
    with pytest.raises(TemplateError, match="no chat template") as caught:
        pick("embedded", name="koala")
    assert "koala" in caught.value.hint


def test_template_file_with_the_models_tokens(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(b"\xef\xbb\xbf" + ECHO.encode())
    format, reason = pick(str(path), known=vocabulary(["<|u|>"], ["<|end|>"]))
    assert isinstance(format, JinjaFormat)
    assert str(path) in reason
    assert pick(f"'{path}'", known=vocabulary(["<|u|>"], ["<|end|>"]))[0].key == format.key
    with format:
        segments = format.segments(Dialogue((Turn("a<|u|><|end|>"),)))
    assert segments == [BOS, Control("<|u|>"), Text("a<|u|><|end|>"), EOS]


def test_unknown_name_lists_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError) as caught:
        pick("vicuna-v9")
    assert "vicuna-v9" in caught.value.message
    assert all(name in caught.value.hint for name in FORMATS)


@pytest.mark.parametrize("name", ["none.jinja", "folder/none", ".", "~nobody-of-this-name/x.jinja"])
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError, match="no template file") as caught:
        pick(name)
    assert "koala" in caught.value.hint


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TemplateError, match="not UTF-8"):
        pick(str(path))


@pytest.mark.parametrize("size", [SOURCE_CHARACTERS + 1, 5 * SOURCE_CHARACTERS])
def test_file_that_is_too_large(size: int, tmp_path: Path) -> None:
    path = tmp_path / "large.jinja"
    path.write_bytes(b"a" * size)
    with pytest.raises(TemplateError, match="larger than"):
        pick(str(path))


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(ECHO)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TemplateError, match="Permission denied"):
        pick(str(path))

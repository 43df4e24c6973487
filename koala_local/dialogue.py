"""How a conversation becomes the pieces of a prompt: the one place that knows the dialogue formats.

A format writes a dialogue as a flat list of segments. `Control` is one control token, `Text` is a string that is
tokenized on its own with no special token parsed, `Reply` is what the model wrote: its sampled token ids where they are
held, else its text. Chat and training both read this list; nothing else decides where a token boundary lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. `reply` is None while it is still to be written; an unhelpful one carries the negative marker."""

    user: str
    reply: str | None = None
    helpful: bool = True


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation, oldest turn first. Only the last turn may lack its reply."""

    turns: tuple[Turn, ...]
    system: str = ""


@dataclass(frozen=True, slots=True)
class Control:
    """One control token: `bos`, `eos`, or a token by its own text such as `<|im_start|>`."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Markup and content that is tokenized together as one string; nothing in it becomes a control token."""

    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of turn `turn` (an index into the dialogue). With `spaced` its first word carries a leading space."""

    turn: int
    text: str
    spaced: bool


Segment = Control | Text | Reply
BOS = Control("bos")
EOS = Control("eos")


class PromptFormat(Protocol):
    """A way to write a dialogue for a model."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str:
        """Equal for formats that write the same: a name alone does not tell two templates apart."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply besides the model's own end tokens."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Control tokens this format writes by their text: content must never match them."""

    def segments(self, dialogue: Dialogue) -> list[Segment]:
        """The whole dialogue; it ends where the next reply begins, or after the end token of the last one."""


@dataclass(frozen=True, slots=True)
class BuiltinFormat:
    """A format of a published model family, exact to the token."""

    name: str
    write: Callable[[Dialogue], Iterator[Segment]]
    stops: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name

    def segments(self, dialogue: Dialogue) -> list[Segment]:
        return list(self.write(dialogue))


def _koala(dialogue: Dialogue) -> Iterator[Segment]:
    """Koala: EasyLM's and FastChat's `koala_v1`; the system text follows the header, once."""
    yield BOS
    header = "BEGINNING OF CONVERSATION: " + (f"{dialogue.system} " if dialogue.system else "")
    for index, turn in enumerate(dialogue.turns):
        marker = "GPT:" if turn.helpful else "An Unhelpful Answer:"
        yield Text(f"{header}USER: {turn.user} {marker}")
        header = ""
        if turn.reply is not None:
            yield Reply(index, turn.reply, spaced=True)
            yield EOS


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _vicuna(dialogue: Dialogue) -> Iterator[Segment]:
    """Vicuna v1.1, as FastChat's `vicuna_v1.1` writes it."""
    yield BOS
    header = f"{dialogue.system or _VICUNA_SYSTEM} "
    for index, turn in enumerate(dialogue.turns):
        yield Text(f"{header}USER: {turn.user} ASSISTANT:")
        header = ""
        if turn.reply is not None:
            yield Reply(index, turn.reply, spaced=True)
            yield EOS


_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def _alpaca(dialogue: Dialogue) -> Iterator[Segment]:
    """Stanford Alpaca's prompt, repeated per turn after the first preamble; trained on one turn only."""
    yield BOS
    header = f"{dialogue.system or _ALPACA_SYSTEM}\n\n"
    for index, turn in enumerate(dialogue.turns):
        yield Text(f"{header}### Instruction:\n{turn.user}\n\n### Response:")
        header = ""
        if turn.reply is not None:
            yield Reply(index, turn.reply, spaced=False)
            yield EOS


def _llama2(dialogue: Dialogue) -> Iterator[Segment]:
    """Llama-2-chat: each exchange between its own BOS and EOS, the system text inside the first; messages stripped."""
    system = f"<<SYS>>\n{dialogue.system}\n<</SYS>>\n\n" if dialogue.system else ""
    for index, turn in enumerate(dialogue.turns):
        yield BOS
        yield Text(f"[INST] {(system + turn.user).strip()} [/INST]")
        system = ""
        if turn.reply is not None:
            yield Reply(index, turn.reply, spaced=True)
            yield EOS


_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")


def _chatml(dialogue: Dialogue) -> Iterator[Segment]:
    """ChatML: a control token opens and closes each message."""
    yield BOS
    if dialogue.system:
        yield from (_IM_START, Text(f"system\n{dialogue.system}"), _IM_END, Text("\n"))
    for index, turn in enumerate(dialogue.turns):
        yield from (_IM_START, Text(f"user\n{turn.user}"), _IM_END, Text("\n"))
        yield from (_IM_START, Text("assistant\n"))
        if turn.reply is not None:
            yield Reply(index, turn.reply, spaced=False)
            yield from (_IM_END, Text("\n"))


KOALA = BuiltinFormat("koala", _koala)
# The same for programs that read templates; a file that carries it was made for Koala's format.
KOALA_TEMPLATE = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: "
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' GPT:' }}"
    "{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
FORMATS: dict[str, BuiltinFormat] = {
    format.name: format
    for format in (
        KOALA,
        BuiltinFormat("vicuna-v1.1", _vicuna),
        BuiltinFormat("alpaca", _alpaca, stops=("### Instruction:",)),
        BuiltinFormat("llama-2", _llama2),
        BuiltinFormat("chatml", _chatml, markers=(_IM_START.text, _IM_END.text)),
    )
}

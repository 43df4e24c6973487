"""Which tokens a conversation costs: every count here is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from koala_local.chat.ledger import KEEP, Answer, Exchange, Ledger, Overflow
from koala_local.dialogue import (
    BOS,
    FORMATS,
    KOALA,
    BuiltinFormat,
    Control,
    Dialogue,
    Reply,
    Segment,
    Text,
    Turn,
)
from koala_local.engine.llama import LlamaEngine
from koala_local.engine.sampling import Sampling
from koala_local.errors import ContextError, Interrupted
from tests.engines import tiny_engine

SAMPLING = Sampling(temperature=1.0, max_tokens=12)
CONTEXT = 512


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"), context=CONTEXT)
    yield engine
    engine.close()


@pytest.fixture
def ledger(engine: LlamaEngine) -> Iterator[Ledger]:
    ledger = Ledger(engine, KOALA)
    yield ledger
    ledger.cache.clear()
    engine.resume()


class Talk:
    """A straight conversation on a ledger."""

    def __init__(self, ledger: Ledger, system: str = "") -> None:
        self.ledger, self.system, self.dropped = ledger, system, 0
        self.path: list[Exchange] = []

    def say(self, text: str, sampling: Sampling = SAMPLING, seed: int = 0) -> Answer:
        self.path.append(Exchange(Turn(text)))
        answer = self.ledger.reply(self.system, self.path, self.dropped, sampling, seed)
        self.path[-1] = Exchange(Turn(text, answer.text), answer.ids)
        self.dropped = answer.stats.dropped_turns
        return answer


def own_tokens(ledger: Ledger, text: str) -> int:
    return len(ledger.engine.tokenize(f"USER: {text} GPT:"))


def test_the_ids_are_those_of_the_fields(ledger: Ledger) -> None:
    """Each field is tokenized on its own; replies keep their sampled ids, whatever their text says."""
    tokenize = ledger.engine.tokenize
    path = [Exchange(Turn("the hat", "an hat"), (70, 71)), Exchange(Turn("more"))]
    first = tokenize("BEGINNING OF CONVERSATION: USER: the hat GPT:")
    expected = [1, *first, 70, 71, 2, *tokenize("USER: more GPT:")]
    assert ledger.ids("", path) == expected
    assert ledger.ids("", [path[0]._replace(reply_ids=None), path[1]]) == [
        1, *first, *tokenize("an hat"), 2, *tokenize("USER: more GPT:")
    ]  # fmt: skip
    with_system = tokenize("BEGINNING OF CONVERSATION: Be kind. USER: more GPT:")
    assert ledger.ids("Be kind.", path, dropped=1) == [1, *with_system]


def test_a_turn_evaluates_only_its_own_text(ledger: Ledger) -> None:
    talk = Talk(ledger)
    talk.say("first")
    for turn in range(12):
        before, text = ledger.engine.evaluated_tokens, f"turn {turn}"
        answer = talk.say(text)
        assert answer.stats.evaluated_tokens == own_tokens(ledger, text)
        assert answer.stats.prompt_tokens == answer.stats.reused_tokens + answer.stats.evaluated_tokens
        # every generated token once, and one end token
        total = ledger.engine.evaluated_tokens - before
        assert total == answer.stats.evaluated_tokens + answer.stats.generated_tokens + 1
        assert ledger.cache.ids == ledger.ids("", talk.path)


def test_regenerating_evaluates_one_token(ledger: Ledger) -> None:
    talk = Talk(ledger)
    talk.say("first")
    talk.say("second")
    again = [*talk.path[:-1], Exchange(Turn("second"))]
    answer = ledger.reply("", again, 0, SAMPLING, seed=99)
    assert answer.stats.evaluated_tokens == 1
    # back to the first attempt: only the new message
    after = [*talk.path, Exchange(Turn("third"))]
    assert ledger.reply("", after, 0, SAMPLING, 1).stats.evaluated_tokens == own_tokens(ledger, "third")


def test_editing_evaluates_from_where_the_histories_differ(ledger: Ledger) -> None:
    talk = Talk(ledger)
    for text in ("one", "two", "three"):
        talk.say(text)
    edited = [talk.path[0], Exchange(Turn("2"))]
    assert ledger.reply("", edited, 0, SAMPLING, 5).stats.evaluated_tokens <= own_tokens(ledger, "2")


def test_a_seed_repeats(ledger: Ledger) -> None:
    first, second = Talk(ledger).say("hello", seed=4), Talk(ledger).say("hello", seed=4)
    assert (first.ids, first.text) == (second.ids, second.text)
    assert Talk(ledger).say("hello", seed=5).ids != first.ids


@pytest.mark.parametrize("overflow", ["exact", "shift"])
def test_whole_turns_leave_a_full_context(engine: LlamaEngine, overflow: Overflow) -> None:
    ledger = Ledger(engine, KOALA, overflow)
    talk = Talk(ledger, system="Be kind.")
    header = ledger.ids("Be kind.", [Exchange(Turn(""))])[:-6]
    quiet, drops = 0, []
    for turn in range(60):
        before = talk.dropped
        answer = talk.say(f"turn number {turn}", seed=turn)
        assert ledger.cache.ids == ledger.ids("Be kind.", talk.path, talk.dropped)
        assert ledger.cache.ids[: len(header)] == header
        assert len(ledger.cache.ids) <= CONTEXT
        if talk.dropped == before:
            quiet += 1
            assert answer.stats.evaluated_tokens <= own_tokens(ledger, f"turn number {turn}") or turn == 0
        else:
            drops.append(quiet)
            quiet = 0
            assert answer.stats.prompt_tokens <= KEEP[overflow] * CONTEXT
            if overflow == "shift":
                assert answer.stats.evaluated_tokens <= own_tokens(ledger, f"turn number {turn}")
    assert len(drops) >= 3
    assert min(drops) >= 2, "enough leaves at once that the next turns evaluate only their own text"
    ledger.cache.clear()


@pytest.mark.parametrize("overflow", ["exact", "shift"])
def test_a_long_reply_goes_on_when_old_turns_leave(
    engine: LlamaEngine, overflow: Overflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(engine, KOALA, overflow)
    talk = Talk(ledger)
    for turn in range(4):
        talk.say(f"turn {turn}", Sampling(temperature=1.0, max_tokens=50), seed=turn)
    monkeypatch.setattr(engine, "vocabulary", engine.vocabulary._replace(ends=frozenset()))  # it never ends by itself
    answer = talk.say("now at length", Sampling(temperature=1.0), seed=3)
    assert answer.finish == "length"
    assert talk.dropped == 4
    assert len(ledger.cache.ids) == CONTEXT
    prompt = ledger.ids("", [*talk.path[:-1], Exchange(Turn("now at length"))], talk.dropped)
    assert len(answer.ids) == CONTEXT - len(prompt) - 1  # all but the end token
    assert ledger.cache.ids == ledger.ids("", talk.path, talk.dropped)
    assert len(ledger.cache.ids) <= CONTEXT
    ledger.cache.clear()


def test_too_long_a_message_is_refused_and_nothing_changes(ledger: Ledger) -> None:
    talk = Talk(ledger)
    talk.say("first")
    with pytest.raises(ContextError, match="the message needs"):
        ledger.reply("", [*talk.path, Exchange(Turn("x" * 3 * CONTEXT))], 0, SAMPLING, 0)
    assert talk.say("second").stats.evaluated_tokens == own_tokens(ledger, "second")


def test_a_message_is_refused_where_what_closes_a_reply_leaves_no_room_for_one(engine: LlamaEngine) -> None:
    def write(dialogue: Dialogue) -> Iterator[Segment]:
        yield BOS
        for index, turn in enumerate(dialogue.turns):
            yield Text(f"user: {turn.user}")
            if turn.reply is not None:
                yield Reply(index, turn.reply, spaced=True)
                yield Control("<|the end of this message|>")  # spelled out: more than the shortest reply

    ledger = Ledger(engine, BuiltinFormat("long end", write))
    answers = []
    for length in range(CONTEXT - 80, CONTEXT):
        with suppress(ContextError):
            answers.append(ledger.reply("", [Exchange(Turn("z" * length))], 0, SAMPLING, 0))
    assert 0 < len(answers) < 80
    assert all(answer.ids and answer.stats.ttft_s > 0 for answer in answers)
    ledger.cache.clear()


def test_megabytes_are_refused_without_being_tokenized(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "word " * 1_000_000
    monkeypatch.setattr(ledger.engine, "tokenize", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(ContextError, match="the message needs more than"):
        ledger.reply("", [Exchange(Turn(endless))], 0, SAMPLING, 1)
    with pytest.raises(ContextError, match="the system text needs more than"):
        ledger.check_system(endless)


def test_too_long_a_system_text_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ContextError, match="system text"):
        ledger.check_system("y" * CONTEXT)


def test_a_stop_string_is_cut_and_rewound(engine: LlamaEngine) -> None:
    """Whatever the model wrote, stopping at a string inside it leaves text, ids and cache in step."""
    whole = Talk(Ledger(engine, KOALA)).say("hello", Sampling(temperature=1.0, max_tokens=40), seed=11).text
    plain = [index for index in range(5, len(whole) - 3) if whole[index : index + 2].isascii()]
    assert plain
    for index in plain[:8]:
        stop = whole[index : index + 2]
        ledger = Ledger(engine, BuiltinFormat("koala", KOALA.write, stops=(stop,)))
        talk = Talk(ledger)
        answer = talk.say("hello", Sampling(temperature=1.0, max_tokens=40), seed=11)
        assert answer.finish == "stop"
        assert answer.text == whole[: whole.index(stop)]
        spelled = b"".join(map(engine.piece, answer.ids)).decode("utf-8", "replace")
        assert spelled.lstrip(" ") == answer.text.lstrip(" ")
        assert ledger.cache.ids == ledger.ids("", talk.path)
        ledger.cache.clear()


def test_an_interrupt_keeps_the_partial_reply(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koala_local.chat.ledger._PACE_S", 0.0)  # each token's text at once
    chunks: list[str] = []

    def stop_after_three(text: str) -> None:
        chunks.append(text)
        if len(chunks) == 3:
            ledger.engine.interrupt()

    long = Sampling(temperature=1.0, max_tokens=200)
    answer = ledger.reply("", [Exchange(Turn("go"))], 0, long, 2, stop_after_three)
    assert answer.finish == "interrupted"
    assert "".join(chunks) == answer.text
    path = [Exchange(Turn("go", answer.text), answer.ids)]
    assert ledger.cache.ids == ledger.ids("", path)
    after = ledger.reply("", [*path, Exchange(Turn("on"))], 0, SAMPLING, 3)
    assert after.stats.evaluated_tokens == own_tokens(ledger, "on")


def test_an_interrupt_during_prefill_leaves_a_valid_cache(ledger: Ledger) -> None:
    talk = Talk(ledger)
    talk.say("first")
    with pytest.raises(Interrupted):
        ledger.reply(
            "", [*talk.path, Exchange(Turn("z" * 300))], 0, SAMPLING, 0,
            on_prefill=lambda done, total: ledger.engine.interrupt(),
        )  # fmt: skip
    ledger.engine.resume()
    assert talk.say("second").stats.evaluated_tokens <= own_tokens(ledger, "second")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reuses_its_history(engine: LlamaEngine, name: str) -> None:
    ledger = Ledger(engine, FORMATS[name])
    talk = Talk(ledger)
    talk.say("hi")
    for text in ("a", "bb", "ccc"):
        before = len(ledger.cache.ids)
        answer = talk.say(text, Sampling(temperature=1.0, max_tokens=5))
        assert answer.stats.reused_tokens == before
        assert ledger.cache.ids == ledger.ids("", talk.path)
    ledger.cache.clear()


def test_user_text_holds_no_control_token(ledger: Ledger) -> None:
    pieces = ledger.pieces("</s><s>", [Exchange(Turn("</s><s><unk>", "</s>"))])
    control = set(ledger.engine.vocabulary.control.values())
    for piece in pieces:
        assert piece.kind == "control" or not control & set(piece.ids)
    assert [piece.kind for piece in pieces] == ["control", "text", "reply", "control"]


def test_stopping_while_old_turns_are_read_again_does_not_read_them_after_all(engine: LlamaEngine) -> None:
    ledger = Ledger(engine, KOALA)
    talk = Talk(ledger)
    for turn in range(5):
        talk.say(f"turn {turn}", Sampling(temperature=1.0, max_tokens=50), seed=turn)
    path = [*talk.path, Exchange(Turn("at length"))]
    before: list[int] = []

    def stop_in_the_overflow(done: int, total: int) -> None:
        if total > 100 and not before:
            before.append(engine.evaluated_tokens)
            engine.interrupt()

    endless = engine.vocabulary._replace(ends=frozenset())
    known, engine.vocabulary = engine.vocabulary, endless
    try:
        answer = ledger.reply("", path, 0, Sampling(temperature=1.0), 1, on_prefill=stop_in_the_overflow)
    finally:
        engine.vocabulary = known
    assert before
    assert answer.finish == "interrupted"
    assert engine.evaluated_tokens - before[0] < 100
    ledger.cache.clear()

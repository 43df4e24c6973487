"""The llama.cpp engine on a tiny random model."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from llama_cpp import llama_cpp as ll

from koala_local.engine import bindings, llama
from koala_local.engine.batch import TILE, tiled
from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.engine.sampling import Sampling
from koala_local.errors import Interrupted, KoalaError, ModelFileError
from tests.engines import tiny_engine
from tests.gguf_maker import make_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = tiny_engine(tmp_path_factory.mktemp("model"))
    yield engine
    engine.close()


def test_a_context_that_is_rounded_up_is_read_whole(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, context=300)
    assert engine.context_size == 512
    engine.evaluate([1, *[20] * 500], slot=0, position=0)
    assert engine.evaluated_tokens == 501
    engine.close()


def test_pieces_spell_the_text(engine: LlamaEngine) -> None:
    text = "the hat, é 你 \U0001f428\n\tend"
    assert b"".join(map(engine.piece, engine.tokenize(text))).decode() == f" {text}"
    assert b"".join(map(engine.piece, engine.tokenize(text, continues=True))).decode() == text


def test_vocabulary_names_the_special_tokens(engine: LlamaEngine) -> None:
    vocabulary = engine.vocabulary
    assert (vocabulary.bos, vocabulary.eos, vocabulary.add_bos, vocabulary.adds_space) == (1, 2, True, True)
    assert vocabulary.control["</s>"] == 2
    assert 2 in vocabulary.ends
    assert engine.piece(2) == b""


def test_vocabulary_key_changes_with_a_token(tmp_path: Path, engine: LlamaEngine) -> None:
    other = tiny_engine(tmp_path, extra_tokens=[("<|x|>", 4)])
    assert other.vocabulary.key != engine.vocabulary.key
    assert "<|x|>" in other.vocabulary.user_defined
    other.close()


def test_saved_state_comes_back_with_its_logits(engine: LlamaEngine, tmp_path: Path) -> None:
    ids = [1, *range(20, 60)]
    engine.crop(0, 0)
    engine.evaluate(ids, slot=0, position=0)
    engine.save(0, ids, tmp_path / "state")
    engine.evaluate([7], slot=0, position=len(ids))
    expected = engine.logits()
    assert engine.load(3, tmp_path / "state") == ids
    engine.evaluate([7], slot=3, position=len(ids))
    assert max(abs(a - b) for a, b in zip(engine.logits(), expected, strict=True)) < 1e-4
    engine.crop(3, 0)


def test_a_seed_repeats_and_another_differs(engine: LlamaEngine) -> None:
    def draw(seed: int) -> list[int]:
        engine.crop(0, 0)
        engine.evaluate([1, 30, 31], slot=0, position=0)
        sampler = engine.sampler(Sampling(temperature=2.0, min_p=0.0), seed, [])
        drawn = []
        for position in range(3, 23):
            drawn.append(sampler.sample())
            engine.evaluate(drawn[-1:], slot=0, position=position)
        sampler.close()
        return drawn

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_penalties_know_the_tokens_before_the_reply(engine: LlamaEngine) -> None:
    engine.crop(0, 0)
    engine.evaluate([1, 30, 31], slot=0, position=0)
    greedy = engine.sampler(Sampling(temperature=0.0), 0, [])
    favourite = greedy.sample()
    primed = engine.sampler(Sampling(temperature=0.0, repeat_penalty=3.0), 0, [favourite])
    assert primed.sample() != favourite
    greedy.close()
    primed.close()


def test_an_interrupt_from_another_thread_stops_inside_a_batch(tmp_path: Path) -> None:
    """A batch that takes long is stopped within it: the flag is seen without any Python running."""
    path = make_model(tmp_path / "m.gguf", context=4096, embedding=512, layers=8, heads=8, feed_forward=2048)
    engine = LlamaEngine(path, "test", Placement(context=4096, threads=1))
    batch = [5] * 512
    started = time.perf_counter()
    engine.evaluate(batch, slot=0, position=0)
    whole = time.perf_counter() - started
    threading.Timer(whole / 4, engine.interrupt).start()
    started = time.perf_counter()
    with pytest.raises(Interrupted):
        engine.evaluate(batch, slot=0, position=512)
    assert time.perf_counter() - started < whole * 0.9
    engine.resume()
    assert engine.evaluated_tokens == 512
    engine.evaluate(batch, slot=0, position=512)  # the interrupted tokens left nothing behind
    engine.close()


def test_a_move_is_done_at_once_whatever_stops_what_follows(engine: LlamaEngine, tmp_path: Path) -> None:
    ids = [1, *range(10, 90)]

    def logits(slot: int) -> list[float]:
        engine.evaluate([7], slot=slot, position=41)
        return engine.logits()

    def moved(*, stopped: bool) -> list[float]:
        engine.crop(0, 0)
        engine.evaluate(ids, slot=0, position=0)
        if stopped:
            engine.interrupt()
        engine.shift(0, 5, 45, ids[-1])
        if stopped:
            engine._stopped = False  # llama.cpp is called, and stopped itself
            with pytest.raises(Interrupted):
                engine.evaluate([7], slot=0, position=41)
            engine.resume()
        return logits(0)

    wanted = moved(stopped=False)
    assert moved(stopped=True) == pytest.approx(wanted, abs=1e-3)
    engine.crop(0, 0)
    engine.evaluate(ids, slot=0, position=0)
    engine.shift(0, 5, 45, ids[-1])
    left = [*ids[:5], *ids[45:]]
    engine.save(0, left, tmp_path / "kv")
    assert engine.load(1, tmp_path / "kv") == left
    assert logits(1) == pytest.approx(wanted, abs=1e-3)


def test_a_message_behind_a_long_history_is_filled_up_and_nothing_shows_it(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", context=512)
    with patch.object(llama, "_flash_attention", return_value=ll.LLAMA_FLASH_ATTN_TYPE_ENABLED):
        engine = LlamaEngine(path, "test", Placement(context=512, threads=1))
    history, message = [1, *(5 + n % 250 for n in range(400))], [*range(20, 60)]
    assert tiled(len(message), len(history), 64) == TILE
    sizes: list[int] = []
    decode = ll.llama_decode

    def read(*, full: bool) -> list[float]:
        def counted(context: Any, batch: Any) -> int:
            sizes.append(batch.n_tokens)
            return 1 if full and batch.n_tokens == TILE else int(decode(context, batch))

        engine.crop(0, 0)
        engine.evaluate(history, slot=0, position=0)
        before = engine.evaluated_tokens
        with patch.object(ll, "llama_decode", counted):
            engine.evaluate(message, slot=0, position=len(history))
        assert engine.evaluated_tokens == before + len(message)
        return engine.logits()

    whole, plain = read(full=False), read(full=True)  # where no cell is free for filler, there is none
    assert sizes == [TILE, TILE, len(message)]
    assert max(abs(a - b) for a, b in zip(whole, plain, strict=True)) < 0.02
    engine.crop(0, 0)
    engine.evaluate([7] * 512, slot=0, position=0)  # every cell is free again
    engine.close()


@pytest.mark.parametrize(
    ("count", "history", "size"),
    [(46, 0, 46), (46, 100, 46), (46, 1785, 64), (20, 1785, 20), (20, 3300, 64), (1, 4000, 1), (64, 4000, 64)],
)
def test_filling_up_must_pay(count: int, history: int, size: int) -> None:
    assert tiled(count, history, 768) == size


@pytest.mark.parametrize(
    ("features", "plain"), [(b"AVX2 = 1 | FMA = 1", True), (b"AVX2 = 1 | AVX512 = 1", False), (b"NEON = 1", False)]
)
def test_flash_attention_is_left_out_where_it_is_slow(features: bytes, plain: bool) -> None:
    with patch.object(ll, "llama_print_system_info", return_value=features):
        flash = {kind: llama._flash_attention(kind) for kind in ("f16", "q8_0")}
    off, on, auto = (getattr(ll, f"LLAMA_FLASH_ATTN_TYPE_{name}") for name in ("DISABLED", "ENABLED", "AUTO"))
    assert flash == {"f16": off if plain and not llama.can_offload() else auto, "q8_0": on}


def test_quantized_kv_works(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", embedding=128)
    engine = LlamaEngine(path, "test", Placement(context=256, kv_type="q8_0"))
    engine.evaluate([1, 10, 11], slot=0, position=0)
    assert len(engine.logits()) == engine.vocabulary.size
    assert "kv=q8_0" in engine.cache_key
    engine.close()


def test_all_logits_are_those_of_each_step(engine: LlamaEngine) -> None:
    ids = [1, *range(20, 150)]
    pieces = list(engine.all_logits(ids))
    assert [len(piece) for piece in pieces] == [64, 64, 3]
    for length in (1, 64, 65, len(ids)):
        engine.crop(0, 0)
        engine.evaluate(ids[:length], slot=0, position=0)
        row = pieces[(length - 1) // 64][(length - 1) % 64]
        assert max(abs(row - engine.logits())) < 0.02
    engine.crop(0, 0)


def test_ctrl_c_ends_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a callback raises is dropped; so Ctrl-C is remembered, and llama.cpp told to stop at its next report."""
    path = make_model(tmp_path / "tiny.gguf")
    proceeds: list[bool] = []
    load = ll.llama_model_load_from_file

    def interrupted(name: bytes, params: Any) -> Any:
        proceeds.append(params.progress_callback(0.1, None))
        os.kill(os.getpid(), signal.SIGINT)
        proceeds.append(params.progress_callback(0.2, None))
        return load(name, params)

    monkeypatch.setattr(ll, "llama_model_load_from_file", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without it
    with pytest.raises(KeyboardInterrupt):
        LlamaEngine(path, "fingerprint", Placement(context=64))
    assert proceeds == [True, False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    path = make_model(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ModelFileError, match=r"cannot load tiny.gguf: .*architecture"):
        LlamaEngine(path, "test", Placement(512))


def test_a_vocabulary_that_cannot_be_read_leaves_no_model_behind(tmp_path: Path) -> None:
    with (
        patch.object(LlamaEngine, "_read_vocabulary", side_effect=KoalaError("odd")),
        patch.object(bindings.ll, "llama_free", wraps=bindings.ll.llama_free) as free,
        patch.object(bindings.ll, "llama_model_free", wraps=bindings.ll.llama_model_free) as free_model,
        pytest.raises(KoalaError, match="odd"),
    ):
        tiny_engine(tmp_path)
    assert free.call_count == free_model.call_count == 1


def test_without_a_context_the_model_is_freed_behind_the_reading(tmp_path: Path) -> None:
    with (
        patch.object(bindings.ll, "llama_init_from_model", return_value=None),
        patch.object(bindings.ll, "llama_model_free", wraps=bindings.ll.llama_model_free) as free_model,
        pytest.raises(ModelFileError),
    ):
        tiny_engine(tmp_path)
    assert free_model.call_count == 2  # once more to hear the reason

"""A damaged or hostile model file ends in a one-line error, or it runs; it never takes the program down."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from koala_local.errors import ModelFileError
from koala_local.models.gguf_header import read_header
from koala_local.models.load_probe import probe
from tests.gguf_maker import make_model

MUTANTS = 1000
HUGE = (0, 1, 5, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mutants") / "tiny.gguf"
    return make_model(path, embedding=32, layers=1, heads=2, feed_forward=32, chat_template="{{ messages }}")


class Mutator:
    """Seeded damage to one file's bytes."""

    def __init__(self, path: Path) -> None:
        self.original = path.read_bytes()
        header = read_header(path)
        self.data_offset = header.data_offset
        vocabulary = self.original.index(b"tokenizer.ggml.tokens")
        table = self.original.index(header.tensors[0].name.encode() + b"\x02\0\0\0")
        self.structure = [*range(4, vocabulary + 64), *range(table - 400, self.data_offset)]  # where sizes stand dense

    def mutant(self, seed: int) -> bytes:
        rng = random.Random(seed)
        data = bytearray(self.original)
        ways = (self._flip, self._flip, self._flip, self._body, self._number, self._small, self._swap)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(ways)(rng, data)
        if rng.random() < 0.1:
            self._cut(rng, data)
        return bytes(data)

    def _place(self, rng: random.Random) -> int:
        return rng.choice(self.structure) if rng.random() < 0.8 else rng.randrange(4, self.data_offset)

    def _flip(self, rng: random.Random, data: bytearray) -> None:
        data[self._place(rng)] ^= 1 << rng.randrange(8)

    def _body(self, rng: random.Random, data: bytearray) -> None:
        for _ in range(rng.randrange(1, 64)):
            data[rng.randrange(4, len(data))] = rng.randrange(256)

    def _number(self, rng: random.Random, data: bytearray) -> None:
        at = self._place(rng)
        data[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))

    def _small(self, rng: random.Random, data: bytearray) -> None:
        """Types and counts are small numbers: put another one where one stands."""
        small = [at for at in self.structure if 0 < data[at] < 64 and not any(data[at + 1 : at + 4])]
        data[rng.choice(small)] = rng.randrange(48)

    def _swap(self, rng: random.Random, data: bytearray) -> None:
        one, other = (self._place(rng) for _ in range(2))
        data[one : one + 8], data[other : other + 8] = data[other : other + 8], data[one : one + 8]

    def _cut(self, rng: random.Random, data: bytearray) -> None:
        at = self._place(rng) if rng.random() < 0.5 else rng.randrange(len(data))
        if rng.random() < 0.5:
            del data[at:]
        elif rng.random() < 0.5:
            del data[at : at + rng.randrange(1, 64)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))


class Worker:
    """The long-lived process that loads and decodes survivors."""

    def __init__(self) -> None:
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.decode_worker"]
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=quiet, text=True)

    def decode(self, path: Path) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        return answer or f"crashed: {self.process.wait()}"


@contextmanager
def worker() -> Iterator[Worker]:
    working = Worker()
    try:
        yield working
    finally:
        working.process.kill()
        working.process.communicate()


def outcome(path: Path) -> str:
    """ "refused" by the header, "probed" out by llama.cpp, or "passed"."""
    by = "refused"
    try:
        read_header(path)
        by = "probed"
        probe(path)
    except ModelFileError as error:
        assert error.message.isprintable(), error.message
        assert error.hint
        return by
    return "passed"


def test_every_mutant_is_refused_in_one_line_or_runs(model: Path, tmp_path: Path) -> None:
    mutator, path = Mutator(model), tmp_path / "mutant.gguf"
    outcomes: Counter[str] = Counter()
    with worker() as working:
        for seed in range(MUTANTS):
            path.write_bytes(mutator.mutant(seed))
            start = time.monotonic()
            outcomes[result := outcome(path)] += 1
            assert time.monotonic() - start < 2, f"mutant {seed} took {time.monotonic() - start:.1f} s"
            if result == "passed":
                assert working.decode(path) == "decoded", f"mutant {seed}"
    assert outcomes["refused"] > MUTANTS / 10
    assert outcomes["passed"] > MUTANTS / 10, outcomes


def test_the_model_itself_runs(model: Path) -> None:
    assert outcome(model) == "passed"
    with worker() as working:
        assert working.decode(model) == "decoded"

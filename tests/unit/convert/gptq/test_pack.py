"""The on-disk layout of GPTQ layers, against a reader that takes it bit by bit."""

from __future__ import annotations

import pytest
import torch
from koala_local.convert.gptq.pack import BITS, QuantizedMatrix, pack, unpack

from koala_local.errors import ModelFileError


def bit_by_bit(words: list[int], bits: int) -> list[int]:
    """The values in a column of packed words, read as one long number."""
    stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(stream >> (bits * index)) & ((1 << bits) - 1) for index in range(len(words) * 32 // bits)]


def slow_weight(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The weights, (outputs, inputs), entry by entry as facts about the format have it."""
    qweight, qzeros = parts["qweight"].tolist(), parts["qzeros"].tolist()
    outputs, groups = len(qweight[0]), parts["g_idx"].tolist()
    zeros = [bit_by_bit(row, bits) for row in qzeros]
    columns = [bit_by_bit([row[output] for row in qweight], bits) for output in range(outputs)]
    scales = parts["scales"].float().tolist()
    return torch.tensor(
        [[(columns[o][i] - (zeros[g][o] + 1)) * scales[g][o] for i, g in enumerate(groups)] for o in range(outputs)]
    )


def random_matrix(bits: int, outputs: int = 64, inputs: int = 96, groups: int = 3, seed: int = 0) -> QuantizedMatrix:
    """Any codes, asymmetric zeros, groups in no order."""
    torch.manual_seed(seed)
    return QuantizedMatrix(
        torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8),
        torch.randint(1, (1 << bits) + 1, (groups, outputs), dtype=torch.int16),
        (torch.rand(groups, outputs) + 0.01).half(),
        torch.randint(0, groups, (inputs,), dtype=torch.int32),
    )


@pytest.mark.parametrize("bits", BITS)
def test_an_independent_reader_finds_the_weights(bits: int) -> None:
    matrix = random_matrix(bits)
    parts = pack(matrix, bits)
    assert torch.equal(slow_weight(parts, bits), matrix.dequantized())


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_gives_back_what_was_packed(bits: int) -> None:
    matrix = random_matrix(bits, seed=1)
    found = unpack(pack(matrix, bits), bits)
    for name in ("codes", "zeros", "scales", "groups"):
        assert torch.equal(getattr(found, name), getattr(matrix, name)), name


def test_shapes_types_and_the_symmetric_zero_are_those_of_version_1() -> None:
    matrix = QuantizedMatrix(
        torch.arange(64, dtype=torch.uint8).repeat(32, 1) % 16,
        torch.full((2, 32), 8, dtype=torch.int16),
        torch.ones(2, 32).half(),
        torch.arange(64, dtype=torch.int32) // 32,
    )
    parts = pack(matrix, 4)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == {
        "qweight": ((8, 32), torch.int32),
        "qzeros": ((2, 4), torch.int32),
        "scales": ((2, 32), torch.float16),
        "g_idx": ((64,), torch.int32),
    }
    assert set(parts["qzeros"].flatten().tolist()) == {0x77777777}
    assert parts["qweight"][0, 0].item() == 0x76543210
    assert int(parts["qweight"][1, 0]) & 0xFFFFFFFF == 0xFEDCBA98


def test_three_bits_lie_across_words() -> None:
    """Values 10 and 21 of each 32 begin in one word and end in the next."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10] = 0b101
    codes[:, 21] = 0b110
    matrix = QuantizedMatrix(
        codes, torch.full((1, 32), 4, dtype=torch.int16), torch.ones(1, 32).half(), torch.zeros(32)
    )
    words = [word & 0xFFFFFFFF for word in pack(matrix, 3)["qweight"][:, 0].tolist()]
    assert words == [0b01 << 30, 0b1, 0b11]


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (64, 40)])
def test_a_matrix_that_does_not_fill_words_is_refused(outputs: int, inputs: int) -> None:
    with pytest.raises(ModelFileError, match="multiples of 32"):
        pack(random_matrix(4, outputs, inputs), 4)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("qweight", torch.zeros(11, 64, dtype=torch.int32)),
        ("qzeros", torch.zeros(3, 7, dtype=torch.int32)),
        ("qzeros", torch.zeros(3, 8)),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32)),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32)),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, value: torch.Tensor) -> None:
    parts = pack(random_matrix(4), 4)
    with pytest.raises(ModelFileError):
        unpack({**parts, part: value}, 4)


def test_a_missing_part_is_refused() -> None:
    parts = pack(random_matrix(4), 4)
    del parts["qzeros"]
    with pytest.raises(ModelFileError, match="qzeros"):
        unpack(parts, 4)

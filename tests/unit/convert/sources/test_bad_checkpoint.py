"""Damaged and hostile checkpoints: each is refused in words that name the file, before anything is made of it."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from koala_local.convert.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file

from koala_local.errors import ModelFileError
from tests.checkpoint_maker import make_easylm, make_gguf, make_hf, make_meta, save_state

WEIGHTS = "model.safetensors"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path, **options)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value.message


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return load_file(make_hf(tmp_path_factory.mktemp("made") / "hf", layers=1) / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "model", layers=1)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "model", layers=1, shards=2)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(path: Path, change: Callable[[dict[str, Any]], object], pad: int = 0) -> None:
    """Let `change` edit the safetensors header; the data stays."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + bytes(pad))


def test_a_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert re.search("model-00002-of-00002.safetensors.*is missing", refusal(shards))


def test_a_missing_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    assert "not the index" in refusal(shards)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/hostname", "sub/../../x.safetensors", "..", "", "a\\b"]
)
def test_a_shard_map_that_points_outside(shards: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (shards.parent / "outside.safetensors").write_bytes((shards / "model-00001-of-00002.safetensors").read_bytes())
    index = shards / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**where, "lm_head.weight": name})
    opened: list[str] = []
    real = Path.open

    def watched(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self.name)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert "not in the folder" in refusal(shards)
    assert opened == [index.name]


def test_a_shard_that_is_a_link_out_of_the_folder(shards: Path) -> None:
    shard = shards / "model-00001-of-00002.safetensors"
    shard.rename(shards.parent / "elsewhere.safetensors")
    shard.symlink_to(shards.parent / "elsewhere.safetensors")
    assert "outside the folder" in refusal(shards)


def test_links_within_the_hubs_cache_are_followed(shards: Path) -> None:
    snapshot = shards.parent / "hub" / "snapshots" / "abc"
    blobs = shards.parent / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(shards.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).config.layers == 1


def test_the_index_lies_about_a_tensor(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**where, "lm_head.weight": where["model.embed_tokens.weight"]})
    assert "lm_head.weight" in refusal(shards)


def test_a_tensor_in_two_shards(shards: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    second = shards / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "model.embed_tokens.weight": state["model.embed_tokens.weight"]}, second)
    message = refusal(shards)
    assert "model.embed_tokens.weight" in message and "00001" in message and "00002" in message


LIES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("should take", lambda header: header["lm_head.weight"].update(shape=[340, 65])),
    ("sizes", lambda header: header["lm_head.weight"].update(shape=[-340, -64])),
    ("sizes", lambda header: header["lm_head.weight"].update(shape=[True, 64])),
    ("sizes", lambda header: header["lm_head.weight"].update(data_offsets=[0])),
    ("unknown type", lambda header: header["lm_head.weight"].update(dtype="F13")),
    ("not described", lambda header: header.update({"lm_head.weight": 7})),
    ("overlaps", lambda header: header["model.embed_tokens.weight"].update(header["lm_head.weight"])),
    ("cut off", lambda header: move_last(header, 10**15)),
    ("hole", lambda header: header.pop("model.layers.0.mlp.up_proj.weight")),
]


def move_last(header: dict[str, Any], far: int) -> None:
    last = max((entry for name, entry in header.items() if name[0] != "_"), key=lambda entry: entry["data_offsets"][1])
    last["shape"] = [far]
    last["data_offsets"][1] = last["data_offsets"][0] + 2 * far


@pytest.mark.parametrize(("word", "lie"), LIES, ids=[str(number) for number in range(len(LIES))])
def test_a_lying_safetensors_header(folder: Path, word: str, lie: Callable[[dict[str, Any]], object]) -> None:
    change_header(folder / WEIGHTS, lie)
    message = refusal(folder)
    assert word in message and WEIGHTS in message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\1\2\3",
        (2**63).to_bytes(8, "little") + b"{}",
        (10**6).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"{nix",
        (20000).to_bytes(8, "little") + b'{"a":' + b"[" * 19995,
        (29).to_bytes(8, "little") + b'{"twice":{},"twice":{}}      ',
    ],
    ids=["empty", "short", "huge", "past-end", "array", "no-json", "nested", "twice"],
)
def test_a_header_that_is_none(folder: Path, raw: bytes) -> None:
    (folder / WEIGHTS).write_bytes(raw)
    assert WEIGHTS in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta", "easylm", "gguf"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, state: dict[str, torch.Tensor], kind: str, share: float) -> None:
    path, source = made(tmp_path, state, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert path.name in refusal(source, head_size=16)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta", "easylm"])
def test_mutants_are_read_or_refused(tmp_path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """Bytes changed anywhere in what describes the tensors, at the start and the end of the file."""
    path, source = made(tmp_path, state, kind)
    raw = path.read_bytes()
    rng = random.Random(kind)
    for _ in range(60):
        mutant = bytearray(raw)
        for _ in range(rng.randrange(1, 9)):
            at = rng.choice([rng.randrange(2048), len(raw) - 1 - rng.randrange(2048), rng.randrange(len(raw))])
            mutant[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256), mutant[at] ^ (1 << rng.randrange(8))])
        path.write_bytes(mutant)
        try:
            checkpoint = open_checkpoint(source, head_size=16)
            for name in checkpoint.tensors:
                checkpoint.read(name)
        except ModelFileError:
            pass


def made(tmp_path: Path, state: dict[str, torch.Tensor], kind: str) -> tuple[Path, Path]:
    """The weights, and what to open."""
    if kind == "meta":
        folder = make_meta(tmp_path / "meta", state)
        return folder / "consolidated.00.pth", folder
    if kind == "easylm":
        path = make_easylm(tmp_path / "koala_diff", state)
        return path, path
    if kind == "gguf":
        path = make_gguf(tmp_path / "model.gguf", state)
        return path, path
    folder = make_hf(tmp_path / "hf", layers=1, kind="bin" if kind == "bin" else "safetensors")
    return folder / ("pytorch_model.bin" if kind == "bin" else WEIGHTS), folder


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.witness, "it ran")


@pytest.mark.parametrize("place", ["value", "whole", "old"])
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, state: dict[str, torch.Tensor], place: str) -> None:
    folder = make_hf(tmp_path / "model", layers=1, kind="bin")
    witness = tmp_path / "witness"
    path = folder / "pytorch_model.bin"
    if place == "old":
        path.write_bytes(pickle.dumps(Bomb(witness)))
    else:
        torch.save({**state, "x": Bomb(witness)} if place == "value" else Bomb(witness), path)
    assert path.name in refusal(folder)
    assert not witness.exists()


def test_a_pickle_of_old_times_is_named_as_such(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = make_hf(tmp_path / "model", layers=1, kind="bin")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(folder)


def test_something_else_in_a_pickle(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = make_hf(tmp_path / "model", layers=1, kind="bin")
    contents: list[Any] = [[1, 2], {**state, "step": 7}, dict([*state.items(), (3, torch.zeros(1))])]
    for content in contents:
        torch.save(content, folder / "pytorch_model.bin")
        assert "pytorch_model.bin" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"num_hidden_layers": 3}, "model.layers.1.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2**30}, "model.layers.1.input_layernorm.weight is missing"),
        ({"vocab_size": 341}, "341 x 64"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"eos_token_id": "two"}, "eos_token_id"),
    ],
)
def test_a_configuration_that_is_not_supported(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_json(folder / "config.json", **changes)
    assert words in refusal(folder)


def test_tensors_that_do_not_belong(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_state(folder, {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert open_checkpoint(folder).config.layers == 1
    save_state(folder, {**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    assert "biases" in refusal(folder)
    save_state(folder, {**state, "model.layers.0.adapter.weight": torch.ones(64)})
    assert "model.layers.0.adapter.weight" in refusal(folder)


def test_a_type_that_is_not_read(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_state(folder, {**state, "model.norm.weight": state["model.norm.weight"].double()})
    assert "F64" in refusal(folder)


def test_a_missing_part_of_metas(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = make_meta(tmp_path / "meta", state, parts=4)
    (folder / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth is missing" in refusal(folder)
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    assert "shape" in refusal(folder)


def test_hostile_streams(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = make_easylm(tmp_path / "stream", state)
    raw = path.read_bytes()
    key = ["transformer", "ln_f", "kernel"]
    liar = msgpack.packb([key, msgpack.packb(msgpack.ExtType(1, msgpack.packb([[2**40], "bfloat16", b"ab"])))])
    odd = msgpack.packb([key, msgpack.packb(msgpack.ExtType(1, msgpack.packb([[2], "int8", b"ab"])))])
    other = msgpack.packb([key, msgpack.packb(msgpack.ExtType(3, b"ab"))])
    for addition, words in [
        (raw, "twice"),
        (liar, "cannot have"),
        (odd, "int8"),
        (other, "extension"),
        (b"\xc1", "kind"),
    ]:
        path.write_bytes(raw + addition)
        message = refusal(path, head_size=16)
        assert words in message and "stream" in message
    path.write_bytes(raw)
    assert "no whole heads of 24" in refusal(path, head_size=24)
    assert "does not say how large its attention heads are, and 64 wide" in refusal(path)


def test_ggufs_of_other_kinds(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    assert "falcon" in refusal(make_gguf(tmp_path / "falcon.gguf", state, architecture="falcon"))
    odd = {"rope_freqs.weight": torch.full((8,), 3.0)}
    assert "rotary factors" in refusal(make_gguf(tmp_path / "rope.gguf", state, extra=odd))
    (tmp_path / "koala-13B.ggmlv3.q4_0.bin").write_bytes(b"tjgg" + bytes(600))
    assert "old ggjt format" in refusal(tmp_path / "koala-13B.ggmlv3.q4_0.bin")


@pytest.mark.parametrize("name", ["nothing-there", "empty-folder", "notes.txt"])
def test_no_checkpoint_at_all(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "notes.txt").write_text("Buy milk.")
    assert name in refusal(tmp_path / name)

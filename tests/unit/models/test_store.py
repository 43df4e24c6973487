from __future__ import annotations

import json
import os
import time
from pathlib import Path

import gguf
import pytest
from huggingface_hub import constants

from koala_local.errors import ModelFileError
from koala_local.models import store
from koala_local.models.resolve import NotHereError, resolve
from koala_local.nano import MODEL_PATH
from koala_local.paths import data_folder
from tests.gguf_maker import make_model

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the working folder is another one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=512)


def put(cache: Path, repository: str, name: str, content: bytes = b"GGUF", commit: str = COMMIT) -> Path:
    """A file in the cache, as huggingface_hub lays it out."""
    home = cache / f"models--{repository.replace('/', '--')}"
    path = home / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = home / "blobs" / f"{abs(hash((name, commit))):064x}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    path.symlink_to(os.path.relpath(blob, path.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    return path


def gptq(cache: Path, repository: str, bits: int = 4) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "gptq", "bits": bits},
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    put(cache, repository, "model.safetensors", b"x" * 1000)
    return put(cache, repository, "config.json", json.dumps(config).encode()).parent


def names() -> list[str]:
    return [model.reference for model in store.known()]


def test_without_anything_else_there_is_the_bundled_model() -> None:
    (model,) = store.known()
    assert (model.reference, model.path, model.origin, model.used) == ("nano", MODEL_PATH, "bundled", None)
    assert (model.type, model.size) == ("Q4_K_M", MODEL_PATH.stat().st_size)
    assert store.details(model).context and not store.details(model).problem


def test_models_of_the_cache_and_what_means_them(cache: Path, tiny: Path) -> None:
    q4 = put(cache, "mradermacher/koala-13B-HF-GGUF", "koala-13B-HF.Q4_K_M.gguf", tiny.read_bytes())
    put(cache, "mradermacher/koala-13B-HF-GGUF", "README.md")
    plain = put(cache, "owner/plain", "model.gguf", tiny.read_bytes())
    folder = gptq(cache, "owner/koala-GPTQ")
    put(cache, "google/bert", "pytorch_model.bin")
    put(cache, "google/bert", "config.json", b"{}")
    put(cache, "google/t5", "config.json", b"{}")
    put(cache, "google/t5", "model.safetensors")
    assert names() == ["nano", "koala-13b:Q4_K_M", "owner/koala-GPTQ", "owner/plain:model.gguf"]
    assert [model.path for model in store.known()] == [MODEL_PATH, q4, folder, plain]
    for model in store.known():
        assert resolve(model.reference, None) == model.path
    about = [store.details(model) for model in store.known()]
    assert [(entry.type, entry.context) for entry in about][1:] == [
        ("Q4_K_M", 512),
        ("GPTQ 4 bits", 2048),
        ("F32", 512),
    ]
    assert [model.repository for model in store.known()][1] == "mradermacher/koala-13B-HF-GGUF"


def test_an_alias_and_a_repository_are_found_offline(cache: Path) -> None:
    q4 = put(cache, "mradermacher/koala-13B-HF-GGUF", "koala-13B-HF.Q4_K_M.gguf")
    for reference in (
        "koala-13b",
        "KOALA-13B",
        "koala-13b:q4_k_m",
        "mradermacher/koala-13B-HF-GGUF",
        f"koala-13b@{COMMIT}",
    ):
        assert resolve(reference, None) == q4
    q6 = put(cache, "mradermacher/koala-13B-HF-GGUF", "koala-13B-HF.Q6_K.gguf")
    assert resolve("koala-13b", None) == q6
    assert resolve("koala-13b:Q4_K_M", None) == q4


@pytest.mark.parametrize(
    "reference", ["koala-13b", "koala-13b:Q5_K_M", "owner/repo", "owner/repo:Q4_0", "owner/repo@v1"]
)
def test_what_is_not_here_says_how_to_get_it(cache: Path, reference: str) -> None:
    put(cache, "mradermacher/koala-13B-HF-GGUF", "koala-13B-HF.mmproj-F16.gguf")
    with pytest.raises(NotHereError) as caught:
        resolve(reference, None)
    assert caught.value.hint == f"download it: koala pull {reference}"
    assert caught.value.wanted.repository in caught.value.message


def test_a_model_at_a_path_wins_over_an_alias_but_an_empty_folder_does_not(cache: Path, tiny: Path) -> None:
    cached = put(cache, "mradermacher/koala-13B-HF-GGUF", "koala-13B-HF.Q4_K_M.gguf")
    Path("koala-13b").mkdir()
    assert resolve("koala-13b", None) == cached
    Path("koala-13b/mine.gguf").write_bytes(tiny.read_bytes())
    assert resolve("koala-13b", None) == Path("koala-13b/mine.gguf").absolute()


def test_a_mistyped_alias_is_corrected() -> None:
    with pytest.raises(ModelFileError) as caught:
        resolve("koala13b", None)
    assert "'koala-13b'" in caught.value.hint


def test_an_older_commit_stays_known(cache: Path) -> None:
    old = put(cache, "owner/repo", "m.Q4_0.gguf", commit=OLDER)
    new = put(cache, "owner/repo", "m.Q4_0.gguf", commit=COMMIT)
    assert names() == ["nano", "owner/repo:Q4_0", f"owner/repo:Q4_0@{OLDER}"]
    assert resolve("owner/repo", None) == new
    assert resolve(f"owner/repo:Q4_0@{OLDER}", None) == old


def test_a_file_whose_blob_is_gone_is_not_known(cache: Path) -> None:
    path = put(cache, "owner/repo", "m.Q4_0.gguf")
    path.resolve().unlink()
    assert names() == ["nano"]
    with pytest.raises(NotHereError):
        resolve("owner/repo", None)


def test_damaged_models_are_listed_with_the_reason(cache: Path) -> None:
    put(cache, "owner/repo", "m.Q4_0.gguf", b"GGUF and nothing else")
    put(cache, "owner/gptq", "config.json", b"{not json")
    put(cache, "owner/gptq", "quantize_config.json", b"[]")
    put(cache, "owner/gptq", "model.safetensors")
    found = {model.reference: store.details(model) for model in store.known()}
    assert found["owner/repo:Q4_0"].problem and found["owner/repo:Q4_0"].context is None
    assert found["owner/gptq"].problem


def test_a_registered_file_is_known_by_its_name(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "My-Model.Q4_K_M.gguf"
    path.write_bytes(tiny.read_bytes())
    (model,) = store.register(path)
    assert model.reference == "my-model.q4_k_m"
    for name in (model.reference, "My-Model.Q4_K_M", "my-model.q4_k_m.gguf"):
        assert resolve(name, None) == path
    assert names() == ["nano", "my-model.q4_k_m"]
    assert store.unregister(path) is True
    assert store.unregister(path) is False
    assert names() == ["nano"]
    assert path.exists()


def test_a_registered_folder_is_read_anew_each_time(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "one.gguf").write_bytes(tiny.read_bytes())
    store.register(folder)
    (folder / "two.gguf").write_bytes(tiny.read_bytes())
    assert names() == ["nano", "one", "two"]
    (folder / "one.gguf").unlink()
    (folder / "two.gguf").unlink()
    assert [(model.reference, model.size) for model in store.known()][1:] == [("models", None)]


def test_two_registered_models_of_one_name_go_by_their_paths(tmp_path: Path, tiny: Path) -> None:
    paths = [tmp_path / folder / "twin.gguf" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(tiny.read_bytes())
        (model,) = store.register(path)
    assert model.reference == str(path)
    assert names()[1:] == [str(path) for path in paths]
    with pytest.raises(ModelFileError, match="2 registered models"):
        resolve("twin", None)


@pytest.mark.parametrize("name", ["nano", "Koala-13B"])
def test_a_registered_model_with_the_name_of_another_goes_by_its_path(tmp_path: Path, tiny: Path, name: str) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(tiny.read_bytes())
    (model,) = store.register(path)
    assert model.reference == str(path)
    assert names() == ["nano", str(path)]
    assert resolve(model.reference, None) == path


def test_a_vocabulary_alone_is_not_registered(tmp_path: Path, tiny: Path) -> None:
    path = without_weights(tmp_path / "models" / "vocabulary.gguf")
    with pytest.raises(ModelFileError, match="no weights"):
        store.register(path)
    with pytest.raises(ModelFileError, match="no weights"):
        store.register(path.parent)
    (path.parent / "mine.gguf").write_bytes(tiny.read_bytes())
    assert {model.reference for model in store.register(path.parent)} == {"mine", "vocabulary"}


def test_a_model_whose_first_part_has_no_weights_is_registered(tmp_path: Path, tiny: Path) -> None:
    path = without_weights(tmp_path / "big-00001-of-00002.gguf", parts=2)
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(tiny.read_bytes())
    assert [model.path for model in store.register(path)] == [path]


def test_a_file_that_is_registered_with_its_folder_too_is_there_once(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "models" / "one.gguf"
    path.parent.mkdir()
    path.write_bytes(tiny.read_bytes())
    store.register(path)
    assert [model.reference for model in store.register(path.parent)] == ["one"]
    assert names() == ["nano", "one"]


def without_weights(path: Path, parts: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    if parts:
        writer.add_uint16("split.count", parts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF"])
def test_what_is_no_model_is_not_registered(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        store.register(path)
    with pytest.raises(ModelFileError):
        store.register(tmp_path / "here")
    assert names() == ["nano"]


def test_the_time_of_use(cache: Path, tiny: Path) -> None:
    path = put(cache, "owner/repo", "m.Q4_0.gguf", tiny.read_bytes())
    store.mark_used(path)
    store.register(tiny)
    (used,) = [model.used for model in store.known() if model.path == path]
    assert used is not None and abs(used - time.time()) < 60
    store.mark_used(tiny)
    assert "tiny" in names()
    store.forget(path)
    assert [model.used for model in store.known() if model.path == path] == [None]


def test_notes_that_make_no_sense_are_passed_over() -> None:
    folder = data_folder() / "models"
    folder.mkdir(parents=True)
    for number, content in enumerate(("", "[]", "{}", '{"path": 3}', '{"path": "/x", "used": "now"}', "null")):
        (folder / f"{number}.json").write_text(content)
    assert names() == ["nano"]


def test_a_data_folder_that_cannot_be_written_is_no_reason_to_stop(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KOALA_HOME", str(tmp_path / "file"))
    store.mark_used(tiny)
    assert names() == ["nano"]

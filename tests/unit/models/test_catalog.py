from __future__ import annotations

import gguf
import pytest

from koala_local.errors import ModelFileError
from koala_local.models import catalog
from koala_local.models.quant_types import FILE_TYPES, PREFERENCE, type_in_name
from koala_local.models.reference import HubReference, is_oid, is_repository, is_safe_name, parse
from koala_local.models.variants import File, Variant, choose, listed, variants

SHA = "0" * 64


def test_every_alias_is_a_repository_in_lower_case() -> None:
    for alias, repository in catalog.ALIASES.items():
        assert alias == alias.lower()
        assert "/" not in alias
        assert is_repository(repository)
        assert catalog.repository(alias.upper()) == repository
        assert catalog.alias_of(repository) == alias


@pytest.mark.parametrize(
    ("typed", "meant"), [("koala13b", "koala-13b"), ("koala-13", "koala-13b"), ("tinylama", "tinyllama")]
)
def test_a_mistyped_alias_finds_the_nearest(typed: str, meant: str) -> None:
    assert catalog.nearest(typed)[0] == meant
    assert catalog.nearest("something else") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo", HubReference("owner/repo")),
        ("owner/repo:Q4_K_M", HubReference("owner/repo", "Q4_K_M")),
        ("o.w-n_er/Re.po-1:sub/file.gguf", HubReference("o.w-n_er/Re.po-1", "sub/file.gguf")),
        ("owner/repo@v1.0", HubReference("owner/repo", None, "v1.0")),
        ("owner/repo:Q4_0@refs/pr/1", HubReference("owner/repo", "Q4_0", "refs/pr/1")),
    ],
)
def test_a_reference_and_its_text(text: str, expected: HubReference) -> None:
    assert parse(text) == expected
    assert str(expected) == text
    assert parse(f"koala:{text.partition(':')[2]}", "owner/repo") if ":" in text else True


@pytest.mark.parametrize(
    "text",
    [
        *("", "repo", "a/b/c", "../repo", "owner/..", "/owner/repo", "owner\\repo", "-o/repo", "owner/repo-", "o--w/r"),
        *("owner/repo:../x", "owner/repo:/etc/passwd", "owner/repo:a/../../x", "owner/repo:", "owner/repo:a\\b"),
        *("owner/repo:a\nb", "owner/repo:\x1b[31m", "owner/repo:a\0", "owner/repo:a:b", "owner/repo:a//b"),
        *("owner/repo@", "owner/repo@../x", "owner/repo@a/../b", "owner/repo@/x", "owner/repo@a b", "owner/repo@a\0"),
        *("öwner/repo", "owner/re po", f"owner/{'r' * 100}", f"owner/repo:{'f' * 300}"),
    ],
)
def test_what_could_lead_elsewhere_is_no_reference(text: str) -> None:
    assert parse(text) is None


def test_names_from_the_hub() -> None:
    assert is_safe_name("model.gguf") and is_safe_name("Q4/model 1 é.gguf")
    for name in ("", "/x", "../x", "x/..", "x/./y", "x\\y", "C:x", "x\x7f", "x\u202e", "x/", None, 3, "x" * 256):
        assert not is_safe_name(name)
    assert is_oid(SHA) and is_oid("a" * 40)
    assert not any(is_oid(text) for text in ("", "A" * 64, "../" + "a" * 61, "a" * 63, None, 5, f"{SHA}\n"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("koala-13B-HF.Q4_K_M.gguf", "Q4_K_M"),
        ("koala-13B-HF.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("model-q8_0.gguf", "Q8_0"),
        ("llama-7b.Q4_0.gguf", "Q4_0"),
        ("tiny-fp16.gguf", "F16"),
        ("tiny-BF16.gguf", "BF16"),
        ("gpt-mxfp4.gguf", "MXFP4"),
        ("model-UD-Q4_K_XL.gguf", "Q4_K_XL"),
        ("Q4_K_M/model.gguf", "Q4_K_M"),
        ("model.gguf", ""),
        ("seq5_k_m.gguf", ""),
    ],
)
def test_the_type_in_a_file_name(name: str, expected: str) -> None:
    assert type_in_name(name) == expected


def test_the_numbers_of_the_types_are_those_of_the_format() -> None:
    for number, name in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") == name
    assert len(set(PREFERENCE)) == len(PREFERENCE)
    assert set(PREFERENCE) <= set(FILE_TYPES.values())


def files(*names: str) -> list[File]:
    return [File(name, 100 + number, SHA) for number, name in enumerate(names)]


def gguf_of(type_: str, size: int) -> Variant:
    return Variant(type_, (File(f"m.{type_}.gguf", size, SHA),))


def test_variants_of_a_repository() -> None:
    split = [f"big.Q5_K_M-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    found = variants(files(*split, "m.Q4_K_M.gguf", "mmproj-F16.gguf", "README.md", "imatrix.gguf", "config.json"))
    assert [variant.type for variant in found] == ["Q4_K_M", "Q5_K_M"]
    assert [file.name for file in found[1].files] == split
    assert found[1].name == split[0]
    assert found[1].size == 100 + 101 + 102


def test_a_split_model_with_a_part_missing_is_none() -> None:
    assert variants(files("big.Q5_K_M-00001-of-00003.gguf", "big.Q5_K_M-00003-of-00003.gguf")) == []


def test_a_gptq_folder_has_no_code_and_no_pickles() -> None:
    named = ["config.json", "model.safetensors", "tokenizer.model", "quantize_config.json", "modeling.py", "x.bin"]
    (found,) = variants(files(*named, "sub/config.json", "training.pt"))
    assert found.type == "GPTQ" and found.is_folder and found.name == ""
    assert {file.name for file in found.files} == {*named[:4]}
    assert variants(files("config.json", "x.bin", "training.pt")) == []


def test_a_checkpoint_that_is_not_quantized() -> None:
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    (found,) = variants(files("config.json", *shards, "tokenizer.model", "optimizer.bin"))
    assert found.type == "PYTORCH" and found.is_folder
    assert {file.name for file in found.files} == {"config.json", "tokenizer.model", *shards}
    (found,) = variants(files("config.json", *shards, "model.safetensors"))
    assert found.type == "SAFETENSORS"
    assert {file.name for file in found.files} == {"config.json", "model.safetensors"}
    (found,) = variants(files("config.json", "model.safetensors"), method="gptq")
    assert found.type == "GPTQ"
    assert variants(files("sub/config.json", "sub/pytorch_model.bin")) == []


def test_the_best_that_fits_is_chosen() -> None:
    found = [
        gguf_of(type_, size) for type_, size in (("Q2_K", 2), ("Q4_K_M", 4), ("Q6_K", 6), ("Q8_0", 8), ("F16", 16))
    ]

    def best(memory: int) -> str:
        return choose(found, None, lambda size: size <= memory, "o/r").type

    assert [best(memory) for memory in (1, 3, 5, 7, 100)] == ["Q2_K", "Q2_K", "Q4_K_M", "Q6_K", "Q6_K"]
    assert choose(found, None, lambda size: None, "o/r").type == "Q6_K"
    assert choose(found[-2:], None, lambda size: True, "o/r").type == "Q8_0"


def test_a_type_or_file_is_found_whatever_its_case_or_the_error_says_what_there_is() -> None:
    found = variants(files("sub/m.Q4_K_M.gguf", "m.Q6_K.gguf", "other.Q6_K.gguf", "plain.gguf"))
    for choice in ("q4_k_m", "m.q4_k_m.gguf", "sub/m.Q4_K_M.gguf"):
        assert choose(found, choice, lambda size: None, "o/r").name == "sub/m.Q4_K_M.gguf"
    with pytest.raises(ModelFileError) as caught:
        choose(found, "Q9_Z", lambda size: None, "o/r")
    assert "'Q9_Z'" in caught.value.message and "Q4_K_M" in caught.value.hint and "plain.gguf" in caught.value.hint
    with pytest.raises(ModelFileError) as caught:
        choose(found, "Q6_K", lambda size: None, "o/r")
    assert "several" in caught.value.message and "other.Q6_K.gguf" in caught.value.hint
    assert listed([gguf_of(f"T{number}", 1) for number in range(14)]).endswith("T11 and 2 more")

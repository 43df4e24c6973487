"""Recipes: the built-in ones, a user's own, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
from koala_local.finetune.data.recipe import RecipeError, own_recipe, parse_recipe, read_recipe, recipe_names
from koala_local.finetune.data.sources import SOURCES

KNOWN = tuple(SOURCES)


def parse(text: str) -> object:
    return parse_recipe(text, "test", KNOWN, Path("/data"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_can_be_read(name: str) -> None:
    recipe = read_recipe(name, KNOWN)
    assert recipe.name == name and recipe.description and recipe.epochs == 2
    assert all(rules.decontaminate and not rules.files for rules in recipe.sources.values())


def test_the_published_mixes() -> None:
    distill, everything, open_source = (read_recipe(n, KNOWN) for n in ("koala-distill", "koala-all", "open-source"))
    assert list(distill.sources) == ["sharegpt", "hc3", "identity"]
    assert list(everything.sources) == ["sharegpt", "hc3", *open_source.sources]
    sharegpt = everything.sources["sharegpt"]
    assert sharegpt == distill.sources["sharegpt"]
    assert sharegpt.english and sharegpt.duplicates == "near"
    assert {"openai", "chatgpt", "gpt-3", "chadgpt", "gpt3", "chat-gpt", "open-ai", "open ai"} == set(sharegpt.keywords)
    assert everything.sources["identity"].weight == 5


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'seed = 7\nepochs = 1.5\n[sources.notes]\nfiles = ["a.jsonl", "/b/c.json"]\nweight = 0.5\n'
        'keywords = ["SECRET"]\ndecontaminate = false\n[sources.alpaca]\nduplicates = "exact"\n'
    )
    recipe = read_recipe(str(path), KNOWN)
    assert (recipe.name, recipe.seed, recipe.epochs) == ("mine", 7, 1.5)
    notes, alpaca = recipe.sources["notes"], recipe.sources["alpaca"]
    assert notes.files == (tmp_path / "a.jsonl", Path("/b/c.json"))
    assert (notes.weight, notes.keywords, notes.decontaminate) == (0.5, ("secret",), False)
    assert alpaca.duplicates == "exact" and not alpaca.english
    assert str(tmp_path) not in str(recipe.as_tree())


def test_a_file_alone_is_kept_whole() -> None:
    recipe = own_recipe([Path("my.jsonl")])
    rules = recipe.sources["own"]
    assert (rules.weight, rules.english, rules.duplicates, rules.keywords) == (1.0, False, "keep", ())
    assert rules.decontaminate


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("[sources.alpaka]", "'alpaka'", "did you mean alpaca?"),
        ("[sources.zzz]", "'zzz'", "the sources are "),
        ("[sources.alpaca]\nenglisch = true", "'englisch'", "did you mean english?"),
        ("sead = 1\n[sources.alpaca]", "'sead'", "did you mean seed?"),
        ("", "no sources", "sharegpt"),
        ("sources = 3", "no sources", "sharegpt"),
        ("sources.alpaca = 3", "not a table", "[sources.alpaca]"),
        ("[sources.alpaca", "not valid TOML", ""),
        ("[sources.alpaca]\nweight = 0", "sources.alpaca.weight", "above 0"),
        ("[sources.alpaca]\nweight = nan", "sources.alpaca.weight", "above 0"),
        ("[sources.alpaca]\nweight = true", "sources.alpaca.weight", "above 0"),
        ('[sources.alpaca]\nenglish = "yes"', "sources.alpaca.english", "true or false"),
        ('[sources.alpaca]\nduplicates = "all"', "sources.alpaca.duplicates", '"near"'),
        ('[sources.alpaca]\nkeywords = "openai"', "sources.alpaca.keywords", "list"),
        ('[sources.alpaca]\nfiles = ["a"]', "known source", "[sources.mine]"),
        ('[sources."../x"]\nfiles = ["a"]', "no name", "[sources.mine]"),
        ("seed = -1\n[sources.alpaca]", "seed", "2^63"),
        ("seed = 1.5\n[sources.alpaca]", "seed", "2^63"),
        ("epochs = 0\n[sources.alpaca]", "epochs", "above 0"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong_and_what_there_is(text: str, what: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert what in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize("name", ["koala-al", "no/such.toml", "", "."])
def test_no_such_recipe(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(name, KNOWN)
    assert "koala-all" in caught.value.hint


def test_a_recipe_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'description = "\xe9"\n[sources.alpaca]\n')
    with pytest.raises(RecipeError, match="UTF-8"):
        read_recipe(str(path), KNOWN)

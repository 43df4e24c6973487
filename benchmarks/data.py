"""Raw dialogues into a corpus: rows a second of the whole build, tokens a second of the tokenization alone, and how
full the packed rows are. On real dialogues where KOALA_TEST_DATA names a folder of them, else on made-up ones.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.models import RUNS
from benchmarks.table import Row

_LENGTH = 2048
_REAL = {  # names as published: where below KOALA_TEST_DATA the file is
    "alpaca_data.json.xz": "dialogue/alpaca_data.json.xz",
    "sharegpt/sharegpt_sample.json.xz": "dialogue/sharegpt_sample.json.xz",
    "hh/hh_harmless_base_test.jsonl.gz": "dialogue/hh_harmless_base_test.jsonl.gz",
    "hh/hh_helpful_base_recovered.jsonl.xz": "dialogue/hh_helpful_base_recovered.jsonl.xz",
    "eval": "eval",
}
_RECIPE = """
[sources.sharegpt]
english = true
duplicates = "near"
keywords = ["openai", "chatgpt", "gpt-3", "chadgpt", "gpt3", "chat-gpt", "open-ai", "open ai"]
[sources.alpaca]
[sources.hh]
"""


@dataclass(frozen=True, slots=True)
class _Inputs:
    what: str
    raw: Path
    recipe: Path
    tokenizer: Path


def run(quick: bool) -> list[Row]:
    """Rows of the table."""
    from koala_local.finetune.data.workers import usable_cores

    RUNS.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=RUNS) as temporary:
        inputs, out = _inputs(Path(temporary), quick), Path(temporary, "corpus")
        cores = usable_cores()
        return [_build(inputs, out, cores), _tokenization(inputs, out, cores), _packing(inputs, out)]


def _inputs(folder: Path, quick: bool) -> _Inputs:
    raw = folder / "raw"
    if "KOALA_TEST_DATA" not in os.environ:
        from tests.unit.finetune.data.raw_maker import make_raw

        made = make_raw(raw, 500 if quick else 20_000)
        return _Inputs("made-up rows, a tokenizer of 340 pieces", made, made / "mine.toml", made / "tokenizer.model")
    data = Path(os.environ["KOALA_TEST_DATA"]).resolve()
    short = {"alpaca/lima.json.xz": "dialogue/lima.json.xz"}  # of Alpaca's schema
    for name, place in (_REAL if not quick else {n: p for n, p in _REAL.items() if "alpaca" not in n} | short).items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).symlink_to(data / place)
    (folder / "mix.toml").write_text(_RECIPE)
    return _Inputs("Alpaca, ShareGPT, HH", raw, folder / "mix.toml", data / "models" / "llama_tokenizer.model")


def _build(inputs: _Inputs, out: Path, cores: int) -> Row:
    from koala_local.finetune.data.build import build, choose_recipe
    from koala_local.finetune.data.tokens import DialogueTokenizer

    started, tokenizer = time.perf_counter(), DialogueTokenizer(inputs.tokenizer)
    report = build(choose_recipe(str(inputs.recipe)), out, tokenizer, raw=inputs.raw, processes=cores)
    seconds, total = time.perf_counter() - started, report["total"]
    note = f"{inputs.what}: {total['rows']:,} rows, {total['tokens']:,} tokens in {seconds:.0f} s; {cores} processes"
    return Row("data build, from raw rows to tokens", total["rows"] / seconds, "rows/s", note=note)


def _tokenization(inputs: _Inputs, out: Path, cores: int) -> Row:
    from koala_local.finetune.data.corpus_writer import write_corpus
    from koala_local.finetune.data.examples import read_examples
    from koala_local.finetune.data.tokens import DialogueTokenizer
    from koala_local.finetune.data.workers import workers

    examples, again = list(read_examples(out / "dialogues.jsonl")), out.with_name("again")
    tokenizer = DialogueTokenizer(inputs.tokenizer)
    with workers(cores) as work:
        write_corpus(examples[:cores], tokenizer, again, inputs={}, recipe={}, work=work)  # the processes start
        shutil.rmtree(again)
        started = time.perf_counter()
        made = write_corpus(examples, tokenizer, again, inputs={}, recipe={}, work=work)
        seconds = time.perf_counter() - started
    note = f"{inputs.what}; {cores} processes, {len(examples):,} dialogues"
    return Row("data tokenization", made.tokens / seconds, "tokens/s", at_least=1e6, note=note)


def _packing(inputs: _Inputs, out: Path) -> Row:
    from koala_local.finetune.data.corpus import open_corpus
    from koala_local.finetune.data.packing import make_plan

    corpus = open_corpus(out)
    started = time.perf_counter()
    plan = make_plan(corpus, _LENGTH)
    note = f"{inputs.what}; {plan.rows:,} rows planned in {time.perf_counter() - started:.1f} s"
    return Row(f"data packing, fill at {_LENGTH}", 100 * plan.fill, "%", at_least=98.0, note=note)

"""README.md of a trained model: what it was made from and how, what was measured, and what it cannot do.

It says nothing that the run did not see: figures come from the corpus, the settings and the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koala_local.models.card import UNSTATED
from koala_local.wording import as_markdown, duration

from .data.corpus import Manifest
from .data.packing import PackPlan
from .data.sources import SOURCES
from .run_log import CURVES
from .settings import Settings, as_tree
from .throughput import Numbers

_OWN = "the user's own; not known here"
_LIMITS = """\
- It predicts likely text. It can be wrong with confidence, invent sources, and repeat what is biased or offensive in
  its data; nothing in the training teaches it to tell.
- It knows nothing that is not in the base's training data or in the dialogues above, and nothing after them.
- It was not trained on tools, or on anything but text, and on system messages only where its data has them.
- This training saw {length} tokens at a time; quality past that was not measured.
- Nothing but the figures above was measured: no benchmark, no safety test, no human comparison.
"""


@dataclass(frozen=True, slots=True)
class Training:
    """What the card tells of a run. `log` are the lines of log.jsonl."""

    name: str
    base: str | None  # a folder's name or a hub id; None: from scratch
    base_licence: str | None
    numbers: Numbers
    settings: Settings
    manifest: Manifest
    plan: PackPlan
    log: Sequence[Mapping[str, Any]]
    dtype: str
    version: str  # of the program
    ranks: int = 1
    gpu: str = ""  # its name; none: a processor


def model_card(run: Training) -> str:
    """README.md as Markdown, with the metadata that the hub reads."""
    parts = [
        _metadata(run),
        f"# {run.name}\n",
        _summary(run),
        "## Data\n",
        _data(run),
        "## Training\n",
        _training(run),
        "## Measured\n",
        _measured(run),
        f"![Curves of the run]({CURVES})\n",
        "## Format\n",
        _FORMAT,
        "## What it cannot do\n",
        _LIMITS.format(length=run.settings.sequence_length),
        "## Licences\n",
        _licences(run),
    ]
    return "\n".join(parts)


_FORMAT = """\
    BEGINNING OF CONVERSATION: USER: {text} GPT:{reply}</s>USER: {text} GPT:

Each field is tokenized on its own. `koala chat` writes this, and so does the chat template of the tokenizer.
"""


def _metadata(run: Training) -> str:
    lines = ["---", "language: en", "library_name: transformers", "pipeline_tag: text-generation", "tags: [koala]"]
    lines += ["license: other", f"license_name: {UNSTATED}"]
    if run.base and _is_hub_id(run.base):
        lines.append(f"base_model: {run.base}")
    return "\n".join([*lines, "---\n"])


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return bool(owner and slash and repository) and all(c.isalnum() or c in "-._/" for c in name)


def _summary(run: Training) -> str:
    start = f"{_plain(run.base)}, fine-tuned" if run.base else "A LLaMA trained from scratch"
    adapters = ""
    if lora := run.settings.lora:
        kind = "QLoRA, over weights of 4 bits (NF4)," if lora.four_bit else "LoRA"
        adapters = (
            f" by {kind} of rank {lora.rank} and alpha {lora.alpha:g} on every linear layer of the blocks: "
            f"{run.numbers.adapters(lora.rank):,} weights were trained, then merged into the original ones,"
        )
    return f"{start}{adapters} on dialogues. {run.numbers.parameters:,} parameters, stored as {run.dtype}.\n"


def _data(run: Training) -> str:
    """The sources, with what was really drawn for training."""
    recipe = run.manifest.recipe
    named = f"Recipe `{_plain(recipe['name'])}`. " if recipe.get("name") else ""
    plan = run.plan
    rows = [
        (
            _plain(name),
            f"{counts.documents:,}",
            f"{counts.held_out:,}",
            f"{plan.sources[name].documents:,}" if name in plan.sources else "0",
            f"{plan.sources[name].tokens:,}" if name in plan.sources else "0",
            f"{plan.sources[name].trained_tokens:,}" if name in plan.sources else "0",
            _licence_of(name),
        )
        for name, counts in run.manifest.sources.items()
    ]
    head = ("source", "dialogues", "held out", "planned", "tokens", "trained on", "licence")
    cuts = plan.cuts and f"Cut, per epoch: {plan.cuts}. "
    packing = (
        f"Planned: {plan.rows:,} rows of {plan.sequence_length:,} tokens, {plan.fill:.1%} full; "
        f"{plan.tokens:,} tokens, {plan.trained_tokens:,} of them trained on. {cuts}"
        f"Corpus {run.manifest.key[:16]}, plan {plan.key[:16]} (SHA-256).\n"
    )
    caption = "Dialogues in the corpus, and what the plan draws of them over all epochs.\n\n"
    return f"{named}{caption}{_table(head, rows)}\n{packing}"


def _training(run: Training) -> str:
    steps = _steps(run)
    tokens = sum(int(step["tokens"]) for step in steps)
    where = f"{run.ranks} x {_plain(run.gpu)}" if run.gpu else f"{run.ranks} processor rank{'s'[: run.ranks > 1]}"
    seconds = sum(step["tokens"] / step["tokens_per_s"] for step in steps if step["tokens_per_s"])
    lines = [
        f"- {len(steps):,} steps, {tokens:,} tokens, on {where}; {duration(seconds)} in steps.",
        f"- `koala {run.version}` with the settings below. Documents of a row do not see each other.",
    ]
    settings = {key: value for key, value in as_tree(run.settings).items() if value not in (None, {})}
    return "\n".join(lines) + f"\n\n```json\n{json.dumps(settings, indent=1)}\n```\n"


def _measured(run: Training) -> str:
    steps = _steps(run)
    lines = []
    if steps:
        first, last = steps[:10], steps[-10:]
        lines.append(
            f"Training loss: {_mean(first):.4f} over the first {len(first)} steps, {_mean(last):.4f} over the last "
            f"{len(last)} (nats a trained token).\n"
        )
    evaluations = [line for line in run.log if line.get("event") == "evaluation"]
    if evaluations and evaluations[-1].get("perplexity"):
        before, after = evaluations[0], evaluations[-1]
        rows = [
            (_plain(name), _shown(before["perplexity"].get(name)), _shown(value), f"{after['held_out_tokens'][name]:,}")
            for name, value in after["perplexity"].items()
        ]
        head = ("held out", f"step {before['step']}", f"step {after['step']}", "tokens")
        lines.append(f"Perplexity on held-out dialogues, by source:\n\n{_table(head, rows)}")
    else:
        lines.append("Nothing was held out: no perplexity was measured.\n")
    if evaluations and evaluations[-1].get("samples"):
        lines.append("Greedy replies at the end, as they came:\n")
        lines += [_quoted(sample) for sample in evaluations[-1]["samples"]]
    return "\n".join(lines)


def _licences(run: Training) -> str:
    base = run.base_licence or "its licence is not known here: look it up before passing these weights on"
    lines = [f"- Base {_plain(run.base)}: {_plain(base)}." if run.base else "- No base: trained from scratch."]
    by_licence: dict[str, list[str]] = {}
    for name in run.manifest.sources:
        by_licence.setdefault(_licence_of(name), []).append(_plain(name))
    lines += [f"- {licence}: {', '.join(names)}." for licence, names in by_licence.items()]
    return "\n".join([*lines, "", "The strictest of these binds the weights; this card is no legal advice.", ""])


def _steps(run: Training) -> list[Mapping[str, Any]]:
    return [line for line in run.log if "event" not in line]


def _licence_of(name: str) -> str:
    return SOURCES[name].licence if name in SOURCES else _OWN


def _mean(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(step["loss"]) for step in steps) / len(steps)


def _shown(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.3f}"


def _quoted(sample: Mapping[str, Any]) -> str:
    """As a code block, so that nothing of a reply is taken for Markdown."""
    ending = "" if sample["finished"] else " [cut]"
    lines = f"USER: {sample['prompt']}\nGPT: {sample['reply']}{ending}".splitlines()
    return "\n".join(f"    {line}" for line in lines) + "\n"


def _plain(text: object) -> str:
    return as_markdown(str(text), 200)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

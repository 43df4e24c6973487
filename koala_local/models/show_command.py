"""`koala show`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from koala_local import console
from koala_local.errors import ModelFileError

if TYPE_CHECKING:
    from koala_local.models.show import About


@click.command(short_help="Tell what a model is, and what memory it takes here.")
@click.argument("reference", metavar="REF")
@click.option("--context", type=click.IntRange(256, 1 << 20), help="Plan for this many tokens of context.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show(reference: str, context: int | None, as_json: bool) -> None:
    """The facts of the model REF and the memory plan for this machine, from its header alone.

    REF is what `koala chat` takes: nano, an alias, OWNER/REPO[:TYPE or :FILE], a GGUF file, or a folder.
    """
    from koala_local.models import show as facts
    from koala_local.models.devices import this_machine
    from koala_local.models.memory import Wish
    from koala_local.models.resolve import NotHereError, resolve

    try:
        path = resolve(reference, None)
    except NotHereError as error:
        hint = f"koala pull {reference} --list shows its types and which fit here; koala pull {reference} downloads it"
        raise ModelFileError(error.message, hint) from None
    about = facts.describe(path, this_machine(), Wish(context))
    if as_json:
        console.json_line(facts.as_json(about))
        return
    console.out(_page(about))


def _page(about: About) -> str:
    from koala_local.engine.text_stream import one_line
    from koala_local.models.page import columns, section
    from koala_local.models.show import plan_rows
    from koala_local.wording import size

    types = [["  TYPE", "TENSORS", "WEIGHTS", "BYTES"]]
    for part in about.tensor_types:
        types.append([f"  {part.type}", str(part.tensors), f"{part.weights:,}", size(part.bytes)])
    parts = [section(console.folded(one_line(about.name)), _facts(about))]
    if about.tensor_types:
        parts.append(f"tensors\n{columns(types)}")
    if about.plan:
        parts.append(section("memory", plan_rows(about.plan)))
    elif about.expected_ram:
        parts.append(section("memory", [("on a CPU", f"about {size(about.expected_ram)}; a GPU takes less")]))
    elif about.kind == "checkpoint":
        parts.append(console.folded(f"not for chat as it is: koala quantize {shlex.quote(str(about.path))} --bits 4"))
    return "\n\n".join(parts)


def _facts(about: About) -> list[tuple[str, str]]:
    from koala_local.wording import short_number, size

    shape = [
        (about.layers, "layers"),
        (about.embedding, "wide"),
        (about.feed_forward, "feed-forward"),
        (about.heads, "heads"),
        (about.kv_heads, "KV heads"),
    ]
    template = f"its own, {len(about.template)} characters" if about.template else "none"
    vocabulary = f"{about.vocabulary:,} tokens" if about.vocabulary else "unknown"
    rows = [
        ("path", str(about.path)),
        ("architecture", ", ".join([about.architecture or "unknown", *(f"{n} {word}" for n, word in shape if n)])),
        ("parameters", f"{short_number(about.parameters)}, {about.bits_per_weight:.2f} bits each, {size(about.bytes)}"),
        ("quantization", about.quantization or ""),
        ("context", f"{about.context} tokens" if about.context else "unknown"),
        ("vocabulary", f"{vocabulary}, {about.tokenizer}" if about.tokenizer else vocabulary),
        ("chat template", template),
        ("licence", about.licence or "not stated"),
    ]
    return [(name, value) for name, value in rows if value]

"""`koala quantize` and `koala recover`: paths and options in, a checkpoint with its report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koala_local import console
from koala_local.extras import need

_BITS = ("2", "3", "4", "5", "6", "8")
_NEEDED = ("torch", "safetensors", "sentencepiece", "gguf")
_EXISTING = click.Path(exists=True, path_type=Path)


@click.command(short_help="Make a model of 2 to 8 bits a weight from a checkpoint.")
@click.argument("source", type=_EXISTING)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write; default: named after SOURCE.")
@click.option("--bits", type=click.Choice(_BITS), help="Bits a weight; picks the recommended type; default: 4.")
@click.option("--format", "layout", type=click.Choice(["gguf", "gptq"]), default="gguf", help="GPTQ is a folder.")
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128", "-1"]), help="GPTQ: weights per scale; default: 128."
)
@click.option("--type", "kind", metavar="TYPE", help="The type itself, such as Q4_K_M, Q5_K_S, IQ4_XS, BF16.")
@click.option("--base", type=_EXISTING, help="SOURCE is a weight difference, such as Koala's: add it to this LLaMA.")
@click.option("--tokenizer", type=_EXISTING, help="Folder of the tokenizer, where SOURCE has none.")
@click.option("--calibration", type=_EXISTING, help="A text or dialogue file to weigh rounding errors by.")
@click.option("--imatrix", type=_EXISTING, help="An importance matrix that llama-imatrix wrote, instead.")
@click.option("--tensor-type", "overrides", multiple=True, metavar="PATTERN=TYPE", help="The type of some tensors.")
@click.option("--no-verify", is_flag=True, help="Do not compare the output with its source.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: all cores.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def quantize(source: Path, **options: Any) -> None:
    """Write SOURCE as a GGUF file, or a GPTQ folder, that `koala chat` runs.

    SOURCE is a Hugging Face folder, Meta's folder, an EasyLM stream or a GGUF of the LLaMA family. It is read tensor by
    tensor; the whole model is never in memory.
    """
    gptq = options["layout"] == "gptq"
    if options["calibration"] and options["imatrix"]:
        raise click.UsageError("--calibration and --imatrix exclude each other")
    if options["bits"] and options["kind"]:
        raise click.UsageError("--bits picks a type, and --type names one: give one of them")
    if options["group_size"] and not gptq:
        raise click.UsageError("--group-size is for --format gptq; a GGUF type has its own")
    if gptq and (options["kind"] or options["imatrix"] or options["overrides"] or options["bits"] in ("5", "6")):
        raise click.UsageError("GPTQ has 2, 3, 4 or 8 bits, no --type, --imatrix or --tensor-type")
    need("convert", *_NEEDED)
    from .job import Options, quantize_to_gguf, quantize_to_gptq  # with it comes torch: seconds

    wanted = Options(**options)
    if wanted.threads:
        from torch import set_num_threads

        set_num_threads(wanted.threads)
    (quantize_to_gptq if gptq else quantize_to_gguf)(source, wanted)


@click.command(short_help="Add Koala's published weight difference to LLaMA.")
@click.option("--base", required=True, type=_EXISTING, help="LLaMA, in any format that is read.")
@click.option("--diff", required=True, type=_EXISTING, help="An EasyLM stream or a Hugging Face folder.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--tokenizer", type=_EXISTING, help="Folder of the tokenizer, where the base has none.")
@click.option("--dtype", type=click.Choice(["F32", "F16", "BF16"]), help="Type of the weights; default: the base's.")
def recover(base: Path, diff: Path, output: Path, tokenizer: Path | None, dtype: Any) -> None:
    """Write base + difference as a Hugging Face checkpoint, streaming."""
    need("convert", *_NEEDED)
    from koala_local.wording import size

    from .recover import known_checksums
    from .recover import recover as recover_checkpoint
    from .sources.checkpoint import open_checkpoint

    llama = open_checkpoint(base)
    with console.progress("adding", "B") as step:

        def tell(tensor: str, done: int, total: int) -> None:
            step(done, total, tensor)

        made = recover_checkpoint(
            llama,
            open_checkpoint(diff, head_size=llama.config.head_size),
            output,
            tokenizer_folder=tokenizer,
            dtype=dtype,
            checksums=known_checksums(base) | known_checksums(diff),
            progress=tell,
        )
    if made.verified:
        console.note(f"as its checklist.chk says: {', '.join(path.name for path in made.verified)}")
    console.out(f"{made.folder}  {len(made.files)} files, {size(made.size)}, {made.dtype}")

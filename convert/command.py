"""`koala quantize` and `koala recover`: paths and options in, a checkpoint with its report out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koala_local import console
from koala_local.errors import Interrupted, KoalaError
from koala_local.extras import need
from koala_local.models.reference import name_of

from .publish import publish, unverified

if TYPE_CHECKING:
    from koala_local.models.configuration import ModelConfig

    from .calibration import Sample, Tokenizer
    from .report import Report
    from .sources.architecture import Checkpoint
    from .verify import Comparison
    from .vocabulary.read import Vocabulary

_BITS = ("2", "3", "4", "5", "6", "8")
_HELD_LENGTH = 512  # tokens of a sequence of the held text
_VERIFY_SECONDS = 180.0  # what the source's forward pass may take
_SAMPLE, _GPTQ_SAMPLE = (512, 64), (2048, 128)  # tokens of a calibration sequence, sequences at most
_NEEDED = ("torch", "safetensors", "sentencepiece", "gguf")
_EXISTING = click.Path(exists=True, path_type=Path)


@click.command(short_help="Make a model of 2 to 8 bits a weight from a checkpoint.")
@click.argument("source", type=_EXISTING)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write; default: named after SOURCE.")
@click.option("--bits", type=click.Choice(_BITS), default="4", help="Bits a weight; picks the recommended type.")
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
    need("convert", *_NEEDED)
    if options["calibration"] and options["imatrix"]:
        raise click.UsageError("--calibration and --imatrix exclude each other")
    if options["group_size"] and options["layout"] != "gptq":
        raise click.UsageError("--group-size is for --format gptq; a GGUF type has its own")
    if options["threads"]:
        from torch import set_num_threads

        set_num_threads(options["threads"])
    options["group_size"] = options["group_size"] or "128"
    if options["layout"] == "gptq":
        _quantize_to_gptq(source, options)
    else:
        _quantize_to_gguf(source, options)


def _open(source: Path, options: dict[str, Any]) -> Checkpoint:
    from .recover import sum_checkpoint
    from .sources.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    return sum_checkpoint(open_checkpoint(options["base"]), checkpoint) if options["base"] else checkpoint


def _refuse_existing(out: Path, options: dict[str, Any]) -> None:
    if out.exists() and not options["force"]:
        raise KoalaError(f"{out} exists already", "give another name with -o, or --force to replace it")


def _quantize_to_gguf(source: Path, options: dict[str, Any]) -> None:
    from .gguf.kquants import kind_for_bits, parse_overrides

    kind = (options["kind"] or kind_for_bits(int(options["bits"]))).upper()
    overrides = parse_overrides(options["overrides"])
    checkpoint = _open(source, options)
    out = options["output"] or Path(f"{_stem(source)}-{kind.lower()}.gguf")
    _refuse_existing(out, options)
    with unverified(out) as written:
        report = _quantize_gguf(source, checkpoint, written, out.stem, kind, overrides, options)
        os.replace(written, out)
    publish(report, out, as_json=options["as_json"])


def _quantize_to_gptq(source: Path, options: dict[str, Any]) -> None:
    from math import prod

    from .gptq.checkpoint import quantize_gptq
    from .gptq.matrix import GptqSettings

    useless = [name for name in ("kind", "imatrix", "overrides") if options[name]]
    if useless or options["bits"] in ("5", "6"):
        raise click.UsageError("GPTQ has 2, 3, 4 or 8 bits, no --type, --imatrix or --tensor-type")
    checkpoint = _open(source, options)
    out = options["output"] or Path(f"{_stem(source)}-gptq-{options['bits']}bit")
    _refuse_existing(out, options)
    folder = options["tokenizer"] or checkpoint.tokenizer_folder
    sample = _calibration_sample(source, folder, checkpoint.config, options)
    settings = GptqSettings(bits=int(options["bits"]), group_size=int(options["group_size"]))
    compared: dict[str, Any] = {}
    with ExitStack() as bar:
        step = bar.enter_context(console.progress("quantizing", "matrix"))

        def tell(name: str, done: int, total: int) -> None:
            step(done, total, name)

        def check(written: Path) -> None:
            bar.close()  # the comparison has bars of its own
            compared.update(_compared(checkpoint, source, folder, written, f"GPTQ-{options['bits']}", options))

        try:
            made = quantize_gptq(
                checkpoint,
                sample.batches(),
                out,
                settings,
                tokenizer_folder=folder,
                force=options["force"],
                progress=tell,
                check=check,
            )
        except (KeyboardInterrupt, Interrupted):
            console.note("stopped; the same command goes on behind the layers that are done")
            raise
    parameters = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    report = _report(
        checkpoint.config,
        out.name,
        format="GPTQ",
        kind=f"{options['bits']} bits, groups of {options['group_size']}",
        size=made.size,
        parameters=parameters,
        bits_per_weight=8 * made.size / parameters,
        source=_stem(source),
        calibration=str(sample),
        notes=made.notes,
        **compared,
    )
    publish(report, out, as_json=options["as_json"])


def _calibration_sample(source: Path, folder: Path | None, config: ModelConfig, options: dict[str, Any]) -> Sample:
    """What --calibration names; for GPTQ, which cannot do without, the built-in text is the default."""
    from .calibration import builtin_calibration, make_sample, read_texts
    from .estimate import estimate
    from .gptq.checkpoint import default_compute

    path, gptq = options["calibration"], options["layout"] == "gptq"
    longest, most = _GPTQ_SAMPLE if gptq and path else _SAMPLE
    length = min(longest, config.context)
    with _tokenizer(source, folder, config) as tokenizer:
        sample = make_sample(read_texts(path) if path else builtin_calibration(), tokenizer, length=length, most=most)
    compute = default_compute() if gptq else None
    cost = estimate(config, sample.tokens, length, head=False, gptq=gptq, compute=compute)
    console.note(f"calibration: {sample}; {cost}" + ("; solving the layers comes on top" if gptq else ""))
    if path is None:
        console.note("the built-in text is small: --calibration FILE with your own texts gives a better model")
    return sample


def _report(config: ModelConfig, name: str, *, size: int, **figures: Any) -> Report:
    from .report import Report, card_fit

    fits = card_fit(size, config)
    return Report(name=config.name or name, licence=config.licence, size=size, fits=fits, **figures)


def _compared(
    checkpoint: Checkpoint, source: Path, folder: Path | None, written: Path, kind: str, options: dict[str, Any]
) -> dict[str, Any]:
    """What a report says of the quality. Raises VerificationError."""
    if options["no_verify"]:
        return {}
    comparison, held = _verify(checkpoint, source, folder, written, kind)
    return {"comparison": comparison, "sample": held}


def _stem(source: Path) -> str:
    """What the source is called; links are not followed: the hub's cache names what they lead to after hashes."""
    path = source.absolute()
    return name_of(path) if path.is_dir() else path.stem


def _quantize_gguf(
    source: Path,
    checkpoint: Checkpoint,
    written: Path,
    name: str,
    kind: str,
    overrides: tuple[tuple[str, str], ...],
    options: dict[str, Any],
) -> Report:
    from .gguf.write import Progress, write_gguf
    from .importance import importance_matrix, read_imatrix

    config = checkpoint.config
    folder = options["tokenizer"] or checkpoint.tokenizer_folder
    vocabulary = _vocabulary(source, folder, config)
    for note in vocabulary.notes:
        console.note(note)
    importance, calibrated = None, ""
    if options["imatrix"]:
        importance, calibrated = read_imatrix(options["imatrix"]), options["imatrix"].name
    elif options["calibration"]:
        sample = _calibration_sample(source, folder, config, options)
        calibrated = str(sample)
        with console.progress("calibrating", "layer") as step:
            importance = importance_matrix(checkpoint, sample.batches(), step)
    with console.progress("quantizing", "B") as step:

        def tell(progress: Progress) -> None:
            step(progress.done, progress.total, progress.tensor)

        made = write_gguf(
            checkpoint,
            vocabulary,
            written,
            kind,
            overrides=overrides,
            importance=importance,
            threads=options["threads"],
            progress=tell,
            force=True,
        )
    compared = _compared(checkpoint, source, folder, written, kind, options)
    return _report(
        config,
        name,
        format="GGUF",
        kind=kind,
        size=made.size,
        parameters=made.parameters,
        bits_per_weight=made.bits_per_weight,
        source=_stem(source),
        calibration=calibrated,
        notes=made.notes,
        kernels=made.kernels,
        **compared,
    )


def _vocabulary(source: Path, folder: Path | None, config: ModelConfig) -> Vocabulary:
    from .vocabulary.from_gguf import read_gguf_vocabulary
    from .vocabulary.read import read_vocabulary

    if folder is not None:
        return read_vocabulary(folder, config)
    if _is_gguf(source):
        return read_gguf_vocabulary(source, config)
    raise KoalaError(f"{source} has no tokenizer files", "name their folder with --tokenizer FOLDER")


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


@contextmanager
def _tokenizer(source: Path, folder: Path | None, config: ModelConfig) -> Iterator[Tokenizer]:
    """The source's own tokenizer: that of its folder, or llama.cpp's where the source is a GGUF."""
    from .calibration import Tokenizer

    if folder is None:
        with _engine(source, 256) as engine:
            yield Tokenizer(engine.tokenize, engine.vocabulary.bos, engine.vocabulary.eos)
    else:
        from koala_local.engine.gptq_tokenizer import Expected, GptqTokenizer

        tokenizer = GptqTokenizer(folder, Expected(config.vocabulary_size, config.bos, config.eos))
        yield Tokenizer(tokenizer.tokenize, tokenizer.vocabulary.bos, tokenizer.vocabulary.eos)


def _verify(
    checkpoint: Checkpoint, source: Path, folder: Path | None, written: Path, kind: str
) -> tuple[Comparison, str]:
    """Reload the output in its engine and compare its predictions on the held text with the source's.
    Raises VerificationError."""
    from .verify import check, compare, streamed_logits

    with _engine(written, _HELD_LENGTH) as engine:
        with _tokenizer(source, folder, checkpoint.config) as tokenizer:
            sample = _held_sample(checkpoint.config, tokenizer)
            _check_round_trip(engine.tokenize, tokenizer)
        with console.progress("source", "layer") as step:
            logits = streamed_logits(checkpoint, sample.sequences, step)
        with console.progress("comparing", "sequence") as step:
            comparison = compare(logits, engine.all_logits, sample.sequences, step)
    check(comparison, kind)
    return comparison, str(sample)


def _held_sample(config: ModelConfig, tokenizer: Tokenizer) -> Sample:
    """As much of the held text as the source's forward pass reads in a few minutes."""
    from .calibration import builtin_held_out, make_sample
    from .estimate import estimate

    length = min(_HELD_LENGTH, config.context)
    seconds = estimate(config, length, length).seconds
    most = min(64, max(1, int(_VERIFY_SECONDS / max(seconds, 1e-3))))
    sample = make_sample(builtin_held_out(), tokenizer, length=length, most=most)
    console.note(f"verification: {sample}; {estimate(config, sample.tokens, length)}")
    return sample


@contextmanager
def _engine(path: Path, context: int) -> Iterator[Any]:
    """The engine that `koala chat` would run the model with."""
    if path.is_dir():
        from koala_local.engine.gptq import load_gptq

        with closing(load_gptq(path, max(context, 256))) as gptq:
            yield gptq
        return
    from koala_local.engine.llama import LlamaEngine, Placement
    from koala_local.models.gguf_header import read_header
    from koala_local.models.load_probe import probe

    fingerprint = read_header(path).fingerprint
    probe(path)
    with closing(LlamaEngine(path, fingerprint, Placement(context=max(context, 256)))) as engine:
        yield engine


def _check_round_trip(written: Callable[[str], list[int]], source: Tokenizer) -> None:
    from .calibration import builtin_held_out
    from .verify import VerificationError

    for document in builtin_held_out().documents:
        text = str(document)
        if written(text) != list(source.encode(text)):
            raise VerificationError(
                "the written vocabulary tokenizes a text in another way than the source's tokenizer",
                "please report which tokenizer this is",
            )


@click.command(short_help="Add Koala's published weight difference to LLaMA.")
@click.option("--base", required=True, type=_EXISTING, help="LLaMA, in any format that is read.")
@click.option("--diff", required=True, type=_EXISTING, help="An EasyLM stream or a Hugging Face folder.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--tokenizer", type=_EXISTING, help="Folder of the tokenizer, where the base has none.")
@click.option("--dtype", type=click.Choice(["F32", "F16", "BF16"]), help="Type of the weights; default: the base's.")
def recover(base: Path, diff: Path, output: Path, tokenizer: Path | None, dtype: Any) -> None:
    """Write base + difference as a Hugging Face checkpoint, streaming."""
    need("convert", *_NEEDED)
    from koala_local.models.page import size

    from .recover import known_checksums
    from .recover import recover as recover_checkpoint
    from .sources.checkpoint import open_checkpoint

    with console.progress("adding", "B") as step:

        def tell(tensor: str, done: int, total: int) -> None:
            step(done, total, tensor)

        made = recover_checkpoint(
            open_checkpoint(base),
            open_checkpoint(diff),
            output,
            tokenizer_folder=tokenizer,
            dtype=dtype,
            checksums=known_checksums(base) | known_checksums(diff),
            progress=tell,
        )
    if made.verified:
        console.note(f"as its checklist.chk says: {', '.join(path.name for path in made.verified)}")
    console.out(f"{made.folder}  {len(made.files)} files, {size(made.size)}, {made.dtype}")

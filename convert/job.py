"""One `koala quantize`: a source is opened, packed, put to the test before it gets its name, and reported on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koala_local import console
from koala_local.errors import KoalaError
from koala_local.models.file_kind import is_gguf
from koala_local.models.reference import name_of

from .calibration import Sample, builtin_calibration, make_sample, read_texts
from .estimate import estimate
from .outcome import report_files, save_report, tell_outcome
from .proof import prove, source_tokenizer
from .recover import sum_checkpoint
from .report import Report, card_fit
from .sources.checkpoint import located, open_checkpoint

if TYPE_CHECKING:
    from .gptq.matrix import GptqSettings
    from .sources.architecture import Checkpoint
    from .vocabulary.read import Vocabulary

_BITS = "4"  # where neither they nor a type are asked for
_SAMPLE, _GPTQ_SAMPLE = (512, 64), (2048, 128)  # tokens of a calibration sequence, sequences at most


@dataclass(frozen=True, slots=True)
class Options:
    """As the command line has them."""

    output: Path | None
    bits: str | None
    layout: Literal["gguf", "gptq"]
    group_size: str | None
    kind: str | None
    base: Path | None
    tokenizer: Path | None
    calibration: Path | None
    imatrix: Path | None
    overrides: tuple[str, ...]
    no_verify: bool
    threads: int | None
    force: bool
    as_json: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A source with what is wanted of it. `folder`: of the tokenizer; None where it is in a GGUF, or missing."""

    source: Path
    options: Options
    checkpoint: Checkpoint
    folder: Path | None

    @property
    def stem(self) -> str:
        """What the source is called; links are not followed: the hub's cache names what they lead to after hashes."""
        path = self.source.absolute()
        return name_of(path) if path.is_dir() else path.stem

    def out(self, ending: str) -> Path:
        """Where the output goes. Raises KoalaError when something is there, or where the report goes, that may not be
        replaced."""
        path, folder = self.options.output or Path(f"{self.stem}-{ending}"), self.options.layout == "gptq"
        if not folder and path.is_dir():
            hint = f"name the file: -o {path / self.stem}-{ending}"
            raise KoalaError(f"{path} is a folder, and a GGUF is one file", hint)
        if not folder and path in report_files(path, folder=False):
            raise KoalaError(f"{path} is where the report goes", f"name the model -o {path.with_suffix('.gguf')}")
        for taken in (path, *report_files(path, folder=folder)):
            if taken.exists() and not self.options.force:
                what = "" if taken == path else ", and the report would replace it"
                raise KoalaError(f"{taken} exists already{what}", "give another name with -o, or --force to replace it")
        return path

    def compared(self, written: Path, kind: str) -> dict[str, Any]:
        """What a report says of the quality. Raises VerificationError."""
        if self.options.no_verify:
            return {}
        comparison, held = prove(self.checkpoint, self.source, self.folder, written, kind)
        return {"comparison": comparison, "sample": held}

    def report(self, name: str, *, size: int, **figures: Any) -> Report:
        config = self.checkpoint.config
        gguf = self.options.layout == "gguf"  # else chat's own engine runs it, whose cache is in 16 bits
        fits = card_fit(size, config) if gguf else card_fit(size, config, kv_types=("f16",))
        name = config.name or name
        return Report(name=name, licence=config.licence, source=self.stem, size=size, fits=fits, **figures)


def open_job(source: Path, options: Options) -> Job:
    """Read the headers; no weights yet."""
    source = located(source)
    if options.base:
        base = open_checkpoint(options.base)
        checkpoint: Checkpoint = sum_checkpoint(base, open_checkpoint(source, head_size=base.config.head_size))
    else:
        checkpoint = open_checkpoint(source)
    return Job(source, options, checkpoint, options.tokenizer or checkpoint.tokenizer_folder)


def quantize_to_gguf(source: Path, options: Options) -> None:
    """Write a GGUF file with its report, and tell the outcome."""
    from .gguf.kquants import checked_kind, kind_for_bits, parse_overrides
    from .gguf.write import plan_gguf

    kind = checked_kind(options.kind) if options.kind else kind_for_bits(int(options.bits or _BITS))
    overrides = parse_overrides(options.overrides)
    job = open_job(source, options)
    out = job.out(f"{kind.lower()}.gguf")
    vocabulary = _vocabulary(job)
    for note in vocabulary.notes:
        console.note(note)
    weighed = bool(options.imatrix or options.calibration)
    plan_gguf(job.checkpoint, vocabulary, out, kind, overrides, importance=weighed, force=options.force)
    matrix = _importance(job)  # may take hours: what can be refused was refused before
    report = _write_gguf(job, vocabulary, out, kind, overrides, *matrix)
    tell_outcome(report, out, report_files(out, folder=False), as_json=options.as_json)


def _write_gguf(
    job: Job,
    vocabulary: Vocabulary,
    out: Path,
    kind: str,
    overrides: tuple[tuple[str, str], ...],
    importance: Any,
    calibration: str,
) -> Report:
    from .gguf.write import Progress, write_gguf
    from .gguf.write import Report as Written

    report: Report
    with _packing(job, "B", kind) as (step, compared):

        def tell(progress: Progress) -> None:
            step(progress.done, progress.total, progress.tensor)

        def finish(written: Path, made: Written) -> None:
            nonlocal report
            report = job.report(
                out.stem,
                format="GGUF",
                kind=kind,
                size=made.size,
                parameters=made.parameters,
                bits_per_weight=made.bits_per_weight,
                calibration=calibration,
                notes=made.notes,
                kernels=made.kernels,
                **compared(written),
            )
            save_report(report, report_files(out, folder=False))

        write_gguf(
            job.checkpoint,
            vocabulary,
            out,
            kind,
            overrides=overrides,
            importance=importance,
            threads=job.options.threads,
            progress=tell,
            check=finish,
            force=job.options.force,
        )
    return report


def _importance(job: Job) -> tuple[Any, str]:
    """The importance matrix, or None, and what it comes from."""
    from .importance import importance_matrix, read_imatrix

    if job.options.imatrix:
        return read_imatrix(job.options.imatrix), job.options.imatrix.name
    if not job.options.calibration:
        return None, ""
    sample = _calibration_sample(job)
    with console.progress("calibrating", "layer") as step:
        return importance_matrix(job.checkpoint, sample.batches(), step), str(sample)


def quantize_to_gptq(source: Path, options: Options) -> None:
    """Write a GPTQ folder with its report, and tell the outcome; goes on behind the layers that are done."""
    from .gptq.matrix import GptqSettings

    job, bits = open_job(source, options), options.bits or _BITS
    out = job.out(f"gptq-{bits}bit")
    if job.folder is None:
        raise KoalaError(
            f"{job.source} has no tokenizer files, and a GPTQ folder needs them",
            "name their folder with --tokenizer FOLDER",
        )
    report = _write_gptq(job, out, GptqSettings(bits=int(bits), group_size=int(options.group_size or 128)))
    tell_outcome(report, out, report_files(out, folder=True), as_json=options.as_json)


def _write_gptq(job: Job, out: Path, settings: GptqSettings) -> Report:
    from .gptq.checkpoint import GptqResult, quantize_gptq

    sample = _calibration_sample(job)
    parameters = sum(prod(tensor.shape) for tensor in job.checkpoint.tensors.values())
    report: Report
    with _packing(job, "matrix", f"GPTQ-{settings.bits}") as (step, compared):

        def tell(name: str, done: int, total: int) -> None:
            step(done, total, name)

        def finish(written: Path, made: GptqResult) -> None:
            nonlocal report
            report = job.report(
                out.name,
                format="GPTQ",
                kind=f"{settings.bits} bits, groups of {settings.group_size}",
                size=made.size,
                parameters=parameters,
                bits_per_weight=8 * made.size / parameters,
                calibration=str(sample),
                notes=made.notes,
                **compared(written),
            )
            save_report(report, report_files(written, folder=True))

        with console.told_when_stopped("stopped; the same command goes on behind the layers that are done"):
            quantize_gptq(
                job.checkpoint,
                sample.batches(),
                out,
                settings,
                tokenizer_folder=job.folder,
                force=job.options.force,
                progress=tell,
                check=finish,
            )
    return report


@contextmanager
def _packing(job: Job, unit: str, kind: str) -> Iterator[tuple[Callable[..., None], Callable[[Path], dict[str, Any]]]]:
    """A bar to step, and what compares the output when it is written: it returns what a report says of that."""
    with ExitStack() as bar:
        step = bar.enter_context(console.progress("quantizing", unit))

        def compared(written: Path) -> dict[str, Any]:
            bar.close()  # the comparison has bars of its own
            return job.compared(written, kind)

        yield step, compared


def _calibration_sample(job: Job) -> Sample:
    """What --calibration names; for GPTQ, which cannot do without, the built-in text is the default."""
    from .gptq.checkpoint import default_compute

    config, path, gptq = job.checkpoint.config, job.options.calibration, job.options.layout == "gptq"
    longest, most = _GPTQ_SAMPLE if gptq and path else _SAMPLE
    length = min(longest, config.context)
    with source_tokenizer(job.source, job.folder, config) as tokenizer:
        sample = make_sample(read_texts(path) if path else builtin_calibration(), tokenizer, length=length, most=most)
    compute = default_compute() if gptq else None
    cost = estimate(config, sample.tokens, length, head=False, gptq=gptq, compute=compute)
    console.note(f"calibration: {sample}; {cost}" + ("; solving the layers comes on top" if gptq else ""))
    if path is None:
        console.note("the built-in text is small: --calibration FILE with your own texts gives a better model")
    return sample


def _vocabulary(job: Job) -> Vocabulary:
    from .vocabulary.from_gguf import read_gguf_vocabulary
    from .vocabulary.read import read_vocabulary

    if job.folder is not None:
        return read_vocabulary(job.folder, job.checkpoint.config)
    if job.source.is_file() and is_gguf(job.source):
        return read_gguf_vocabulary(job.source, job.checkpoint.config)
    raise KoalaError(f"{job.source} has no tokenizer files", "name their folder with --tokenizer FOLDER")

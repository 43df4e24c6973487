"""From what the user named to a model that is ready to talk: resolve, check, probe, place, load, choose the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from koala_local.chat.formats import pick_format
from koala_local.chat.ledger import Ledger, Overflow
from koala_local.dialogue import PromptFormat
from koala_local.engine.llama import LlamaEngine, Placement
from koala_local.errors import ModelFileError, OutOfMemoryError
from koala_local.models.card import read_card
from koala_local.models.configuration import read_template, refuse_unquantized
from koala_local.models.devices import this_machine
from koala_local.models.gguf_header import GgufHeader, read_header
from koala_local.models.load_probe import probe, probing
from koala_local.models.memory import DEFAULT_CONTEXT, Plan, Wish, fit, step_down
from koala_local.models.reference import name_of, repository_of
from koala_local.models.resolve import resolve
from koala_local.models.shape import all_tensors, read_shape
from koala_local.models.store import mark_used
from koala_local.nano import MODEL_PATH
from koala_local.wording import short_number, size

if TYPE_CHECKING:
    from koala_local.engine.base import Vocabulary
    from koala_local.engine.gptq import GptqEngine

_NOTHING_LEFT = "close other programs, or take a smaller model: `koala pull REF --list` shows sizes"
_RESEARCH_ONLY = "research only: Koala's weights follow LLaMA's non-commercial licence and its data's terms of use"


class LoadOptions(NamedTuple):
    """What the command line says about loading; None and `auto` leave the choice to the program."""

    context: int | None = None
    gpu_layers: int | None = None
    kv_type: str = "auto"
    template: str = "auto"
    overflow: Overflow = "exact"
    quiet: bool = False  # the memory plan is told only where it concedes something


class LoadedModel(NamedTuple):
    """A model, what its header says, and the prompt format chosen for it, with the reason."""

    path: Path
    header: GgufHeader | None  # None: a GPTQ folder
    engine: LlamaEngine | GptqEngine
    format: PromptFormat
    format_reason: str

    @property
    def name(self) -> str:
        return self.header.name if self.header else repository_of(self.path) or self.path.name

    @property
    def summary(self) -> str:
        """Size and type in a few words."""
        if self.header is None:
            return f"GPTQ, {size(sum(file.stat().st_size for file in self.path.glob('*.safetensors')))}"
        parameters = sum(prod(tensor.shape) for tensor in self.header.tensors)
        types: Counter[str] = Counter()
        for tensor in self.header.tensors:
            types[tensor.type] += tensor.size
        kind = types.most_common(1)[0][0] if types else "no tensors"
        return f"{short_number(parameters)} parameters, mostly {kind}, {size(self.header.file_size)}"

    def ledger(self, overflow: Overflow) -> Ledger:
        return Ledger(self.engine, self.format, overflow)

    def choose_format(self, template: str) -> tuple[PromptFormat, str]:
        """The format named `template` (`auto`, `embedded`, a built-in's name or a file). Raises TemplateError."""
        return _choose_format(template, self.path, self.header, self.engine.vocabulary)

    def licence_notice(self) -> str:
        """What the banner must say about the licence, or nothing."""
        licence = self.header.licence if self.header else read_card(self.path).licence
        if "koala" in f"{self.name} {name_of(self.path)}".lower() and (licence or "").lower() != "apache-2.0":
            return _RESEARCH_ONLY
        return ""


def open_model(
    reference: str | None,
    last_used: str | None,
    options: LoadOptions,
    note: Callable[[str], None],
    meanwhile: Callable[[], object] = lambda: None,
) -> LoadedModel:
    """Load the model; `meanwhile` is begun beside that, in another thread. Raises ModelFileError, TemplateError or
    OutOfMemoryError."""
    path = resolve(reference, last_used)
    if path.is_dir():
        refuse_unquantized(path)
    header, engine, plan = _open_gptq(path, options) if path.is_dir() else _open_gguf(path, options, note, meanwhile)
    if engine.context_size > engine.trained_context and not (
        header and header.metadata.get(f"{header.architecture}.rope.scaling.type")
    ):
        note(
            f"the model was trained on {engine.trained_context} tokens of context, not {engine.context_size}: "
            "replies get worse beyond that"
        )
    if options.gpu_layers and isinstance(engine, LlamaEngine) and not engine.gpu_layers:
        note("this build has no GPU backend, or finds no GPU: all layers stay on the CPU")
    if options.kv_type not in ("auto", "f16") and not isinstance(engine, LlamaEngine):
        note(f"the KV cache of a GPTQ model is not quantized: {options.kv_type} is for GGUF files")
    try:
        format, reason = _choose_format(options.template, path, header, engine.vocabulary)
    except BaseException:
        engine.close()
        raise
    mark_used(path)
    if plan is not None and (plan.concessions or not (options.quiet or path == MODEL_PATH)):
        note(str(plan))
    return LoadedModel(path, header, engine, format, reason)


def checked(path: Path) -> GgufHeader:
    """The header of a GGUF that llama.cpp can load. Raises ModelFileError; takes the memory of no weights."""
    header = read_header(path)
    probe(path)
    return header


def _open_gguf(
    path: Path, options: LoadOptions, note: Callable[[str], None], meanwhile: Callable[[], object]
) -> tuple[GgufHeader, LlamaEngine, Plan]:
    def beside() -> None:
        with suppress(Exception):  # whoever needs what failed meets it again
            meanwhile()

    header = read_header(path)
    with probing(path):
        Thread(target=beside, daemon=True).start()  # behind the probe's fork
    engine, plan = load_planned(path, header, Wish(options.context, options.kv_type, options.gpu_layers), note)
    return header, engine, plan


def load_planned(path: Path, header: GgufHeader, wish: Wish, note: Callable[[str], None]) -> tuple[LlamaEngine, Plan]:
    """The model, checked and probed before, placed by the plan, and that plan. Every step down from the first one is
    noted. Raises ModelFileError, or OutOfMemoryError with the change that would fit."""
    plan = fit(read_shape(header, all_tensors(header)), this_machine(), wish)
    if plan.is_hopeless:
        raise OutOfMemoryError(f"{path.name} does not fit this machine: {plan.problem}", plan.hint)
    if plan.problem:
        note(f"{path.name} does not fit well: {plan.problem}; it will be slow. {plan.hint}")
    while True:
        try:
            return LlamaEngine(path, header.fingerprint, _placement(plan)), plan
        except OutOfMemoryError as error:
            smaller = step_down(plan)
            if smaller is None:
                hint = _NOTHING_LEFT if plan.wish == Wish() else error.hint
                raise OutOfMemoryError(error.message, hint) from None
            note(f"not enough memory after all for {plan.choice}; trying {smaller.choice}")
            plan = smaller


def _placement(plan: Plan) -> Placement:
    choice = plan.choice
    layers = choice.gpu_layers if plan.machine.gpus else plan.wish.gpu_layers
    return Placement(choice.context, layers, choice.kv_type)


def _open_gptq(folder: Path, options: LoadOptions) -> tuple[None, GptqEngine, None]:
    try:
        from koala_local.engine.gptq import load_gptq
        from koala_local.engine.gptq_files import read_model_settings
    except ImportError as error:
        what = f"a GPTQ model needs {error.name}, which is not installed"
        raise ModelFileError(what, "run `make convert`, or install koala-local[convert]") from None
    context = options.context or min(read_model_settings(folder).context, DEFAULT_CONTEXT)
    return None, load_gptq(folder, context), None


def _choose_format(
    template: str, path: Path, header: GgufHeader | None, vocabulary: Vocabulary
) -> tuple[PromptFormat, str]:
    texts = {token: text for text, token in vocabulary.control.items()}
    return pick_format(
        template,
        model_name=header.name if header else "",
        file_name=name_of(path),
        template=header.chat_template if header else read_template(path),
        vocabulary=vocabulary,
        bos_text=texts.get(vocabulary.bos, "") if vocabulary.bos is not None else "",
        eos_text=texts.get(vocabulary.eos, "") if vocabulary.eos is not None else "",
    )

"""Which prompt format a model gets: what the user named, else what the model's name and file say."""

from __future__ import annotations

from pathlib import Path

from koala_local.chat.template import SOURCE_CHARACTERS, JinjaFormat
from koala_local.dialogue import FORMATS, KOALA, KOALA_TEMPLATE, PromptFormat
from koala_local.engine.base import Vocabulary
from koala_local.errors import TemplateError
from koala_local.paths import typed_path

_SOURCE_BYTES = 4 * SOURCE_CHARACTERS
_FILE_SUFFIXES = {".jinja", ".jinja2", ".j2", ".txt"}
_HINT = f"name a Jinja file, or one of: auto, embedded, {', '.join(FORMATS)}"
_CHATML_START = "<|im_start|>"


def pick_format(
    override: str,
    *,
    model_name: str,
    file_name: str,
    template: str | None,
    vocabulary: Vocabulary,
    bos_text: str,
    eos_text: str,
) -> tuple[PromptFormat, str]:
    """The format and, in one line, why. `override`: `auto`, a built-in format's name, `embedded` for the model's own
    `template`, or the path of a Jinja file. Raises TemplateError."""

    def jinja(source: str, name: str) -> JinjaFormat:
        return JinjaFormat(
            source,
            name=name,
            specials={*vocabulary.control, *vocabulary.user_defined},
            bos_text=bos_text,
            eos_text=eos_text,
            add_bos=vocabulary.add_bos,
        )

    template = template if template and not template.isspace() else None
    if override == "embedded":
        if template is None:
            raise TemplateError("the model file holds no chat template", f"choose one of: {', '.join(FORMATS)}")
        return jinja(template, "embedded"), "asked for: the model's own chat template"
    if override != "auto":
        return FORMATS.get(override) or jinja(*_template_file(override)), f"asked for: {override}"
    if "koala" in f"{model_name} {file_name}".lower():
        return KOALA, "the model is called Koala"
    if template == KOALA_TEMPLATE:
        return KOALA, "the model file holds Koala's template"
    if template is not None:
        return jinja(template, "embedded"), "the model file holds its own chat template"
    return _guessed(f"{model_name} {file_name}", vocabulary)


def _template_file(name: str) -> tuple[str, str]:
    """The template in the file called `name`, and how to call it. Raises TemplateError, KoalaError for a bad name."""
    path = typed_path(name)
    if not path.exists() and path.suffix not in _FILE_SUFFIXES and path.name == name:
        raise TemplateError(f"there is no prompt format called {name!r}", _HINT)
    return _read(path), path.name


def _read(path: Path) -> str:
    """The template in the file at `path`. Raises TemplateError."""
    if not path.is_file():
        raise TemplateError(f"there is no template file {str(path)!r}", _HINT)
    try:
        with path.open("rb") as file:
            data = file.read(_SOURCE_BYTES + 1)
        if len(data) > _SOURCE_BYTES:
            raise TemplateError(f"the template file {str(path)!r} is larger than {_SOURCE_BYTES >> 20} MiB", _HINT)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise TemplateError(f"the template file {str(path)!r} cannot be read: {error.strerror}", _HINT) from None
    except UnicodeDecodeError:
        raise TemplateError(f"the template file {str(path)!r} is not UTF-8 text", _HINT) from None


def _guessed(names: str, vocabulary: Vocabulary) -> tuple[PromptFormat, str]:
    names = names.lower().replace("_", "-").replace(" ", "-")
    for family, format in (("vicuna", "vicuna-v1.1"), ("alpaca", "alpaca")):
        if family in names:
            return FORMATS[format], f"the model is called {family.capitalize()}"
    if ("llama-2" in names or "llama2" in names) and "chat" in names:
        return FORMATS["llama-2"], "the model is called Llama-2 chat"
    if _CHATML_START in vocabulary.control or _CHATML_START in vocabulary.user_defined:
        return FORMATS["chatml"], f"the vocabulary has {_CHATML_START}"
    return FORMATS["vicuna-v1.1"], "nothing says which format the model was trained on"

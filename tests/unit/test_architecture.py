"""Who may import whom. The rules are those of docs/development.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "koala_local"
STAGES = ("convert", "finetune")  # top-level folders that are installed below koala_local
NOT_FOR_HELP = [
    *("llama_cpp", "prompt_toolkit", "rich", "jinja2", "huggingface_hub", "numpy", "torch"),
    *(
        "gguf",
        "platformdirs",
        "transformers",
        "koala_local.convert",
        "koala_local.finetune",
        "numba",
        "pyarrow",
        "pygments",
        "sqlite3",
        "koala_local.chat",
        "koala_local.engine",
        "koala_local.models",
    ),
]


@dataclass(frozen=True)
class Rule:
    """Modules that match `where`, but not `except_in`, import none of `banned` or of what lies below it, but for what
    lies below `allowed`."""

    banned: tuple[str, ...]
    where: str = "*"
    except_in: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


RICH = (
    *("console.py", "finetune/*views.py"),
    *(f"chat/{name}.py" for name in ("render", "markdown", "repl", "commands", "front", "*views")),
)

# The proof loads an engine; the layout of GPTQ tensors is shared with the engine that runs them.
CONVERT_MAY = ("convert/proof.py", "convert/gptq/*")
CONVERT_GROUND = ("koala_local.convert.sources", "koala_local.convert.vocabulary")
FINETUNE_MAY = ("finetune/*command.py", "finetune/data/tokens.py")  # a training row has the ids that chat gives it

RULES = [
    Rule(("koala_local.chat", "koala_local.dialogue"), where="engine/*"),
    Rule(("koala_local.chat",), where="models/*"),
    Rule(("koala_local.console", "koala_local.models.page"), "models/*", ("models/*command.py", "models/page.py")),
    Rule(("koala_local.console",), where="engine/*"),
    Rule(("torch", "transformers"), except_in=("engine/gptq*.py", "convert/*", "finetune/*")),
    Rule(("koala_local.engine", "koala_local.chat"), "convert/*", CONVERT_MAY),
    Rule(("koala_local.engine", "koala_local.chat", "koala_local.convert"), "finetune/*", FINETUNE_MAY),
    Rule(("koala_local.finetune",), "convert/*"),
    Rule(("koala_local.convert",), "convert/vocabulary/*", allowed=("koala_local.convert.vocabulary",)),
    Rule(("koala_local.convert",), "convert/sources/*", allowed=CONVERT_GROUND),
    Rule(("koala_local.convert",), "convert/kernels/*", allowed=("koala_local.convert.kernels",)),
    Rule(("koala_local.convert.gptq",), "convert/gguf/*"),
    Rule(("koala_local.convert.gguf",), "convert/gptq/*"),
    Rule(("koala_local.finetune",), "finetune/data/*", allowed=("koala_local.finetune.data",)),
    Rule(("torch", "transformers"), "finetune/data/*"),
    Rule(("rich",), except_in=RICH),
    Rule(("click",), except_in=("cli.py", "console.py", "*/*command.py")),
    Rule(("prompt_toolkit",), except_in=("chat/*",)),
    Rule(("koala_local.cli",)),
    Rule(("koala_local.chat.command",), except_in=("cli.py",)),
]
GROUND = ("dialogue.py", "errors.py")


def violations(package: Path, inside: str = "") -> list[str]:
    """Every import and every `print` below `package` that a rule forbids, as "file:line: what". `inside`: where below
    koala_local the folder is installed."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = (Path(inside) / path.relative_to(package)).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                forbidden = {"print"} - ({"print"} if name == "console.py" else set())
            else:
                forbidden = {module for module in imported(node, name) if is_forbidden(name, module)}
            found += [f"{name}:{getattr(node, 'lineno', 0)}: {what}" for what in sorted(forbidden)]
    return found


def imported(node: ast.AST, name: str) -> set[str]:
    """The absolute names that an import statement in the file `name` makes available."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    above = ["koala_local", *Path(name).parent.parts]
    base = (
        ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
    )
    return {f"{base}.{alias.name}" for alias in node.names}


def is_forbidden(name: str, module: str) -> bool:
    root = module.partition(".")[0]
    if name in GROUND and root not in sys.stdlib_module_names and not is_below(module, "koala_local.errors"):
        return True
    return any(
        fnmatch(name, rule.where)
        and not any(fnmatch(name, exception) for exception in rule.except_in)
        and any(is_below(module, banned) for banned in rule.banned)
        and not any(is_below(module, allowed) for allowed in rule.allowed)
        for rule in RULES
    )


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_module_keeps_the_rules() -> None:
    found = [*violations(PACKAGE), *(what for stage in STAGES for what in violations(ROOT / stage, stage))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dialogue.py", "import numpy"),
        ("errors.py", "from jinja2 import Environment"),
        ("dialogue.py", "from koala_local.engine import base"),
        ("dialogue.py", "from . import paths"),
        ("engine/llama.py", "from koala_local.dialogue import Turn"),
        ("engine/llama.py", "from koala_local import dialogue"),
        ("engine/llama.py", "from ..chat.ledger import Ledger"),
        ("engine/llama.py", "def late():\n    import koala_local.chat.ledger"),
        ("models/store.py", "from koala_local import chat"),
        ("models/store.py", "import torch"),
        ("models/hub.py", "from koala_local.models.page import columns"),
        ("chat/ledger.py", "from transformers import AutoModel"),
        ("chat/ledger.py", "from rich.text import Text"),
        ("chat/ledger.py", "import click"),
        ("chat/ledger.py", "from .command import chat"),
        ("models/store.py", "import prompt_toolkit.history"),
        ("models/store.py", "from koala_local.cli import koala"),
        ("chat/repl.py", "def show():\n    print('text')"),
        ("finetune/data/packing.py", "from ..settings import LossNorm"),
        ("finetune/data/sources/hh.py", "from ...train import Run"),
        ("finetune/data/corpus.py", "import torch"),
        ("convert/sources/gguf.py", "from ..gguf.layout import plan_tensors"),
        ("convert/sources/gguf.py", "from .. import verify"),
        ("convert/vocabulary/read.py", "from ..sources.architecture import Checkpoint"),
        ("convert/kernels/choice.py", "from ..gguf import kquants"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "dialogue.py",
            "import re\nfrom collections.abc import Iterator\nfrom koala_local.errors import TemplateError",
        ),
        ("engine/gptq.py", "import torch"),
        ("chat/render.py", "from rich.text import Text"),
        ("chat/command.py", "import click"),
        ("cli.py", "import click\nimport koala_local.chat.command"),
        ("console.py", "print('text')"),
        ("chat/ledger.py", "from koala_local.engine.base import Engine\nfrom koala_local.dialogue import Turn"),
        ("finetune/data/mix.py", "from .sources import Skipped\nfrom koala_local.finetune.data.recipe import Recipe"),
        ("finetune/train.py", "import torch\nfrom .data.packing import Batch"),
        ("convert/sources/huggingface.py", "import gguf\nfrom ..vocabulary.tokenizer_files import has_tokenizer"),
        (
            "convert/gguf/write.py",
            "import gguf\nfrom ..kernels import ggml\nfrom ..sources.architecture import Checkpoint",
        ),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option: str) -> None:
    code = (
        "import sys; from koala_local.cli import main; main();"
        f"sys.exit(', '.join(name for name in {NOT_FOR_HELP!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "koala" in done.stdout

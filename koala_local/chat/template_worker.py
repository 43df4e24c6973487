"""Renders chat templates in a process of its own: a template is a program that came inside somebody's model file.

`template.py` runs this file as a script, which imports nothing but the standard library and jinja2. The process limits
itself, says that it is ready with an empty object, and from then on answers each JSON line `{"template": source,
"variables": {..}, "now": ISO time}` on stdin with one line on stdout: `{"text": ..}` or `{"error": ..}`. How long a
rendering may take is for the other side to watch.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUTPUT_CHARACTERS = 4 << 20
ERROR_CHARACTERS = 500
CPU_SECONDS = 4  # for one rendering: the end of a process that nobody watches any more
LIMITS = {
    "RLIMIT_AS": 512 << 20,
    "RLIMIT_CORE": 0,
    "RLIMIT_FSIZE": 0,
    "RLIMIT_NOFILE": 3,  # stdin, stdout and stderr are open already: no file, no socket
    "RLIMIT_NPROC": 0,
}


class Generation(Extension):
    """`{% generation %} .. {% endgeneration %}` marks the reply in templates for training; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  (an instance variable to jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for; reaching for an unsafe attribute is an error at once."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation])
        self.globals["raise_exception"] = raise_exception
        self.filters["tojson"] = to_json

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is not allowed")


def raise_exception(message: object) -> NoReturn:
    """How a template refuses a conversation."""
    raise TemplateError(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """The template of `source`. Raises TemplateSyntaxError, or what a parser raises that is led astray."""
    return Sandbox().from_string(source)


def render(request: Mapping[str, Any]) -> str:
    """The text of one request. Raises whatever the template makes jinja2 raise, ValueError where it writes too much."""
    variables = {**request["variables"], "strftime_now": datetime.fromisoformat(request["now"]).strftime}
    pieces, size = [], 0
    for piece in compiled(request["template"]).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_CHARACTERS:
            raise ValueError(f"it writes more than {OUTPUT_CHARACTERS} characters")
    return "".join(pieces)


def answer(line: bytes) -> dict[str, str]:
    """The answer to one request line."""
    try:
        return {"text": render(json.loads(line))}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except TemplateSyntaxError as error:
        return {"error": f"{error.message} (line {error.lineno})"[:ERROR_CHARACTERS]}
    except Exception as error:  # a template can raise anything, and only its words are of use
        return {"error": (str(error) or type(error).__name__)[:ERROR_CHARACTERS]}


def limit_process() -> None:
    """Lower what this process may use, as far as the system knows such limits (macOS has none for memory)."""
    for name, most in LIMITS.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def grant_cpu_seconds() -> None:
    """Allow the next rendering its share: the limit counts all that the process has ever used."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, hard))


def load_everything() -> None:
    """Make Python and jinja2 import what they import late: no file can be opened once the process is limited."""
    for source in (r"{{ strftime_now('%B') }}{{ '\N{BULLET}' | tojson(indent=1) }}", "{{ raise_exception('') }}", "{{"):
        request: dict[str, object] = {"template": source, "variables": {}, "now": "2000-01-01T00:00:00"}
        answer(json.dumps(request).encode())


def main() -> None:
    load_everything()
    limit_process()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        grant_cpu_seconds()
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

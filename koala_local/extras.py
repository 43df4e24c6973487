"""Optional dependencies: a command says what it needs before it begins."""

from __future__ import annotations

from importlib.util import find_spec

from koala_local.errors import KoalaError


def need(extra: str, *modules: str) -> None:
    """Raise KoalaError unless these are installed, as the extra of this name does."""
    if missing := [name for name in modules if find_spec(name) is None]:
        what = f"this command needs {', '.join(missing)}, not installed yet"
        raise KoalaError(what, f"run `make {extra}`, or install koala-local[{extra}]")

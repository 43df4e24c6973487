"""Put a text on the clipboard, through the program that this system has for it."""

from __future__ import annotations

import os
import shutil
import subprocess

from koala_local.errors import KoalaError

_PROGRAMS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (  # program, arguments, needs this variable, encoding
    ("wl-copy", (), "WAYLAND_DISPLAY", "utf-8"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY", "utf-8"),
    ("xsel", ("--clipboard", "--input"), "DISPLAY", "utf-8"),
    ("pbcopy", (), "", "utf-8"),
    ("clip.exe", (), "", "utf-16"),
)
_TIMEOUT_S = 5.0


def copy(text: str) -> str:
    """Put `text` on the clipboard; returns the name of the program that did it. Raises KoalaError."""
    for program, arguments, variable, encoding in _PROGRAMS:
        found = shutil.which(program)
        if found and (not variable or os.environ.get(variable)):
            _run([found, *arguments], text.encode(encoding, "replace"))
            return program
    raise KoalaError(
        "there is no clipboard program here", "install wl-clipboard, xclip or xsel; or write a file with /export"
    )


def _run(command: list[str], data: bytes) -> None:
    try:
        # xclip stays behind to serve the selection: it must not hold pipes of ours
        subprocess.run(
            command, input=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KoalaError(f"{os.path.basename(command[0])} failed: {error}", "/export writes a file instead") from None

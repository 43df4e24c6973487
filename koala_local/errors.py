"""Every error that a user can cause, drawn as a tree. `console.run` turns them into a message and an exit code.

KoalaError                  exit code 1: one line that says what happened, one that says what to do next
├── ModelFileError          a model file that is missing, damaged, hostile or of a kind that is not read
├── TemplateError           a prompt format or chat template that is unknown, fails, or takes too long
├── ContextError            text that does not fit the model's context
├── SessionError            a saved session that is missing or cannot be read or written
└── OutOfMemoryError        a model or its KV cache that does not fit the machine
Interrupted                 not an error: the user asked to stop; what was done so far is kept
"""

from __future__ import annotations


class KoalaError(Exception):
    """Something the user can mend: `message` says what happened and where, `hint` what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelFileError(KoalaError):
    """A model file that is missing, damaged, hostile or of a kind that is not read."""


class TemplateError(KoalaError):
    """A prompt format or chat template that is unknown, fails, or takes too long."""


class ContextError(KoalaError):
    """Text that does not fit the model's context."""


class SessionError(KoalaError):
    """A saved session that is missing or cannot be read or written."""


class OutOfMemoryError(KoalaError):
    """A model or its KV cache that does not fit the machine."""


class Interrupted(Exception):
    """The user asked to stop. What was evaluated before stays valid."""


DAMAGED = "the file is damaged or was not downloaded completely: download it again"  # a hint

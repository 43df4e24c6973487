"""A GGUF in several files (`-00001-of-00003`): the first one is what is opened, and says how many there are."""

from __future__ import annotations

import re

from koala_local.models.gguf_header import GgufHeader, Tensor, read_header

_FIRST = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.IGNORECASE)


def all_tensors(header: GgufHeader) -> tuple[Tensor, ...]:
    """The tensors of all files that belong to the model. Raises ModelFileError where one is missing or damaged."""
    match = _FIRST.fullmatch(header.path.name)
    count = header.metadata.get("split.count")
    if match is None or type(count) is not int or count != int(match[2]):
        return header.tensors
    tensors = header.tensors
    for number in range(2, count + 1):
        tensors += read_header(header.path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf")).tensors
    return tensors

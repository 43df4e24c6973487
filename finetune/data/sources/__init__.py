"""Raw datasets in their published formats -> dialogues. One module for each: what a raw row is, what becomes of it.

    SOURCES["hc3"]                                a Source, by its key; the order is that of the Koala post
    replace(OWN, key="mine", title="my notes")    a user's own files, of any of five schemas, plain text among them
    find_raw, fetch                               (in ..download) a source's files in a folder, or from the hub
    read_source(source, paths, seed)              Example or Skipped, row by row

A row that cannot be used costs that row only, and says why in one of few texts. A file whose first rows all lack its
source's keys is an error (WrongSchema). Preference pairs become two examples, with `helpful=False` on every turn of the
worse one. Nothing is cleaned here: that depends on the recipe.
"""

from ..raw_files import RawFileError, Skipped
from .alpaca import ALPACA
from .hc3 import HC3
from .hh import HH
from .identity import IDENTITY
from .oig import OIG
from .own import OWN
from .reading import check, read_source
from .sharegpt import SHAREGPT
from .source import BadRow, Source, Trimmed, WrongSchema
from .summarization import SUMMARIZATION
from .webgpt import WEBGPT

SOURCES: dict[str, Source] = {
    source.key: source for source in (SHAREGPT, HC3, OIG, ALPACA, HH, WEBGPT, SUMMARIZATION, IDENTITY)
}

__all__ = [
    "IDENTITY",
    "OWN",
    "SOURCES",
    "BadRow",
    "RawFileError",
    "Skipped",
    "Source",
    "Trimmed",
    "WrongSchema",
    "check",
    "read_source",
]

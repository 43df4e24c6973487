"""llama.cpp's C functions, as llama-cpp-python binds them.

Importing its package runs the classes on top of them as well, and numpy and jinja2 with these: longer than all the rest
of a chat takes to start. So the two modules of functions are imported with an empty package around them, which then
makes room for the real one, should anybody import that.

OpenMP's threads wait for each other at every step of the model. GNU's spin for some milliseconds before they sleep:
where another program has taken the core of one, each step lasts as long, and a reply up to 200 times as long as beside
nobody. They spin for some 20 µs here, unless the user has said how they wait; beside nobody that is as fast (on two
cores, where it was measured).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when the library is loaded


def _without_package() -> tuple[Any, Any]:
    package = "llama_cpp"
    spec = find_spec(package) if package not in sys.modules else None
    if spec is not None:
        sys.modules[package] = module_from_spec(spec)
    try:
        return import_module(f"{package}.llama_cpp"), import_module(f"{package}._ggml").libggml
    finally:
        if spec is not None:
            del sys.modules[package]


ll, libggml = _without_package()

"""Sets up .venv for the Makefile: koala and its extras, with llama.cpp built for the GPU of this machine.

    python3 -m tools.install [--extra test] [--backend auto|cpu|cuda|hip|metal|vulkan]

A second run finds its stamp and does nothing. Standard library only, in a syntax that Python 3.6 can read, so that an
old Python gets a sentence instead of a syntax error.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

from tools.backends import BACKENDS, build_settings, choose, find_gpus, find_toolchains, minutes, remedy

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP, LOG = VENV / "koala-install.json", VENV / "koala-install.log"
PROBE = "import sys, llama_cpp.llama_cpp as it; sys.exit(0 if it.llama_supports_gpu_offload() else 3)"


def say(text: str) -> None:
    print(f"koala: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    say(f"error: {text}")
    sys.exit(1)


def pip(what: str, arguments: "list[str]", settings: "dict[str, str]") -> None:
    """Run `pip install` with its output in LOG and a line every 20 seconds. Exits with the log's end when it fails."""
    command = [str(VENV / "bin/python"), "-m", "pip", "install", "-c", "constraints.txt", *arguments]
    pinned = {"PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}  # build tools, too
    started = time.monotonic()
    with LOG.open("w") as log:
        environment = {**os.environ, **pinned, **settings}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=str(ROOT), env=environment)
        while process.poll() is None:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                elapsed = int(time.monotonic() - started)
                say(f"{what}: {elapsed // 60}:{elapsed % 60:02}")
            except KeyboardInterrupt:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)  # pip got the same Ctrl-C and tidies up
                process.terminate()
                raise
    if process.returncode:
        print(*LOG.read_text(errors="replace").splitlines()[-30:], sep="\n", file=sys.stderr)
        how = f"was killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
        fail(f"{what} {how}; the whole log is {LOG}")


def make_venv() -> None:
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        how = remedy("Python's venv module")
        fail(f"this Python cannot make virtual environments: {how}")
    say("making .venv")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False).returncode:
        fail(f"{sys.executable} -m venv failed, see above")


def build_llama(backend: str, why: str, replace: bool) -> None:
    """Compile and install llama.cpp with its bindings, and see that they load."""
    say(f"building llama.cpp for {backend.upper()}: {why}")
    say(f"this takes {minutes(backend)}, once (seconds if it was built here before); pip writes to {LOG}")
    # pip's cache does not tell builds for different backends apart, so only CPU builds may come from it or go to it.
    fresh = ["--no-cache-dir"] if backend != "cpu" else []
    again = ["--force-reinstall", "--no-deps"] if replace else []
    what = "building llama.cpp" + (f" for {backend.upper()} (BACKEND=cpu would do without)" if backend != "cpu" else "")
    pip(what, ["llama-cpp-python", *fresh, *again], build_settings(backend))
    command = [str(VENV / "bin/python"), "-c", PROBE]
    probe = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if probe.returncode not in (0, 3):
        reason = probe.stderr.decode(errors="replace").strip().splitlines()[-1:]
        fail(f"llama.cpp was installed but does not load: {' '.join(reason)}")
    if probe.returncode == 3 and backend != "cpu":
        say("WARNING: llama.cpp was built for the GPU but finds none when it runs: look at the GPU's driver")


def read_stamp() -> "dict[str, Any]":
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def install(extras: "set[str]", wish: str) -> None:
    """Bring .venv to what pyproject.toml and constraints.txt say. An empty `wish` is the backend wished for before."""
    pins = (ROOT / "constraints.txt").read_text()
    inputs = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + pins.encode()).hexdigest()
    old = read_stamp()
    wish, built = wish or old.get("wish", "auto"), old.get("backend", "cpu")
    backend, why, warning = choose(find_gpus(), find_toolchains(), built)
    if wish != "auto":
        backend, why, warning = wish, "it was asked for", ""
    if warning:
        say(f"WARNING: {warning}")
    wanted = sorted(extras | set(old.get("extras", [])))
    new = {"wish": wish, "backend": backend, "inputs": inputs, "extras": wanted}
    if new == old and (VENV / "bin/koala").exists():
        return
    version = re.findall(r"^llama_cpp_python==(\S+)", pins, re.MULTILINE)[0]
    present = bool(glob(str(VENV / f"lib/python*/site-packages/llama_cpp_python-{version}.dist-info")))
    compiles = not present or backend != built
    if compiles and not any(map(shutil.which, [os.environ.get("CXX", "c++"), "c++", "g++", "clang++"])):
        fail(f"a C++ compiler is missing: {remedy('a C++ compiler')}")
    if not ((VENV / "bin/pip").exists() and (VENV / "bin/python").exists()):
        make_venv()
    if compiles:
        build_llama(backend, why, replace=present)
        STAMP.write_text(json.dumps({"wish": wish, "backend": backend, "extras": old.get("extras", [])}))
    say("installing koala and what it needs")
    pip("installing koala", ["-e", f".[{','.join(wanted)}]" if wanted else "."], {})
    STAMP.write_text(json.dumps(new))


def main() -> None:
    version = tuple(sys.version_info)  # a type checker would take a plain comparison for always false
    if version < (3, 11):
        newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
        cure = f"run make with PYTHON={newer[0]}" if newer else "install a newer one"
        fail(f"Python 3.11 or newer is needed, this is {version[0]}.{version[1]}: {cure}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--backend", choices=["", "auto", *BACKENDS], default="")
    arguments = parser.parse_args()
    try:
        install(set(arguments.extra), arguments.backend)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

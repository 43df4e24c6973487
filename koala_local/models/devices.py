"""The memory of this machine: GPUs as llama.cpp lists them (CUDA, HIP, Metal, Vulkan alike), and RAM.

Free RAM is what the system can give without swapping, and never more than a container's limit leaves.
"""

from __future__ import annotations

import ctypes
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from koala_local.engine.text_stream import one_line

_GPU, _INTEGRATED = 1, 2  # of ggml_backend_dev_type
# Weights of these types are kept in another order on a CPU with these instructions (llama.cpp's repack.cpp).
_REPACKED = {
    ("AVX2",): ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    ("AVX512",): ("Q2_K",),
    ("NEON", "DOTPROD"): ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"),
}


class Gpu(NamedTuple):
    """A device of llama.cpp that layers can go to. Bytes; an integrated GPU and Apple's share them with the RAM."""

    name: str  # "CUDA0"
    description: str  # "NVIDIA GeForce RTX 4070"
    free: int
    total: int
    integrated: bool = False


class Machine(NamedTuple):
    """What a plan is made for. None: not known, then everything fits."""

    ram_available: int | None = None
    ram_total: int | None = None
    swap_free: int = 0
    gpus: tuple[Gpu, ...] = ()
    repacked: frozenset[str] = frozenset()
    plain_attention: bool = False  # an f16 KV cache is read without flash attention


def this_machine() -> Machine:
    """As it is now. Loads llama.cpp, and with a GPU starts its driver: not before a fork."""
    from koala_local.engine.llama import plain_attention

    total, available, swap = ram()
    return Machine(available, total, swap, tuple(gpus()), repacked_types(cpu_features()), plain_attention())


def gpus() -> list[Gpu]:
    """The GPUs that this build of llama.cpp uses; integrated ones only where there is no other."""
    library = _ggml()
    if library is None:
        return []
    found = []
    for index in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(index)
        kind = library.ggml_backend_dev_type(device)
        if kind in (_GPU, _INTEGRATED):
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name, text = library.ggml_backend_dev_name(device), library.ggml_backend_dev_description(device)
            found.append(Gpu(_text(name), _text(text), free.value, total.value, kind == _INTEGRATED))
    return [gpu for gpu in found if not gpu.integrated] or found


def backends() -> list[str]:
    """What this build of llama.cpp computes with: "CPU", "CUDA", "Vulkan", .."""
    library = _ggml()
    if library is None:
        return []
    count = library.ggml_backend_reg_count()
    return [_text(library.ggml_backend_reg_name(library.ggml_backend_reg_get(index))) for index in range(count)]


def cpu_features() -> list[str]:
    """The instruction sets that llama.cpp was built for and uses, such as AVX2."""
    from koala_local.engine.bindings import ll

    return re.findall(r"(\w+) = 1", ll.llama_print_system_info().decode("utf-8", "replace"))


def repacked_types(features: list[str]) -> frozenset[str]:
    """The types of weights that are copied into another order on a CPU with these features."""
    if "REPACK" not in features:
        return frozenset()
    return frozenset(type_ for wanted, types in _REPACKED.items() if {*wanted} <= {*features} for type_ in types)


def _text(raw: bytes | None) -> str:
    return one_line((raw or b"").decode("utf-8", "replace"))


def _ggml() -> ctypes.CDLL | None:
    """ggml's device list, None where the library has none."""
    try:
        from koala_local.engine.bindings import libggml, ll

        ll.llama_backend_init()
        library: ctypes.CDLL = libggml
        for kind, names in {
            ctypes.c_void_p: ("dev_get", "reg_get"),
            ctypes.c_char_p: ("dev_name", "dev_description", "reg_name"),
            ctypes.c_size_t: ("dev_count", "reg_count"),
        }.items():
            for name in names:
                getattr(library, f"ggml_backend_{name}").restype = kind
        for name in ("dev_name", "dev_description", "dev_type", "reg_name"):
            getattr(library, f"ggml_backend_{name}").argtypes = [ctypes.c_void_p]
        for name in ("dev_get", "reg_get"):
            getattr(library, f"ggml_backend_{name}").argtypes = [ctypes.c_size_t]
        size = ctypes.POINTER(ctypes.c_size_t)
        library.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    except (ImportError, AttributeError, OSError):
        return None
    return library


def ram(root: Path = Path("/")) -> tuple[int | None, int | None, int]:
    """(total, available, free swap) in bytes; None where the system does not say. `root` stands for `/`."""
    if sys.platform == "darwin":
        return _mac_ram()
    with suppress(OSError, ValueError):
        lines = re.findall(r"^(\w+):\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
        info = {name: int(value) << 10 for name, value in lines}
        total, available, swap = info.get("MemTotal"), info.get("MemAvailable"), info.get("SwapFree", 0)
        for limit, left in _container_limits(root):
            total = limit if total is None else min(total, limit)
            if available is None or left < available:
                available, swap = left, 0  # a container's limit is not widened by the machine's swap
        return total, available, swap
    return None, None, 0


def peak_memory() -> int:
    """The most bytes that this process has had in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _container_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, what is left of it) of each control group that this process is in, version 2 and 1."""
    groups = (root / "proc/self/cgroup").read_text().splitlines() if (root / "proc/self/cgroup").exists() else []
    found = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(base))]:
            with suppress(OSError, ValueError):  # "max": no limit
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = (folder / "memory.stat").read_text() if (folder / "memory.stat").exists() else ""
                cache = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)  # can be dropped
                if limit < 1 << 60:
                    found.append((limit, max(0, limit - used + (int(cache[1]) if cache else 0))))
    return found


def _mac_ram() -> tuple[int | None, int | None, int]:
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        total = int(_output("sysctl", "-n", "hw.memsize"))
        return total, available_in(_output("vm_stat")), 0
    return None, None, 0


def available_in(vm_stat: str) -> int | None:
    """What macOS can give without swapping, from what its vm_stat prints."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    counts = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", vm_stat, re.MULTILINE)
    return int(page[1]) * sum(map(int, counts)) if page and counts else None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout


def ggml_version() -> str | None:
    """The version and commit of the ggml inside the installed llama.cpp."""
    library = _ggml()
    try:
        if library is None:
            return None
        library.ggml_version.restype = library.ggml_commit.restype = ctypes.c_char_p
        return f"{_text(library.ggml_version())} ({_text(library.ggml_commit())})"
    except AttributeError:
        return None

"""`koala doctor`: what this installation is made of, how fast it is, what is misconfigured, and how to mend it.

Nothing that names a person goes into it: the home folder is written as ~, no host name, no list of models.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from koala_local import __version__, paths
from koala_local.disk import nearest
from koala_local.errors import KoalaError
from koala_local.models import devices
from koala_local.models.devices import Gpu
from koala_local.wording import size

_PACKAGES = ("llama-cpp-python", "huggingface-hub", "numpy", "torch", "transformers")
_BACKENDS = {"nvidia": ("CUDA", "cuda"), "amd": ("ROCm", "hip"), "apple": ("Metal", "metal")}
_PCI_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
_LITTLE_ROOM = 5 << 30
_VECTORS = ("AVX2", "AVX512")  # what a build for another machine may lack


@dataclass(frozen=True, slots=True)
class Finding:
    """Something amiss. `broken`: koala cannot work at all."""

    what: str
    remedy: str
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Folder:
    path: str
    free: int | None
    writable: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of the bundled model."""

    prefill: float
    decode: float
    threads: int


@dataclass(frozen=True, slots=True)
class Report:
    versions: dict[str, str | None]
    system: str
    cpu: str
    cores: int
    cpu_features: tuple[str, ...]
    backends: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    gpu_makers: tuple[str, ...]  # of what is in the machine, used or not
    ram_total: int | None
    ram_available: int | None
    folders: dict[str, Folder]
    speed: Speed | None
    findings: tuple[Finding, ...]


def examine() -> Report:
    """Look at everything; takes some three seconds, two of which are the measurement."""
    findings: list[Finding] = []
    speed, features, backends, gpus = None, [], [], []
    try:
        features, backends, gpus = devices.cpu_features(), devices.backends(), devices.gpus()
        speed = measure()
    except (ImportError, OSError, KoalaError) as error:
        what = f"llama.cpp does not work: {getattr(error, 'message', error)}"
        findings.append(Finding(homeless(what), _rebuild("cpu"), broken=True))
    total, available, _ = devices.ram()
    makers = find_gpus()
    folders = {"data": _folder(paths.data_folder()), "models": _folder(_hub_cache())}
    findings += bad_folders(folders)
    if speed is not None:
        findings += [*idle_gpus(makers, backends, gpus), *missing_features(features, _cpu_flags())]
    findings += [*too_large(_known_sizes(), total, gpus), *_busy()]
    return Report(
        versions=_versions(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        cpu_features=tuple(features),
        backends=tuple(backends),
        gpus=tuple(gpus),
        gpu_makers=tuple(makers),
        ram_total=total,
        ram_available=available,
        folders=folders,
        speed=speed,
        findings=tuple(findings),
    )


def measure(seconds: float = 1.0) -> Speed:
    """Prefill and decode of the bundled model, `seconds` each. Raises KoalaError when it cannot be loaded."""
    import time

    from koala_local.engine.cores import physical_cores
    from koala_local.engine.llama import LlamaEngine, Placement
    from koala_local.nano import MODEL_PATH

    engine = LlamaEngine(MODEL_PATH, "doctor", Placement(1024))
    try:
        ids = [7] * 256
        engine.evaluate(ids, slot=0, position=0)
        rates = []
        for step in (ids, ids[:1]):
            started, done, position = time.perf_counter(), 0, 0
            while (passed := time.perf_counter() - started) < seconds:
                if position + len(step) > engine.context_size or not position:
                    position = engine.crop(0, 0)
                engine.evaluate(step, slot=0, position=position)
                position, done = position + len(step), done + len(step)
            rates.append(done / passed)
    finally:
        engine.close()
    return Speed(rates[0], rates[1], physical_cores())


def find_gpus(root: Path = Path("/")) -> dict[str, bool]:
    """The makers of the GPUs in this machine, and whether a driver runs them, without asking any driver."""
    if sys.platform == "darwin":
        return {"apple": True} if platform.machine() == "arm64" else {}
    in_windows = (root / "dev/dxg").exists() and shutil.which("nvidia-smi") is not None
    running = {"nvidia": in_windows or bool(glob(str(root / "dev/nvidia[0-9]*"))), "amd": (root / "dev/kfd").exists()}
    seen = {maker for maker, runs in running.items() if runs}
    for device in (root / "sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            if (device / "class").read_text().startswith("0x03"):  # a display controller
                seen.add(_PCI_VENDORS.get((device / "vendor").read_text().strip(), ""))
    return {maker: runs for maker, runs in running.items() if maker in seen}


def idle_gpus(makers: dict[str, bool], backends: Iterable[str], gpus: Iterable[Gpu]) -> list[Finding]:
    """A GPU that llama.cpp does not use, and what to do about it."""
    backends, found = {*backends}, []
    if any(True for _ in gpus):
        return []
    for maker, runs in makers.items():
        name, option = _BACKENDS[maker]
        if backends & {name, "Vulkan", "MTL" if maker == "apple" else name}:
            what = f"llama.cpp is built for {' and '.join(sorted(backends - {'CPU'}))}, but finds no GPU"
            found.append(Finding(what, f"install or restart the {maker.upper()} driver, then run koala doctor again"))
        elif not runs:
            what = f"an {maker.upper()} GPU is here, but no driver runs it: the CPU does all the work"
            found.append(Finding(what, f"install its driver and restart; then {_rebuild(option)}"))
        else:
            tool = {"cuda": "nvcc", "hip": "hipconfig"}.get(option)
            first = f"install the toolkit with {tool}, which is not on the PATH; then " if _lacks(tool) else ""
            what = f"an {maker.upper()} GPU is here, but this build of llama.cpp is for the CPU: many times slower"
            found.append(Finding(what, f"{first}{_rebuild(option)}"))
    return found


def _lacks(tool: str | None) -> bool:
    return tool is not None and shutil.which(tool) is None


def _rebuild(option: str) -> str:
    """The exact command, in a checkout or for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "Makefile").is_file() and (checkout / "tools" / "install.py").is_file():
        return f"run: cd {homeless(str(checkout))} && make chat BACKEND={option}"
    flags = "" if option == "cpu" else f'CMAKE_ARGS="-DGGML_{option.upper()}=on" '
    pinned = _version("llama-cpp-python")
    package = f"llama-cpp-python=={pinned}" if pinned else "llama-cpp-python"
    return f"run: {flags}pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python {package}"


def missing_features(features: Iterable[str], cpu_flags: Iterable[str]) -> list[Finding]:
    """Instruction sets that the CPU has and the build does not use."""
    flags = {flag.upper() for flag in cpu_flags}
    has = {"AVX2": "AVX2" in flags, "AVX512": {"AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"} <= flags}
    missing = [name for name in _VECTORS if has[name] and name not in set(features)]
    if not missing:
        return []
    what = f"llama.cpp is built without {' and '.join(missing)}, which this CPU has: slower than it could be"
    return [Finding(what, _rebuild("cpu"))]


def _busy() -> list[Finding]:
    with suppress(OSError, AttributeError):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores + 0.5:
            what = f"other programs keep the cores busy (load {load:.1f} on {cores}): the speeds are too low"
            return [Finding(what, "close them, or run koala doctor again later")]
    return []


def too_large(models: Iterable[tuple[str, int, bool]], ram_total: int | None, gpus: Iterable[Gpu]) -> list[Finding]:
    """Models that are here, (name, bytes, whether it is the hub's), and can never fit this machine."""
    room = None if ram_total is None else ram_total + sum(gpu.total for gpu in gpus if not gpu.integrated)
    return [
        Finding(
            f"{name} takes {size(count)}, this machine has {size(room)}: it will read the disk for every token",
            "take a smaller type of it" + (f": koala pull {name.partition(':')[0]} --list" if of_hub else ""),
        )
        for name, count, of_hub in models
        if room is not None and count > room
    ]


def bad_folders(folders: dict[str, Folder]) -> list[Finding]:
    """Folders that cannot be written to, or disks that are nearly full."""
    found = []
    for name, folder in folders.items():
        variable = "KOALA_HOME" if name == "data" else "HF_HOME"
        if not folder.writable:
            what = f"the {name} folder {folder.path} cannot be written to"
            found.append(Finding(what, f"give it to your user, or set {variable} to a folder that is yours"))
        elif folder.free is not None and folder.free < _LITTLE_ROOM:
            what = f"the disk of the {name} folder {folder.path} has only {size(folder.free)} left"
            found.append(Finding(what, f"koala rm frees models; or set {variable} to a folder on another disk"))
    return found


def _folder(path: Path) -> Folder:
    """Of a folder that need not exist yet: what holds for the nearest one above it."""
    there = nearest(path)
    writable, free = False, None
    with suppress(OSError):
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there):
            writable = True
    return Folder(homeless(str(path)), free, writable)


def homeless(text: str) -> str:
    """`text` without the user's name: the home folder in it is written as ~."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _hub_cache() -> Path:
    from koala_local.models import cache

    return cache.folder()


def _known_sizes() -> list[tuple[str, int, bool]]:
    from koala_local.models import store

    with suppress(OSError, KoalaError):
        sized = [(model, model.size) for model in store.known() if model.runs and model.size is not None]
        return [(homeless(model.reference), count, model.repository is not None) for model, count in sized]
    return []


def _versions() -> dict[str, str | None]:
    found = {"koala": __version__, "python": platform.python_version(), "llama.cpp (ggml)": devices.ggml_version()}
    return {**found, **{package: _version(package) for package in _PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""

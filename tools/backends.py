"""Which GPU this machine has, what it can build for it, and what is missing.

Standard library only, in a syntax that Python 3.6 can read: see `install.py`.
"""

import os
import platform
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

BACKENDS_OF = {"apple": ["metal"], "nvidia": ["cuda", "vulkan"], "amd": ["hip", "vulkan"], "intel": ["vulkan"]}
BACKENDS = ["cpu", "cuda", "hip", "metal", "vulkan"]

_PCI_VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_TOOLCHAINS = "/usr/local/cuda/bin:/opt/cuda/bin:/opt/rocm/bin"
_INSTALL = {"apt-get": "sudo apt-get install", "dnf": "sudo dnf install", "pacman": "sudo pacman -S"}
_PACKAGES = {
    "a C++ compiler": {"apt-get": "g++", "dnf": "gcc-c++", "pacman": "gcc"},
    "Python's venv module": {"apt-get": "python3-venv"},
    "the CUDA toolkit": {"apt-get": "nvidia-cuda-toolkit", "dnf": "cuda-toolkit", "pacman": "cuda"},
    "the Vulkan SDK": {
        "apt-get": "libvulkan-dev glslc spirv-headers",
        "dnf": "vulkan-headers vulkan-loader-devel glslc spirv-headers-devel",
        "pacman": "vulkan-headers vulkan-icd-loader shaderc spirv-headers",
    },
}


def remedy(missing: str) -> str:
    """How to install what is missing on this machine."""
    if sys.platform == "darwin" and missing == "a C++ compiler":
        return "xcode-select --install"
    for manager, packages in _PACKAGES[missing].items():
        if shutil.which(manager):
            return f"{_INSTALL[manager]} {packages}"
    return f"install {missing}"


def find_gpus() -> "dict[str, bool]":
    """The makers of the GPUs in this machine, and whether a driver runs them."""
    if sys.platform == "darwin":
        return {"apple": True} if platform.machine() == "arm64" else {}
    in_wsl = os.path.exists("/dev/dxg") and shutil.which("nvidia-smi") is not None
    running = {"nvidia": in_wsl or bool(glob("/dev/nvidia[0-9]*")), "amd": os.path.exists("/dev/kfd"), "intel": False}
    seen = {maker for maker, runs in running.items() if runs}
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if (device / "class").read_text().startswith("0x03"):  # display controllers
            seen.add(_PCI_VENDORS.get((device / "vendor").read_text().strip(), "other"))
    for maker in ("amd", "intel"):
        running[maker] |= bool(glob("/dev/dri/renderD*"))
    return {maker: runs for maker, runs in running.items() if maker in seen}


def find_toolchains() -> "list[str]":
    """The GPU backends that this machine has what it takes to build."""
    headers = all(os.path.exists(f"/usr/include/{name}") for name in ("vulkan/vulkan.h", "spirv"))
    vulkan = bool(_tool("glslc")) and (headers or "VULKAN_SDK" in os.environ)
    found = {"metal": True, "cuda": bool(_tool("nvcc")), "hip": bool(_tool("hipconfig")), "vulkan": vulkan}
    return [backend for backend, there in found.items() if there]


def choose(gpus: "dict[str, bool]", toolchains: "list[str]", built: str) -> "tuple[str, str, str]":
    """The backend to use, why, and a warning, empty unless a GPU lies idle. What is `built` already stays in use when
    its toolchain is gone."""
    for maker, runs in gpus.items():
        for backend in BACKENDS_OF[maker]:
            if runs and (backend in toolchains or backend == built):
                return backend, f"this machine has an {maker.upper()} GPU and what it takes to build for it", ""
    for maker in [maker for maker in ("nvidia", "amd") if maker in gpus]:
        missing = "toolchain to build for it" if gpus[maker] else "driver that runs it"
        toolkit = "the CUDA toolkit" if maker == "nvidia" else "the Vulkan SDK"
        cure = remedy(toolkit) if gpus[maker] else "install the driver of the GPU and restart"
        idle = f"an {maker.upper()} GPU is here, but no {missing}: the CPU will be used, MANY TIMES SLOWER"
        return (
            "cpu",
            "the GPU cannot be used yet",
            f"{idle}\n  to use the GPU: {cure}\n  then run the same command again",
        )
    return "cpu", "no GPU to build for was found", ""


def build_settings(backend: str) -> "dict[str, str]":
    """The environment variables that make CMake build llama.cpp for `backend`."""
    settings = {"CMAKE_ARGS": f"-DLLAVA_BUILD=OFF {os.environ.get('CMAKE_ARGS', '')}"}  # no image input here
    if backend in ("cuda", "hip", "vulkan"):
        settings["CMAKE_ARGS"] += f" -DGGML_{backend.upper()}=ON"
    if backend == "cuda" and _tool("nvcc"):
        settings["CUDACXX"] = str(_tool("nvcc"))
    if backend == "hip" and _tool("hipconfig"):
        clang, home = (subprocess.getoutput(f"{_tool('hipconfig')} {flag}") for flag in ("-l", "-R"))
        settings.update(HIPCXX=f"{clang}/clang", HIP_PATH=home)
    return settings


def minutes(backend: str) -> str:
    """How long compiling takes, in words."""
    cores = os.cpu_count() or 1
    on_cpu = f"{max(1, round(14 / cores))}"
    spans = {"cuda": "15 to 30", "hip": "15 to 30", "vulkan": "10 to 20"}
    return f"about {spans.get(backend, on_cpu)} minutes on {cores} cores"


def _tool(name: str) -> "str | None":
    return shutil.which(name) or shutil.which(name, path=_TOOLCHAINS)

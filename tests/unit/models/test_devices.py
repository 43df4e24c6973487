from __future__ import annotations

from pathlib import Path

import pytest

from koala_local.models import devices

MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\nSwapFree:  2000000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_ram_of_a_plain_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    root = write(tmp_path, {"proc/meminfo": MEMINFO})
    assert devices.ram(root) == (16_000_000 << 10, 8_000_000 << 10, 2_000_000 << 10)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/box/inner\n",
        "sys/fs/cgroup/box/inner/memory.max": "max",
        "sys/fs/cgroup/box/memory.max": "4000000000",
        "sys/fs/cgroup/box/memory.current": "3000000000",
        "sys/fs/cgroup/box/memory.stat": "anon 1\ninactive_file 500000000\n",
    }
    assert devices.ram(write(tmp_path, files)) == (4_000_000_000, 1_500_000_000, 0)


def test_a_limit_of_version_1_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/\n4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000000000",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "500000000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    }
    assert devices.ram(write(tmp_path, files)) == (2_000_000_000, 1_500_000_000, 0)


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert devices.ram(tmp_path) == (None, None, 0)


def test_what_this_process_took_is_known() -> None:
    assert devices.peak_memory() > 10 << 20


def test_what_a_mac_says() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:   1000.\nPages active:  5.\n"
        "Pages inactive:   2000.\nPages speculative:   30.\nPages wired down:  9.\nPages purgeable:   4.\n"
    )
    assert devices.available_in(text) == 16384 * 3034
    assert devices.available_in("nonsense") is None


def test_which_types_are_reordered() -> None:
    assert devices.repacked_types(["AVX2"]) == frozenset()
    assert devices.repacked_types(["AVX2", "REPACK"]) == {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
    assert "Q2_K" in devices.repacked_types(["AVX2", "AVX512", "REPACK"])
    assert "Q8_0" in devices.repacked_types(["NEON", "DOTPROD", "REPACK"])


def test_this_machine_is_known() -> None:
    here = devices.this_machine()
    assert here.ram_total and here.ram_available and 0 < here.ram_available <= here.ram_total
    assert "CPU" in devices.backends()
    assert devices.ggml_version()
    for gpu in here.gpus:
        assert gpu.name and 0 < gpu.free <= gpu.total

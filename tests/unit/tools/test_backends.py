from __future__ import annotations

import pytest

from tools.backends import BACKENDS, BACKENDS_OF, build_settings, choose, minutes, remedy

ALL = ["metal", "cuda", "hip", "vulkan"]


@pytest.mark.parametrize(
    ("gpus", "toolchains", "chosen"),
    [
        ({}, ALL, "cpu"),
        ({"nvidia": True}, ALL, "cuda"),
        ({"nvidia": True}, ["metal", "vulkan"], "vulkan"),
        ({"nvidia": True}, ["metal", "hip"], "cpu"),
        ({"nvidia": False}, ALL, "cpu"),
        ({"amd": True}, ALL, "hip"),
        ({"amd": True}, ["vulkan"], "vulkan"),
        ({"intel": True}, ["cuda", "vulkan"], "vulkan"),
        ({"nvidia": False, "intel": True}, ALL, "vulkan"),
        ({"apple": True}, ["metal"], "metal"),
    ],
)
def test_the_backend_is_one_that_gpu_and_toolchain_share(
    gpus: dict[str, bool], toolchains: list[str], chosen: str
) -> None:
    backend, why, _ = choose(gpus, toolchains, built="cpu")
    assert backend == chosen
    assert why


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ({"nvidia": True}, ["NVIDIA", "no toolchain", "MANY TIMES SLOWER", remedy("the CUDA toolkit")]),
        ({"amd": True}, ["AMD", "no toolchain", remedy("the Vulkan SDK")]),
        ({"nvidia": False}, ["NVIDIA", "no driver"]),
        ({"intel": True, "amd": True}, ["AMD"]),
    ],
)
def test_an_idle_gpu_is_spoken_of_with_its_cure(gpus: dict[str, bool], words: list[str]) -> None:
    _, _, warning = choose(gpus, ["metal"], built="cpu")
    assert all(word in warning for word in words)


@pytest.mark.parametrize("gpus", [{}, {"intel": True}, {"apple": True}])
def test_no_warning_where_no_gpu_lies_idle(gpus: dict[str, bool]) -> None:
    assert choose(gpus, ["metal"], built="cpu")[2] == ""


def test_a_gpu_build_stays_when_its_toolchain_is_gone_but_not_when_its_gpu_is() -> None:
    assert choose({"nvidia": True}, ["vulkan"], built="cuda")[0] == "cuda"
    assert choose({"nvidia": True}, [], built="vulkan")[0] == "vulkan"
    assert choose({}, ["cuda"], built="cuda")[0] == "cpu"


def test_cmake_is_told_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DMINE=1")
    for backend in BACKENDS:
        arguments = build_settings(backend)["CMAKE_ARGS"].split()
        assert "-DMINE=1" in arguments
        assert [argument for argument in arguments if argument.startswith("-DGGML")] == (
            [f"-DGGML_{backend.upper()}=ON"] if backend in ("cuda", "hip", "vulkan") else []
        )


def test_every_backend_can_be_reached_and_has_a_time() -> None:
    assert {"cpu", *(backend for backends in BACKENDS_OF.values() for backend in backends)} == set(BACKENDS)
    assert all(minutes(backend).startswith("about ") for backend in BACKENDS)

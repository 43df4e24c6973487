from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from koala_local.models import doctor, doctor_command
from koala_local.models.devices import Gpu
from koala_local.models.doctor import Folder
from tests.unit.models.test_devices import write

CARD = Gpu("CUDA0", "a card", 1, 8 << 30)


def test_gpus_are_found_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    pci = "sys/bus/pci/devices"
    root = write(
        tmp_path,
        {
            f"{pci}/0/class": "0x030200",
            f"{pci}/0/vendor": "0x10de\n",
            f"{pci}/1/class": "0x020000",  # a network card
            f"{pci}/1/vendor": "0x1002\n",
        },
    )
    assert doctor.find_gpus(root) == {"nvidia": False}
    write(root, {"dev/nvidia0": "", "dev/kfd": ""})
    assert doctor.find_gpus(root) == {"nvidia": True, "amd": True}
    assert doctor.find_gpus(tmp_path / "nothing") == {}


def test_an_idle_gpu_gets_the_exact_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (found,) = doctor.idle_gpus({"nvidia": True}, ["CPU"], [])
    assert "build of llama.cpp is for the CPU" in found.what
    assert found.remedy.startswith("run: cd ") and found.remedy.endswith("&& make chat BACKEND=cuda")
    (found,) = doctor.idle_gpus({"amd": False}, ["CPU"], [])
    assert "no driver runs it" in found.what and "BACKEND=hip" in found.remedy
    monkeypatch.setattr("shutil.which", lambda name: None)
    (found,) = doctor.idle_gpus({"nvidia": True}, ["CPU"], [])
    assert "nvcc" in found.remedy


def test_an_installed_package_is_rebuilt_with_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "site-packages/koala_local/models/doctor.py"))
    (found,) = doctor.idle_gpus({"nvidia": True}, ["CPU"], [])
    assert 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall' in found.remedy
    assert "llama-cpp-python==" in found.remedy


def test_a_gpu_build_without_a_gpu_blames_the_driver() -> None:
    (found,) = doctor.idle_gpus({"nvidia": True}, ["CPU", "CUDA"], [])
    assert "finds no GPU" in found.what and "driver" in found.remedy


def test_a_gpu_in_use_is_no_finding() -> None:
    assert doctor.idle_gpus({"nvidia": True}, ["CPU", "CUDA"], [CARD]) == []
    assert doctor.idle_gpus({}, ["CPU"], []) == []


def test_a_build_without_the_cpus_instructions_is_found() -> None:
    (found,) = doctor.missing_features(["AVX"], ["avx", "avx2"])
    assert "AVX2" in found.what
    assert doctor.missing_features(["AVX2"], ["avx", "avx2", "avx512f"]) == []


def test_models_larger_than_the_machine_are_found() -> None:
    models = [("big:Q8_0", 20 << 30, True), ("small", 1 << 30, True)]
    (found,) = doctor.too_large(models, 16 << 30, [])
    assert found.what.startswith("big:Q8_0 takes 21.47 GB") and "koala pull big --list" in found.remedy
    (own,) = doctor.too_large([("mine", 20 << 30, False)], 16 << 30, [])
    assert "koala pull" not in own.remedy
    assert doctor.too_large(models, 16 << 30, [CARD]) == []
    assert doctor.too_large(models, None, []) == []


def test_folders_that_cannot_be_used_are_found() -> None:
    folders = {"data": Folder("~/a", 1 << 40, False), "models": Folder("~/b", 1 << 30, True)}
    wrong, full = doctor.bad_folders(folders)
    assert "~/a cannot be written to" in wrong.what and "KOALA_HOME" in wrong.remedy
    assert "only 1.07 GB left" in full.what and "HF_HOME" in full.remedy


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_noticed(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not doctor._folder(tmp_path / "koala").writable
    tmp_path.chmod(0o700)


def test_a_folder_that_is_a_file_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not doctor._folder(tmp_path / "file" / "data").writable
    assert doctor._folder(tmp_path / "new" / "data").writable
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_report_names_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KOALA_HOME", str(tmp_path / "koala"))
    monkeypatch.setattr(doctor, "measure", lambda: doctor.Speed(1.0, 1.0, 1))
    report = doctor.examine()
    assert report.folders["data"].path == "~/koala/data"
    assert str(tmp_path) not in repr(report)
    assert report.versions["llama-cpp-python"] and report.backends


def test_a_llama_cpp_that_does_not_work_is_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> doctor.Speed:
        raise OSError("libllama.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "measure", fail)
    (found,) = [finding for finding in doctor.examine().findings if finding.broken]
    assert "libllama.so" in found.what and found.remedy


def test_the_bundled_model_is_measured() -> None:
    speed = doctor.measure(seconds=0.1)
    assert speed.prefill > speed.decode > 0 and speed.threads >= 1


def test_json_names_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.Report({}, "", "", 1, (), (), (CARD,), (), None, None, {}, None, ())
    monkeypatch.setattr(doctor, "examine", lambda: report)
    printed = json.loads(CliRunner().invoke(doctor_command.doctor, ["--json"], standalone_mode=False).stdout)
    assert printed["gpus"] == [CARD._asdict()]

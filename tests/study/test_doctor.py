"""What the doctor finds: text in every place, the versions that are there, and of what is not used the reason and the line that would change it."""

import importlib.metadata
import re
import shutil
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import homelib
from homelib.errors import UserError
from homelib.network.scan.backends import MODULES, backend, resolve
from homelib.study import doctor
from homelib.study.doctor import Finding, as_markdown, environment_line, examine

DEVICES = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_finding_is_text_in_its_section():
    found = examine()
    scans = [f"selective scan on {device}" for device in DEVICES]
    assert list(found) == ["machine", "packages", "extras", *scans, "demo data", "folders"]
    for section, findings in found.items():
        assert findings, section
        for finding in findings.values():
            assert finding.value
            assert all(isinstance(part, str) and "\n" not in part for part in finding)


def test_what_is_not_used_has_a_reason_and_a_remedy():
    for section, findings in examine().items():
        for name, finding in findings.items():
            if finding.value in ("not used", "not installed", "not in the cache", "missing", "none"):
                assert finding.reason, (section, name)
                assert finding.remedy, (section, name)


# ---------------------------------------------------------------- machine


def test_memory_is_told_and_no_more_is_free_than_there_is():
    total, free = map(float, re.fullmatch(r"([\d.]+) GiB, ([\d.]+) free", examine()["machine"]["memory"].value).groups())
    assert 0 < free <= total


def test_a_system_that_does_not_tell_its_memory_is_no_error(monkeypatch):
    monkeypatch.delattr("os.sysconf")
    assert doctor._memory() == Finding("unknown")


def test_what_is_set_for_homelib_is_told(monkeypatch):
    monkeypatch.setenv("HOMELIB_OFFLINE", "1")
    monkeypatch.setenv("UNTOLD", "secret")
    told = examine()["machine"]["environment"].value
    assert "HOMELIB_OFFLINE=1" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("cuda", "driver", "reason", "remedy"),
    [
        (None, None, "this PyTorch is built without CUDA, and no NVIDIA driver was found", "nothing, without an NVIDIA GPU"),
        (None, "/bin/nvidia-smi", "this PyTorch is built without CUDA, and there is an NVIDIA driver", "make clean env"),
        ("13.0", None, "no GPU or driver was found", "see that nvidia-smi lists a GPU"),
    ],
    ids=["CPU build", "CPU build beside a driver", "CUDA build"],
)
def test_without_a_gpu_it_says_why(monkeypatch, cuda, driver, reason, remedy):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    found = examine()["machine"]["cuda"]
    assert found[:2] == ("none", reason)
    assert found.remedy.startswith(remedy)


def test_a_gpu_is_told_with_its_memory(monkeypatch):
    """Here the GPU is only said to be there."""
    gpu = namedtuple("Gpu", "name major minor")("H100", 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 2**30, 80 * 2**30))
    machine = doctor._machine(["cuda:0"])
    assert machine["cuda:0"] == Finding("H100, 80 GiB, 70 free, compute capability 9.0")
    assert "cuda" not in machine


def test_a_gpu_by_metal_is_listed_with_what_can_be_used_on_it(monkeypatch):
    """Here the device is only said to be there: "blocked" is all that is made for it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = examine()
    assert found["machine"]["mps"] == Finding("a GPU by Metal")
    scan = found["selective scan on mps"]
    assert scan["blocked"].value.startswith("chosen by auto")
    assert scan["numba"] == Finding("not used", "needs a cpu device", "nothing: it is for CPUs")
    assert scan["causal convolution"] == Finding("PyTorch", "causal_conv1d needs a cuda device", "an NVIDIA GPU")
    assert scan["instance norm"] == Finding("PyTorch", "triton needs a cuda device", "an NVIDIA GPU")
    if not torch.cuda.is_available():
        assert "GPU by Metal, scan backend blocked" in environment_line()


# ---------------------------------------------------------------- packages


def test_versions_are_those_that_are_installed():
    packages = examine()["packages"]
    assert packages.pop("homelib").value.startswith(homelib.__version__)
    assert {name: packages[name].value for name in doctor.PACKAGES} == {name: importlib.metadata.version(name) for name in doctor.PACKAGES}


def test_the_commit_of_a_clone_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert doctor._commit() == ""
    if shutil.which("git"):
        doctor.subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
        assert doctor._commit() == "", "a clone without a commit"
        commit = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"]
        doctor.subprocess.run(commit, check=True)
        assert re.fullmatch(r" at [0-9a-f]{7,}", doctor._commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._commit() == "", "git is not there"


@pytest.mark.parametrize(
    ("needed", "finding"),
    [
        ("no-such-package>=1.2", Finding("missing", "homelib needs it", "pip install 'no-such-package>=1.2'")),
        ("torch>=99", Finding(importlib.metadata.version("torch"), "expected >=99", "pip install 'torch>=99'")),
        ("torch>=2", Finding(importlib.metadata.version("torch"))),
    ],
)
def test_a_package_that_is_missing_or_too_old_comes_with_its_remedy(needed, finding):
    assert doctor._installed(Requirement(needed)) == finding


def test_a_needed_package_is_shown_where_something_is_wrong_with_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", "tqdm>=4", "no-such-package", "other; extra == 'zoo'"])
    packages = examine()["packages"]
    assert packages["no-such-package"].remedy == "pip install 'no-such-package'"
    assert "tqdm" not in packages
    assert "other" not in packages


@pytest.mark.skipif(not PROJECT.exists(), reason="needs the clone: pyproject.toml is not installed")
def test_the_extras_are_those_of_the_project():
    assert set(doctor.EXTRAS) == set(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]) - {"slurm"}, "which adds nothing"


@pytest.mark.parametrize("clone", [True, False])
def test_an_extra_that_is_not_there_is_told_with_what_it_is_for(monkeypatch, tmp_path, clone):
    if clone:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch", "no-such-package>=2; extra == 'zoo'", "torch; extra == 'onnx'"])
    extras = examine()["extras"]
    remedy = "pip install -e '.[zoo]'" if clone else "pip install 'homelib[zoo]'"
    assert extras["zoo"] == Finding("not installed", "for network=ResEncUNet: no-such-package missing", remedy)
    assert extras["onnx"] == Finding(f"installed: torch {torch.__version__}")
    assert extras["site"].value == "unknown"


def test_homelib_that_is_not_installed_is_no_error(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert set(examine()["packages"]) == {"homelib", *doctor.PACKAGES}


# ---------------------------------------------------------------- backends


@pytest.mark.parametrize("device", DEVICES)
def test_every_scan_backend_is_chosen_or_works_or_has_a_reason(device):
    scan = examine()[f"selective scan on {device}"]
    assert list(scan) == [*MODULES, "causal convolution", "instance norm"]
    chosen = [name for name, told in scan.items() if told.value.startswith("chosen by auto")]
    assert chosen == [resolve("auto", device)]
    assert scan["reference"] == Finding("works", f"auto takes {chosen[0]} here", "--set model.scan_backend=reference")


def test_on_a_cpu_it_says_why_the_gpu_backends_are_not_used():
    scan = examine()["selective scan on cpu"]
    assert scan["mamba_ssm"].value == "not used"
    assert scan["mamba_ssm"].reason == "needs a cuda device" or scan["mamba_ssm"].reason.startswith("cannot be imported: ")
    assert scan["mamba_ssm"].remedy == "an NVIDIA GPU"
    assert scan["causal convolution"] == Finding("PyTorch", "causal_conv1d needs a cuda device", "an NVIDIA GPU")
    assert scan["instance norm"] == Finding("PyTorch", "triton needs a cuda device", "an NVIDIA GPU")


def test_the_devices_that_backends_are_made_for_are_theirs():
    for name in MODULES:
        try:
            devices = backend(name).DEVICES
        except ImportError:
            continue
        assert (devices or (None,))[0] == doctor.MADE_FOR.get(name), f"{name}; Triton's interpreter runs on a CPU too"


@pytest.mark.parametrize(
    ("name", "device", "why", "remedy"),
    [
        ("triton", "cuda:0", "cannot be imported: ModuleNotFoundError: No module named 'triton'", "pip install 'triton"),
        ("mamba_ssm", "cuda:0", "cannot be imported: ImportError: libcudart.so.12", r".*CUDA_HOME=<toolkit> .* --no-build-isolation .*\[cuda\]'$"),
        ("causal_conv1d", "cuda:1", "causal_conv1d cannot be used: ModuleNotFoundError: No module", ".*CUDA_HOME=<toolkit> "),
        ("mamba_ssm", "cuda:0", "y of a small case differs from the plain loop's by 1e-02", "send this report"),
        ("numba", "cpu", "cannot be imported: ModuleNotFoundError: No module named 'numba'", "pip install 'numba"),
    ],
)
def test_a_backend_that_should_work_comes_with_what_would_make_it(name, device, why, remedy):
    assert re.match(remedy, doctor._backend(name, device, why))


# ---------------------------------------------------------------- data and folders


def test_the_demos_scans_are_in_the_cache_or_it_says_how_they_get_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HOMELIB_CACHE", str(tmp_path))
    monkeypatch.delenv("HOMELIB_OFFLINE", raising=False)
    found = examine()["demo data"]
    assert list(found) == ["demo_ct", "demo_mr_spine"]
    assert all((told.value, told.remedy) == ("not in the cache", "home data fetch demo") for told in found.values())
    monkeypatch.setenv("HOMELIB_OFFLINE", "1")
    assert examine()["demo data"]["demo_ct"].remedy == "unset HOMELIB_OFFLINE, then home data fetch demo"
    monkeypatch.setattr(doctor, "fetch_cases", lambda manifest, **_: {"ct-a": None, "ct-c": None})
    assert examine()["demo data"]["demo_ct"] == Finding("in the cache: ct-a, ct-c")


def test_a_cache_that_cannot_be_used_is_told_and_ends_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOMELIB_CACHE", str(tmp_path / "file" / "cache"))
    found = examine()
    assert found["folders"]["cache"].remedy == "export HOMELIB_CACHE=/a/folder/of/yours"
    assert found["demo data"]["demo_ct"].value == "not in the cache"

    def broken(*_, **__):
        raise UserError("demo_ct: broken.")

    monkeypatch.setattr(doctor, "fetch_cases", broken)
    assert examine()["demo data"]["demo_ct"].reason == "demo_ct: broken."


def test_folders_are_the_ones_in_use_with_the_room_on_their_disks(monkeypatch, tmp_path):
    monkeypatch.setenv("HOMELIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOMELIB_RUNS", str(tmp_path / "not" / "yet"))
    free = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free(0, 0, 3 * 2**30))
    assert examine()["folders"] == {"cache": Finding(f"{tmp_path / 'cache'}, 3.0 GiB free"), "runs": Finding(f"{tmp_path / 'not' / 'yet'}, 3.0 GiB free")}
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free(0, 0, 2**29))
    assert examine()["folders"]["runs"][1:] == ("less than 1 GiB free", "make room there, or export HOMELIB_RUNS=/a/folder/of/yours")
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert examine()["folders"]["runs"].reason == f"{tmp_path} cannot be written to"


# ---------------------------------------------------------------- as a line, and as a block


def test_the_environment_is_one_line():
    line = environment_line()
    assert "\n" not in line
    for part in (
        homelib.__version__,
        sys.version.split()[0],
        torch.__version__,
        resolve("auto", "cuda:0" if torch.cuda.is_available() else "cpu"),
        "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(0),
    ):
        assert part in line


def test_the_report_is_a_table_in_markdown_with_every_finding():
    found = {"one": {"a": Finding("b|c", "<d>", "e")}, "two": {"f": Finding("g")}}
    lines = as_markdown(found).splitlines()
    assert lines[0] == f"<details><summary>home doctor: {environment_line()}</summary>"
    assert lines[2:8] == [
        "| | found | why | remedy |",
        "| --- | --- | --- | --- |",
        "| **one** | | | |",
        r"| a | b\|c | &lt;d> | e |",
        "| **two** | | | |",
        "| f | g |  |  |",
    ]
    assert lines[-1] == "</details>"


def test_the_report_hides_the_home_folder(monkeypatch, tmp_path):
    (tmp_path / "real" / "ann").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "real")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home" / "ann")
    text = f"{tmp_path}/home/ann, {tmp_path}/real/ann/x, {tmp_path}/home/anna/y, /scratch/ann/z, ann, /data/joann/w"
    assert doctor._without_home(text) == f"~, ~/x, {tmp_path}/home/anna/y, /scratch/~/z, ann, /data/joann/w"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert doctor._without_home("/scratch/x") == "/scratch/x"


def test_home_doctor_prints_all_of_it_and_the_report(home):
    status, out, _ = home("doctor")
    assert status == 0
    scan = examine()["selective scan on cpu"]["mamba_ssm"]
    assert f"  {'mamba_ssm':18} not used: {scan.reason}\n  {'':18} -> {scan.remedy}\n" in out
    status, out, _ = home("doctor", "--report")
    assert (status, out.startswith("<details><summary>home doctor: homelib ")) == (0, True)
    assert str(Path.home()) not in out

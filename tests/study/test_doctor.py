"""What the doctor finds: text in every place, the versions that are there, and the reason why something is not."""

import importlib.metadata
import sys

import pytest
import torch

import homelib
from homelib.network.scan.backends import MODULES, resolve
from homelib.study import doctor
from homelib.study.doctor import environment_line, examine

DEVICES = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]


def test_every_finding_is_text_in_its_section():
    found = examine()
    assert list(found) == ["machine", "packages", *(f"selective scan on {device}" for device in DEVICES), "folders"]
    for section, findings in found.items():
        assert findings, section
        assert all(isinstance(told, str) and told and "\n" not in told for told in findings.values()), section


def test_versions_are_those_that_are_installed():
    packages = examine()["packages"]
    assert packages.pop("homelib") == homelib.__version__
    assert packages == {name: importlib.metadata.version(name) for name in doctor.PACKAGES}


def test_a_missing_package_comes_with_its_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert examine()["packages"]["no-such-package"] == "missing: pip install no-such-package"


@pytest.mark.parametrize("device", DEVICES)
def test_every_scan_backend_is_chosen_or_works_or_has_a_reason(device):
    scan = examine()[f"selective scan on {device}"]
    assert list(scan) == [*MODULES, "causal convolution"]
    assert [name for name, told in scan.items() if told.startswith("chosen by auto")] == [resolve("auto", device)]
    assert scan["reference"] == "works"


def test_on_a_cpu_it_says_why_the_gpu_backends_are_not_used():
    scan = examine()["selective scan on cpu"]
    assert scan["mamba_ssm"] == "needs a cuda device" or scan["mamba_ssm"].startswith("cannot be imported: ")
    assert scan["causal convolution"] == "PyTorch (causal_conv1d needs a cuda device)"


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["CPU build", "CUDA build"])
def test_without_a_gpu_it_says_why(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert examine()["machine"]["cuda"] == {None: "none: this PyTorch is built without CUDA", "13.0": "none: no GPU or driver was found"}[cuda]


def test_a_gpu_by_metal_is_listed_with_what_can_be_used_on_it(monkeypatch):
    """Here the device is only said to be there: "blocked" is all that is made for it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = examine()
    assert found["machine"]["mps"] == "a GPU by Metal"
    scan = found["selective scan on mps"]
    assert scan["blocked"].startswith("chosen by auto")
    assert scan["numba"] == "needs a cpu device"
    assert scan["causal convolution"] == "PyTorch (causal_conv1d needs a cuda device)"
    if not torch.cuda.is_available():
        assert "GPU by Metal, scan backend blocked" in environment_line()


def test_folders_are_the_ones_in_use(monkeypatch, tmp_path):
    monkeypatch.setenv("HOMELIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOMELIB_RUNS", str(tmp_path / "runs"))
    assert examine()["folders"] == {"cache": str(tmp_path / "cache"), "runs": str(tmp_path / "runs")}


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

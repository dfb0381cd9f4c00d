"""What the doctor finds: text in every place, the versions that are there, and the reason why something is not."""

import importlib.metadata
import sys

import pytest
import torch

import homelib
from homelib.network.scan import BACKENDS, resolve
from homelib.study import doctor
from homelib.study.doctor import environment_line, examine


def test_every_finding_is_text_in_its_section():
    found = examine()
    assert list(found) == ["machine", "packages", "selective scan", "optional", "folders"]
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


def test_the_scan_backend_is_named():
    scan = examine()["selective scan"]
    assert scan["auto means"] == resolve("auto") in BACKENDS
    assert scan["backends"].split(", ") == list(BACKENDS)


def test_an_optional_part_says_what_for_and_why_it_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "broken_kernels.py").write_text('raise RuntimeError("undefined symbol: cudaFoo\\nand more")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "OPTIONAL", {"broken_kernels": "kernels", "no_such_module": "other kernels", "json": "text"})
    told = examine()["optional"]
    assert told["broken_kernels"].startswith("not importable: RuntimeError: undefined symbol: cudaFoo (kernels;")
    assert told["no_such_module"].startswith("not importable: ModuleNotFoundError: No module named 'no_such_module' (other kernels;")
    assert told["json"].startswith("imports (text;")


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["CPU build", "CUDA build"])
def test_without_a_gpu_it_says_why(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert examine()["machine"]["cuda"] == {None: "none: this PyTorch is built without CUDA", "13.0": "none: no GPU or driver was found"}[cuda]


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
        resolve("auto"),
        "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(0),
    ):
        assert part in line

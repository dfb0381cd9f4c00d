"""The files that install homelib agree with each other, and `make` installs once, fully, and only into its own .venv."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"torch": "pytorch", "blosc2": "python-blosc2"}  # pip name -> conda-forge name, where they differ
USERS_PACKAGES = {"torch", "mamba-ssm", "causal-conv1d", "jupyterlab", "matplotlib", "ipywidgets", "monai", "pandas", "papermill"}
NEEDS_CUDA = {"mamba-ssm", "causal-conv1d"}

EXTRAS = {"cuda", "dev", "bench", "slurm", "site", "onnx", "voila", "zoo", "tensorboard"}
LOCKED = sorted(EXTRAS - {"cuda"})  # cuda builds beside a GPU alone

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = (ROOT / "environment.yml").read_text()
CONSTRAINTS = (ROOT / "constraints-cpu.txt").read_text()


def requirements(*extras: str) -> dict[str, Requirement]:
    """The default requirements of pyproject.toml and those of `extras`, by canonical name."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def conda_bounds(text: str) -> dict[str, SpecifierSet]:
    """Package -> bounds of the conda lines of an environment file, each read by conda's own rules."""
    rattler = pytest.importorskip("rattler", reason='needs py-rattler: pip install -e ".[dev]"')
    specs = [rattler.MatchSpec(line) for line in yaml.safe_load(text)["dependencies"] if isinstance(line, str)]
    names = [spec.name.normalized for spec in specs]
    assert len(names) == len(set(names)), f"listed twice: {sorted(n for n in names if names.count(n) > 1)}"
    return {name: SpecifierSet(spec.version or "") for name, spec in zip(names, specs, strict=True)}


def pip_lines(text: str) -> list[str]:
    return next(line["pip"] for line in yaml.safe_load(text)["dependencies"] if isinstance(line, dict))


def pip_bounds(text: str) -> dict[str, SpecifierSet]:
    """Package -> bounds of the pip section, without the editable install of homelib itself."""
    found = [Requirement(line) for line in pip_lines(text) if not line.startswith("-e ")]
    return {canonicalize_name(r.name): r.specifier for r in found}


def uncommented(text: str) -> str:
    """The environment file as it reads with the CUDA lines switched on."""
    return re.sub(r"^  # - (?=\S+$)", "  - ", text, flags=re.MULTILINE)


# --- environment.yml ---------------------------------------------------------------------------------------------------


def test_environment_yml_has_every_default_dependency_with_the_same_bounds():
    parsed = yaml.safe_load(ENVIRONMENT)
    assert parsed["name"] == "homelib"
    assert parsed["channels"] == ["conda-forge"]
    listed = conda_bounds(ENVIRONMENT)
    assert listed.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert "pip" in listed, "conda warns unless pip itself is listed beside a pip section"
    del listed["pip"]
    by_pip = pip_bounds(ENVIRONMENT)
    assert not listed.keys() & by_pip.keys()
    expected = {CONDA_NAMES.get(name, name): r.specifier for name, r in requirements().items()}
    assert listed | by_pip == expected


def test_environment_yml_installs_homelib_with_its_test_tools():
    assert [line for line in pip_lines(ENVIRONMENT) if line.startswith("-e ")] == ["-e .[dev]"]
    assert "dev" in PROJECT["optional-dependencies"]


def test_the_users_packages_are_there_and_only_the_cuda_kernels_are_commented_out():
    active = conda_bounds(ENVIRONMENT)
    full = conda_bounds(uncommented(ENVIRONMENT))
    names = {CONDA_NAMES.get(name, name) for name in USERS_PACKAGES}
    assert names <= full.keys()
    assert full.keys() - active.keys() == NEEDS_CUDA
    cuda = requirements("cuda")
    assert {name: full[name] for name in NEEDS_CUDA} == {name: cuda[name].specifier for name in NEEDS_CUDA}


def test_the_extras_are_there_and_a_package_has_one_bound_wherever_it_stands():
    assert set(PROJECT["optional-dependencies"]) == EXTRAS
    everywhere = PROJECT["dependencies"] + [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    bounds: dict[str, SpecifierSet] = {}
    for r in map(Requirement, everywhere):
        assert bounds.setdefault(canonicalize_name(r.name), r.specifier) == r.specifier, f"{r.name} has two bounds"


def test_a_cluster_needs_nothing_more_than_the_defaults():
    """submitit runs a grid on one machine too, so it is a default; the extra is a name for who looks for it."""
    defaults = requirements()
    assert {name: defaults[name].specifier for name in requirements("slurm")} == {name: r.specifier for name, r in requirements("slurm").items()}


def test_cuda_kernels_are_in_neither_the_default_nor_the_test_set():
    assert not NEEDS_CUDA & requirements("dev").keys()


# --- constraints-cpu.txt -----------------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    lines = [Requirement(line) for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    found: dict[str, Version] = {}
    for r in lines:
        (clause,) = r.specifier
        assert clause.operator == "==", f"{r} is not a pin"
        assert r.url is None, f"{r} names an address"
        assert canonicalize_name(r.name) not in found, f"{r.name} is pinned twice"
        found[canonicalize_name(r.name)] = Version(clause.version)
    return found


def test_constraints_satisfy_every_requirement():
    pinned = pins()
    for name, r in requirements(*LOCKED).items():
        if name == "triton":  # PyTorch's CUDA build names its own
            continue
        assert name in pinned, f"{name} is not in constraints-cpu.txt: bash scripts/make_lock.sh"
        assert r.specifier.contains(pinned[name]), f"{name}=={pinned[name]} does not satisfy {r}"


def test_constraints_pin_what_the_requirements_require_too():
    """Followed through the packages that are installed here; of an extra that is not, no farther than its own lines."""
    pinned, seen, to_do = pins(), set(), [(r, ()) for r in requirements(*LOCKED).values()]
    while to_do:
        requirement, extras = to_do.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or ("",)):
            continue
        name, wanted = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if (name, wanted) in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add((name, wanted))
        assert name in pinned, f"{name} is required and not in constraints-cpu.txt: bash scripts/make_lock.sh"
        try:
            further = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        to_do += [(Requirement(line), wanted) for line in further]
    assert len(seen) > 150


def test_the_lock_is_made_of_every_extra_but_cuda():
    script = (ROOT / "scripts/make_lock.sh").read_text()
    (listed,) = re.findall(r"^extras=\((.*)\)$", script, re.MULTILINE)
    assert set(listed.split()) == set(LOCKED)
    (torch,) = re.findall(r"^torch=(\S+)", script, re.MULTILINE)
    assert pins()["torch"] == Version(torch)
    assert CONSTRAINTS.splitlines()[0].endswith("bash scripts/make_lock.sh")


def test_constraints_leave_the_torch_build_to_the_machine():
    pinned = pins()
    assert pinned["torch"].local is None, "a build tag such as +cpu would keep a GPU machine from its CUDA build"
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-", "triton"))]


@pytest.mark.long
@pytest.mark.network
@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_pins_are_what_another_python_would_get(python):
    """Resolved and not installed; a wheel's metadata is all that is fetched. The Python of this environment has the pins already."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [uv, "pip", "compile", "pyproject.toml", "--extra", "dev", "-c", "constraints-cpu.txt", "--no-header", "--no-annotate"]
    done = subprocess.run([*command, "--python-version", python], cwd=ROOT, capture_output=True, text=True, timeout=280)
    if done.returncode and "No solution found" not in done.stderr:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = {canonicalize_name(r.name): r.specifier for r in map(Requirement, done.stdout.splitlines())}
    pinned = pins()
    assert requirements("dev").keys() <= found.keys()
    strangers = {name for name in found if name not in pinned and not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert strangers == set()
    assert {name: spec for name, spec in found.items() if name in pinned and not spec.contains(pinned[name])} == {}


SCRIPTS = ["Makefile", "scripts/make_env.sh", "scripts/make_lock.sh", "scripts/make_peers.sh", "scripts/make_wheels.sh", ".ci/run"]
SET_UP = ["pyproject.toml", "environment.yml", "constraints-cpu.txt", *SCRIPTS]


@pytest.mark.parametrize("name", SET_UP)
def test_no_registry_host_or_path_of_one_machine(name):
    text = (ROOT / name).read_text()
    assert not re.findall(r"\w+://\S*|\b[\w.-]+\.(?:org|com|io|net)\b|--(?:extra-)?index-url", text)
    assert not re.findall(r"(?<![\w.}$/])/(?:home|root|opt|work|tmp|Users)/\S*", text)


# --- make --------------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def clone(tmp_path):
    """A copy of the files that `make` works with, and nothing installed."""
    folder = tmp_path.resolve() / "clone"
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt", "scripts/make_env.sh"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k not in ("PYTHON", "PROFILE", "ARGS")}
    return subprocess.run(["make", *arguments], cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=60)


def install(folder: Path, installed_for: Path | None = None) -> Path:
    """What a finished installation leaves behind, newer than every file that it depends on."""
    ready = folder / ".venv/.homelib-ready"
    ready.parent.mkdir(exist_ok=True)
    ready.write_text(f"{installed_for or folder}\n")
    later = max(f.stat().st_mtime for f in folder.iterdir()) + 10
    os.utime(ready, (later, later))
    return ready


def fake_python(folder: Path, version: str = "3.12", pip_exit_status: int = 0) -> str:
    """An interpreter of the given version whose `-m venv` copies itself and whose pip only says how it was called."""
    script = folder / "fake-python"
    script.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        f'  *version_info*) exec {shutil.which("python3")} -c "import sys; sys.version_info = ({version.replace(".", ", ")}, 0)\n$2" ;;\n'
        "  *ensurepip*) ;;\n"
        f"  -V) echo 'Python {version}.0' ;;\n"
        f"  '-m venv .venv') mkdir -p .venv/bin; cp {script} .venv/bin/python; cp {script} .venv/bin/uv ;;\n"
        f'  *pip*) echo "installer called: $*"; exit {pip_exit_status} ;;\n'
        "esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@needs_make
def test_make_alone_lists_every_target():
    result = make(ROOT)
    assert result.returncode == 0
    listed = re.findall(r"^make ([\w-]+) +\S.*$", result.stdout, flags=re.MULTILINE)
    (targets,) = re.findall(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets.split())
    assert {"env", "demo", "test", "lab", "clean"} <= set(listed)
    assert make(ROOT, "help").stdout == result.stdout


@needs_make
@pytest.mark.parametrize(("target", "runs"), [("demo", ".venv/bin/home demo --profile laptop"), ("test", ".venv/bin/python -m pytest"), ("env", "")])
def test_make_installs_nothing_once_the_environment_is_there(clone, target, runs):
    assert "make_env.sh" in make(clone, "-n", target).stdout
    install(clone)
    result = make(clone, "-n", target)
    assert result.returncode == 0
    assert "make_env.sh" not in result.stdout
    assert runs in result.stdout


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints-cpu.txt"])
def test_make_installs_again_when_the_dependencies_change(clone, name):
    later = install(clone).stat().st_mtime + 10
    os.utime(clone / name, (later, later))
    assert "make_env.sh" in make(clone, "-n", "demo").stdout


@needs_make
def test_make_installs_again_in_a_clone_that_was_moved(clone):
    install(clone, installed_for=clone.parent / "old place")
    assert "make_env.sh" in make(clone, "-n", "demo").stdout


@needs_make
def test_make_env_refuses_another_python_in_one_line(clone):
    result = make(clone, "env", PYTHON=fake_python(clone, version="3.10"))
    assert result.returncode != 0
    message = [line for line in result.stderr.splitlines() if line.startswith("make env:")]
    assert len(message) == 1
    for word in ("Python 3.10.0", "3.11 to 3.13", "make env PYTHON="):
        assert word in message[0]
    assert not (clone / ".venv").exists()


@needs_make
def test_make_env_leaves_an_environment_alone_that_it_did_not_make(clone):
    mine = clone / ".venv/bin/mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    result = make(clone, "env", PYTHON=fake_python(clone))
    assert result.returncode != 0
    assert "make clean" in result.stderr
    assert mine.exists()


@needs_make
def test_an_interrupted_installation_is_redone_from_nothing(clone):
    failed = make(clone, "env", PYTHON=fake_python(clone, pip_exit_status=1))
    assert failed.returncode != 0
    assert not (clone / ".venv/.homelib-ready").exists()
    leftover = clone / ".venv/half of a package"
    leftover.touch()
    done = make(clone, "env", PYTHON=fake_python(clone))
    assert done.returncode == 0, done.stderr
    assert not leftover.exists()
    assert (clone / ".venv/.homelib-ready").read_text().strip() == str(clone)
    assert "installer called" not in make(clone, "env").stdout
    later = (clone / ".venv/.homelib-ready").stat().st_mtime + 10
    os.utime(clone / "pyproject.toml", (later, later))
    (clone / ".venv/bin/uv").unlink()
    (clone / ".venv/bin/python").write_text(Path(fake_python(clone, pip_exit_status=1)).read_text())
    assert make(clone, "env").returncode != 0
    assert not (clone / ".venv/.homelib-ready").exists(), "a failed update was taken for a finished installation"


@needs_make
def test_without_uv_pip_installs_the_pinned_torch_first(clone):
    python = fake_python(clone)
    text = Path(python).read_text().replace("  *pip*)", "  *quiet*uv*) exit 1 ;;\n  *pip*)")  # no uv to be had
    Path(python).write_text(text)
    result = make(clone, "env", PYTHON=python)
    assert result.returncode == 0, result.stderr
    calls = [line for line in result.stdout.splitlines() if line.startswith("installer called")]
    assert len(calls) == 2
    assert calls[0].endswith(f"-c constraints-cpu.txt torch=={pins()['torch']}")
    assert calls[1].endswith("-c constraints-cpu.txt -e .[dev]")


@needs_make
@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_torch_build_follows_the_machine(clone, has_gpu):
    wheels = clone / "wheels"
    wheels.mkdir()
    programs = clone / "programs"
    programs.mkdir()
    nvidia_smi = programs / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\nexit {0 if has_gpu else 1}\n")
    nvidia_smi.chmod(0o755)
    surroundings = {"PYTHON": fake_python(clone), "PATH": f"{programs}:{os.environ['PATH']}", "PIP_FIND_LINKS": f"{wheels} {clone}/missing"}

    def installer_call() -> str:
        shutil.rmtree(clone / ".venv", ignore_errors=True)
        result = make(clone, "env", **surroundings)
        assert result.returncode == 0, result.stderr
        return next(line for line in result.stdout.splitlines() if "--compile-bytecode" in line)

    call = installer_call()
    assert f"--torch-backend {'auto' if has_gpu else 'cpu'}" in call
    assert "missing" not in call
    assert (f"--find-links {wheels}" in call) is not has_gpu
    (wheels / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    call = installer_call()
    assert ("--torch-backend" in call) is has_gpu
    assert (f"--find-links {wheels}" in call) is not has_gpu
    surroundings["UV_TORCH_BACKEND"] = "cu130"  # an image for a GPU, built where there may be none
    call = installer_call()
    assert "--torch-backend cu130" in call
    assert "--find-links" not in call


@needs_make
def test_make_passes_the_exit_status_on_and_prints_the_time(clone):
    install(clone)
    home = clone / ".venv/bin/home"
    home.parent.mkdir()
    for status in (0, 3):
        home.write_text(f"#!/bin/sh\nexit {status}\n")
        home.chmod(0o755)
        result = make(clone, "demo")
        assert (result.returncode == 0) is (status == 0)
        assert re.search(rf"exit status {status} after \d+ min \d+ s in all", result.stdout)


@needs_make
def test_make_clean_keeps_the_users_runs(clone):
    for name in ("runs/mine", "runs/demo", ".venv", "homelib/__pycache__", "runs/mine/__pycache__"):
        (clone / name).mkdir(parents=True)
    assert make(clone, "clean").returncode == 0
    left = {str(p.relative_to(clone)) for p in clone.rglob("*") if p.is_dir()}
    assert left == {"scripts", "runs", "runs/mine", "runs/mine/__pycache__", "homelib"}

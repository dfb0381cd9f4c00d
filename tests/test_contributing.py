"""CONTRIBUTING.md: its worked examples work, on a copy of the package that they change; and the files that a contributor meets agree with each other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {"A network": "AttentionUNet", "A data set": "liver_of_ours", "An ablation arm": "depth-deep", "A notebook": "08_memory"}

# Runs in the copy: every block of the examples in turn, in one process, for each would import PyTorch anew.
DRIVER = """
import json, shlex, sys
steps = json.load(open("steps.json"))
names = {}
import pytest
import homelib.data.parallel
from homelib import cli
homelib.data.parallel.default_workers = lambda: 1
for kind, text in steps:
    print("#", text.splitlines()[0], flush=True)
    if kind == "python":
        exec(compile(text, "CONTRIBUTING.md", "exec"), names)
        continue
    program, *arguments = shlex.split(text)
    if program == "home":
        sys.argv = ["home", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, f"{text}: exit status {end.code}"
    else:
        assert [program, *arguments[:2]] == ["python", "-m", "pytest"], text
        assert pytest.main([*arguments[2:], "-p", "no:cacheprovider"]) == 0, text
print("all of them")
"""


def sections() -> dict[str, list[tuple[str, str]]]:
    """Title -> (info string, text) of its fenced blocks."""
    parts = re.split(r"^## (?!Exercise$)(.*)$", TEXT, flags=re.MULTILINE)  # which is a cell's, inside a block
    return {title: BLOCK.findall(body) for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def titled(info: str) -> str:
    return re.search(r'title="(.*)"', info).group(1)


def patch(file: Path, text: str) -> None:
    """Apply the hunks of a diff block, each found once in the file by its own lines, wherever that is."""
    content = file.read_text()
    for hunk in re.split(r"^@@\n", text, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-\n" for line in lines), hunk
        before, after = ("".join(line[1:] or "\n" for line in lines if line[0] in kinds) for kinds in (" -\n", " +\n"))
        assert content.count(before) == 1, f"{file.name} has {content.count(before)} places like this one:\n{before}"
        content = content.replace(before, after)
    file.write_text(content)


def cell(info: str, text: str):
    text = text.rstrip("\n")
    if info.startswith("markdown"):
        return new_markdown_cell(text)
    return new_code_cell(text, metadata={"tags": ["parameters"]} if "parameters" in info else {})


@pytest.mark.timeout(900)  # it imports PyTorch once more, on a machine that may be busy
def test_every_worked_example_does_what_it_says(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("homelib", "notebooks", "data_manifests", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    steps: list[tuple[str, str]] = []
    for title in SECTIONS:
        cells = []
        for info, text in sections()[title]:
            if info.startswith("diff "):
                patch(copy / titled(info), text)
            elif info.startswith("yaml "):
                assert not (copy / titled(info)).exists()
                (copy / titled(info)).write_text(text)
            elif " cell" in info:
                cells.append(cell(info, text))
            else:
                steps += [("python", text)] if info == "python" else [("command", line) for line in text.splitlines()]
        if cells:
            python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            nbformat.write(new_notebook(cells=cells, metadata=python), copy / "notebooks" / f"{SECTIONS[title]}.ipynb")
            steps.append(("python", "\n".join(cell.source for cell in cells if cell.cell_type == "code")))
    (copy / "steps.json").write_text(json.dumps(steps))
    surroundings = os.environ | {"PYTHONPATH": str(copy), "HOMELIB_CACHE": str(tmp_path / "cache"), "HOMELIB_RUNS": str(tmp_path / "runs"), "COLUMNS": "200"}
    surroundings = {name: value for name, value in surroundings.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=copy, env=surroundings, capture_output=True, text=True, timeout=800, check=False)
    told = done.stdout + done.stderr
    print(told)
    assert done.returncode == 0, told[-4000:]
    assert done.stdout.endswith("all of them\n")
    passed = [int(number) for number in re.findall(r"(\d+) passed", told)]
    assert len(passed) == sum(text.startswith("python -m pytest") for _, text in steps)
    assert "skipped" not in told, told[-4000:]
    for words in ("scans: 2 cases, ", "depth-deep_seed0", "state-8_seed0", "at the token itself"):
        assert words in told, (words, told[-4000:])


def test_each_example_is_there_and_ends_in_a_command_of_its_own():
    for title, name in SECTIONS.items():
        blocks = sections()[title]
        assert any(name in text or name in info for info, text in blocks), title
        assert any(info == "" and text.startswith(("python -m pytest", "home")) for info, text in blocks), title


def test_the_map_names_what_is_there():
    for place in re.findall(r"^\| `([\w/.*]+)` \|", TEXT, re.MULTILINE):
        assert list(ROOT.glob(place)), place
    folders = {path.name for path in (ROOT / "homelib").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(re.findall(r"^\| `homelib/(\w+)/` \|", TEXT, re.MULTILINE))


def test_the_docs_that_it_points_to_are_there():
    for path in ("CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([\w/.]+)\)", (ROOT / path).read_text()):
            assert (ROOT / link).exists(), f"{path}: {link}"


# ---------------------------------------------------------------- pre-commit and the issue forms


def test_the_hooks_have_the_versions_of_the_lock_and_need_no_other_place():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    lock = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff", "nbstripout"}
    for name, hook in hooks.items():
        (pinned,) = hook["additional_dependencies"]
        assert pinned in lock, f"{pinned} is not in constraints-cpu.txt"
        assert hook["language"] == "python"
        assert hook["entry"].split()[0] == name
    assert "--keep-id" in hooks["nbstripout"]["entry"].split(), "else every commit numbers the cells anew"

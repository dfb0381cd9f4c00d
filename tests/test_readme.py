"""What the README says to type: commands and options that exist, targets that make knows, Python that runs, pages and pictures that are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from homelib.cli import app
from homelib.study.executing import parameters_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the clone: README.md is not installed")
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.M | re.S)
LINES = [line.split("#")[0].strip() for language, block in BLOCKS if language != "python" for line in block.splitlines()]
INLINE = re.findall(r"`((?:home|make|papermill) [^`]*)`", TEXT)
COMMANDS = sorted({line for line in [*LINES, *(line for line in INLINE if len(line.split()) > 2)] if line.startswith("home ")})
TARGETS = sorted({word for line in [*LINES, *INLINE] if line.startswith("make ") for word in re.findall(r"^make ([a-z-]+)", line)})


def parsed(line: str) -> None:
    """Its words taken by the command line as they would be, but for what the command then does."""
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while known := getattr(command, "commands", None):
        assert words, f"{line}: ends with a group of commands"
        assert words[0] in known, f"{line}: no command {words[0]!r}"
        command, words = known[words[0]], words[1:]
    command.make_context(line, words)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists_with_its_options(line):
    parsed(line)


def test_a_command_that_does_not_exist_is_seen():
    for line in ("home dctor", "home train x --no-such-option", "home data"):
        with pytest.raises(Exception, match=r"no command|No such option|ends with a group"):
            parsed(line)


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target):
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_runs(block):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("line", [line for line in [*LINES, *INLINE] if line.startswith("papermill ")])
def test_papermill_is_given_what_the_notebook_knows(line):
    words = shlex.split(line)
    assert set(words[index + 1] for index, word in enumerate(words) if word == "-p") <= set(parameters_of(ROOT / words[1]))


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_a_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def mapped() -> set[str]:
    """Modules that the map of the house names, by their paths below homelib: a line is `WING/  what it is about: name, name; more about it: name`."""
    text = next(block for _, block in BLOCKS if "\nhomelib/\n" in block).partition("\nhomelib/\n")[2]
    wing, names = "", set()
    for line in text.splitlines():
        wing = found[1] if (found := re.match(r"  (\S+/) ", line)) else wing
        for part in line.split(";"):
            names |= {f"{wing}{name.strip()}.py" for name in part.partition(": ")[2].split(",") if name.strip()}
    return names


def test_the_map_names_every_module_and_none_that_there_is_not():
    package = ROOT / "homelib"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert mapped() == there


def test_there_is_something_to_test():
    assert len(COMMANDS) > 10
    assert {"demo", "test", "lab"} <= set(TARGETS)

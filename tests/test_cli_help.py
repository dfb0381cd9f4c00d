"""Help that keeps its word: every example is understood and names what is there, every default is the setting's; and what the shell completes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

from homelib import cli_complete
from homelib.cli import app, parse_changes
from homelib.config import PRESETS, Settings, field_names, override, preset, values
from homelib.data.manifest import list_manifests
from homelib.study.grids import list_grids

ROOT = Path(__file__).resolve().parent.parent


def walk(command=None, words=("home",)):
    """(its words, the command) of `home` and all below it."""
    command = command or typer.main.get_command(app)
    yield " ".join(words), command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*words, name))


ALL = dict(walk())
COMMANDS = {words: command for words, command in ALL.items() if not hasattr(command, "commands")}


def examples(command) -> list[str]:
    lines = Text.from_markup(command.epilog or "").plain.splitlines()
    assert lines[:1] == ["Examples"]
    return lines[1:]


EXAMPLES = [(words, line) for words, command in ALL.items() for line in (examples(command) if command.epilog else [])]


def understood(line: str) -> tuple[str, dict]:
    """The command that an example calls, and its parameters: parsed by the command line itself, of which nothing is then done."""
    program, *words = shlex.split(line, comments=True)
    assert program == "home"
    told, command = "home", typer.main.get_command(app)
    context = command.make_context("home", words)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        told, context = f"{told} {name}", command.make_context(name, words, parent=context)
    return told, context.params


@pytest.mark.parametrize("words", ALL)
def test_every_command_has_examples(words):
    assert examples(ALL[words])


@pytest.mark.parametrize(("words", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_is_understood_and_names_what_is_there(words, line):
    told, given = understood(line)
    assert told.startswith(words), "it is an example of this command, or of one below it"
    if "set" in given:
        override(preset(given["profile"] or "paper"), parse_changes(given["set"]))
    if given.get("profile"):
        preset(given["profile"])
    if told.startswith("home data") and (name := given.get("name", "demo")) not in ("demo", "mine.yaml"):
        assert name in list_manifests()
    for name in given["data"] if isinstance(given.get("data"), list) else filter(None, [given.get("data")]):
        assert name in list_manifests()
    if told.startswith("home ablate"):
        assert given["grid"] in list_grids()
    if told == "home settings":
        assert all(any(name.startswith(beginning) for name in field_names(Settings)) for beginning in given["beginnings"])
    if paper := given.get("paper"):
        assert paper in cli_complete.paper_tables()


def test_an_example_that_is_wrong_is_seen():
    for line in ("home train runs/x --profil smoke", "home data chek a b", "home predict"):
        with pytest.raises((typer.Exit, SystemExit, typer.BadParameter.__base__)):
            understood(line)


@pytest.mark.parametrize("words", ALL)
def test_a_default_in_a_help_is_the_settings(words, home):
    raw = " ".join(parameter.help or "" for parameter in ALL[words].params)
    named = re.findall(r"\{([a-z_]+\.[a-z_.]+)\}", raw)
    status, out, _ = home(*words.split()[1:], "--help")
    assert status == 0
    flat = re.sub(r"[\s│]+", " ", out)
    for name in named:
        assert f"{name} ({values(Settings())[name]} unless set)" in flat
    assert not re.search(r"\{[a-z_]+\.", out), "a setting that does not exist would stand there as it is, or end the help"


def test_there_are_defaults_of_settings():
    raw = " ".join(parameter.help or "" for parameter in ALL["home predict"].params)
    assert {"prediction.mirror", "prediction.one_piece"} <= set(re.findall(r"\{(.*?)\}", raw))


# ---------------------------------------------------------------- home settings


@pytest.mark.parametrize("profile", PRESETS)
def test_every_setting_is_shown_as_set_would_take_it(home, profile):
    status, out, _ = home("settings", "--profile", profile)
    assert status == 0
    shown = {line.split()[0]: line for line in out.splitlines()}
    assert list(shown) == field_names(Settings)
    known = values(preset(profile))
    assert all(line.split(maxsplit=1)[1].startswith(known[name] or " ") for name, line in shown.items())
    taken = override(Settings(), parse_changes([f"{name}={value}" for name, value in known.items()]))
    assert taken == preset(profile)


def test_settings_are_chosen_by_the_beginning_of_their_names(home, mistake):
    _, out, _ = home("settings", "training.augment", "network")
    names = [line.split()[0] for line in out.splitlines()]
    assert names == [name for name in field_names(Settings) if name.startswith("training.augment.") or name == "network"]
    assert mistake("settings", "training.step") == "training.step: no such field; did you mean training.steps?"


# ---------------------------------------------------------------- completion


@pytest.fixture
def completed(monkeypatch, home):
    """What the shell is offered for the last word of a line."""

    def call(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_HOME_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        status, out, err = home()
        assert (status, err) == (0, "")
        return out.split()

    return call


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("home da", ["data"]),
        ("home data pre", ["prepare"]),
        ("home train runs/x --prof", ["--profile"]),
        ("home demo --profile l", ["laptop"]),
        ("home --debug data show amos_", ["amos_ct", "amos_joint", "amos_mri"]),
        ("home data fetch dem", ["demo", "demo_ct", "demo_mr_spine", "demo_us_phantom"]),
        ("home train x --data mvs", ["mvseg_2023"]),
        ("home ablate run lap", ["laptop-groups-by-experts", "laptop-tables"]),
        ("home demo --only 03", ["03_training"]),
        ("home tables --paper T5", ["T5"]),
        ("home export x --to b", ["bundle"]),
        ("home train x --set training.warm", ["training.warmup_steps="]),
        ("home train x --set network=Swin", ["network=SwinUNETR", "network=SwinUNETR-V1"]),
        ("home train x --set prediction.mirror=", ["prediction.mirror=true", "prediction.mirror=false"]),
        ("home evaluate x --convention n", ["nnunet"]),
    ],
)
def test_names_are_completed(completed, line, expected):
    assert completed(line) == expected


def test_runs_and_grids_that_were_begun_are_completed(completed, monkeypatch, tmp_path):
    monkeypatch.setenv("HOMELIB_RUNS", str(tmp_path))
    for run in ("mine", "cv/fold-0", "ablations/parts/full_seed0"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "settings.json").touch()
    (tmp_path / "no-run").mkdir()
    (tmp_path / "ablations" / "parts" / "plan.json").touch()
    assert completed(f"home evaluate {tmp_path}/") == [str(tmp_path / run) for run in ("ablations/parts/full_seed0", "cv/fold-0", "mine")]
    assert completed("home ablate status ") == ["parts"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(home, monkeypatch, shell):
    monkeypatch.setenv("_HOME_COMPLETE", f"source_{shell}")
    status, out, _ = home()
    assert status == 0
    assert "_HOME_COMPLETE=complete_" in out


def test_the_help_says_how_completion_is_installed(home):
    assert "--install-completion" in home("--help")[1]


def test_completion_waits_for_neither_pytorch_nor_pandas():
    code = (
        "import atexit, os, sys; from homelib.cli import main; sys.argv = ['home']\n"
        "os.environ |= {'_HOME_COMPLETE': 'complete_bash', 'COMP_WORDS': 'home train x --set network=U', 'COMP_CWORD': '4'}\n"
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'monai', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules))))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[:2] == ["network=UNet", "network=UNETR"], done.stderr
    assert "heavy: []" in done.stdout


def test_the_conventions_are_those_that_there_are():
    from homelib.run.conventions import CONVENTIONS

    assert cli_complete.CONVENTIONS == (*CONVENTIONS, "paper")

"""How `home` ends: one line and an exit status for a mistake, for a fault and for Ctrl-C; the traceback for who asks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAITS = """
import sys, time
import homelib.data.manifest
from homelib import cli
homelib.data.manifest.list_manifests = lambda: print("begun", flush=True) or time.sleep(60)
sys.argv = ["home", "data", "list", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture
def faulty(monkeypatch):
    """`home data list` meets a fault of ours."""

    def fails():
        raise ValueError("found [this]\n  and that.")

    monkeypatch.setattr("homelib.data.manifest.list_manifests", fails)


def test_a_fault_of_ours_is_one_line_with_what_to_do(home, faulty):
    status, out, err = home("data", "list")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"home: ValueError: found \[this\] and that\. [^\n]*--debug[^\n]*home doctor --report[^\n]*\n", err)


def test_an_error_without_words_is_told_by_its_kind(home, monkeypatch):
    def fails():
        raise MemoryError

    monkeypatch.setattr("homelib.data.manifest.list_manifests", fails)
    status, _, err = home("data", "list")
    assert (status, err.startswith("home: MemoryError. This is a fault")) == (1, True)


@pytest.mark.parametrize("arguments", [["--debug", "data", "list"], ["data", "--debug", "list"], ["data", "list", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback_wherever_it_stands(home, faulty, arguments):
    status, _, err = home(*arguments)
    assert status == 1
    assert err.startswith("Traceback")
    assert "in fails" in err
    assert err.splitlines()[-1].startswith("home: ValueError: found [this] and that.")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), (None, False)])
def test_debug_may_be_set_in_the_environment(home, faulty, monkeypatch, value, shown):
    monkeypatch.delenv("HOMELIB_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("HOMELIB_DEBUG", value)
    status, _, err = home("data", "list")
    assert (status, "Traceback" in err) == (1, shown)


def test_debug_leaves_the_status_of_a_mistake_as_it_is(home):
    status, _, err = home("data", "show", "demo_cd", "--debug")
    assert status == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("home: data set 'demo_cd' is unknown; nearest: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'.*\\? See home --help."),
        (["data", "chek"], "No such command 'chek'. Did you mean 'check'.*\\? See home data --help."),
        (["train"], "Missing argument .*. See home train --help."),
        (["--verbose"], "No such option: --verbose. See home --help."),
        (["data", "check", "amos_ct", ".", "--workers", "none"], "Invalid value for '--workers': .* See home data check --help."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_are_none_are_one_line_that_says_where_the_help_is(mistake, arguments, line):
    assert re.fullmatch(line, mistake(*arguments))


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c_is_one_line_and_130(debug):
    process = subprocess.Popen([sys.executable, "-c", WAITS, *["--debug"] * debug], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert ("Traceback" in err) is debug
    assert err.splitlines()[-1].startswith("home: stopped by Ctrl-C. ")
    assert len(err.splitlines()) == 1 or debug


def test_a_reader_that_has_gone_is_no_fault():
    code = "import sys; from homelib import cli; sys.argv = ['home', 'data', 'show', 'amos_ct']; cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as head does
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "home:" not in err
    assert "Traceback" not in err

"""Every long action shows a bar with rate and remaining time on a terminal, and none where there is no terminal."""

import hashlib
import io
import os
import re
import shutil
import struct
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from homelib import cli_ablate
from homelib.config import override, preset
from homelib.data import demo, fetch
from homelib.data.phantom import ct_phantom
from homelib.progress import bar
from homelib.study.ablate_report import Pace
from homelib.study.costs import costs_of
from homelib.study.probe import _probe
from homelib.study.states import Record, Row

fcntl, pty, termios = (pytest.importorskip(name, reason="there are no pseudo-terminals here (Windows)") for name in ("fcntl", "pty", "termios"))

BAR = r"{name}[^\r\n]*\| [\d.]+[kMG]?/[\d.]+[kMG]? \[\d\d:\d\d<(\d\d:\d\d|\?), [^\]]*({unit}/s|s/{unit})"
MANIFEST = """
name: mine
title: generated
modality: CT
source: generated
licence: none
citation: none
classes: {liver: [3], spleen: [4]}
spacing_mm: [15, 15, 15]
intensity_window: [-175, 250]
layouts:
  - {name: all, image: "{case}_ct.nii.gz", label: "{case}_seg.nii.gz"}
split: {folds: 3}
"""


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a pseudo-terminal for a call; returns what the call has shown there."""

    def shown(call) -> str:
        ours, theirs = pty.openpty()
        said = []

        def read() -> None:
            try:
                while piece := os.read(ours, 65536):
                    said.append(piece)
            except OSError:  # so Linux tells that the other end is closed
                pass

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # one of no width shows nothing
        reader = threading.Thread(target=read)
        reader.start()
        with monkeypatch.context() as patch, os.fdopen(theirs, "w", buffering=1) as stderr:
            patch.setattr(sys, "stderr", stderr)
            call()
        reader.join()
        os.close(ours)
        return b"".join(said).decode()

    return shown


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """Three phantoms and a manifest; the folder."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.yaml").write_text(MANIFEST)
    (folder / "files").mkdir()
    for number in range(3):
        image, label, affine = ct_phantom(number, shape=(24, 24, 24), spacing_mm=15.0)
        nib.save(nib.Nifti1Image(image, affine), folder / "files" / f"p{number}_ct.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / "files" / f"p{number}_seg.nii.gz")
    return folder


def test_every_command_that_takes_long_has_its_bars_on_a_terminal_alone(mine, home, terminal, tmp_path):
    """One way through all of them, each done on a terminal and again without one."""
    data, files = mine / "mine.yaml", mine / "files"
    tiny = ["--profile", "smoke", "--set", "training.accelerator=cpu", "--set", "training.steps=2", "--set", "data.patch_voxels=[16, 16, 16]"]
    ours = ["--data", data, "--root", files, "--fold", 0, *tiny]

    def done(*arguments, bars: dict[str, str], status: int = 0) -> None:
        """Run twice: into `tty` on a terminal, into `plain` without one, where OUT stands for the place."""
        place = {way: [str(one).replace("OUT", str(tmp_path / way)) for one in arguments] for way in ("tty", "plain")}
        found = {}
        shown = terminal(lambda: found.update(status=home(*place["tty"])[0]))
        assert found["status"] == status, shown
        for name, unit in bars.items():
            assert re.search(BAR.format(name=name, unit=unit), shown), (name, shown)
        ended, out, err = home(*place["plain"])
        assert (ended, err) == (status, ""), (out, err)

    done("data", "import", files, "-o", "OUT.yaml", "--modality", "CT", bars={"images": "case", "labels": "case"})
    done("data", "check", data, files, "--workers", 1, "--again", bars={"check": "case"})
    done("data", "prepare", data, files, "--workers", 1, "--out", "OUT/prepared", bars={"prepare": "case"})
    ours += ["--prepared", "OUT/prepared"]
    done("train", "OUT/run", *ours, "--estimate", bars={"estimate": "step"})
    done("train", "OUT/run", *ours, bars={"load": "case", "run": "step", "validate": "window"})
    done("predict", "OUT/run", files / "p0_ct.nii.gz", files / "p1_ct.nii.gz", "-o", "OUT/labels", bars={r"p1_ct \(2 of 2\)": "voxel"})
    references = tmp_path / "references"
    references.mkdir()
    for number in (0, 1):
        shutil.copy(files / f"p{number}_seg.nii.gz", references / f"p{number}_ct.nii.gz")
    done("evaluate", "OUT/labels", references, "--data", data, "--workers", 1, bars={"evaluate": "case"})
    one = ["--label", files / "p0_seg.nii.gz", "--stage", 3, "--shifts", 20, "--no-nifti", "-o", "OUT/routing"]
    done("routing", "OUT/run", files / "p0_ct.nii.gz", "--knock-out", *one, bars={"maps": "window", "lift": "map", "knock-out": "prediction"})
    done("train", "OUT/demo", "--profile", "smoke", "--set", "training.accelerator=cpu", bars={"demo": "step"})
    done("evaluate", "OUT/demo", bars={"evaluate": "prediction"})


def test_a_fetch_and_what_it_unpacks_have_a_bar_on_a_terminal_alone(terminal, tmp_path, monkeypatch, capsys):
    shutil.make_archive(str(tmp_path / "set"), "gztar", root_dir=Path(__file__).parent, base_dir="data")
    packed = (tmp_path / "set.tar.gz").read_bytes()

    class Answer(io.BytesIO):
        status_code, headers = 200, {"Content-Length": str(len(packed)), "ETag": '"one"'}

        def raise_for_status(self):
            pass

        def iter_content(self, size):
            yield from iter(lambda: self.read(size), b"")

    monkeypatch.setattr(fetch.requests, "get", lambda *_, **__: Answer(packed))
    archive = fetch.archive_of("https://x/set.tar.gz", sha256=hashlib.sha256(packed).hexdigest())
    shown = terminal(lambda: fetch.fetch_archives([archive], tmp_path / "tty"))
    assert re.search(BAR.format(name="set.tar.gz", unit="B"), shown), shown
    assert re.search(BAR.format(name=r"unpack [^\r\n]*set.tar.gz", unit="B"), shown), shown
    capsys.readouterr()
    fetch.fetch_archives([archive], tmp_path / "plain")
    assert "unpack" not in capsys.readouterr().err


def test_the_download_of_another_program_is_seen_by_how_its_file_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_LOOK_SECONDS", 0.01)

    class Shown:
        n, total, seen = 0, 1000, []

        def update(self, more):
            self.n += more
            self.seen.append(self.n)

    shown = Shown()
    with demo._growth_of(tmp_path, shown):
        for size in (400, 700, 2000):
            (tmp_path / "pip-unpack").mkdir(exist_ok=True)
            (tmp_path / "pip-unpack" / "part").write_bytes(b"x" * size)
            waited = time.monotonic() + 10
            while shown.n < min(size, 1000) and time.monotonic() < waited:
                time.sleep(0.01)
    assert {400, 700, 1000} <= set(shown.seen)
    assert shown.seen == sorted(shown.seen)
    assert shown.n == shown.total


def test_counting_and_probing_arms_have_a_bar(terminal, capsys):
    settings = {name: override(preset("smoke"), {"network": name, "training.accelerator": "cpu"}) for name in ("UNet", "SegMamba")}
    assert re.search(BAR.format(name="count", unit="arm"), terminal(lambda: costs_of(settings)))
    costs_of(settings)
    assert "count" not in capsys.readouterr().err
    arms = {"small": ({"training.accelerator": "cpu"}, None)}
    assert re.search(BAR.format(name="probe", unit="arm"), terminal(lambda: _probe("smoke", arms, {}, None, False)))


def rows(*states: str) -> list[Row]:
    return [Row(Record(f"run{number}", "arm", number, None, "f", state=state), Path(".")) for number, state in enumerate(states)]


def test_a_grid_tells_its_rate_and_what_is_left_by_the_runs_that_ended_meanwhile(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("homelib.study.ablate_report.time.monotonic", lambda: now[0])
    pace = Pace()
    assert re.search(r"25%.*1/4 \[00:00<\?", pace(rows("done", "running", "queued", "queued")))
    now[0] += 60
    assert re.search(r"50%.*2/4 \[01:00<02:00, 60\.00s/run\]", pace(rows("done", "failed", "running", "queued"))), "one run in a minute, two are left"


@pytest.mark.parametrize("there", [True, False])
def test_a_grid_at_work_has_its_bar_on_a_terminal_alone(there, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(cli_ablate, "console", Console(file=said, force_terminal=there, width=100, height=30))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: there, raising=False)
    with cli_ablate._drawn_anew() as draw:
        draw(rows("running", "queued"))
        draw(rows("done", "running"))
    assert ("1/2 [" in said.getvalue()) is there
    assert "run0" in said.getvalue()


@pytest.mark.parametrize("show", [True, False])
def test_a_bar_that_is_not_asked_for_is_not_shown_on_a_terminal_either(show, terminal):
    def count() -> None:
        for _ in bar(range(3), desc="counted", unit="thing", show=show):
            pass

    assert bool(re.search(BAR.format(name="counted", unit="thing"), terminal(count))) is show

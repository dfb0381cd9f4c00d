"""What docs/training.md tells to type is understood as it stands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from homelib import cli
from homelib.config import field_names, override
from homelib.data.manifest import load_manifest

TEXT = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if "home train" in line]


class Seen(BaseException):
    """Whatever else is raised within a command ends it in one line."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_settings_and_data_sets_that_there_are(command, monkeypatch):
    def cohort(start, sets, *, fold=None, changes=None, **more):
        override(start, {name: value for name, value in changes.items() if name != "model.out_channels"})
        raise Seen([load_manifest(one.manifest).name for one in sets])

    monkeypatch.setattr("homelib.run.cohort.cohort", cohort)
    monkeypatch.setattr("homelib.study.folds.train_folds", lambda start, sets, folder, *, changes, say: cohort(start, sets, changes=changes))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(Seen) as seen:
        cli.main()
    assert seen.value.args[0] == re.findall(r"--data (\S+)", command)


def test_every_setting_that_is_named_is_there():
    from homelib import Settings

    named = set(re.findall(r"`((?:training|data|model|prediction)\.\w+)", TEXT))
    assert named
    assert named <= set(field_names(Settings))


def test_the_union_of_the_papers_pretraining_has_its_25_classes():
    from homelib.data.labelspace import union

    space = union([load_manifest("abdomenatlas_1_1"), load_manifest("totalsegmentator_mri")])
    assert len(space.class_names) == 26

"""Validation within a training: it ends between two windows where it is asked to, and looks at a few cases where there are many."""

from dataclasses import replace

import pandas as pd
import torch

from homelib.config import override
from homelib.run.cohort import cohort
from homelib.run.predict import windows_of
from homelib.run.train import fit
from homelib.run.validate import chosen, validate


class Blind(torch.nn.Module):
    """Background everywhere; counts its windows."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return torch.eye(9)[0].reshape(1, 9, 1, 1, 1).expand(len(x), 9, *x.shape[2:])


def test_a_stop_is_seen_after_each_window(prepared, smoke):
    settings = override(smoke, {"data.patch_voxels": (16, 16, 16)})
    count, network = windows_of(prepared, settings).count, Blind()
    assert count > 8
    assert validate(network, [prepared, prepared], settings, stop=lambda: network.seen == count + 3) is None
    assert network.seen == count + 3
    assert validate(network, [prepared], settings)["dice"].max() == 0


def test_a_few_cases_are_the_same_whatever_others_there_are_and_in_whatever_order(prepared):
    cases = [replace(prepared, case=replace(prepared.case, id=f"case-{number}")) for number in range(20)]
    assert chosen(cases, None) == chosen(cases, 20) == chosen(cases, 30) == cases
    few = [case.case.id for case in chosen(cases, 5)]
    assert len(few) == 5
    assert few != [f"case-{number}" for number in range(5)]
    assert sorted(case.case.id for case in chosen(cases[::-1], 5)) == sorted(few)
    without = [case for case in cases if case.case.id not in few[:2]]
    assert set(few[2:]) < {case.case.id for case in chosen(without, 5)}


def test_a_training_validates_on_a_few_of_its_cases_and_says_so(ct_set, brief, tmp_path, capsys):
    made = cohort(override(brief, {"training.steps": 2}), [ct_set.set], fold=0, changes={"training.validation_cases_most": 1})
    assert len(made.validation) == 2
    run = fit(made.settings, made.train, tmp_path / "run", validation=made.validation)
    (only,) = chosen(made.validation, 1)
    assert pd.read_csv(run.validation_file)["case"].unique().tolist() == [only.case.id]
    assert "run: validated on 1 of 2 cases (training.validation_cases_most)" in capsys.readouterr().out

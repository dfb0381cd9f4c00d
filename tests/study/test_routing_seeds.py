"""`python -m benchmarks.routing_seeds`: tables of every seed, from runs that are there, in the form in which they are shown."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import measure, routing_seeds
from homelib.paths import shipped
from homelib.study import measured
from homelib.study.demo import demo_run, trained


@pytest.fixture
def go(tmp_path, monkeypatch):
    """The command, with a few knock-outs, into a folder of the test's own."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "benchmarks" / "results")
    few = routing_seeds.interventions
    monkeypatch.setattr(routing_seeds, "interventions", lambda network: few(network, stages=[3], levels=[1]))

    def call(*arguments) -> Path:
        told = ["--profile", "smoke", "--shifts", "20", "--folder", tmp_path / "runs", *arguments]
        monkeypatch.setattr(sys, "argv", ["benchmarks.routing_seeds", *map(str, told)])
        routing_seeds.main()
        return measure.RESULTS

    return call


@pytest.mark.long
def test_every_seed_has_its_rows_and_they_are_shown(go, tmp_path, monkeypatch):
    for seed in (3, 4):
        trained(demo_run("smoke", folder=tmp_path / "runs" / f"MambaHoME-{seed}", changes={"training.seed": seed}), progress=False)
    results = go("--seeds", 3, 4)
    about = json.loads((results / "routing_seeds-smoke.json").read_text())
    assert (about["seeds"], about["case"], about["label_origin"], about["shifts"]) == ([3, 4], "phantom-c", "SYNTHETIC", 20)
    tables = {path.stem: pd.read_csv(path) for path in (results / "routing_seeds-smoke").iterdir()}
    assert set(tables) == {"balance", "lift", "information", "stability", "knockout"}
    assert all(set(tables[name]["seed"]) == {3, 4} for name in set(tables) - {"stability"})
    assert set(zip(tables["stability"]["first"], tables["stability"]["second"], strict=True)) == {(3, 4)}
    assert {"expert", "bypass", "shuffle", "layer"} == set(tables["knockout"]["what"])
    assert "entropy_start" in tables["balance"]

    (results / "routing_seeds-smoke").rename(results / "routing_seeds")
    monkeypatch.setattr(measured, "shipped", lambda name: tmp_path / name if name == "benchmarks" else shipped(name))
    shown = measured.routing_over_seeds()
    assert len(measured.said_over_seeds(shown)) == len(shown["information"]) == len(tables["information"]) // 2


def test_a_run_that_is_not_finished_is_named(go, capsys):
    with pytest.raises(SystemExit):
        go("--seeds", 5)
    assert "MambaHoME-5" in capsys.readouterr().err

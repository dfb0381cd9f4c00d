"""What was measured elsewhere and is shown in notebooks: read as it stands, or asked for in one line."""

import json
import shutil
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from homelib import UserError, paths
from homelib.study import measured
from homelib.study.parity import reference_folder
from homelib.study.workbook import notebooks

LAYERS = [(0, 0, 1), (0, 0, 2)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "shipped", lambda name: tmp_path / name)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    return folder


def test_networks_stand_with_parameters_and_intervals(results):
    runs = [
        {"network": network, "seed": seed, "direction": "a-to-c", "role": role, "case": case, "dice": 0.5, "parameters": parameters, "steps": 7}
        for network, parameters in (("MambaHoME", 2_000_000), ("UNet", 2_100_000))
        for seed in (0, 1)
        for role, case in (("test", "ct-c"), ("train", "ct-a"))
    ]
    told = [
        {"direction": "a-to-c", "role": "test", "network": network, "seeds": 2, "dice": dice, "half_width": 0.125}
        for network, dice in (("MambaHoME", 0.5), ("UNet", 0.25))
    ]
    told.append(told[0] | {"role": "train"})
    (results / "three_seeds.json").write_text(json.dumps({"runs": runs, "over_seeds": told}))
    found = measured.networks_over_seeds()
    assert found["patient"].tolist() == ["never seen"] * 2 + ["trained on"]
    assert found["label origin"].tolist() == ["UNSTATED"] * 2 + ["MODEL"]
    assert found["M parameters"].tolist() == [2.0, 2.1, 2.0]
    assert found["seeds"].tolist() == ["0, 1"] * 3
    assert found[["Dice %", "low", "high"]].to_numpy().tolist() == [[50, 37.5, 62.5], [25, 12.5, 37.5], [50, 37.5, 62.5]]


def test_results_that_are_not_there_are_named_with_what_makes_them(results):
    with pytest.raises(UserError, match=r"three_seeds\.json: not there.*python -m benchmarks\.three_seeds"):
        measured.networks_over_seeds()
    with pytest.raises(UserError, match=r"information\.csv: not there.*python -m benchmarks\.routing_seeds"):
        measured.routing_over_seeds()


def test_results_that_were_never_there_are_one_line_too(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "homelib" / "paths.py"))
    for shown in (measured.networks_over_seeds, measured.routing_over_seeds):
        with pytest.raises(UserError, match=r"not there, expected in benchmarks/results"):
            shown()


def test_a_wheel_has_what_the_notebooks_show(monkeypatch, tmp_path):
    """Laid out as pyproject.toml says, without the package itself."""
    root = Path(__file__).resolve().parents[2]
    target = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source in target["only-include"]:
        if source == "homelib":
            continue
        (prefix,) = (prefix for prefix in target["sources"] if source == prefix or source.startswith(prefix + "/"))
        place = tmp_path / (target["sources"][prefix] + source.removeprefix(prefix))
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (root / source).is_dir() else shutil.copy)(root / source, place)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "homelib" / "paths.py"))
    assert len(measured.networks_over_seeds())
    assert len(measured.said_over_seeds(measured.routing_over_seeds()))
    assert tmp_path in reference_folder().parents
    assert len(list(reference_folder().glob("*.npz"))) == 7
    assert all(tmp_path in path.parents for path in notebooks())


@pytest.fixture
def routing(results):
    """Two layers, three seeds: at level 1 the liver's expert is 0, beyond chance, and taking it away costs the liver 0.4 to 0.6; at level 2 nothing is."""
    folder = results / "routing_seeds"
    folder.mkdir()
    rows = {"information": [], "stability": [], "lift": [], "knockout": []}
    for stage, block, level in LAYERS:
        place = {"stage": stage, "block": block, "level": level}
        for first, second in ((0, 1), (0, 2), (1, 2)):
            rows["stability"].append(place | {"first": first, "second": second, "similarity": 0.9, "low": 0.1, "high": 0.5, "p": 0.01 if first == 0 else 0.5})
        for seed in range(3):
            at = {"seed": seed} | place
            p = 0.01 if level == 1 else 0.5
            rows["information"].append(at | {"bits": 0.5 + 0.1 * seed, "chance": 0.2, "p": p})
            rows["lift"] += [at | {"class": "liver", "expert": e, "lift": 2.0 - 1.5 * e, "p": p} for e in (0, 1)]
            knocked = at | {"class": "liver", "scan_low": -1.0, "scan_high": 1.0}
            rows["knockout"] += [knocked | {"what": "expert", "expert": e, "change": -0.4 - 0.1 * seed if e == 0 else 0.0} for e in (0, 1)]
            rows["knockout"] += [knocked | {"what": what, "expert": -1, "change": change} for what, change in (("bypass", -0.8), ("shuffle", -0.2))]
            rows["knockout"] += [knocked | {"level": 0, "what": "layer", "expert": -1, "change": -0.9}] * (level == 1)
    for name, lines in rows.items():
        pd.DataFrame(lines).to_csv(folder / f"{name}.csv", index=False)
    return measured.routing_over_seeds()


def test_seeds_are_averaged_layer_by_layer(routing):
    information = routing["information"].set_index(["stage", "block", "level"])
    assert information["bits"].tolist() == pytest.approx([0.6, 0.6])
    assert information["seeds beyond"].tolist() == [3, 0]
    assert information["by chance"].tolist() == pytest.approx([0.2, 0.2])
    assert routing["stability"][["pairs", "beyond"]].to_numpy().tolist() == [[3, 2], [3, 2]]
    without = routing["without"].set_index(["level", "what"])["change"]
    assert without[1, "bypass"] == pytest.approx(-0.8)
    assert without[2, "shuffle"] == pytest.approx(-0.2)
    assert without[0, "layer"] == pytest.approx(-0.9)
    (excess,) = routing["specialists"].to_dict("records")
    assert (excess["level"], excess["seeds"], excess["classes a seed"]) == (1, 3, 1)
    assert excess["excess"] == pytest.approx(-0.5)
    assert excess["high"] == pytest.approx(-0.5 + 4.302653 * 0.1 / 3**0.5, rel=1e-5)


def test_needs_is_said_where_knock_outs_support_it_and_nowhere_else(routing):
    first, second = measured.said_over_seeds(routing)
    assert "beyond it in 3 of 3 seeds" in first
    assert first.endswith("a class needs the expert that goes with it.")
    assert "beyond it in 0 of 3 seeds" in second
    assert second.endswith("No class has an expert beyond chance.")
    doubtful = routing | {"specialists": routing["specialists"].assign(high=0.01)}
    assert measured.said_over_seeds(doubtful)[0].endswith("associated with, and no more.")
    single = routing | {"specialists": routing["specialists"].assign(seeds=1, low=float("nan"), high=float("nan"))}
    assert "(one seed, no interval)" in measured.said_over_seeds(single)[0]
    assert measured.said_over_seeds(single)[0].endswith("associated with, and no more.")

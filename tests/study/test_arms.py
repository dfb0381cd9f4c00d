"""A grid's arms as tables for figures, by hand."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from homelib import UserError
from homelib.study import arms, states
from homelib.study.ablate import Sweep
from homelib.study.arms import beside_baseline, committed, costs, costs_and_scores, experts_and_groups, how_made
from homelib.study.grids import Grid, load_grid

GRID = Grid(
    name="made",
    question="?",
    profile="smoke",
    seeds=(0, 1),
    arms={"one": {}, "more": {"model.experts_local": [4, 4, 4, 4]}, "wide": {"model.group_size": [128, 64, 32, 16]}, "rate": {"training.learning_rate": 0.1}},
)


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two seeds of each arm on one patient: 0.5, 0.6, 0.7, 0.8, and half a point more with the second seed."""
    lines = []
    for number, arm in enumerate(GRID.arms):
        for seed in (0, 1):
            value = 0.5 + 0.1 * number + 0.005 * seed
            about = {"arm": arm, "seed": seed, "fold": "", "case": "x"}
            lines += [about | {"class": "liver", "metric": metric, "value": value * factor} for metric, factor in (("dice", 1), ("hd95", 50))]
    return pd.DataFrame(lines)


@pytest.fixture
def counted(monkeypatch) -> list:
    """In place of a count, which takes a second an arm and is tested in test_costs: experts of level 1 and tokens a group. What was counted."""
    asked = []

    def costs_of(settings):
        asked.append(list(settings))
        lines = {arm: {"parameters M": sum(its.model.experts_local), "GFLOPs": sum(its.model.group_size)} for arm, its in settings.items()}
        return pd.DataFrame.from_dict(lines, orient="index")

    monkeypatch.setattr("homelib.study.costs.costs_of", costs_of)
    return asked


def test_costs_and_scores_of_the_arms(rows, tmp_path, counted):
    table = costs_and_scores(rows, GRID, tmp_path)
    assert table["mean"].tolist() == pytest.approx([50.25, 60.25, 70.25, 80.25])
    assert (table["low"] < table["mean"]).all()
    assert table["parameters M"].tolist() == [8, 16, 8, 8]
    assert table["GFLOPs"].tolist() == [120, 120, 240, 120]
    pd.DataFrame({"arm": ["one", "one"], "training_seconds": [1.0, 3.0], "steps_gib": [None, None]}).to_csv(tmp_path / "runs.csv", index=False)
    with_costs = costs_and_scores(rows, GRID, tmp_path)
    assert with_costs.loc["one", "training s"] == 2
    assert "peak GiB" not in with_costs
    assert with_costs["GFLOPs"].equals(table["GFLOPs"])
    assert counted == [list(GRID.arms)] * 2


def test_costs_that_were_counted_at_collect_are_not_counted_again(rows, tmp_path, counted):
    told = pd.DataFrame({"arm": list(GRID.arms), "parameters_m": [1.0, 2.0, 3.0, 4.0], "gflops": 5.0, "training_seconds": 6.0, "steps_gib": 7.0})
    told.to_csv(tmp_path / "runs.csv", index=False)
    table = costs(rows, GRID, tmp_path)
    assert table.columns.tolist() == ["parameters M", "GFLOPs", "training s", "peak GiB"]
    assert table.loc["more"].tolist() == [2, 5, 6, 7]
    assert counted == []


def test_differences_are_in_points(rows):
    assert beside_baseline(rows, GRID)["difference"].tolist() == pytest.approx([10, 20, 30])


def test_experts_and_groups_hold_no_arm_that_differs_in_another_way_and_are_sorted(rows):
    table = experts_and_groups(rows, GRID)
    assert table.columns.tolist() == ["64 32 16 8", "128 64 32 16"]
    assert table.index.tolist() == ["2 2 2 2 / 4 4 4 4", "4 4 4 4 / 4 4 4 4"]
    assert table.to_numpy().tolist() == [[pytest.approx(50.25), pytest.approx(70.25)], [pytest.approx(60.25), pytest.approx(float("nan"), nan_ok=True)]]


def test_sizes_are_sorted_as_numbers_whatever_the_order_of_the_arms():
    small = {"model.experts_local": [1, 1, 1, 1]}
    groups = {name: {"model.group_size": [most, 64, 32, 16]} for name, most in (("wide", 1024), ("narrow", 256))}
    arms = {"base": {}, "wide": groups["wide"], "narrow": groups["narrow"] | small, "other": {"model.gsc": "none"}}
    grid = Grid(name="g", question="?", profile="smoke", arms=arms)
    about = {"seed": 0, "fold": "", "case": "x", "class": "liver", "metric": "dice"}
    table = experts_and_groups(pd.DataFrame([{"arm": arm, "value": 0.5} | about for arm in arms]), grid)
    assert [name.split()[0] for name in table.columns] == ["64", "256", "1024"]
    assert [name.split()[0] for name in table.index] == ["1", "2"]


def test_the_crossed_grid_fills_its_heat_map():
    grid = load_grid("laptop-groups-by-experts")
    about = {"seed": 0, "fold": "", "case": "x", "class": "liver", "metric": "dice"}
    table = experts_and_groups(pd.DataFrame([{"arm": arm, "value": 0.5} | about for arm in grid.arms]), grid)
    assert table.shape == (3, 3)
    assert table.notna().all(axis=None)
    assert [name.split()[0] for name in table.columns] == ["256", "512", "1024"]


# ---------------------------------------------------------------- committed results


def faults(folder: Path) -> list[str]:
    """What is wrong with a grid's committed results: they must be of the grid as it is now, whole, say how they were made, and name no place of a machine."""
    plan, grid = json.loads((folder / "plan.json").read_text()), load_grid(folder.name)
    results, made = pd.read_csv(folder / "results.csv"), json.loads((folder / "made.json").read_text())
    now = {run.name: run.fingerprint for run in grid.runs()}
    then = {line["name"]: line["fingerprint"] for line in plan["runs"]}
    told = [f"{name}: fingerprint {then.get(name)}, now {now.get(name)}" for name in {**now, **then} if then.get(name) != now.get(name)]
    told += [f"{name}: no results" for name in sorted(set(now) - set(results["run"]))]
    told += [f"made.json: {made['runs']} runs"] if made["runs"] != len(now) else []
    places = [(path.name, found) for path in folder.iterdir() for found in re.findall(r"(?<![\w.])/\w+/[\w/.-]+", path.read_text())]
    return told + [f"{name}: names {place}" for name, place in places]


@pytest.mark.parametrize("folder", sorted(path.parent for path in arms.COMMITTED.glob("*/results.csv")), ids=lambda folder: folder.name)
def test_committed_results_are_of_the_grid_as_it_is(folder):
    """A setting that was added since: list it in `grids.LATER` if its default is what was done before; else the results must be made anew."""
    assert faults(folder) == []


def test_results_of_another_grid_unfinished_or_with_a_place_in_them_are_found_out(tmp_path):
    grid = load_grid("smoke")
    sweep = Sweep.begin(grid, tmp_path / "smoke")
    for task in sweep.tasks:
        states.write(task.folder, replace(states.read(task.folder), state="done"))
        (task.folder / "metrics.csv").write_text("case,metric,value\nx,dice,0.5\n")
    sweep.collect()
    kept = tmp_path / "kept" / "smoke"
    kept.mkdir(parents=True)
    for name in ("plan.json", "results.csv", "runs.csv", "made.json"):
        shutil.copy(sweep.folder / name, kept)
    assert faults(kept) == []
    whole = (kept / "plan.json").read_text()
    mark = grid.runs()[0].fingerprint
    (kept / "plan.json").write_text(whole.replace(mark, "0" * 16))
    assert faults(kept) == [f"released_seed0_c-to-a: fingerprint {'0' * 16}, now {mark}"]
    (kept / "plan.json").write_text(whole.replace('"parameters": {}', '"parameters": {"folder": "/data/of/mine"}'))
    assert faults(kept) == ["plan.json: names /data/of/mine"]
    (kept / "plan.json").write_text(whole)
    pd.read_csv(kept / "results.csv").iloc[1:].to_csv(kept / "results.csv", index=False)
    assert faults(kept) == ["released_seed0_c-to-a: no results"]


def test_committed_results_are_a_folder_of_the_grids_name(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "COMMITTED", tmp_path)
    assert committed(GRID) is None
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "results.csv").write_text("")
    assert committed(GRID) == tmp_path / "made"


def test_how_results_were_made_is_a_line(tmp_path):
    assert how_made(GRID, None).endswith("home ablate run made; home ablate collect made")
    with pytest.raises(UserError, match=r"no made\.json there"):
        how_made(GRID, tmp_path)
    made = {"command": "home ablate run made -p figures=false", "runs": 8, "minutes": 91.4, "began": "then", "ended": "now", "environment": "homelib 0"}
    (tmp_path / "made.json").write_text(json.dumps(made))
    said = "made: made by home ablate run made -p figures=false; home ablate collect made. 8 runs in 91 minutes, from then to now. homelib 0"
    assert how_made(GRID, tmp_path) == said

"""`home tables` of grids and of the paper: its forms, what stands beside what, and mistakes as one line."""

import json
import re

import pandas as pd
import pytest


@pytest.fixture
def grid(tmp_path):
    """The folder of a grid of two arms and two seeds."""
    arms = {"released": (0.5, 0.52), "layernorm": (0.4, 0.43)}
    about = {"fold": "a-to-c", "role": "test", "method": "MambaHoME", "case": "ct-c", "class": "liver", "metric": "dice"}
    about |= {"reference_voxels": 9, "predicted_voxels": 9}
    lines = [{"run": f"{arm}_seed{seed}", "arm": arm, "seed": seed, **about, "value": values[seed]} for arm, values in arms.items() for seed in (0, 1)]
    pd.DataFrame(lines).to_csv(tmp_path / "results.csv", index=False)
    took = [{"run": line["run"], "arm": line["arm"], "seed": line["seed"], "training_seconds": 60 + line["seed"], "steps_gib": None} for line in lines]
    pd.DataFrame(took).to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / "plan.json").write_text(json.dumps({"grid": "laptop-tables"}))
    return tmp_path


@pytest.fixture
def tables(home):
    """`home tables ARGUMENTS`."""
    return lambda *arguments: home("tables", *arguments)


def test_a_table_of_the_paper_by_itself(tables):
    status, out, _ = tables("--paper", "T8")
    assert status == 0
    assert "| DyT | 77.5 | 86.3 | 87.4 |" in out
    assert tables("--paper", "T8", "--csv")[1].splitlines()[1:3] == ["LayerNorm,77.4,86.2,87.5", "DyT,77.5,86.3,87.4"]
    assert r"\toprule" in tables("--paper", "T8", "--latex")[1]


def test_a_grid_beside_the_paper(tables, grid):
    status, out, err = tables(grid, "--paper", "T8")
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("| released"))
    assert line == "| released | **51.0 (38.3 to 63.7)** | 2 | 77.5 | 86.3 | 87.4 |"


def test_a_grid_by_itself_in_latex(tables, grid):
    status, out, err = tables(grid / "results.csv", "--latex")
    assert status == 0, err
    assert r"released & \textbf{51.0 (38.3 to 63.7)} & 2 \\" in out


def test_costs_are_counted_and_what_runs_took_is_told(tables, grid):
    status, out, err = tables(grid, "--costs", "--csv")
    assert status == 0, err
    head, *lines = out.strip().splitlines()
    assert head == "arm,dice %,runs,parameters M,GFLOPs,training s,peak GiB"
    released = dict(zip(head.split(","), lines[0].split(","), strict=True))
    assert released["parameters M"] == "3.0"
    assert released["training s"] == "60.5"
    assert released["peak GiB"] == "-"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), r"FOLDER: found none, expected run folders or folders of grids; or --paper with a table of the paper\."),
        (("--paper", "T99"), r"table: found 'T99', expected one of the paper's result tables; nearest: .*"),
        (("GRID", "--latex", "--csv"), r"found --latex and --csv, expected one of them\."),
        (("GRID", "--metric", "hd95"), r"metric: found hd95, expected some of dice\."),
        (("GRID", "--paper", "T1"), r"paper T1: no arm of these results is one of its rows; .*"),
        (("GRID", "--grid", "expert", "--paper", "T5"), r"grid 'expert' is unknown; nearest: experts.*"),
        (("GRID", "--grid", "experts", "--costs"), r"--grid: experts has no arm 'released', which the results have; .*"),
    ],
)
def test_mistakes_are_one_line(tables, grid, arguments, told):
    status, out, err = tables(*(grid if argument == "GRID" else argument for argument in arguments))
    assert status == 2, (out, err)
    assert re.fullmatch(rf"home: {told}\n", err), err

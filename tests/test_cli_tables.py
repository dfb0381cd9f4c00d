"""`home tables` of grids and of the paper: its forms, what stands beside what, and mistakes as one line."""

import json
import re
import sys

import pandas as pd
import pytest

from homelib import cli


@pytest.fixture
def home(monkeypatch, capsys):
    """`home tables ARGUMENTS` in this process: exit status, stdout, stderr."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["home", "tables", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def grid(tmp_path):
    """The folder of a grid of two arms and two seeds."""
    arms = {"released": (0.5, 0.52), "layernorm": (0.4, 0.43)}
    about = {"fold": "a-to-c", "role": "test", "method": "MambaHoME", "case": "ct-c", "class": "liver", "metric": "dice"}
    lines = [{"run": f"{arm}_seed{seed}", "arm": arm, "seed": seed, **about, "value": values[seed]} for arm, values in arms.items() for seed in (0, 1)]
    pd.DataFrame(lines).to_csv(tmp_path / "results.csv", index=False)
    took = [{"run": line["run"], "arm": line["arm"], "seed": line["seed"], "training_seconds": 60 + line["seed"], "peak_gib": None} for line in lines]
    pd.DataFrame(took).to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / "plan.json").write_text(json.dumps({"grid": "laptop-tables"}))
    return tmp_path


def test_a_table_of_the_paper_by_itself(home):
    status, out, _ = home("--paper", "T8")
    assert status == 0
    assert "| DyT | 77.5 | 86.3 | 87.4 |" in out
    assert home("--paper", "T8", "--csv")[1].splitlines()[1:3] == ["LayerNorm,77.4,86.2,87.5", "DyT,77.5,86.3,87.4"]
    assert r"\toprule" in home("--paper", "T8", "--latex")[1]


def test_a_grid_beside_the_paper(home, grid):
    status, out, err = home(grid, "--paper", "T8")
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("| released"))
    assert line == "| released | **51.0 (38.3 to 63.7)** | 2 | 77.5 | 86.3 | 87.4 |"


def test_a_grid_by_itself_in_latex(home, grid):
    status, out, err = home(grid / "results.csv", "--latex")
    assert status == 0, err
    assert r"released & \textbf{51.0 (38.3 to 63.7)} & 2 \\" in out


def test_costs_are_counted_and_what_runs_took_is_told(home, grid):
    status, out, err = home(grid, "--costs", "--csv")
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
def test_mistakes_are_one_line(home, grid, arguments, told):
    status, out, err = home(*(grid if argument == "GRID" else argument for argument in arguments))
    assert status == 2, (out, err)
    assert re.fullmatch(rf"home: {told}\n", err), err

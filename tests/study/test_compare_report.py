"""`home compare`: which rows are taken, and that what is printed are the numbers of `homelib.study.statistics`."""

import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from homelib.errors import UserError
from homelib.study import statistics
from homelib.study.compare_report import gather, print_comparison


def write(path, values, *, metric="dice", **more):
    """A metrics.csv with one value a case, of the one class liver."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"method": "as written", "class": "liver", "metric": metric, "reference_voxels": 9, "predicted_voxels": 9} | more
    rows = [{"case": f"{i:03}", "value": value} | about for i, value in enumerate(values)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture
def told(capsys):
    def call(methods, **asked) -> str:
        print_comparison(gather([str(method) for method in methods]), Console(width=200), **{"metric": "dice"} | asked)
        return capsys.readouterr().out

    return call


def test_the_printed_numbers_are_those_of_the_statistics(told, tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.6, 0.9, 8), rng.uniform(0.5, 0.9, 8)
    write(tmp_path / "a" / "metrics.csv", a, label_origin="REF")
    write(tmp_path / "b.csv", b, label_origin="REF")
    out = told([tmp_path / "a", f"other={tmp_path / 'b.csv'}"])
    rows = gather([f"a={tmp_path / 'a'}", f"other={tmp_path / 'b.csv'}"])
    line = statistics.compare(rows, "dice").iloc[0]
    printed = re.search(r"a - other.*", out).group(0)
    for name in ("difference", "low", "high", "p", "p_holm"):
        assert f" {line[name]:.3g} " in printed, name
    low, high = statistics.interval(a)
    assert f"{a.mean():.3f} ({low:.3f} to {high:.3f})" in out
    assert "ranking" in out
    assert "mean over 8 cases, labels REF, with its 95 % interval" in out
    assert "seeds" not in out
    assert "higher is better" in out


def test_one_name_twice_is_two_seeds_of_a_method(told, tmp_path):
    files = [write(tmp_path / f"{i}.csv", np.linspace(0.5, 0.7, 4) + shift) for i, shift in enumerate((0.0, 0.1))]
    rows = gather([f"ours={file}" for file in files])
    assert sorted(set(rows["seed"])) == [0, 1]
    out = told([f"ours={file}" for file in files])
    assert re.search(r"ours\W+2\W+0\.65\W+0\.0707", out)
    assert "paired" not in out


def test_few_cases_have_no_p_value_and_it_says_so(told, tmp_path):
    out = told([f"a={write(tmp_path / 'a.csv', [0.5, 0.6])}", f"b={write(tmp_path / 'b.csv', [0.4, 0.5])}"])
    assert "No p value for a - b: 2 of 2 cases differ, and a two-sided test cannot reach 0.05 with fewer than 6." in out


def test_a_lower_distance_is_first(told, tmp_path):
    near, far = (write(tmp_path / f"{name}.csv", values, metric="hd95") for name, values in (("near", [1.0, 2.0, 3.0]), ("far", [4.0, 5.0, 7.0])))
    out = told([f"far={far}", f"near={near}"], metric="hd95", against="far")
    ranked = out[out.index("ranking") :]
    assert ranked.index("near") < ranked.index("far")
    assert "far - near" in out


def test_of_a_run_the_network_on_the_patient_it_never_saw(tmp_path):
    rows = [
        {"case": case, "method": method, "class": "liver", "metric": "dice", "value": value, "role": role, "reference_voxels": 9, "predicted_voxels": 9}
        for case, role, method, value in (("a", "train", "MambaHoME", 0.9), ("c", "test", "MambaHoME", 0.7), ("c", "test", "all background", 0.0))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    assert gather([f"x={tmp_path}"])["value"].tolist() == [0.7]


def test_what_cannot_be_compared_is_one_line(told, tmp_path):
    good = write(tmp_path / "good.csv", [0.5, 0.6])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    write(tmp_path / "fewer.csv", [0.5])
    for methods, asked, message in (
        ([tmp_path / "none.csv"], {}, r"none\.csv: no such file; `home evaluate` writes it"),
        ([tmp_path / "other.csv"], {}, r"other\.csv: no column case, class, metric, predicted_voxels, reference_voxels, value"),
        ([good], {"metric": "hd95"}, r"--metric: found 'hd95', expected one of dice"),
        ([f"a={good}", f"b={tmp_path / 'fewer.csv'}"], {}, r"found 2 cases, 1 of them in all methods"),
        ([good, tmp_path / "fewer.csv"], {}, r"fewer\.csv: found the name .* again, expected NAME=PATH for each"),
        ([good, f"{good.parent.name}={good}"], {}, r"again, expected NAME=PATH for each"),
        ([f"a={good}", f"b={good}"], {"against": "c"}, r"method: found 'c', expected one of a, b"),
    ):
        with pytest.raises(UserError, match=message):
            told(methods, **asked)

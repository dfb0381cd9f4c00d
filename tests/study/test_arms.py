"""Arms beside each other, by hand."""

import pandas as pd
import pytest
from scipy import stats

from homelib import UserError
from homelib.study import arms
from homelib.study.arms import by_arm, committed, scores


def rows(*runs: tuple[str, int, str, float]) -> pd.DataFrame:
    """One class of one patient a run, beside what must not count: background, a baseline, another metric, the patient that it was trained on."""
    lines = []
    for arm, seed, fold, value in runs:
        run = {"run": f"{arm}_seed{seed}_{fold}", "arm": arm, "seed": seed, "fold": fold}
        its = {"case": "x", "method": "MambaHoME", "class": "liver", "metric": "dice", "role": "test", "value": value}
        for other in ({}, {"class": "background"}, {"method": "all background"}, {"metric": "hd95"}, {"role": "train"}):
            lines.append(run | its | other | ({"value": 99.0} if other else {}))
    return pd.DataFrame(lines)


TABLE = rows(("a", 0, "x", 0.5), ("a", 1, "x", 0.6), ("b", 0, "x", 0.7), ("b", 1, "x", 0.6), ("c", 1, "x", 0.1))


def test_a_runs_score_is_of_its_own_network_on_patients_that_it_never_saw():
    assert scores(TABLE)["score"].tolist() == [0.5, 0.6, 0.7, 0.6, 0.1]


def test_arms_are_paired_with_the_baseline_by_seed_and_fold():
    table = by_arm(TABLE, "a")
    assert table.index.tolist() == ["a", "b", "c"]
    assert table["runs"].tolist() == [2, 2, 1]
    assert table["pairs"].tolist() == [0, 2, 1]
    assert table["mean"].tolist() == pytest.approx([0.55, 0.65, 0.1])
    assert table.loc["b", "difference"] == pytest.approx(0.1)
    assert table.loc["c", "difference"] == pytest.approx(-0.5)
    half = stats.t.ppf(0.975, 1) * 0.1  # of 0.2 and 0: standard deviation 0.1414, over the root of 2
    assert table.loc["b", ["low", "high"]].tolist() == pytest.approx([0.1 - half, 0.1 + half])
    assert table.loc[["a", "c"], ["low", "high"]].isna().all(axis=None)


def test_runs_of_a_grid_without_folds_are_paired():
    assert by_arm(TABLE.assign(fold=float("nan")), "a").loc["b", "pairs"] == 2


def test_a_baseline_without_a_run_is_one_line():
    with pytest.raises(UserError, match=r"^baseline: found 'z' without a finished run, expected one of a, b, c"):
        by_arm(TABLE, "z")


def test_a_metric_that_was_not_measured_is_one_line():
    with pytest.raises(UserError, match=r"^metric: found 'nsd', expected one of dice, hd95"):
        scores(TABLE, "nsd")


def test_committed_results_are_read_by_the_grids_name(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    assert committed("made") is None
    TABLE.to_csv(tmp_path / "made.csv", index=False)
    pd.testing.assert_frame_equal(committed("made"), TABLE)

"""Intervals, tests and rankings on numbers whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from homelib.errors import UserError
from homelib.study import statistics


def rows_of(metric="dice", **methods):
    """Tidy rows from method -> values by case (or by seed and case)."""
    lines = []
    for method, values in methods.items():
        for seed, by_case in enumerate(np.atleast_2d(values)):
            lines += [{"case": f"c{i}", "method": method, "class": "liver", "metric": metric, "value": value, "seed": seed} for i, value in enumerate(by_case)]
    return pd.DataFrame(lines)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for low, high in (statistics.interval(rng.exponential(1, 40), resamples=400, seed=s) for s in range(150)))
    assert 0.85 < hits / 150 < 0.99


def test_intervals_of_one_value_of_equal_ones_and_with_gaps():
    assert np.isnan(statistics.interval(np.array([0.5]))).all()
    assert statistics.interval(np.array([0.5, 0.5, np.nan])) == (0.5, 0.5)
    table = statistics.intervals(rows_of(a=[0.1, 0.2, np.nan, 0.6]), "dice", resamples=500)
    assert table["class"].tolist() == ["liver", "mean"]
    assert table["cases"].tolist() == [3, 3]
    assert (table["low"] < table["mean"]).all()
    assert (table["mean"] < table["high"]).all()


def test_holms_correction_by_hand():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1, 1])


def test_a_better_method_is_found_and_its_effect_is_signed():
    rng = np.random.default_rng(1)
    worse = rng.uniform(0.5, 0.7, 20)
    rows = rows_of(worse=worse, better=worse + rng.uniform(0.01, 0.05, 20), same=worse + rng.normal(0, 0.01, 20))
    found = statistics.compare(rows, "dice").set_index(["first", "second"])
    row = found.loc[("worse", "better")]
    assert row["p"] == pytest.approx(stats.wilcoxon(worse, rows[rows["method"] == "better"]["value"]).pvalue)
    assert row["p_holm"] == pytest.approx(3 * row["p"])
    assert (row["rank_biserial"], row["better"], row["cases"]) == (-1, "second", 20)
    assert row["difference"] < row["high"] < 0
    assert row["cohen_dz"] < -1
    assert found.loc[("worse", "same"), "p_holm"] > 0.05
    assert len(statistics.compare(rows, "dice", against="better")) == 2


def test_lower_distances_are_better():
    rows = rows_of("hd95", near=[1, 2, 3, 1, 2, 3, 4], far=[5, 6, 7, 5, 6, 7, 9])
    assert statistics.compare(rows, "hd95")["better"].item() == "first"
    assert statistics.ranking(rows, "hd95")["method"].tolist() == ["near", "far"]


def test_too_few_cases_have_no_p_value_and_equal_methods_have_1():
    assert np.isnan(statistics.compare(rows_of(a=[0.1, 0.2, 0.3, 0.4, 0.5], b=[0.2, 0.3, 0.4, 0.5, 0.6]), "dice")["p_holm"].item())
    assert statistics.compare(rows_of(a=[0.1] * 8, b=[0.1] * 8), "dice")[["p", "rank_biserial", "better"]].values.tolist() == [[1.0, 0.0, ""]]


def test_cases_that_are_alike_count_for_no_test():
    """Wilcoxon's test leaves them out: of seven cases, three that differ cannot reach 0.05, whatever they say."""
    a = np.linspace(0.3, 0.9, 7)
    few = statistics.compare(rows_of(a=a, b=a - [0, 0, 0, 0, 0.1, 0.1, 0.1]), "dice").iloc[0]
    assert few[["cases", "differ"]].tolist() == [7, 3]
    assert np.isnan(few["p"])
    assert np.isnan(few["p_holm"])
    enough = statistics.compare(rows_of(a=a, b=a - [0, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16]), "dice").iloc[0]
    assert enough["p"] == pytest.approx(2 / 2**6)


def test_seeds_are_counted_as_the_methods_are_compared():
    """Rightly silent in one seed, inventive in the other: its mean over seeds is the one of the comparison."""
    rows = rows_of(silent=[[np.nan, 0.8], [np.nan, 0.8]], torn=[[np.nan, 0.8], [0.0, 0.8]])
    means = statistics.seeds(rows, "dice").set_index("method")["mean"]
    assert means.to_dict() == pytest.approx({"silent": 0.9, "torn": 0.65})
    assert means.to_dict() == pytest.approx(statistics.ranking(rows, "dice", resamples=10).set_index("method")["mean"].to_dict())


def test_a_method_that_is_rightly_empty_is_better_than_one_that_invents_a_structure():
    ill = np.linspace(0.78, 0.82, 8)
    rows = rows_of(silent=[*ill, *[np.nan] * 8, np.nan], inventive=[*ill, *[0.0] * 8, np.nan])  # of the last one no method says anything
    found = statistics.compare(rows, "dice").iloc[0]
    assert (found["cases"], found["better"]) == (16, "first")
    assert found["difference"] == pytest.approx(0.5)
    assert found["p"] < 0.05
    table = statistics.intervals(rows, "dice", resamples=200).set_index(["method", "class"])
    assert table.loc[("silent", "liver"), "mean"] == pytest.approx((ill.sum() + 8) / 16)
    assert table.loc[("silent", "mean"), "cases"] == 16
    far = rows_of("hd95", silent=[np.nan, 1.0], inventive=[300.0, 1.0])
    assert statistics.by_case(far, "hd95")["silent"].tolist() == [0, 1]
    volumes = rows_of("reference_volume", a=[np.nan, 1.0], b=[2.0, 1.0])  # a fact has no best
    assert np.isnan(statistics.by_case(volumes, "reference_volume")["a"].iloc[0])


def test_methods_of_different_classes_are_not_compared():
    rows = pd.concat([both := rows_of(a=[0.9] * 7, b=[0.8] * 7), both[both["method"] == "a"].assign(**{"class": "spleen"})])
    with pytest.raises(UserError, match=r"^method a: found 2 classes, 1 of them in all methods \(spleen not\), expected the same classes"):
        statistics.compare(rows, "dice")
    assert len(statistics.compare(rows, "dice", classes=("liver",))) == 1


def test_a_ranking_says_how_stable_it_is():
    rng = np.random.default_rng(2)
    base = rng.uniform(0.4, 0.8, 30)
    rows = rows_of(clear=base + 0.1, one=base + rng.normal(0, 0.05, 30), two=base + rng.normal(0, 0.05, 30))
    found = statistics.ranking(rows, "dice").set_index("method")
    assert found.index[0] == "clear"
    assert found.loc["clear", ["first", "rank_low", "rank_high"]].tolist() == [1, 1, 1]
    assert found.loc["one", "rank_high"] == found.loc["two", "rank_high"] == 3  # which of the two is second is open
    assert min(found.loc["one", "rank_low"], found.loc["two", "rank_low"]) == 2


def test_seeds_are_a_factor_of_their_own():
    cases = np.linspace(0.4, 0.8, 9)
    rows = rows_of(steady=[cases, cases + 0.001], shaky=[cases, cases + 0.2])
    found = statistics.seeds(rows, "dice").set_index("method")
    assert found.loc["shaky", "seed_sd"] == pytest.approx(0.2 / np.sqrt(2))
    assert found.loc["steady", "seed_sd"] == pytest.approx(0.001 / np.sqrt(2))
    assert found["case_sd"].tolist() == pytest.approx([cases.std(ddof=1)] * 2)
    table = statistics.by_case(rows, "dice")
    assert table["shaky"].to_numpy() == pytest.approx(cases + 0.1)  # seeds are averaged within a case, and never count as cases
    assert statistics.compare(rows, "dice")["cases"].item() == 9


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(UserError, match="found 'hd95', expected one of dice"):
        statistics.by_case(rows_of(a=[1.0]), "hd95")
    with pytest.raises(UserError, match="a alone, expected two"):
        statistics.compare(rows_of(a=[1.0]), "dice")
    with pytest.raises(UserError, match="found 'c', expected one of a, b"):
        statistics.compare(rows_of(a=[1.0], b=[1.0]), "dice", against="c")
    with pytest.raises(UserError, match="expected the same cases"):
        statistics.compare(rows_of(a=[1.0, 2], b=[1.0]), "dice")
    with pytest.raises(UserError, match="no column seed"):
        statistics.seeds(rows_of(a=[1.0]).drop(columns="seed"), "dice")

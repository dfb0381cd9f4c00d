"""Scores of arms from hand-made rows: means, Student's intervals, paired tests, marks; and the tables made of them in every form."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from homelib import UserError
from homelib.study.ablation_tables import ablation_table
from homelib.study.printed import Printed
from homelib.study.scores import by_run, differences, mean_interval, read_results, scores


def rows(values: dict[str, dict[int, float]], *, metric: str = "dice", cases: int = 1, fold: str = "a-to-c") -> pd.DataFrame:
    """Arm -> seed -> score; every case has it, one class a tenth above and one a tenth below, and background, which must not count."""
    found = []
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            for case in range(cases):
                about = {"arm": arm, "seed": seed, "fold": fold, "case": f"case-{case}", "metric": metric, "reference_voxels": 9, "predicted_voxels": 9}
                found += [about | {"class": c, "value": v} for c, v in (("background", 9.0), ("liver", value + 0.1), ("spleen", value - 0.1))]
    return pd.DataFrame(found)


THREE = {"released": {0: 0.50, 1: 0.52, 2: 0.54}, "worse": {0: 0.40, 1: 0.42, 2: 0.45}, "near": {0: 0.51, 1: 0.50, 2: 0.53}}


def test_a_score_is_the_mean_over_classes_and_runs_with_students_interval():
    found = scores(rows(THREE), "dice").set_index("arm")
    assert list(found.index) == list(THREE)
    released = np.array([0.50, 0.52, 0.54])
    half = 4.302653 * released.std(ddof=1) / np.sqrt(3)  # t of two degrees of freedom, from a table
    assert found.loc["released", ["mean", "low", "high"]].tolist() == pytest.approx([0.52, 0.52 - half, 0.52 + half], abs=1e-6)
    assert found["runs"].tolist() == [3, 3, 3]
    assert found["cases"].tolist() == [1, 1, 1]


def test_marks_say_the_best_and_what_is_not_significantly_worse():
    found = scores(rows(THREE), "dice").set_index("arm")
    assert found["mark"].to_dict() == {"released": "best", "worse": "", "near": "alike"}
    worse, near = (stats.ttest_1samp(np.subtract(list(THREE[arm].values()), list(THREE["released"].values())), 0).pvalue for arm in ("worse", "near"))
    assert found.loc["worse", "p_holm"] == pytest.approx(2 * worse)
    assert found.loc["near", "p_holm"] == pytest.approx(near)
    assert found.loc["worse", "difference"] == pytest.approx(-0.29 / 3)


def test_the_best_distance_is_the_smallest():
    found = scores(rows({"a": {0: 5.0, 1: 6.0}, "b": {0: 9.0, 1: 9.5}}, metric="hd95"), "hd95").set_index("arm")
    assert found["mark"]["a"] == "best"


def test_pairs_are_the_seeds_and_folds_that_both_have():
    both = pd.concat([rows({"a": {0: 0.5, 1: 0.6}, "b": {1: 0.5, 2: 0.1}}), rows({"a": {1: 0.8}, "b": {1: 0.6}}, fold="c-to-a")], ignore_index=True)
    assert by_run(both, "dice").shape == (4, 2)
    found = differences(both, "dice", against="a").iloc[0]
    assert (found["arm"], found["runs"]) == ("b", 2)
    assert found["difference"] == pytest.approx(-0.15)
    assert found["unit"] == "runs"


def test_with_six_cases_the_case_is_tested():
    generator = np.random.default_rng(0)
    table = rows({"a": {0: 0.5}, "b": {0: 0.4}}, cases=8)
    table["value"] += generator.normal(0, 0.01, len(table))
    found = differences(table, "dice", against="a").iloc[0]
    assert found["unit"] == "cases"
    assert found["p"] == pytest.approx(2 / 2**8)  # all eight differences have one sign
    assert np.isnan(found["low"])  # of one run there is no interval over runs


def test_with_eight_cases_of_which_few_differ_the_run_is_tested():
    table = rows({"a": {0: 0.5, 1: 0.5}, "b": {0: 0.5, 1: 0.5}}, cases=8)
    table.loc[(table["arm"] == "b") & table["case"].isin(["case-0", "case-1"]), "value"] -= 0.1
    table.loc[(table["arm"] == "b") & (table["case"] == "case-0") & (table["seed"] == 1), "value"] -= 0.1
    assert differences(table, "dice", against="a")["unit"].tolist() == ["runs"]


def test_an_arm_that_is_rightly_empty_is_better_than_one_that_invents_a_structure():
    table = rows({"silent": {0: 0.5, 1: 0.5}, "inventive": {0: 0.5, 1: 0.5}}, cases=8)
    spleen = (table["class"] == "spleen") & (table["case"] != "case-0")
    table.loc[spleen, "value"] = np.where(table.loc[spleen, "arm"] == "silent", np.nan, 0.0)
    means = by_run(table, "dice").mean()
    assert means["silent"] - means["inventive"] == pytest.approx(7 / 8 / 2)
    assert scores(table, "dice").set_index("arm")["mark"].to_dict() == {"silent": "best", "inventive": ""}


def test_one_run_alone_has_no_interval_and_no_mark():
    found = scores(rows({"a": {0: 0.5}, "b": {0: 0.4}}), "dice").set_index("arm")
    assert found[["low", "high"]].isna().all(axis=None)
    assert found["mark"].tolist() == ["best", ""]


def test_equal_runs_are_alike():
    assert scores(rows({"a": {0: 0.5, 1: 0.6}, "b": {0: 0.5, 1: 0.6}}), "dice")["mark"].tolist() == ["best", "alike"]


def test_an_interval_needs_two_values():
    assert np.isnan(mean_interval(np.array([1.0]))[1])
    assert np.isnan(mean_interval(np.array([])))[0]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: scores(rows(THREE), "hd95"), r"metric: found 'hd95', expected one of dice"),
        (lambda: differences(rows(THREE), "dice", against="none"), r"arm: found 'none', expected one of released, worse, near"),
        (lambda: ablation_table(rows(THREE), ("nsd_1mm",)), r"metric: found nsd_1mm, expected some of dice"),
        (lambda: ablation_table(rows(THREE), paper="T5", paper_rows={}), r"paper T5: no arm of these results is one of its rows"),
        (lambda: ablation_table(rows(THREE), paper="T8", paper_rows={"worse": "RMSNorm"}), r"paper T8: no row 'RMSNorm', expected one of LayerNorm; DyT"),
    ],
)
def test_what_cannot_be_scored_is_one_line(call, told):
    with pytest.raises(UserError, match=rf"^{told}"):
        call()


def test_results_are_the_networks_rows_on_test_cases(tmp_path):
    table = rows(THREE)
    more = table.assign(role="train", method="MambaHoME"), table.assign(role="test", method="all background")
    pd.concat([table.assign(role="test", method="MambaHoME"), *more]).to_csv(tmp_path / "results.csv", index=False)
    assert len(read_results(tmp_path)) == len(table) == len(read_results(tmp_path / "results.csv"))
    pd.concat(more).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UserError, match="no rows of test cases"):
        read_results(tmp_path / "other.csv")
    table.drop(columns="seed").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UserError, match="no column seed"):
        read_results(tmp_path / "other.csv")
    with pytest.raises(UserError, match="no such file"):
        read_results(tmp_path / "none.csv")


def test_a_grid_without_folds_has_runs_too(tmp_path):
    rows(THREE).assign(fold=None).to_csv(tmp_path / "results.csv", index=False)
    assert scores(read_results(tmp_path), "dice")["runs"].tolist() == [3, 3, 3]


# ---------------------------------------------------------------- tables


def test_ours_stands_beside_the_papers():
    costs = pd.DataFrame({"parameters M": [3.0, 4.25]}, index=["released", "worse"])
    table = ablation_table(rows(THREE), paper="T8", paper_rows={"released": "DyT", "worse": "LayerNorm"}, costs=costs)
    assert list(table.cells.index) == ["released", "worse"]
    assert list(table.cells) == ["dice %", "runs", "parameters M", "paper: PANORAMA mDSC %", "paper: AMOS-CT mDSC %", "paper: FeTA mDSC %"]
    assert table.cells.loc["worse"].tolist() == ["42.3 (36.1 to 48.6)", "3", "4.2", "77.4", "86.2", "87.5"]
    assert table.marks["dice %"].tolist() == ["best", ""]
    assert (table.marks.drop(columns="dice %") == "").all(axis=None)
    assert any("87.5 for the same configuration" in note for note in table.notes)
    assert table.notes[0].startswith("dice [1]: 2 |P and R|")
    assert table.notes[1].startswith("Empty masks: Both masks empty: no number")
    told = "6 in the references, 0 missed, 0 spurious"  # two structures in each of three runs
    assert table.notes[2] == f"Structures: released: {told}; worse: {told}."


@pytest.fixture
def small() -> Printed:
    cells = pd.DataFrame({"Dice %": ["50 (40 to 60)", "49"], "a|b_c": ["1", "2"]}, index=pd.Index(["one", "two & more"], name="arm"))
    return Printed(cells, pd.DataFrame({"Dice %": ["best", "alike"], "a|b_c": ["", ""]}, index=cells.index), "A caption of 100 %", ("A note.",))


def test_markdown(small):
    lines = small.markdown().splitlines()
    assert lines[0] == "**A caption of 100 %**"
    assert lines[2:6] == ["| arm | Dice % | a\\|b_c |", "| --- | ---: | ---: |", "| one | **50 (40 to 60)** | 1 |", "| two & more | *49* | 2 |"]
    assert lines[-1] == "A note."
    assert "Bold: the best." in small.markdown()


def test_words_stand_to_the_left_and_numbers_or_none_to_the_right():
    columns = {"label origin": ["MODEL", ""], "dice %": ["1.5 (-1 to 4)", "-"], "change": ["-0.1", "+0.2"], "none": ["-", "nan"], "cases": ["3 of 4", "ct-a"]}
    table = Printed.plain(pd.DataFrame(columns, index=["liver", "mean"]), "Both")
    assert table.markdown().splitlines()[3] == "| --- | --- | ---: | ---: | ---: | --- |"
    assert r"\begin{tabular}{llrrrl}" in table.latex()


def test_latex_has_booktabs_and_escapes(small):
    text = small.latex()
    assert r"\begin{tabular}{lrr}" in text
    assert [rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [True] * 3
    assert r"one & \textbf{50 (40 to 60)} & 1 \\" in text
    assert r"two \& more & \textit{49} & 2 \\" in text
    assert r"Dice \% & a|b\_c \\" in text
    assert r"\caption{A caption of 100 \%. Bold: the best." in text
    assert text.count("{") == text.count("}")


def test_csv_and_notebook(small, tmp_path):
    (tmp_path / "t.csv").write_text(small.csv())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv", index_col=0, dtype=str), small.cells)
    page = small.styled().to_html()
    assert "font-weight: bold" in page
    assert "font-style: italic" in page
    assert "A caption of 100 %.<br>Bold: the best." in page
    assert "caption-side: bottom" in page, "a table is not looked for below its notes"


def test_a_table_without_marks_explains_none():
    assert "Bold" not in Printed.plain(pd.DataFrame({"a": ["1"]}), "Plain").markdown()

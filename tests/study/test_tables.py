"""Result tables against means made by hand: absent classes, missed and spurious structures, order, Markdown."""

import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from homelib.run.folder import Run
from homelib.run.metrics import EMPTY_RULE
from homelib.study.demo_report import print_dice
from homelib.study.tables import best_median_worst, dice_table, distance_table, in_words, means, to_markdown
from homelib.study.tables_report import run_tables

NAN = float("nan")
VOXELS = {"liver": 1000, "spleen": 200, "kidneys": 0, "aorta": 50}
DICE = {  # method -> Dice by class; the kidneys are not in the reference
    "MambaHoME": {"liver": 0.8, "spleen": 0.5, "kidneys": 0.0, "aorta": 0.2},  # it finds kidneys where there are none
    "untrained network": {"liver": 0.1, "spleen": 0.0, "kidneys": NAN, "aorta": 0.0},
    "all background": {"liver": 0.0, "spleen": 0.0, "kidneys": NAN, "aorta": 0.0},
}


def rows(dice: dict = DICE, *, role: str = "test", case: str = "ct-c", origin: str = "UNSTATED") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "case": case,
                "method": method,
                "label_origin": origin,
                "class": name,
                "metric": "dice",
                "value": value,
                "unit": "1",
                "reference_voxels": VOXELS[name],
                "predicted_voxels": 7,
                "role": role,
            }
            for method, values in dice.items()
            for name, value in values.items()
        ]
    )


@pytest.fixture
def metrics() -> pd.DataFrame:
    """Test and train rows, with distances of the network in between that no Dice table may count."""
    test, train = rows(), rows({"MambaHoME": {"liver": 0.9, "spleen": 0.7, "kidneys": NAN, "aorta": 0.5}}, role="train", case="ct-a", origin="MODEL")
    distances = rows({"MambaHoME": {"liver": 3.0, "spleen": 9.0, "kidneys": 400.0, "aorta": 400.0}}).assign(metric="hd95", unit="mm")
    distances["predicted_voxels"] = [900, 100, 30, 0]
    nowhere = distances.iloc[:1].assign(**{"class": "stomach", "value": NAN, "reference_voxels": 0, "predicted_voxels": 0})
    return pd.concat([test, distances, nowhere, train], ignore_index=True)


def test_what_is_printed_of_a_run_says_what_its_numbers_mean_and_what_a_mean_hides(metrics, tmp_path, capsys):
    """On the command line and in every form: definition, rule, counts by method."""
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    (tmp_path / "settings.json").write_text("{}")
    print_dice(Run(tmp_path), Console(width=500))
    out = capsys.readouterr().out
    counted = "3 in the references, 0 missed, 1 spurious"
    expected = [
        "dice [1]: 2 |P and R| / (|P| + |R|) (higher is better, best 1, worst 0)",
        f"Empty masks: {EMPTY_RULE}",
        f"Structures: MambaHoME: {counted}; untrained network: {counted}; all background: {counted}.",
    ]
    assert [line for line in out.splitlines() if line.startswith(("dice [", "Empty", "Structures"))][:3] == expected
    test, train = run_tables(tmp_path)
    assert list(test.notes) == expected
    assert train.notes[-1] == f"Structures: {counted}."
    assert all(line in test.markdown() for line in expected)


def test_dice_is_in_percent_by_class_and_method_in_the_order_of_the_rows(metrics):
    table = dice_table(metrics, role="test")
    assert list(table.index) == ["liver", "spleen", "kidneys", "aorta", "mean"]
    assert list(table.columns) == ["label origin", "reference voxels", "MambaHoME", "untrained network", "all background"]
    assert table.loc["liver", "MambaHoME"] == pytest.approx(80)
    assert table.loc["liver", "untrained network"] == pytest.approx(10)
    assert table.loc["aorta", "MambaHoME"] == pytest.approx(20)


def test_an_absent_class_has_no_number_and_leaves_the_mean_alone(metrics):
    table = dice_table(metrics, role="test")
    assert np.isnan(table.loc["kidneys", "untrained network"])
    assert table.loc["mean", "MambaHoME"] == pytest.approx((80 + 50 + 0 + 20) / 4)  # found where it is not: zero, and counted
    assert table.loc["mean", "untrained network"] == pytest.approx(10 / 3)
    assert table.loc["mean", "all background"] == 0


def test_a_class_that_no_method_has_a_number_for_stays_in_the_table_in_its_place(metrics):
    table = dice_table(metrics, role="train")
    assert list(table.index) == ["liver", "spleen", "kidneys", "aorta", "mean"]
    assert np.isnan(table.loc["kidneys", "MambaHoME"])
    assert table.loc["mean", "MambaHoME"] == pytest.approx((90 + 70 + 50) / 3)


def test_a_class_that_only_a_later_method_has_a_number_for_keeps_its_place():
    dice = {"first": {"liver": NAN, "spleen": 0.5}, "second": {"liver": 0.0, "spleen": 0.25}}
    assert list(dice_table(rows(dice), role="test").index) == ["liver", "spleen", "mean"]


def test_roles_are_kept_apart_and_say_where_their_labels_come_from(metrics):
    test, train = (dice_table(metrics, role=role) for role in ("test", "train"))
    assert train.loc["liver", "MambaHoME"] == pytest.approx(90)
    assert list(train.columns) == ["label origin", "reference voxels", "MambaHoME"]
    assert test["label origin"].tolist() == ["UNSTATED"] * 4 + [""]
    assert train["label origin"].tolist() == ["MODEL"] * 4 + [""]


def test_reference_voxels_are_whole_numbers_with_their_sum(metrics):
    assert dice_table(metrics, role="test")["reference voxels"].tolist() == [1000, 200, 0, 50, 1250]
    assert dice_table(metrics, role="test")["reference voxels"].dtype == int


def test_distances_count_missed_and_spurious_structures(metrics):
    table = distance_table(metrics, role="test")
    assert table["HD95 mm"].dropna().to_dict() == {"liver": 3.0, "spleen": 9.0, "kidneys": 400.0, "aorta": 400.0}
    assert table["missed"].to_dict() == {"liver": False, "spleen": False, "kidneys": False, "aorta": True, "stomach": False}
    assert table["spurious"].to_dict() == {"liver": False, "spleen": False, "kidneys": True, "aorta": False, "stomach": False}
    assert table["predicted_voxels"].tolist() == [900, 100, 30, 0, 0]


def test_means_by_role_case_and_method(metrics):
    table = means(metrics).set_index(["role", "method"])
    assert table.loc[("test", "MambaHoME"), "mean Dice %"] == pytest.approx(37.5)
    assert table.loc[("test", "untrained network"), "mean Dice %"] == pytest.approx(10 / 3)
    assert table.loc[("train", "MambaHoME"), "mean Dice %"] == pytest.approx(70)
    assert table.loc[("train", "MambaHoME"), "label_origin"] == "MODEL"
    assert len(table) == 4


def test_means_keep_runs_apart(metrics):
    better = metrics.assign(value=metrics["value"] / 2)
    table = means(pd.concat({"a-to-c": metrics, "c-to-a": better}, names=["run"]).reset_index(level=0)).set_index(["run", "role", "method"])
    assert table.loc[("a-to-c", "test", "MambaHoME"), "mean Dice %"] == pytest.approx(37.5)
    assert table.loc[("c-to-a", "test", "MambaHoME"), "mean Dice %"] == pytest.approx(18.75)
    assert len(table) == 8


def test_the_mean_of_the_table_is_the_mean_of_means(metrics):
    table, mean = dice_table(metrics, role="test"), means(metrics).query("role == 'test'").set_index("method")["mean Dice %"]
    for method, value in mean.items():
        assert table.loc["mean", method] == pytest.approx(value)


def test_markdown_by_hand():
    table = pd.DataFrame({"label origin": ["MODEL", ""], "voxels": [1000, 1250], "MambaHoME": [80.04, NAN]}, index=pd.Index(["liver", "mean"], name="class"))
    assert to_markdown(table).splitlines() == [
        "| class | label origin | voxels | MambaHoME |",
        "| --- | --- | ---: | ---: |",
        "| liver | MODEL | 1000 | 80.0 |",
        "| mean |  | 1250 | nan |",
    ]
    assert "| 80.040 |" in to_markdown(table, digits=3)


def test_a_result_table_in_markdown_has_one_line_a_class(metrics):
    lines = to_markdown(dice_table(metrics, role="test")).splitlines()
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {7}  # six columns
    assert lines[-1] == "| mean |  | 1250 | 37.5 | 3.3 | 0.0 |"


def test_best_median_and_worst_are_chosen_by_the_mean_without_the_background():
    values = {"a": 0.1, "b": 0.9, "c": 0.5, "d": NAN, "background": 1.0}
    rows = pd.DataFrame([{"case": "x", "class": name, "metric": "dice", "value": value} for name, value in values.items()])
    assert best_median_worst(rows, by="class") == {"best": "b", "median": "c", "worst": "a"}
    assert best_median_worst(rows, by="case") == {"best": "x", "median": "x", "worst": "x"}


def test_a_table_of_sentences_is_whole_and_set_to_the_left():
    page = in_words(pd.DataFrame({"remedy": ["word " * 100] * 100})).to_html()
    assert page.count("word " * 100) == 100
    assert [bool(re.search(rf"#T_\w+\s+{cell} \{{\s+text-align: left", page)) for cell in ("th", "td")] == [True, True]

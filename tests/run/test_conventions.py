"""The same rows under the conventions of others, against those others' own code where it is here, and by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric

from homelib.errors import UserError
from homelib.run.conventions import CONVENTIONS, averaged, convention_of
from homelib.run.evaluate import evaluate
from homelib.run.metrics import FULL

NAMES = ("background", "liver", "pdac")


def rows_of(volumes):
    tables = [
        evaluate(P, R, spacing_mm=(1, 1, 2), class_names=NAMES, case=f"c{i}", method="m", label_origin="REF", metrics=FULL, background=True)
        for i, (P, R) in enumerate(volumes)
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def volumes():
    """Five cases: all there, pdac missed, pdac spurious, pdac in neither, liver missed."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(5):
        R = np.zeros((12, 12, 12), np.uint8)
        R[2:7, 2:8, 3:7], R[8:11, 8:11, 8:11] = 1, 2
        made.append([np.roll(R, tuple(rng.integers(0, 2, 3)), (0, 1, 2)), R])
    made[1][0][made[1][0] == 2] = 0
    made[2][1][made[2][1] == 2] = 0
    for volume in made[3]:
        volume[volume == 2] = 0
    made[4][0][made[4][0] == 1] = 0
    return made


@pytest.fixture(scope="module")
def rows(volumes):
    return rows_of(volumes)


def total(rows, name, metric, **about):
    table = averaged(rows, convention_of(name, **about))
    return table[(table["metric"] == metric) & (table["class"] == "mean")]["value"].item()


@pytest.mark.filterwarnings("ignore")
def test_monais_convention_is_what_its_metrics_return(volumes, rows):
    dice, distance = DiceMetric(include_background=False), HausdorffDistanceMetric(include_background=False, percentile=95)
    for pair in volumes:
        one_hot = [torch.nn.functional.one_hot(torch.from_numpy(volume).long(), 3).movedim(-1, 0)[None] for volume in pair]
        dice(*one_hot)
        distance(*one_hot, spacing=[1, 1, 2])
    assert total(rows, "monai", "dice") == pytest.approx(dice.aggregate().item(), abs=1e-5)
    assert total(rows, "monai", "hd95") == pytest.approx(distance.aggregate().item(), abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_monai_calls_a_prediction_of_nothing_perfect_and_ours_does_not(volumes):
    empty = rows_of([(np.zeros_like(R), R) for _, R in volumes])
    assert total(empty, "monai", "hd95") == 0
    assert total(empty, "own", "hd95") == pytest.approx(np.linalg.norm([12, 12, 24]))
    assert total(empty, "own", "dice") == 0


def test_missed_spurious_and_absent_structures_by_hand(rows):
    dice = rows[rows["metric"] == "dice"].pivot(index="case", columns="class", values="value")
    liver, pdac = dice["liver"].to_numpy(), dice["pdac"].to_numpy()
    assert liver[4] == pdac[1] == pdac[2] == 0
    assert np.isnan(pdac[3])
    assert total(rows, "own", "dice") == total(rows, "nnunet", "dice") == pytest.approx((liver.mean() + np.nanmean(pdac)) / 2)
    assert total(rows, "segmamba", "dice") == pytest.approx((liver.mean() + np.nan_to_num(pdac).mean()) / 2)
    assert total(rows, "brats", "dice") == pytest.approx((liver.mean() + np.nan_to_num(pdac, nan=1).mean()) / 2)
    assert total(rows, "paper", "dice") == total(rows, "own", "dice")
    assert total(rows, "paper", "dice", data_set="panorama") == pytest.approx(np.nanmean([*liver, *pdac]))
    feta = (dice["background"].mean() + liver.mean() + np.nanmean(pdac)) / 3
    assert total(rows, "paper", "dice", data_set="feta_2022") == pytest.approx(feta)
    pooled = rows[rows["metric"] == "hd95_pooled"].pivot(index="case", columns="class", values="value")
    counted = np.where([False, True, True, True, False], 50, pooled["pdac"])
    assert total(rows, "segmamba", "hd95") == pytest.approx((np.where([False] * 4 + [True], 50, pooled["liver"]).mean() + counted.mean()) / 2)
    assert "hd95" not in set(averaged(rows, CONVENTIONS["nnunet"])["metric"])


@pytest.mark.parametrize("data_set", [None, "feta_2022"])
def test_the_papers_hd95_is_over_the_cases_that_have_the_class(data_set, rows):
    """Its Eq. 22 and 23: surface voxels, each counting alike; a spurious structure has no part in it, a missed one counts as ours."""
    table = rows[rows["metric"] == "hd95_voxels"].pivot(index="case", columns="class", values="value")
    liver, pdac = table["liver"].to_numpy(), table["pdac"].to_numpy()
    expected = (liver.mean() + pdac[[0, 1, 4]].mean()) / 2  # spurious in case 2, nowhere in case 3
    assert total(rows, "paper", "hd95", data_set=data_set) == pytest.approx(expected)
    assert expected < total(rows, "own", "hd95")


@pytest.mark.parametrize("name", [*CONVENTIONS, "paper"])
def test_every_table_has_its_counts(name, rows):
    table = averaged(rows, convention_of(name)).query("metric == 'dice'").set_index("class")
    assert table.loc["pdac", ["references", "missed", "spurious"]].tolist() == [3, 1, 1]
    assert table.loc["mean", ["references", "missed", "spurious"]].tolist() == [8, 2, 1]


def test_what_cannot_be_is_one_line(rows):
    with pytest.raises(UserError, match="found 'monia', expected one of own, monai"):
        convention_of("monia")
    with pytest.raises(UserError, match="no rows of the class background"):
        averaged(rows[rows["class"] != "background"], convention_of("paper", data_set="feta_2022"))
    with pytest.raises(UserError, match="no rows of the metric hd95_pooled"):
        averaged(rows[rows["metric"] == "dice"], CONVENTIONS["segmamba"])

"""Association beside knock-outs, by hand."""

import numpy as np
import pandas as pd
import pytest

from homelib.study.specialists import over_seeds, specialists

LAYER = {"stage": 0, "block": 0, "level": 1}


def lifts(rows):
    return pd.DataFrame([LAYER | dict(zip(("seed", "class", "expert", "lift", "p"), row, strict=True)) for row in rows])


def changes(rows, what="expert"):
    told = [LAYER | {"what": what} | dict(zip(("seed", "class", "expert", "change"), row, strict=True)) for row in rows]
    return pd.DataFrame(told).assign(scan_low=-0.5, scan_high=0.5)


LIFT = lifts(
    [
        (0, "liver", 0, 1.2, 0.01),
        (0, "liver", 1, 3.0, 0.01),
        (0, "liver", 2, 9.0, 0.60),  # by chance
        (0, "spleen", 0, 0.2, 0.01),  # beyond chance, but away from the class
        (0, "spleen", 1, 1.5, 0.30),
        (0, "background", 2, 4.0, 0.01),
        (1, "liver", 2, 2.0, 0.01),
    ]
)
KNOCKOUT = pd.concat(
    [
        changes([(0, "liver", 0, -0.1), (0, "liver", 1, -0.6), (0, "liver", 2, 0.3), (0, "background", 2, -0.9)]),
        changes([(1, "liver", 0, -0.4), (1, "liver", 1, 0.0), (1, "liver", 2, -0.1)]),
        changes([(0, "liver", -1, -0.9)], what="level"),
    ]
)


def test_the_expert_that_goes_with_a_class_is_put_beside_the_others():
    found = specialists(LIFT, KNOCKOUT).set_index(["seed", "class"])
    assert list(found.index) == [(0, "liver"), (1, "liver")]
    assert found["expert"].tolist() == [1, 2]
    assert found["own"].tolist() == [-0.6, -0.1]
    assert found["others"].tolist() == pytest.approx([0.1, -0.2])
    assert found["excess"].tolist() == pytest.approx([-0.7, 0.1])


def test_one_network_needs_no_seed():
    found = specialists(LIFT[LIFT["seed"] == 0].drop(columns="seed"), KNOCKOUT[KNOCKOUT["seed"] == 0].drop(columns="seed"))
    assert found[["class", "expert"]].to_numpy().tolist() == [["liver", 1]]


def test_where_nothing_is_beyond_chance_there_are_no_specialists():
    assert specialists(LIFT.assign(p=0.5), KNOCKOUT).empty


def test_seeds_weigh_alike_however_many_rows_they_have():
    table = pd.DataFrame({"seed": [0, 0, 0, 1, 2], "class": "liver", "excess": [1.0, 2.0, 3.0, 4.0, 6.0]})
    found = over_seeds(table, "excess", by=["class"]).iloc[0]
    assert found["seeds"] == 3
    assert found["excess"] == pytest.approx(4.0)
    assert (found["low"] + found["high"]) / 2 == pytest.approx(4.0)
    assert found["high"] - found["excess"] == pytest.approx(4.302653 * 2 / np.sqrt(3), rel=1e-5)

"""The table of parity says what the reference cases say, and sees a network that is not the authors'."""

import numpy as np
import pytest

from homelib import UserError
from homelib.network.home import HoME
from homelib.study import parity


@pytest.fixture(scope="module")
def table():
    return parity.parity_table()


def test_every_case_is_met_within_its_tolerance(table):
    assert list(table.index) == [*parity.LAYERS, parity.NETWORK]
    assert (table["parameters"] == table["theirs"]).all()
    assert (table[["error of y", "error of dx"]] <= parity.TOLERANCE).all(axis=None)
    assert table.loc[parity.NETWORK, "class"] == "MambaHoME"


def test_a_network_that_is_not_the_authors_is_seen(monkeypatch):
    """Names and shapes are right, the layer computes something else."""
    monkeypatch.setattr(parity, "LAYERS", ("home_layer_even",))
    monkeypatch.setattr(parity, "NETWORK", "home_layer_ragged")
    own = HoME._local
    monkeypatch.setattr(HoME, "_local", lambda self, slots, mean: own(self, slots, mean) + 0.1)
    wrong = parity.parity_table()
    assert (wrong[["error of y", "error of dx"]] > 10 * parity.TOLERANCE).all(axis=None)


def test_the_error_is_the_largest_over_the_largest_value():
    assert parity.largest_error(np.array([1.0, -4.0]), np.array([1.0, -5.0])) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="expected"):
        parity.largest_error(np.zeros(2), np.zeros(3))


def test_a_case_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"^reference case: found 'nothing', expected one of dynamic_tanh"):
        parity.Case.read("nothing")


def test_without_the_cases_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("homelib.paths.__file__", str(tmp_path / "homelib" / "paths.py"))
    with pytest.raises(UserError, match="tests/data/reference/ is neither"):
        parity.Case.read("gsc")

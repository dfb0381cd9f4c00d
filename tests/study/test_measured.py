"""What is shown of kept results is what stands in them."""

import json

import pytest

from homelib.errors import UserError
from homelib.study import measured


def test_the_intervals_are_those_of_the_file(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    runs = [{"network": "UNet", "direction": "a-to-c", "role": "test", "seed": seed, "dice": 0.4, "parameters": 500_000, "steps": 850} for seed in (0, 1)]
    over = [{"direction": "a-to-c", "role": "test", "network": "UNet", "seeds": 2, "dice": 0.4, "half_width": 0.05}]
    (tmp_path / "results" / "three_seeds.json").write_text(json.dumps({"runs": runs, "over_seeds": over}))
    monkeypatch.setattr(measured, "shipped", lambda name: tmp_path)
    (row,) = measured.networks_over_seeds().to_dict("records")
    assert row == {"direction": "a-to-c", "patient": "never seen", "network": "UNet", "M parameters": 0.5, "steps": 850, "seeds": 2} | {
        "Dice %": pytest.approx(40), "low": pytest.approx(35), "high": pytest.approx(45)
    }  # fmt: skip


def test_results_that_are_not_there_are_one_line_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "shipped", lambda name: tmp_path)
    with pytest.raises(UserError, match=r"three_seeds\.json: not there.*python -m benchmarks\.three_seeds"):
        measured.networks_over_seeds()

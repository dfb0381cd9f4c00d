"""Costs: FLOPs against counts by hand, parameters, and the growth of the layers against the paper's formulas."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from homelib import HoME, MambaMixer, ModelConfig
from homelib.config import override, preset
from homelib.network.order import groups_of
from homelib.network.scan import backends
from homelib.network.scan.flops import STATE, TOKEN, scan_flops
from homelib.study import complexity as module
from homelib.study.complexity import complexity, exponents, measured
from homelib.study.costs import arm_costs, costs_of, forward_flops, parameter_count, probe
from homelib.study.grids import Grid


@pytest.fixture(autouse=True)
def _scan_is_there():
    """A counter knows of the operators that are there when it begins."""
    backends.resolve("numba")


def counted(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_home_are_those_of_its_products():
    """Two a multiplication and addition; N tokens in G groups, M slots each, n = G M of them in all."""
    d, K, E1, S, E2, N = 12, 16, 2, 2, 4, 64
    G, M = N // K, E1 * S
    n, h = G * M, int(d * 2 * 2 / 3)
    expert = 2 * d * 2 * h + 2 * h * d
    level_1 = 2 * G * d * M * d + 2 * N * M * d + 2 * N * M * d + n * expert + 2 * G * d  # slot embeddings, logits, slots, experts, group gate
    level_2 = 2 * n // E2 * d * E2 * d + 3 * 2 * n * n * d + n * expert  # slot embeddings; logits, dispatch and combine; experts
    read = 2 * N * M * d
    layer = HoME(d, group_size=K, experts_local=E1, slots_per_expert=S, experts_global=E2)
    assert counted(lambda: layer(torch.zeros(1, N, d))) == level_1 + level_2 + read


def test_flops_of_mamba_include_its_scan():
    d, N, L = 16, 4, 50
    mixer = MambaMixer(d, state_dim=N)
    inner, rank = 2 * d, 1
    products = 2 * L * (d * 2 * inner + inner * (rank + 2 * N) + rank * inner + inner * d)
    found = counted(lambda: mixer(torch.zeros(1, L, d)))
    scan = scan_flops((1, inner, L), N)
    assert scan == inner * L * (STATE * N + TOKEN)
    convolution = 2 * inner * 4 * (L + 3)  # both sides are padded where no gradient is wanted
    assert found == products + scan + convolution


def test_a_scans_backward_pass_is_counted_too():
    mixer = MambaMixer(16, state_dim=4)
    x = torch.zeros(1, 50, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        mixer(x).sum().backward()
    names = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    forward = next(flops for op, flops in names.items() if "selective_scan" in op and "backward" not in op)
    backward = next(flops for op, flops in names.items() if "selective_scan" in op and "backward" in op)
    assert 2 < backward / forward < 4


def test_what_is_counted_without_memory_is_what_a_real_pass_counts(smoke):
    from homelib.run.checkpoint import build_network

    for changes in ({}, {"model.group_order": "hilbert"}, {"model.home": "equations"}, {"network": "SegMamba"}):
        settings = override(smoke, changes)
        network = build_network(settings).eval()
        x = torch.zeros(1, 1, *settings.data.patch_voxels)
        assert forward_flops(settings) == counted(lambda: network(x)) > 0  # noqa: B023
        assert parameter_count(settings) == sum(p.numel() for p in network.parameters())
        with torch.no_grad():
            assert network(x).isfinite().all()  # nothing of the count is left behind
    assert type(groups_of("hilbert", (16, 16, 16), 64)) is torch.Tensor


@pytest.mark.long
def test_the_first_count_of_a_process_knows_the_scan_too():
    code = "from homelib.config import preset; from homelib.study.costs import forward_flops as f; print(f(preset('smoke')), f(preset('smoke')))"
    first, second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert int(first) == int(second) > 0


def test_the_papers_network_is_counted_in_no_memory():
    settings = override(preset("paper"), {"data.patch_voxels": [32, 32, 32]})
    found = costs_of({"paper": settings}).loc["paper"]
    assert round(found["parameters M"], 3) == 170.128
    assert found["GFLOPs"] > 10


def test_a_grids_costs_are_a_row_an_arm(smoke):
    grid = Grid(name="g", question="q", profile="smoke", arms={"a": {}, "b": {"network": "SegMamba"}})
    table = arm_costs(grid)
    assert list(table.index) == ["a", "b"]
    assert (table.loc["a"] > table.loc["b"]).all()


@pytest.mark.slow
def test_a_probe_measures_a_step(smoke):
    found = probe(smoke)
    assert found["seconds a step"] > 0
    assert found["peak GiB"] > 0


# ---------------------------------------------------------------- growth

CONFIG = ModelConfig(
    channels=(8, 8, 8, 8), group_size=(64, 64, 64, 64), experts_local=(2, 2, 2, 2), experts_global=(4, 4, 4, 4), slots_per_expert=1, state_dim=2
)


def test_growth_is_told_beside_the_papers_formula():
    table = complexity(CONFIG, [256, 512, 1024])
    assert list(table["layer"]) == ["Mamba"] * 3 + ["HoME"] * 3
    assert set(table["stage"]) == {0}
    assert (table["seconds"] > 0).all()
    home = table[table["layer"] == "HoME"].set_index("tokens")
    assert home.loc[1024, "formula"] == 16 * (2 + 4) * 64 * 8
    assert home.loc[1024, "level_1_scores"] == 1024 * 2
    assert home.loc[1024, "level_2_scores"] == (16 * 2) ** 2
    grown = exponents(table).set_index("layer")
    assert grown["formula"].tolist() == pytest.approx([1, 1])
    assert grown.loc["Mamba", "kept_mib"] == pytest.approx(1, abs=0.1)
    assert grown.loc["HoME", "kept_mib"] > 1


def test_what_was_measured_is_read_with_its_machine_and_nothing_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEASURED", tmp_path / "complexity.json")
    assert measured() is None
    table = complexity(CONFIG, [64, 128])
    kept = {"machine": {"cpu": "some CPU"}, "about": "stage 0", "rows": table.to_dict("records")}
    (tmp_path / "complexity.json").write_text(json.dumps(kept))
    found, title = measured()
    assert title == "stage 0, some CPU"
    assert found.equals(table)


def test_the_slope_of_a_known_power_is_found():
    table = complexity(CONFIG, [64, 128])
    table["seconds"] = table["tokens"] ** 1.5
    assert exponents(table)["seconds"].tolist() == pytest.approx([1.5, 1.5])
    assert math.isfinite(exponents(table)["kept_mib"].iloc[0])

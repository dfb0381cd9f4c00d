"""Grids: from a YAML file to runs; what is wrong with one is a line; the shipped ones are the paper's tables, with the parameters that it prints."""

import hashlib
import json

import pytest
import torch

from homelib import UserError
from homelib.config import override, preset
from homelib.data.manifest import load_manifest
from homelib.network.summary import stage_table
from homelib.network.unet import MambaHoME
from homelib.study.grids import LATER, WITHOUT_EFFECT, Grid, fingerprint, list_grids, load_grid
from homelib.study.paper_tables import paper_rows

HEAD = "name: mine\nquestion: which?\nprofile: smoke\n"


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(HEAD + text)
        return path

    return write


def test_a_grid_is_every_arm_with_every_seed_and_fold(written):
    grid = load_grid(written("arms: {one: {}, two: {training.steps: 9}}\nseeds: [3, 5]\nfolds: [a-to-c, c-to-a]\nchanges: {training.batch_size: 2}\n"))
    runs = grid.runs()
    assert [run.name for run in runs[:4]] == ["one_seed3_a-to-c", "two_seed3_a-to-c", "one_seed3_c-to-a", "two_seed3_c-to-a"]
    assert [(run.arm, run.seed, run.fold) for run in runs[4:6]] == [("one", 5, "a-to-c"), ("two", 5, "a-to-c")]
    assert len(runs) == len({run.name for run in runs}) == len({run.fingerprint for run in runs}) == 8
    assert runs[1].changes == {"training.batch_size": 2, "training.steps": 9, "training.seed": 3}
    settings = override(preset("smoke"), runs[1].changes)
    assert settings == grid.settings("two", seed=3)
    assert (settings.training.steps, settings.training.batch_size, settings.training.seed) == (9, 2, 3)
    assert grid.compared_with == "one"


def test_an_arms_own_change_wins(written):
    grid = load_grid(written("arms: {one: {training.steps: 2}}\nchanges: {training.steps: 7}\n"))
    assert grid.settings("one").training.steps == 2


def test_a_fingerprint_is_of_what_decides_the_result():
    start = preset("smoke")
    loggers = {"training.loggers": ["csv", "tensorboard"]}
    for without_effect in ({"training.workers": 2}, {"model.scan_backend": "blocked"}, {"training.accelerator": "cpu"}, loggers):
        assert fingerprint(override(start, without_effect)) == fingerprint(start)
    for change in ({"training.seed": 1}, {"training.steps": 9}, {"model.gsc": "product"}, {"network": "SegMamba"}, {"prediction.overlap": 0.25}):
        assert fingerprint(override(start, change)) != fingerprint(start)
    assert fingerprint(override(start, {"training.loss": "dice"})) != fingerprint(start)
    assert len({fingerprint(start), fingerprint(start, fold=0), fingerprint(start, fold=1), fingerprint(start, data=("amos_ct",))}) == 4


def test_a_setting_that_is_younger_than_committed_results_has_no_part_in_a_fingerprint_at_its_default():
    start = preset("smoke")
    tree = start.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    for part, names in LATER.items():
        for name in names:
            del tree[part][name]
    before = {"settings": tree, "fold": "a-to-c", "data": ()}
    assert fingerprint(start, fold="a-to-c") == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arms: {a: {model.slots: 3}}", r"arms\.a: model\.slots: no such field; did you mean model\.slots_per_expert\?"),
        ("arms: {a: {model.home: slot}}", r"arms\.a: model\.home: found 'slot'; Input should be"),
        ("arms: {a: {model.mixer: none, model.scan_direction: both}}", r"arms\.a: model\.scan_direction: found 'both' with mixer 'none'"),
        ("arms: {a: {}, b: {}}", r"arms\.b: has the settings of a, expected others"),
        ("arms: {}", r"arms: found \{\}; Dictionary should have at least 1 item"),
        ("arms: {A b: {}}", r"arms\.A b\.\[key\]: found 'A b'"),
        ("arms: {a: {}, a: {}}", r"found the key 'a' twice"),
        ("arms: {a: {}}\nfolds: [x]", r"folds: found \['x'\], expected a-to-c and c-to-a, for the grid names no data set"),
        ("arms: {a: {}}\ndata: [amos_ct]\nfolds: [a-to-c]", r"folds: found \['a-to-c'\], expected numbers of folds"),
        ("arms: {a: {}}\nseeds: [1, 1]", r"seeds: found \[1, 1\], expected each once"),
        ("arms: {a: {}}\nsede: [0]", r"sede: no such field; did you mean seeds\?"),
        ("arms: {a: {training.seed: 1}}", r"arms\.a: training\.seed: set by the grid's seeds and folds"),
        ("arms: {a: {}}\nbaseline: b", r"baseline: found 'b', expected one of the arms a"),
        ("arms: {a: {}}\npaper: {T5: {b: x}}", r"paper\.T5: found 'b', expected one of the arms a"),
        ("arms: [a]", r"arms: found \['a'\]; Input should be a valid dictionary"),
        ("arms: {a: *b}", r"found .*, expected plain YAML"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_line(text, told, written):
    path = written(text)
    with pytest.raises(UserError, match=rf"^{path}(, line \d+)?: {told}") as caught:
        load_grid(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_grid_tells_the_nearest(tmp_path, written):
    with pytest.raises(UserError, match=r"^grid 'expert' is unknown; nearest: experts"):
        load_grid("expert")
    with pytest.raises(UserError, match=r"none\.yaml: no such file; expected a grid \(\.yaml\)\. Shipped ones: .*experts"):
        load_grid(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"name: found 'mine', expected 'other', the name of the file"):
        load_grid(written("arms: {a: {}}", name="other"))


# ---------------------------------------------------------------- the shipped ones


@pytest.mark.parametrize("name", list_grids())
def test_a_shipped_grid_is_whole(name):
    grid = load_grid(name)
    assert len(grid.seeds) >= 3
    assert grid.compared_with in grid.arms
    runs = grid.runs()
    assert len({run.name for run in runs}) == len(runs) == len(grid.arms) * len(grid.seeds) * max(1, len(grid.folds))
    for table, rows in grid.paper.items():
        assert set(rows.values()) <= set(paper_rows(table)["row"])
    for name in grid.data:
        assert load_manifest(name).epochs or "training.steps" in grid.changes, "it would be trained for the preset's steps, and nothing would say so"
        assert bool(grid.folds) == bool(load_manifest(name).split.folds)


def test_what_the_paper_and_its_lack_name_is_an_arm_somewhere():
    arms = {name: load_grid(name).arms for name in list_grids()}
    assert arms["pretraining"] == {"scratch": {}, "pretrained": {"training.init_from": "$PRETRAINED"}}
    assert {"dice-alone", "entropy-alone", "batch-dice", "balanced", "deep-supervision"} <= set(arms["training"])


def test_the_laptop_grids_note_says_where_groups_and_slots_come_to_their_end():
    grid = load_grid("laptop-tables")
    tables = {arm: stage_table((settings := grid.settings(arm)).model, settings.data.patch_voxels) for arm in grid.arms}
    assert {table.loc[3, "tokens N"] for table in tables.values()} == {24}
    assert {table.loc[3, "groups G"] for table in tables.values()} == {1}
    assert {arm for arm, table in tables.items() if table.loc[2, "groups G"] == 1} == {"groups-twice"}
    more = {}
    for arm, table in tables.items():
        if over := table[table["slots a group M"] > table["group size K"]][["slots a group M", "group size K"]].values.tolist():
            more[arm] = over
    double = {arm: [[192, 64]] for arm in ("experts-equal", "experts-many-double")}
    assert more == double | {"experts-many-equal": [[192, 128], [256, 64]], "slots-8": [[128, 64]], "groups-half": [[64, 32]]}
    for arm, over in more.items():
        assert arm in grid.notes
        assert all(f"{slots} to {tokens}" in grid.notes for slots, tokens in over)


def millions(grid: Grid, arm: str) -> float:
    """With the 16 classes of AMOS, as the released code has them."""
    with torch.device("meta"):
        network = MambaHoME(grid.settings(arm).model.model_copy(update={"out_channels": 16}))
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("experts", {"double": 170.128, "equal": 277.783, "many-double": 359.251, "many-equal": 366.627}),  # the paper prints 367.0 for the last
        ("slots", {"s1": 152.8, "s2": 158.6, "s4": 170.1, "s8": 193.2}),
        ("groups", {"k1024": 170.128, "k2048": 170.128, "k2048-equal": 277.783, "k4096": 170.128}),
    ],
)
def test_parameters_are_the_papers(name, expected):
    grid = load_grid(name)
    for arm, wanted in expected.items():
        assert millions(grid, arm) == pytest.approx(wanted, abs=0.0005 if wanted * 10 % 1 else 0.05)


def test_the_laptop_grid_has_the_arms_of_tables_5_to_8_and_controls():
    grid = load_grid("laptop-tables")
    assert grid.profile == "laptop"
    assert set(grid.paper) == {"T5", "T6", "T7", "T8"}
    for table in ("T5", "T7", "T8"):
        assert set(grid.paper[table].values()) == set(paper_rows(table)["row"])
    controls = {"no-home", "no-mamba", "neither", "level-1-alone", "mlp", "equations", "over-tokens", "blocks", "gsc-product", "gsc-none"}
    assert controls <= set(grid.arms)

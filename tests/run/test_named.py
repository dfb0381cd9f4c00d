"""What the numbers in references mean where nobody says it, and that it is told."""

import json

import pytest

from homelib.data.manifest import load_manifest
from homelib.errors import UserError
from homelib.run.named import meaning

DEMO = load_manifest("demo_ct")


@pytest.fixture
def folders(tmp_path):
    """Predictions with the label map of the demo's classes, and references."""
    P, R = tmp_path / "p", tmp_path / "r"
    P.mkdir()
    R.mkdir()
    write_map(P, DEMO.class_names)
    return P, R


def write_map(folder, names):
    (folder / "labels.json").write_text(json.dumps(dict(enumerate(names))))


def write_record(folder, *data):
    (folder / ".predicted.json").write_text(json.dumps({"by": {}, "inputs": {}, "data": data}))


def test_references_are_those_of_the_data_set_that_was_predicted_for(folders):
    write_record(folders[0], "demo_ct")
    found = meaning(*folders, data=None)
    assert (found.manifest, found.class_names) == (DEMO, DEMO.class_names)
    assert found.told.startswith(f"References: raw labels of demo_ct, which {folders[0]} was predicted for.")
    one = meaning(folders[0] / "a.nii.gz", folders[1] / "a.nii.gz", data=None)  # of one file out of the folder too
    assert one.manifest == DEMO
    named = meaning(*folders, data="demo_ct")
    assert (named.manifest, named.told) == (DEMO, "")


def test_references_with_a_label_map_hold_its_indices_by_name(folders):
    write_record(folders[0], "demo_ct")
    write_map(folders[1], ("background", *reversed(DEMO.class_names[1:])))
    found = meaning(*folders, data=None)
    assert found.manifest is None
    assert found.class_names == DEMO.class_names
    assert found.reference_names == ("background", *reversed(DEMO.class_names[1:]))
    assert found.told == f"References: class indices, by {folders[1] / 'labels.json'}."
    write_map(folders[1], ("background", "lever"))
    with pytest.raises(UserError, match=r"labels\.json: found the classes lever, expected those of the predictions, bone, muscle"):
        meaning(*folders, data=None)


def test_without_any_word_the_assumption_is_told(folders):
    found = meaning(*folders, data=None)
    assert (found.manifest, found.class_names) == (None, DEMO.class_names)
    assert found.told.startswith("References: read as class indices (1 bone, 2 muscle, 3 liver, ")
    beside = meaning(folders[0] / "a.nii.gz", folders[0] / "a_reference.nii.gz", data=None)  # the predictions' own map is not the references'
    assert beside.told == found.told


@pytest.mark.parametrize(("data", "words"), [(("demo_ct", "demo_mr_spine"), "a network of demo_ct and demo_mr_spine"), (("/gone.yaml",), "cannot be read")])
def test_a_data_set_that_is_not_clear_must_be_given(data, words, folders):
    write_record(folders[0], *data)
    with pytest.raises(UserError, match=f"--data: found none.*{words}"):
        meaning(*folders, data=None)
    assert meaning(*folders, data="demo_ct").manifest == DEMO

"""The footer of a table of results: counts of one case and class count once, however many metrics they have."""

import pandas as pd

from homelib.run.footer import footer, structures, wrapped


def rows(method: str, *pairs: tuple[int, int], metrics=("dice", "hd95")) -> list[dict]:
    """A case a pair of reference and predicted voxels of the one class liver."""
    return [
        {"method": method, "case": str(case), "class": name, "metric": metric, "reference_voxels": reference, "predicted_voxels": predicted}
        for case, (reference, predicted) in enumerate(pairs)
        for metric in metrics
        for name in ("background", "liver")
    ]


def test_structures_are_counted_by_method_and_once():
    table = pd.DataFrame(rows("a", (9, 9), (9, 0), (0, 3), (0, 0)) + rows("b", (9, 9), (9, 9), (0, 0), (0, 0), metrics=("dice",)))
    assert structures(table) == "Structures: a: 2 in the references, 1 missed, 1 spurious; b: 2 in the references, 0 missed, 0 spurious."
    assert structures(table[table["method"] == "a"]) == "Structures: 2 in the references, 1 missed, 1 spurious."
    assert structures(table.drop(columns="method").head(4)) == "Structures: 1 in the references, 0 missed, 0 spurious."


def test_a_footer_defines_what_is_shown_and_has_the_rule():
    lines = footer(pd.DataFrame(rows("a", (9, 9))), ["hd95", "nsd_2mm"], rule="as others have it.")
    assert [line.split(" ")[0] for line in lines] == ["hd95", "nsd_2mm", "Empty", "Structures:"]
    assert lines[2] == "Empty masks: as others have it."


def test_printed_lines_are_broken_between_words_and_not_within():
    told = wrapped(["Empty masks: one of them empty.", "hd95_voxels"], width=13)
    assert told.splitlines() == ["Empty masks:", "one of them", "empty.", "hd95_voxels"]

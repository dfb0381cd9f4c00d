"""Figures of routing: every panel, colour, mark, ribbon and number is the one that was handed in, at the place it was planted."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

from homelib import UserError
from homelib.run.outputs import write_volume
from homelib.study.expert_maps import RoutingMaps
from homelib.view import in_3d, plots, routed, routing, routing_charts, routing_page
from homelib.view.routed import Routed

NAMES = ("background", "liver", "spleen", "inferior_vena_cava")
SPACING_MM = (2.0, 3.0, 5.0)  # three different ones: a mix-up shows
SHAPE = (30, 24, 20)


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(-175, 250, SHAPE)


@pytest.fixture
def label():
    """Class 1 in a block, 2 and 3 in a voxel each, on the slices x = 7, y = 11, z = 13."""
    label = np.zeros(SHAPE, int)
    label[5:10, 8:14, 10:16] = 1
    label[7, 11, 13], label[7, 11, 12], label[7, 12, 13], label[6, 11, 13] = 2, 3, 3, 3
    return label


def shares(n: int, seed: int) -> np.ndarray:
    """(n, D, H, W), summing to one."""
    weights = np.random.default_rng(seed).uniform(size=(n, *SHAPE))
    return weights / weights.sum(0)


@pytest.fixture
def maps():
    return shares(5, 1)


@pytest.fixture
def case(image, label) -> Routed:
    """Three experts with two slots each at level 1, four experts at level 2."""
    slots = shares(6, 2)
    experts = {(0, 1, 1): slots.reshape(3, 2, *SHAPE).sum(1), (0, 1, 2): shares(4, 3)}
    groups = {(0, 1): np.arange(6 * 8 * 10).reshape(6, 8, 10) // 20}
    return Routed("Case x", image, experts, SPACING_MM, (-175, 250), {(0, 1): slots}, groups, label, NAMES)


def drawn(figure) -> np.ndarray:
    """The page as RGB."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def panels(figure) -> list:
    """Axes that show a picture; not colour bars."""
    return [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]


def legend_entries(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def shown_in(ax, number: int = -1) -> np.ndarray:
    return np.asarray(ax.images[number].get_array(), float)


# ---------------------------------------------------------------- what is handed in


def test_arrays_that_do_not_fit_the_image_are_refused(image, label):
    def made(**changes):
        return Routed(**{"name": "x", "image": image, "experts": {(0, 0, 1): shares(2, 0)}, "spacing_mm": SPACING_MM, "limits": (0, 1)} | changes)

    made(label=label, slots={(0, 0): shares(4, 0)})
    wrong = np.zeros((2, 5, 5, 5))
    for changes, told in (
        ({"experts": {}}, "x: found no maps of experts"),
        ({"experts": {(0, 0, 1): wrong}}, r"x, experts\(0, 0, 1\): found shape \(2, 5, 5, 5\), expected \(n, 30, 24, 20\)"),
        ({"slots": {(0, 0): wrong}}, r"x, slots\(0, 0\): found shape"),
        ({"slots": {(0, 0): shares(3, 0)}}, r"x, slots\(0, 0\): found 3 slots and 2 experts at level 1"),
        ({"slots": {(1, 0): shares(4, 0)}}, r"x, slots\(1, 0\): found 4 slots and no map of experts at level 1"),
        ({"label": label[1:]}, r"x, label: found shape \(29, 24, 20\), expected \(30, 24, 20\)"),
    ):
        with pytest.raises(UserError, match=told):
            made(**changes)


def test_a_place_that_was_not_traced_is_named_with_those_that_were(case):
    assert case.weights((0, 1, 2)).shape[0] == 4
    assert case.top((0, 1, 1)) == case.experts[0, 1, 1].max()
    with pytest.raises(UserError, match=r"found no maps of stage, block, level \(2, 0, 1\); there are \(0, 1, 1\), \(0, 1, 2\)"):
        case.weights((2, 0, 1))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_entropy_by_hand(dtype):
    weights = np.array([[1, 0.25, 0.5], [0, 0.25, 0.5], [0, 0.25, 0], [0, 0.25, 0]], dtype)
    np.testing.assert_allclose(routed.entropy(weights), [0, 1, 0.5], atol=1e-3)
    assert routed.entropy(np.ones((1, 3))).tolist() == [0, 0, 0]


def test_the_centre_of_a_class_lies_in_it_where_its_centre_of_mass_does_not():
    label = np.zeros((9, 9, 3), int)
    label[0, :, 1] = label[8, :, 1] = label[:, 0, 1] = 2  # a U
    label[4, 4, 1] = 1
    assert routed.centre_of(label, 1) == (4, 4, 1)
    assert label[routed.centre_of(label, 2)] == 2
    assert routed.centre_of(label, 2) == (4, 0, 1)
    with pytest.raises(UserError, match="found no voxel of class 3, expected one of 0, 1, 2"):
        routed.centre_of(label, 3)


@pytest.mark.parametrize("experts", [1, 8, 32])
def test_experts_have_colours_of_their_own(experts):
    colours = routed.expert_colours(experts)
    assert len({to_hex(colour) for colour in colours}) == len(colours) == experts


def test_saved_maps_are_shown_as_they_are(image, label, tmp_path):
    slots, groups = shares(6, 2).astype(np.float16), np.arange(image.size).reshape(SHAPE).astype(np.int32) // 40 - 1
    experts = {(0, 1, 1): shares(3, 1).astype(np.float16), (0, 1, 2): shares(4, 3).astype(np.float16), (1, 0, 2): shares(2, 4).astype(np.float16)}
    about = {"name": "x", "class_names": NAMES, "modality": "MRI", "data_set": "mine", "limits": (-3.0, 7.0)}
    made = RoutingMaps(image, label.astype(np.uint8), SPACING_MM, np.eye(4), experts, {(0, 1): slots, (1, 0): slots}, {0: groups, 1: groups + 1}, **about)
    case = Routed.of(RoutingMaps.load(made.save(tmp_path / "maps.npz")), name="y")
    assert (case.name, case.limits, case.class_names, case.spacing_mm) == ("y", (-3, 7), NAMES, SPACING_MM)
    assert list(case.experts) == list(experts)
    assert list(case.slots) == [(0, 1)], "stage 1's experts of level 1 are not there, so that its slots are nobody's"
    assert {place: shown.max() for place, shown in case.groups.items()} == {(0, 1): groups.max(), (1, 0): groups.max() + 1}
    np.testing.assert_array_equal(case.label, label)


def test_a_viewer_in_3d_has_the_scan_and_the_label_over_it(image, tmp_path):
    files = [write_volume(np.asarray(volume, np.float32), np.eye(4), tmp_path / f"{name}.nii.gz") for name, volume in (("scan", image), ("over", image > 0))]
    viewer = in_3d.in_3d(*files)
    shown = [(volume.name, volume.colormap, volume.opacity) for volume in viewer.volumes]
    assert shown == [("scan.nii.gz", "", 1), ("over.nii.gz", "actc", 0.4)]
    assert "application/vnd.jupyter.widget-view+json" in viewer._repr_mimebundle_()[0]
    with pytest.raises(UserError, match=r"nowhere\.nii\.gz: no such file; expected a NIfTI file"):
        in_3d.in_3d(files[0], tmp_path / "nowhere.nii.gz")


def test_the_page_goes_through_the_class_and_expert_that_say_most_of_each_other(case):
    case.groups[0, 1] = np.zeros(SHAPE, int)
    tables = {
        "use": pd.DataFrame(
            {"stage": 0, "block": 1, "level": [1, 1, 1, 2, 2, 2, 2], "expert": [0, 1, 2, 0, 1, 2, 3], "weight": [0.2, 0.5, 0.3, 0.1, 0.2, 0.6, 0.1]}
        ),
        "lift": pd.DataFrame(
            {
                "stage": 0,
                "block": 1,
                "level": [1, 1, 1, 2, 2],
                "class": ["background", "spleen", "liver", "liver", "spleen"],
                "expert": [1, 2, 0, 3, 0],
                "lift": [9.0, 2.0, 1.0, 3.0, 50.0],
                "weight": [0.5, 0.4, 0.3, 0.3, 1e-4],  # the highest lift of all is of an expert that is hardly used
                "voxels": [9000, 10, 300, 300, 10],
            }
        ),
    }
    found = dict(routing_page.pictures(case, tables))
    assert list(found)[:3] == [
        "stage 0, block 1, level 1: three planes through spleen, expert 2",
        "stage 0, block 1, level 1: experts in axial slice 13",
        "stage 0, block 1, level 1: lift by class",
    ]
    planes, experts, _ = list(found.values())[:3]
    assert [line[0].get_ylabel() for line in np.array(panels(planes)).reshape(3, 5)] == ["axial, slice 13", "coronal, slice 11", "sagittal, slice 7"]
    assert "entropy (1: even)" in [ax.get_title() for ax in panels(planes)]
    assert "groups (colours repeat)" in [ax.get_title() for ax in panels(experts)]
    assert list(found)[3] == "stage 0, block 1, level 2: three planes through liver, expert 3"
    bare = dict(routing_page.pictures(case, {"use": tables["use"]}))
    assert list(bare)[2] == "stage 0, block 1, level 2: three planes through the middle, expert 2", "the busiest"
    assert len(bare) == 4


# ---------------------------------------------------------------- three planes, a montage, groups


def test_planes_go_through_the_centre_of_the_class(case, image, label):
    figure = routing.planes_through(case, (0, 1, 1), expert=2, about=2, title="seed 0")
    drawn(figure)
    grid = np.array(panels(figure)).reshape(3, 5)
    at, weights = {"axial": 13, "coronal": 11, "sagittal": 7}, case.experts[0, 1, 1]
    assert [ax.get_title() for ax in grid[0]] == ["scan and label", "winning expert", "weight of expert 2", "entropy (1: even)", "groups of one window"]
    for line, (plane, index) in zip(grid, at.items(), strict=True):
        assert line[0].get_ylabel() == f"{plane}, slice {index}"
        assert np.array_equal(shown_in(line[0], 0), plots.slice_of(image, plane, index))
        assert line[0].collections, "outlines"
        assert np.array_equal(shown_in(line[1]), plots.slice_of(weights.argmax(0), plane, index))
        assert np.array_equal(shown_in(line[2]), plots.slice_of(weights[2], plane, index))
        assert line[2].images[-1].get_clim() == (0, weights.max())
        np.testing.assert_allclose(shown_in(line[3]), plots.slice_of(routed.entropy(weights), plane, index), rtol=1e-6)
        assert line[3].images[-1].get_clim() == (0, 1)
    assert "Case x, stage 0, block 1, level 1, through the centre of spleen; seed 0" == figure.get_suptitle()
    assert legend_entries(figure) == ["liver", "spleen", "inferior vena cava"]


def test_planes_go_through_a_voxel_and_do_without_label_and_groups(image):
    case = Routed("bare", image, {(1, 0, 2): shares(1, 0)}, SPACING_MM, (-175, 250))
    figure = routing.planes_through(case, (1, 0, 2), expert=0, at=(3, 4, 5))
    drawn(figure)
    grid = np.array(panels(figure)).reshape(3, 4)
    assert [line[0].get_ylabel() for line in grid] == ["axial, slice 5", "coronal, slice 4", "sagittal, slice 3"]
    assert not figure.legends
    middle = routing.planes_through(case, (1, 0, 2), expert=0)
    assert [line[0].get_ylabel() for line in np.array(panels(middle)).reshape(3, 4)] == ["axial, slice 10", "coronal, slice 12", "sagittal, slice 15"]


def test_an_expert_that_is_not_there_is_one_line(case):
    with pytest.raises(UserError, match=r"Case x, expert: found 9, expected 0 to 2, those of stage, block, level \(0, 1, 1\)"):
        routing.planes_through(case, (0, 1, 1), expert=9)
    with pytest.raises(UserError, match=r"expert: found -1, expected 0 to 3"):
        routing.montage(case, (0, 1, 2), expert=-1)


def test_groups_in_the_scan_are_shown_where_their_window_is(image):
    groups = np.full(SHAPE, -1)
    groups[10:14, 8:12, 4:8] = np.arange(8).repeat(8).reshape(4, 4, 4)
    case = Routed("x", image, {(0, 0, 1): shares(2, 0)}, SPACING_MM, (0, 1), groups={(0, 0): groups})
    figure = routing.planes_through(case, (0, 0, 1), expert=0, at=(11, 9, 5))
    drawn(figure)
    for ax, (plane, index) in zip(np.array(panels(figure)).reshape(3, 5)[:, 4], {"axial": 5, "coronal": 9, "sagittal": 11}.items(), strict=True):
        shown = ax.images[-1].get_array()
        assert np.array_equal(~np.ma.getmaskarray(shown), plots.slice_of(groups >= 0, plane, index))
        assert (~np.ma.getmaskarray(shown)).sum() == 16


def test_a_line_is_drawn_wherever_one_group_ends_and_nowhere_else():
    groups = np.array([[0, 0, 1], [0, 2, 1]]).T[:, ::-1][::-1, :, None]  # as a slice shows it: 0 0 1 above 0 2 1
    figure, ax = plt.subplots()
    routing.show_groups(ax, groups, "axial", 0)
    (lines,) = ax.collections
    assert np.array_equal(plots.slice_of(groups, "axial", 0), [[0, 0, 1], [0, 2, 1]])
    assert sorted(np.array(lines.get_segments()).tolist()) == sorted(
        [[[1.5, -0.5], [1.5, 0.5]], [[0.5, 0.5], [1.5, 0.5]], [[0.5, 0.5], [0.5, 1.5]], [[1.5, 0.5], [1.5, 1.5]]]
    )


@pytest.mark.parametrize("expert", [None, 1])
def test_a_montage_goes_from_end_to_end_of_the_label(case, expert):
    figure = routing.montage(case, (0, 1, 1), expert=expert, plane="coronal", slices=4, title="seed 0")
    drawn(figure)
    shown = panels(figure)
    assert [ax.get_title() for ax in shown] == ["slice 8", "slice 10", "slice 11", "slice 13"]
    case.label[:, 20:] = 255  # no class is known there: it does not lengthen the way
    assert [ax.get_title() for ax in panels(routing.montage(case, (0, 1, 1), expert=expert, plane="coronal", slices=4))] == [ax.get_title() for ax in shown]
    weights = case.experts[0, 1, 1]
    for ax, index in zip(shown, (8, 10, 11, 13), strict=True):
        assert np.array_equal(shown_in(ax), plots.slice_of(weights.argmax(0) if expert is None else weights[expert], "coronal", index))
    names = ["liver", "spleen", "inferior vena cava"]
    assert legend_entries(figure) == ([f"expert {e}" for e in range(3)] + names if expert is None else names)


def test_a_montage_of_a_scan_without_a_label_goes_from_end_to_end_of_it(image):
    case = Routed("bare", image, {(0, 0, 1): shares(2, 0)}, SPACING_MM, (-175, 250))
    figure = routing.montage(case, (0, 0, 1), plane="sagittal", slices=7)
    assert [ax.get_title() for ax in panels(figure)] == [f"slice {index}" for index in (0, 5, 10, 14, 19, 24, 29)]


def test_solids_show_the_label_and_the_expert_that_wins_on_its_surface(image):
    label = np.zeros(SHAPE, int)
    label[5:25, 5:20, 5:15], label[0, 0, 0] = 1, 255
    first = np.zeros(SHAPE)
    first[15:] = 1  # expert 0 on the patient's right, expert 1 on the left
    case = Routed("x", image, {(0, 0, 1): np.stack([first, 1 - first])}, SPACING_MM, (0, 1), label=label, class_names=NAMES)
    figure = routing.solid_experts(case, (0, 0, 1), title="seed 0")
    drawn(figure)
    plain, coloured = (ax.images[0].get_array() for ax in figure.axes[:2])
    row = coloured.shape[0] // 2
    np.testing.assert_allclose(plain[row, [8, 21]], [to_rgb(plots.CLASS_COLOURS[1])] * 2)
    left, right = coloured[row, 8], coloured[row, 21]  # of the picture: the patient's right is on the left
    blue, red = (np.array(to_rgb(colour)) for colour in routed.expert_colours(2))
    np.testing.assert_allclose((left, right), (blue, red), atol=1e-6)
    assert legend_entries(figure) == ["expert 0", "expert 1", "liver", "spleen", "inferior vena cava"]
    with pytest.raises(UserError, match="x: found no label"):
        routing.solid_experts(Routed("x", image, {(0, 0, 1): shares(2, 0)}, SPACING_MM, (0, 1)), (0, 0, 1))


# ---------------------------------------------------------------- tables


def lifts(**columns) -> pd.DataFrame:
    rows = {("liver", 0): 2.0, ("liver", 1): 0.5, ("spleen", 0): 1.0, ("spleen", 1): 1.2}
    return pd.DataFrame([{"class": c, "expert": e, "lift": v} for (c, e), v in rows.items()]).assign(**columns)


def framed(ax) -> set:
    return {(round(box.get_x() + 0.46), round(box.get_y() + 0.44)) for box in ax.patches}


def test_a_lift_beyond_its_own_band_is_framed_and_no_other():
    figure = routing_charts.lift_matrix(lifts(low=[0.5, 0.6, 0.9, 0.5], high=[1.5, 1.5, 1.1, 1.3]), title="Lift")
    drawn(figure)
    assert framed(figure.axes[0]) == {(0, 0), (1, 0)}  # column, row: 2 above 1.5, 0.5 below 0.6
    assert "framed: beyond its permutation band" in figure.axes[0].get_xlabel()
    assert "*" not in figure.axes[0].get_xlabel()


def test_a_lift_with_a_small_p_has_a_star():
    ax = routing_charts.lift_matrix(lifts(low=0.9, high=1.1, p=[0.01, 0.2, 1.0, 0.049]), title="Lift").axes[0]
    assert [text.get_text() for text in ax.texts] == ["2.00*", "0.50", "1.00", "1.20*"]
    assert framed(ax) == {(0, 0), (1, 0), (1, 1)}


def test_without_a_band_nothing_is_framed():
    ax = routing_charts.lift_matrix(lifts(), title="Lift").axes[0]
    assert not framed(ax)
    assert ax.get_xlabel() == "expert\nnumbers: lift"


@pytest.fixture
def use():
    rows = [
        (step, stage, e, share)
        for step, *all_ in ((0, 0.5, 0.5, 0.2, 0.3, 0.5), (100, 0.9, 0.1, 0.1, 0.1, 0.8))
        for (stage, e), share in zip(((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)), all_, strict=True)
    ]
    return pd.DataFrame(rows, columns=["step", "stage", "expert", "share"])


def test_utilisation_has_a_panel_a_stage_and_a_curve_an_expert(use):
    figure = routing_charts.utilisation_curves(use, title="Use")
    drawn(figure)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("stage 0", "stage 1")
    assert [line.get_ydata().tolist() for line in second.lines[:3]] == [[0.2, 0.1], [0.3, 0.1], [0.5, 0.8]]
    assert second.lines[0].get_xdata().tolist() == [0, 100]
    assert [list(line.get_ydata()) for line in (first.lines[-1], second.lines[-1])] == [[1 / 2] * 2, [1 / 3] * 2], "the same for all"
    assert [text.get_text() for text in second.texts] == ["0", "1", "2"]


def test_utilisation_tells_block_and_level_apart_and_takes_another_column(use):
    table = pd.concat([use.assign(block=0, level=level) for level in (1, 2)]).rename(columns={"share": "weight"})
    figure = routing_charts.utilisation_curves(table, title="Use", share="weight")
    drawn(figure)
    assert [ax.get_title() for ax in figure.axes if ax.axison] == [f"stage {s}, block 0, level {level}" for s in (0, 1) for level in (1, 2)]


def test_names_at_the_ends_of_curves_lie_apart_in_the_order_of_the_curves():
    shares = [0.1, 0.1, 0.1, 0.3, 0.101, 0.299]
    table = pd.DataFrame([{"step": step, "stage": 0, "expert": e, "share": share} for step in (0, 10) for e, share in enumerate(shares)])
    ax = routing_charts.utilisation_curves(table, title="Use").axes[0]
    heights = [text.xy[1] for text in ax.texts]
    assert np.diff(sorted(heights)).min() >= 0.05 * max(shares)
    assert heights[4] > max(heights[:3])
    assert heights[3] > heights[5] > heights[4]
    assert np.mean(heights) == pytest.approx(np.mean(shares)), "as many moved down as up"


def test_of_many_curves_the_largest_are_named():
    shares = np.linspace(0.01, 0.2, 20)
    table = pd.DataFrame([{"step": step, "stage": 0, "expert": e, "share": share} for step in (0, 10) for e, share in enumerate(shares)])
    ax = routing_charts.utilisation_curves(table, title="Use").axes[0]
    assert len(ax.lines) == 21
    assert [text.get_text() for text in ax.texts] == [str(e) for e in range(8, 20)]


def test_lifts_over_training_have_a_panel_a_class_and_a_curve_an_expert():
    table = pd.concat([lifts().assign(step=0), lifts().assign(step=100, lift=[4.0, 0.0, 1.0, 1.0])])
    table = pd.concat([table, table.assign(**{"class": "background", "lift": 1.0})])
    figure = routing_charts.lift_curves(table, title="Lift")
    drawn(figure)
    assert [ax.get_title() for ax in figure.axes] == ["liver", "spleen"]
    liver = figure.axes[0]
    np.testing.assert_allclose([line.get_ydata() for line in liver.lines[:2]], [[1, 2], [-1, np.log2(1e-3)]])
    assert list(liver.lines[2].get_ydata()) == [0, 0], "no association"
    assert [text.get_text() for text in liver.texts] == ["0", "1"]


def test_bits_over_training_have_a_panel_a_level_and_a_curve_a_layer():
    rows = [(step, stage, block, level, step / 100 + stage + level) for step in (0, 100) for stage, block in ((0, 0), (1, 0), (1, 1)) for level in (1, 2)]
    figure = routing_charts.information_curves(pd.DataFrame(rows, columns=["step", "stage", "block", "level", "bits"]), title="Bits")
    drawn(figure)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("level 1", "level 2")
    assert [line.get_ydata().tolist() for line in second.lines] == [[2, 3], [3, 4], [3, 4]]
    assert [text.get_text() for text in first.texts] == ["stage 0, block 0", "stage 1, block 0", "stage 1, block 1"]


# ---------------------------------------------------------------- the flow of a token


def widths(ax) -> list[tuple[float, float, float]]:
    """Of every ribbon: where it begins, its width there, its width at the end."""
    found = []
    for patch in ax.patches:
        if hasattr(patch, "get_path") and type(patch).__name__ == "PathPatch":
            v = patch.get_path().vertices
            found.append((round(float(v[0, 0])), float(v[0, 1] - v[7, 1]), float(v[3, 1] - v[4, 1])))
    return found


def test_ribbons_are_as_wide_as_the_weights(case):
    figure = routing_charts.token_flow(case, 0, 1, at=(7, 11, 13), title="seed 0")
    drawn(figure)
    ax, beside = figure.axes
    slots, ribbons = case.slots[0, 1][:, 7, 11, 13], widths(ax)
    for begins in (0, 1):  # from the token to the slots, and on to the experts
        found = [ribbon[1:] for ribbon in ribbons if ribbon[0] == begins]
        np.testing.assert_allclose(found, np.stack([slots, slots], 1), rtol=1e-6)
    told = {text.get_text() for text in ax.texts}
    assert {f"expert {e}  {share:.2f}" for e, share in enumerate(case.experts[0, 1, 1][:, 7, 11, 13])} <= told
    np.testing.assert_allclose([bar.get_width() for bar in beside.patches], case.experts[0, 1, 2][:, 7, 11, 13])
    assert figure.get_suptitle() == "Case x, stage 0, block 1: voxel (7, 11, 13) (spleen); seed 0"


def test_a_voxel_of_which_no_class_is_known_is_called_so(case):
    case.label[1, 2, 3] = 255
    figure = routing_charts.token_flow(case, 0, 1, at=(1, 2, 3))
    assert figure.get_suptitle() == "Case x, stage 0, block 1: voxel (1, 2, 3) (no class)"


def test_ribbons_end_inside_the_expert_that_has_their_slots(case):
    ax = routing_charts.token_flow(case, 0, 1, at=(1, 2, 3)).axes[0]
    bars = [box.get_bbox() for box in ax.patches if type(box).__name__ == "Rectangle"]
    experts = bars[-3:]
    ends = [
        (patch.get_path().vertices[4, 1], patch.get_path().vertices[3, 1])
        for patch in ax.patches
        if type(patch).__name__ == "PathPatch" and patch.get_path().vertices[0, 0] > 0.9
    ]
    for m, (low, high) in enumerate(ends):
        assert experts[m // 2].y0 - 1e-9 <= low <= high <= experts[m // 2].y1 + 1e-9
    edges = sorted((box.y0, box.y1) for box in experts)
    assert all(end < start for (_, end), (start, _) in zip(edges, edges[1:], strict=False)), "experts lie apart"


def test_without_slots_ribbons_go_to_the_experts(image):
    case = Routed("bare", image, {(0, 0, 1): shares(3, 0)}, SPACING_MM, (0, 1))
    figure = routing_charts.token_flow(case, 0, 0, at=(1, 2, 3))
    drawn(figure)
    (ax,) = figure.axes
    np.testing.assert_allclose([ribbon[1] for ribbon in widths(ax)], case.experts[0, 0, 1][:, 1, 2, 3])
    with pytest.raises(UserError, match=r"\(1, 0, 1\)"):
        routing_charts.token_flow(case, 1, 0, at=(1, 2, 3))


# ---------------------------------------------------------------- whole slices


def test_expert_panel_has_a_picture_for_the_image_the_winner_and_every_expert(image, label, maps):
    figure = routing.expert_panel(
        image, maps, spacing_mm=SPACING_MM, limits=(-175, 250), title="Case x", plane="coronal", index=11, label=label, class_names=NAMES
    )
    drawn(figure)
    shown = panels(figure)
    assert [ax.get_title() for ax in shown] == ["image and reference", "expert with the largest weight"] + [f"expert {e}" for e in range(5)]
    assert np.array_equal(shown[0].images[0].get_array(), plots.slice_of(image, "coronal", 11))
    assert np.array_equal(shown[0].images[1].get_array().filled(0), plots.slice_of(label, "coronal", 11))
    assert np.array_equal(shown[1].images[0].get_array(), plots.slice_of(maps.argmax(0), "coronal", 11))
    for e, ax in enumerate(shown[2:]):
        assert np.array_equal(ax.images[-1].get_array(), plots.slice_of(maps[e], "coronal", 11))
        assert ax.images[-1].get_clim() == (0, maps.max()), "with many experts a scale to 1 is black"
    assert set(legend_entries(figure)) == {"liver", "spleen", "inferior vena cava"}
    assert not [ax for ax in figure.axes if ax.axison and not ax.images and not ax.collections and ax.get_label() != "<colorbar>"], "an empty panel is drawn"


def test_of_many_experts_those_with_most_of_the_slice_are_shown(image):
    maps = np.zeros((20, *SHAPE), np.float16)
    maps[3, :, :, 10], maps[17, :, :, 10], maps[5, 0, 0, 10], maps[8, :, :, 9] = 0.6, 0.3, 0.04, 1.0
    figure = routing.expert_panel(image, maps, spacing_mm=SPACING_MM, limits=(0, 1), title="Case x", index=10, most=2)
    drawn(figure)
    assert [ax.get_title() for ax in panels(figure)] == ["image", "expert with the largest weight", "expert 3", "expert 17"]
    assert figure.get_suptitle() == "Case x (2 of 20; none of the others weighs more than 0.04 here)"
    bar = next(ax for ax in figure.axes if ax.get_label() == "<colorbar>")
    assert [text.get_text() for text in bar.get_yticklabels() if text.get_text()] == ["0", "4", "8", "12", "16"]


def test_every_expert_has_a_colour_of_its_own(image, maps):
    figure = routing.expert_panel(image, maps, spacing_mm=SPACING_MM, limits=(0, 1), title="")
    picture = panels(figure)[1].images[0]
    assert len(np.unique(picture.to_rgba(np.arange(5.0)), axis=0)) == 5


def test_expert_panel_shows_the_middle_and_the_groups_when_asked(image, maps):
    groups = np.arange(image.size).reshape(image.shape) // 40
    figure = routing.expert_panel(image, maps[:2], groups, spacing_mm=SPACING_MM, limits=(0, 1), title="")
    shown = panels(figure)
    assert [ax.get_title() for ax in shown] == ["image", "expert with the largest weight", "groups (colours repeat)", "expert 0", "expert 1"]
    assert np.array_equal(shown[0].images[0].get_array(), plots.slice_of(image, "axial", 10))
    assert np.array_equal(shown[2].images[0].get_array(), plots.slice_of(groups % 8, "axial", 10))
    assert not figure.legends


def test_lift_matrix_writes_every_lift_into_its_cell():
    lifts = {("liver", 0): 2.0, ("liver", 1): 0.5, ("inferior_vena_cava", 0): 1.0, ("inferior_vena_cava", 1): 1.234}
    figure = routing_charts.lift_matrix(pd.DataFrame([{"class": c, "expert": e, "lift": v, "weight": 0.1} for (c, e), v in lifts.items()]), title="Lift")
    drawn(figure)
    ax, bar = figure.axes
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(0, 0): "2.00", (1, 0): "0.50", (0, 1): "1.00", (1, 1): "1.23"}
    np.testing.assert_allclose(ax.images[0].get_array(), np.log2([[2, 0.5], [1, 1.234]]))
    low, high = ax.images[0].get_clim()
    assert -low == high == pytest.approx(1)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["liver", "inferior vena cava"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1"]
    assert bar.get_ylabel() == "log2 lift"


def test_lift_matrix_bears_an_expert_that_a_class_never_uses():
    figure = routing_charts.lift_matrix(pd.DataFrame({"class": ["liver", "liver"], "expert": [0, 1], "lift": [0.0, 2.0]}), title="")
    drawn(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00", "2.00"]


def test_story_shows_one_slice_and_the_two_experts_that_differ_most_over_it(image, label):
    flat, some, most = (
        np.full((30, 24, 20), 0.5),
        np.random.default_rng(0).uniform(0.4, 0.6, (30, 24, 20)),
        np.random.default_rng(1).uniform(0, 1, (30, 24, 20)),
    )
    figure = routing.story(image, label, label * 0, np.stack([some, flat, most]), spacing_mm=SPACING_MM, limits=(-175, 250), class_names=NAMES, title="Case x")
    drawn(figure)
    shown = panels(figure)
    assert [ax.get_title() for ax in shown] == ["scan", "reference", "prediction", "weight of expert 2", "weight of expert 0"]
    for ax in shown:
        assert np.array_equal(ax.images[0].get_array(), plots.slice_of(image, "coronal", 11))
    assert np.array_equal(shown[1].images[1].get_array().filled(0), plots.slice_of(label, "coronal", 11))
    assert not shown[2].images[1].get_array().filled(0).any()
    assert np.array_equal(shown[3].images[1].get_array(), plots.slice_of(most, "coronal", 11))
    assert np.array_equal(shown[4].images[1].get_array(), plots.slice_of(some, "coronal", 11))
    assert shown[3].images[1].get_clim() == shown[4].images[1].get_clim() == (0, most.max())
    assert set(legend_entries(figure)) == {"liver", "spleen", "inferior vena cava"}


def test_the_first_look_shows_scan_reference_prediction_and_winner_in_three_planes(case, image, label):
    predicted, place = np.roll(label, 1, axis=0), (0, 1, 2)
    figure = routing.first_look(case, predicted, place, title="never seen")
    drawn(figure)
    lines = np.array(panels(figure)).reshape(3, 4)
    assert [ax.get_title().split(",")[0] for ax in lines[0]] == ["scan", "reference", "prediction", "winning expert"]
    winner = case.experts[place].argmax(0)
    for line, (plane, index) in zip(lines, plots.best_slices(label).items(), strict=True):
        assert line[0].get_ylabel() == f"{plane}, slice {index}"
        assert all(np.array_equal(ax.images[0].get_array(), plots.slice_of(image, plane, index)) for ax in line)
        for ax, volume in zip(line[1:3], (label, predicted), strict=True):
            assert np.array_equal(ax.images[1].get_array().filled(0), plots.slice_of(volume, plane, index))
        assert np.array_equal(line[3].images[1].get_array(), plots.slice_of(winner, plane, index))
        assert line[3].collections, "the reference's outlines"
    assert set(legend_entries(figure)) == {"liver", "spleen", "inferior vena cava", *(f"expert {e}" for e in range(4))}
    with pytest.raises(UserError, match="found no label"):
        routing.first_look(Routed("x", image, case.experts, SPACING_MM, (-175, 250)), predicted, place, title="")


def test_group_strips_shows_the_middle_of_each_plane():
    groups = (np.arange(6 * 8 * 10) // 20).reshape(6, 8, 10)
    figure = routing.group_strips(groups, title="Groups")
    drawn(figure)
    assert [ax.get_title() for ax in figure.axes] == ["axial, slice 5", "coronal, slice 4", "sagittal, slice 3"]
    for ax, plane, index in zip(figure.axes, ("axial", "coronal", "sagittal"), (5, 4, 3), strict=True):
        assert np.array_equal(ax.images[0].get_array(), plots.slice_of(groups % 8, plane, index))
        assert not ax.lines, "voxels of a feature grid have no millimetres"


def test_the_story_of_one_expert_shows_that_one(image, label):
    figure = routing.story(image, label, label, np.ones((1, *label.shape)), spacing_mm=SPACING_MM, limits=(-175, 250), class_names=NAMES, title="")
    assert [ax.get_title() for ax in figure.axes[:4]] == ["scan", "reference", "prediction", "weight of expert 0"]


def test_every_figure_function_is_tested_here():
    for module in (routing, routing_charts):
        name = module.__name__.rsplit(".", 1)[-1]
        public = {n for n, thing in vars(module).items() if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and not n.startswith("_")}
        with open(__file__, encoding="utf-8") as text:
            tested = text.read()
        assert {n for n in public - {"told", "show_winner", "show_heat", "legend"} if f"{name}.{n}(" not in tested} == set()

"""The explorer without a browser: what is chosen, the picture pixel by pixel against a loop, voxels and places, and the widgets that follow each other."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import ipywidgets
import matplotlib as mpl
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from homelib import UserError
from homelib.view import explorer_state as logic
from homelib.view.explorer import Explorer
from homelib.view.explorer_state import State
from homelib.view.plots import PLANES, class_colours, slice_of
from homelib.view.routed import Routed, expert_colours
from homelib.view.slice_canvas import bars_html, scale_html

SHAPE = (12, 10, 8)
NAMES = ("background", "liver", "spleen")


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def shares(n: int, seed: int, shape=SHAPE) -> np.ndarray:
    weights = np.random.default_rng(seed).uniform(size=(n, *shape))
    return (weights / weights.sum(0)).astype(np.float16)


def made(name: str = "ct-a", shape=SHAPE, seed: int = 0, **changes) -> Routed:
    """Stage 0 has two blocks, the first with slots and level 2; stage 1 one block of sixteen experts."""
    slots = shares(6, seed, shape)
    experts = {(0, 0, 1): slots.reshape(3, 2, *shape).sum(1), (0, 0, 2): shares(4, seed + 1, shape), (0, 1, 1): shares(3, seed + 2, shape)}
    experts[1, 0, 1] = shares(16, seed + 3, shape)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:7, 2:5], label[7, 2, shape[2] - 2] = 1, 2
    image = np.random.default_rng(seed + 4).uniform(-200, 300, shape)
    return Routed(**{"name": name, "image": image, "experts": experts, "spacing_mm": (2.0, 3.0, 5.0), "limits": (-175, 250), "slots": {(0, 0): slots},
                     "label": label, "class_names": NAMES} | changes)  # fmt: skip


@pytest.fixture
def case() -> Routed:
    return made()


# ---------------------------------------------------------------- what is chosen


def test_it_begins_at_the_first_place_in_the_slice_that_shows_most(case):
    state = logic.start([case])
    assert (state.plane, state.place, state.show) == ("axial", (0, 0, 1), "winner")
    assert (case.label[..., state.index] > 0).sum() == (case.label > 0).sum((0, 1)).max()
    bare = replace(case, label=None)
    assert logic.start([bare]).index == SHAPE[2] // 2


def test_a_choice_that_a_place_does_not_have_gives_way_to_the_nearest_that_there_is(case):
    state = logic.changed(logic.start([case]), [case], level=2, show="weight", channel=("expert", 3))
    assert (state.place, state.channel) == ((0, 0, 2), ("expert", 3))
    state = logic.changed(state, [case], block=1)
    assert (state.place, state.channel) == ((0, 1, 1), ("expert", 0)), "block 1 has no level 2 and no expert 3"
    state = logic.changed(state, [case], stage=1)
    assert state.place == (1, 0, 1)
    assert logic.changed(state, [case], stage=7).place == (0, 0, 1)


def test_a_slot_can_be_chosen_where_there_are_maps_of_slots(case):
    assert logic.channels([case], (0, 0, 1)) == [("expert", e) for e in range(3)] + [("slot", m) for m in range(6)]
    assert logic.channels([case], (0, 0, 2)) == [("expert", e) for e in range(4)]
    assert logic.channels([case], (0, 1, 1)) == [("expert", e) for e in range(3)]
    state = logic.changed(logic.start([case]), [case], channel=("slot", 4))
    assert logic.changed(state, [case], level=2).channel == ("expert", 0)


@pytest.mark.parametrize(("asked", "given"), [(-3, 0), (0, 0), (7, 7), (8, 7), (100, 7)])
def test_a_slice_is_always_one_that_the_scan_has(case, asked, given):
    assert logic.changed(logic.start([case]), [case], index=asked).index == given


def test_another_plane_goes_through_the_picked_voxel(case):
    state = logic.changed(logic.start([case]), [case], voxel=(9, 1, 3))
    assert logic.changed(state, [case], plane="sagittal").index == 9
    assert logic.changed(state, [case], plane="coronal").index == 1
    assert logic.changed(state, [case], plane="coronal", index=4).index == 4
    assert logic.changed(state, [case], show="entropy").index == state.index


def test_a_voxel_beyond_the_scan_is_brought_into_it(case):
    assert logic.changed(logic.start([case]), [case], voxel=(-1, 99, 3)).voxel == (0, 9, 3)


def test_several_cases_offer_what_all_of_them_have():
    one, other = made(), made("ct-c")
    other = replace(other, experts={(0, 0, 1): shares(2, 9), (1, 0, 1): other.experts[1, 0, 1]}, slots={})
    assert logic.places([one, other]) == [(0, 0, 1), (1, 0, 1)]
    assert logic.channels([one, other], (0, 0, 1)) == [("expert", 0), ("expert", 1)]


def test_another_grid_is_shown_at_the_same_share_of_the_way():
    one, other = made(), made("ct-c", (23, 10, 4))
    state = State("sagittal", 11, 0, 0, 1, voxel=(5, 9, 7))
    there = logic.for_case(state, other, one)
    assert (there.index, there.voxel) == (22, (10, 9, 3))
    assert logic.for_case(state, one, one) == state
    assert logic.voxel_in((10, 9, 3), other, one) == (5, 9, 7)


# ---------------------------------------------------------------- the picture


def expected(case: Routed, state: State, voxel, reach: float) -> list[int]:
    """The colour of a voxel, by hand."""
    low, high = case.limits
    grey = min(1, max(0, (case.image[voxel] - low) / (high - low)))
    weights = case.experts[state.place][(slice(None), *voxel)].astype(np.float32)
    if state.show == "winner":
        over = to_rgb(expert_colours(len(weights))[int(np.argmax(weights))])
    else:
        kind, number = state.channel
        channel = case.slots[state.place[:2]][(number, *voxel)] if kind == "slot" else weights[number]
        share = channel / reach if state.show == "weight" else -sum(w * np.log(w) for w in weights) / np.log(len(weights))
        over = mpl.colormaps[state.colours](round(255 * float(share)))[:3]
    return [round(255 * ((1 - state.opacity) * grey + state.opacity * part)) for part in over]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    "chosen",
    [{"show": "winner"}, {"show": "weight", "channel": ("expert", 2)}, {"show": "weight", "channel": ("slot", 5), "colours": "viridis"},
     {"show": "entropy", "opacity": 0.3}, {"show": "weight", "level": 2, "channel": ("expert", 3), "opacity": 1.0}],
    ids=["winner", "expert", "slot", "entropy", "level 2"],
)  # fmt: skip
def test_every_voxel_of_the_picture_has_its_colour(case, plane, chosen):
    state = logic.changed(logic.start([case]), [case], plane=plane, index=4, outline=False, **chosen)
    reach = case.top(state.place)
    picture = logic.picture(case, state, reach=reach)
    fixed = PLANES[plane][0]
    across, up = (axis for axis in range(3) if axis != fixed)
    zoom = picture.shape[0] // SHAPE[up]
    assert picture.shape == (SHAPE[up] * zoom, SHAPE[across] * zoom, 3)
    assert max(picture.shape) > logic.LONG_SIDE / 2
    for i in range(SHAPE[across]):
        for j in range(SHAPE[up]):
            voxel = [4, 4, 4]
            voxel[across], voxel[up] = i, j
            rows, columns = ((n - 1 - k) * zoom for n, k in ((SHAPE[up], j), (SHAPE[across], i)))  # the first voxel is at the right and at the bottom
            square = picture[rows : rows + zoom, columns : columns + zoom].reshape(-1, 3)
            assert (square == square[0]).all()
            np.testing.assert_allclose(square[0].astype(int), expected(case, state, tuple(voxel), reach), atol=2)


def test_a_slice_changes_the_picture_and_only_that_slice_is_read(case):
    seen = [logic.picture(case, State("coronal", index, 0, 0, 1), reach=1.0) for index in range(SHAPE[1])]
    assert len({picture.tobytes() for picture in seen}) == SHAPE[1]


def test_outlines_lie_on_the_outermost_pixels_of_each_class(case):
    state = logic.changed(logic.start([case]), [case], index=3)
    with_lines, without = (logic.picture(case, replace(state, outline=outline), reach=1.0) for outline in (True, False))
    zoom = with_lines.shape[0] // SHAPE[1]
    mask = np.kron(slice_of(case.label, "axial", 3) == 1, np.ones((zoom, zoom), bool))
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    ring = np.zeros(mask.shape, bool)
    ring[[top, bottom], left : right + 1] = ring[top : bottom + 1, [left, right]] = True
    assert np.array_equal((with_lines != without).any(-1), ring)
    assert (with_lines[ring] == np.round(255 * np.array(to_rgb(class_colours(3)[1])))).all()


def test_what_is_no_class_has_no_outline(case):
    unknown = replace(case, label=np.where(case.label == 1, 255, case.label).astype(np.uint8))
    state = logic.changed(logic.start([unknown]), [unknown], index=3)
    assert np.array_equal(logic.picture(unknown, state, reach=1.0), logic.picture(unknown, replace(state, outline=False), reach=1.0))


def test_the_picture_is_as_wide_and_tall_as_the_scan(case):
    assert [logic.size_mm(case, plane) for plane in PLANES] == [(24, 30), (24, 40), (30, 40)]


# ---------------------------------------------------------------- a voxel


@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_is_found_at_its_place_and_nowhere_else(case, plane):
    fixed = PLANES[plane][0]
    for voxel in np.ndindex(SHAPE):
        if voxel[fixed] == 5:
            state = State(plane, 5, 0, 0, 1, voxel=voxel)
            assert logic.voxel_at(case, state, *logic.place_of(case, state)) == voxel
            assert logic.place_of(case, replace(state, index=4)) is None


def test_a_corner_of_the_picture_is_a_corner_of_the_scan(case):
    state = State("axial", 5, 0, 0, 1)
    assert logic.voxel_at(case, state, 0, 0) == (11, 9, 5)  # the patient's right, and front
    assert logic.voxel_at(case, state, 1, 1) == (0, 0, 5)
    assert logic.voxel_at(case, replace(state, plane="sagittal"), 0.999, 0) == (5, 0, 7)


def test_arrow_keys_go_one_voxel_the_way_they_point_and_stop_at_the_edge(case):
    state = State("coronal", 5, 0, 0, 1, voxel=(4, 5, 3))
    assert logic.stepped(case, state, 1, 0) == (3, 5, 3)  # to the right is to the patient's left, which is a lower index
    assert logic.stepped(case, state, 0, -1) == (4, 5, 4)
    assert logic.stepped(case, replace(state, voxel=(0, 5, 7)), 1, -1) == (0, 5, 7)
    assert logic.stepped(case, replace(state, voxel=None), 0, 0) == (5, 5, 3)
    assert logic.stepped(case, replace(state, index=6), 0, 0) == (5, 6, 3), "none is picked in this slice"


def test_bars_are_the_shares_of_the_voxel(case):
    voxel = (3, 4, 2)
    found = logic.bars(case, State("axial", 2, 0, 0, 1, voxel=voxel))
    assert list(found) == ["level 1, experts", "level 1, slots", "level 2, experts"]
    for title, maps, name in (
        ("level 1, experts", case.experts[0, 0, 1], "expert"),
        ("level 1, slots", case.slots[0, 0], "slot"),
        ("level 2, experts", case.experts[0, 0, 2], "expert"),
    ):
        assert [(bar.name, bar.share) for bar in found[title]] == [(f"{name} {i}", float(share)) for i, share in enumerate(maps[(slice(None), *voxel)])]
    assert [bar.colour for bar in found["level 1, slots"]] == [expert_colours(3)[m // 2] for m in range(6)]
    assert logic.bars(case, State("axial", 2, 0, 0, 1)) == {}
    assert list(logic.bars(case, State("axial", 2, 0, 1, 1, voxel=voxel))) == ["level 1, experts"]


def test_of_many_bars_the_largest_are_shown_and_the_others_together(case):
    (found,) = logic.bars(case, State("axial", 2, 1, 0, 1, voxel=(3, 4, 2))).values()
    weights = case.experts[1, 0, 1][:, 3, 4, 2].astype(float)
    assert [bar.share for bar in found[:-1]] == sorted(weights, reverse=True)[: logic.MOST_BARS]
    assert found[-1].name == "8 others"
    assert sum(bar.share for bar in found) == pytest.approx(weights.sum())
    assert all(bar.share == weights[int(bar.name.split()[1])] for bar in found[:-1])


def test_words_tell_what_is_seen(case):
    state = State("axial", 6, 0, 0, 1, show="weight", channel=("slot", 4), voxel=(7, 2, 6))
    assert logic.told(case, state) == "ct-a: axial slice 6 of 0 to 7, weight of slot 4, stage 0, block 0, level 1"
    assert logic.told_voxel(case, state).startswith("Voxel (7, 2, 6): spleen, intensity ")
    assert logic.told_voxel(replace(case, label=np.full(SHAPE, 255, np.uint8)), state).startswith("Voxel (7, 2, 6): no class, intensity ")
    assert logic.told_voxel(replace(case, label=None), state).startswith("Voxel (7, 2, 6): intensity ")
    assert "No voxel is picked" in logic.told_voxel(case, replace(state, voxel=None))


def test_tables_and_scales_carry_names_numbers_and_colours_and_no_markup_of_a_case(case):
    state = State("axial", 2, 0, 0, 1, voxel=(3, 4, 2))
    table = bars_html("<b>told</b>", logic.bars(case, state))
    assert "&lt;b&gt;told" in table
    assert table.count("<tr>") == 3 + 6 + 4
    assert f"{float(case.experts[0, 0, 1][1, 3, 4, 2]):.3f}" in table
    assert all(colour in scale_html(state, experts=3, reach=1.0) for colour in expert_colours(3))
    assert "0.42" in scale_html(replace(state, show="weight"), experts=3, reach=0.42)
    assert "1 (even)" in scale_html(replace(state, show="entropy"), experts=3, reach=0.42)


# ---------------------------------------------------------------- the widgets


def picture_of(canvas) -> np.ndarray:
    return (255 * matplotlib.image.imread(BytesIO(canvas.png), format="png")[..., :3]).round().astype(np.uint8)


@pytest.fixture
def explorer(case, tmp_path) -> Explorer:
    return Explorer([case, made("ct-c", seed=7)], folder=tmp_path / "figures")


def test_the_canvas_shows_the_picture_of_the_state_without_loss(explorer, case):
    canvas = explorer.views[0].canvas
    for index in (0, 5, 3):
        explorer.controls["index"].value = index
        assert explorer.state.index == canvas.about["slice"] == index
        assert np.array_equal(picture_of(canvas), logic.picture(case, explorer.state, reach=case.top((0, 0, 1))))


def test_a_slice_changes_the_picture_alone(explorer):
    panel, before = explorer.views[0], {name: control.get_state() for name, control in explorer.controls.items() if name != "index"}
    said, number = (panel.scale.value, panel.table.value), panel.canvas.number
    explorer.controls["index"].value = 7 - explorer.state.index
    assert (panel.scale.value, panel.table.value) == said
    assert {name: control.get_state() for name, control in explorer.controls.items() if name != "index"} == before
    assert panel.canvas.number == number + 1, "drawn once"


def test_controls_follow_the_state_and_the_state_the_controls(explorer):
    explorer.show(plane="coronal", stage=1, show="weight", channel=("expert", 12))
    controls = explorer.controls
    assert [controls[name].value for name in ("plane", "stage", "block", "level", "show", "channel")] == ["coronal", 1, 0, 1, "weight", ("expert", 12)]
    assert (controls["index"].max, controls["index"].value) == (9, explorer.state.index)
    assert controls["block"].options == (0,)
    controls["stage"].value = 0
    assert explorer.state.place == (0, 0, 1)
    assert controls["channel"].value == ("expert", 0)
    assert controls["block"].options == (0, 1)
    controls["level"].value = 2
    assert [label for label, _ in controls["channel"].options] == [f"expert {e}" for e in range(4)]
    for name, value in {"opacity": 0.25, "outline": False, "colours": "cividis", "show": "entropy"}.items():
        controls[name].value = value
        assert getattr(explorer.state, name) == value


def test_the_slider_fits_every_plane_in_any_order(explorer):
    for plane, n in (("axial", 8), ("sagittal", 12), ("axial", 8), ("coronal", 10), ("sagittal", 12)):
        explorer.controls["plane"].value = plane
        slider = explorer.controls["index"]
        assert (slider.min, slider.max) == (0, n - 1)
        assert (explorer._play.max, explorer._play.value) == (n - 1, explorer.state.index), "in the browser it would move the slider"
        slider.value = n - 1
        assert explorer.state.index == n - 1


def test_controls_that_change_nothing_are_off(explorer):
    off = {show: [name for name in ("channel", "colours") if explorer.controls[name].disabled] for show in logic.SHOWS if explorer.show(show=show)}
    assert off == {"winner": ["channel", "colours"], "weight": [], "entropy": ["channel"]}


def send(explorer, panel: int = 0, **message) -> None:
    explorer.views[panel].canvas._handle_custom_msg(message, [])


def test_a_click_picks_the_voxel_and_shows_its_bars_and_a_cross(explorer, case):
    explorer.show(plane="axial", index=2)
    send(explorer, kind="pick", across=(SHAPE[0] - 0.5 - 3) / SHAPE[0], down=(SHAPE[1] - 0.5 - 4) / SHAPE[1])
    assert explorer.state.voxel == (3, 4, 2)
    assert explorer.views[0].canvas.about["cross"] == pytest.approx((8.5 / 12, 5.5 / 10))
    assert "Voxel (3, 4, 2): liver" in explorer.views[0].table.value
    assert f"<td>{float(case.slots[0, 0][5, 3, 4, 2]):.3f}</td>" in explorer.views[0].table.value
    send(explorer, kind="step", across=1, down=0)
    assert explorer.state.voxel == (2, 4, 2)
    send(explorer, kind="slice", by=1)
    assert explorer.state.index == explorer.controls["index"].value == 3
    assert explorer.views[0].canvas.about["cross"] is None


def test_another_case_is_shown_in_the_same_place(explorer):
    explorer.show(plane="coronal", index=6, level=2)
    explorer.views[0].chooser.value = "ct-c"
    assert explorer.panels == ("ct-c",)
    assert (explorer.state.plane, explorer.state.index, explorer.state.level) == ("coronal", 6, 2)
    other = explorer.shown[0]
    assert np.array_equal(picture_of(explorer.views[0].canvas), logic.picture(other, explorer.state, reach=other.top((0, 0, 2))))


def test_panels_side_by_side_move_together_on_grids_of_their_own(case):
    other = made("mr-a", (23, 10, 15), seed=5)
    explorer = Explorer([case, other], panels=2)
    assert explorer.panels == ("ct-a", "mr-a")
    explorer.controls["index"].value = 7
    assert [view.canvas.about["slice"] for view in explorer.views] == [7, 14]
    explorer.controls["show"].value = "entropy"
    there = logic.for_case(explorer.state, other, case)
    assert np.array_equal(picture_of(explorer.views[1].canvas), logic.picture(other, there, reach=1.0))
    place = logic.place_of(other, State("axial", 14, 0, 0, 1, voxel=(10, 9, 14)))
    send(explorer, 1, kind="pick", across=place[0], down=place[1])
    assert explorer.state.voxel == (5, 9, 7)
    assert "Voxel (5, 9, 7)" in explorer.views[0].table.value
    assert "Voxel (10, 9, 14)" in explorer.views[1].table.value


def test_a_saved_figure_overwrites_nothing(explorer, tmp_path, monkeypatch):
    class Now:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2025, 1, 2, 3, 4, 5)

    monkeypatch.setattr("homelib.view.explorer.datetime", Now)
    saved = [explorer.save() for _ in range(3)]
    assert [path.name for path in saved] == [f"routing-ct-a-axial-{explorer.state.index}-20250102-030405{number}.png" for number in ("", "-2", "-3")]
    saved[0].write_bytes(b"mine")
    explorer._save.click()
    assert saved[0].read_bytes() == b"mine"
    assert explorer._said.value == f"saved: {explorer.folder / saved[0].name.replace('.png', '-4.png')}"
    assert matplotlib.image.imread(saved[1])[..., :3].std() > 0.05
    assert {path.parent for path in saved} == {tmp_path / "figures"}


def test_a_name_with_a_slash_is_saved_in_the_folder(tmp_path):
    explorer = Explorer([made("site/../1: a")], folder=tmp_path)
    assert explorer.save().parent == tmp_path


def test_the_figure_is_what_the_canvas_shows(explorer, case):
    explorer.show(voxel=(3, 4, explorer.state.index), plane="axial")
    figure = explorer.figure()
    figure.canvas.draw()
    above, below = figure.axes
    assert [text.get_text() for text in above.texts] == list("RLAP")
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["expert 0", "expert 1", "expert 2"]
    assert np.array_equal(above.images[0].get_array(), picture_of(explorer.views[0].canvas))
    assert above.images[0].get_extent() == [0, 24, 30, 0]
    heights = [float(v) for maps in (case.experts[0, 0, 1], case.slots[0, 0], case.experts[0, 0, 2]) for v in maps[(slice(None), *explorer.state.voxel)]]
    assert sorted(bar.get_height() for bar in below.patches) == sorted(heights)
    assert below.get_ylim()[1] > 1, "shares of all panels on one scale"
    (outlines,) = figure.legends
    assert [text.get_text() for text in outlines.get_texts()] == [name.replace("_", " ") for name in case.class_names[1:]]


def test_the_figure_of_a_weight_has_its_scale(explorer, case):
    explorer.show(show="weight", channel=("slot", 1))
    assert explorer.figure().axes[2].get_ylim() == (0, case.top((0, 0, 1)))
    explorer.show(show="entropy")
    assert explorer.figure().axes[2].get_ylim() == (0, 1)


def test_every_control_is_named(explorer):
    def all_of(widget):
        for child in getattr(widget, "children", ()):
            yield child
            yield from all_of(child)

    silent = (ipywidgets.Box, ipywidgets.HTML, ipywidgets.Label)
    named = [widget for widget in all_of(explorer.widget) if not isinstance(widget, silent) and hasattr(widget, "description")]
    assert len(named) == len(explorer.controls) + 3  # and play, save, the case
    assert all(widget.description for widget in named)
    assert "axial slice" in explorer.views[0].canvas.about["told"]


def test_it_is_shown_by_the_last_line_of_a_cell(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert bundle["text/plain"].startswith("Explorer: "), "what a page without a kernel shows is a sentence"


@pytest.mark.parametrize(
    ("cases", "panels", "told"),
    [([], 1, "found 0 cases"), (["a", "a"], 1, r"found 2 cases \(a, a\) for 1 panels"), (["a"], 2, "found 1 cases"), (["a", "b"], 0, "for 0 panels")],
)
def test_cases_that_cannot_be_told_apart_or_are_too_few_are_refused(cases, panels, told):
    with pytest.raises(UserError, match=told):
        Explorer([made(name) for name in cases], panels=panels)


def test_cases_without_a_common_place_are_refused(case):
    other = replace(made("ct-c"), experts={(2, 0, 1): shares(2, 0)}, slots={})
    with pytest.raises(UserError, match="no stage, block and level that all of ct-a, ct-c have"):
        Explorer([case, other])


def test_what_the_browser_runs_is_in_the_package():
    from homelib.view import slice_canvas

    folder = Path(slice_canvas.__file__).parent
    assert slice_canvas.SliceCanvas().trait_defaults("_esm") == (folder / "slice_canvas.js").read_text(encoding="utf-8")

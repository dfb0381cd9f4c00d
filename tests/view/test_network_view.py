"""The network's figure: a box a part with its text inside, an arrow an input, from box to box."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from homelib.network.summary import flow_table
from homelib.view import network


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def flow(tiny) -> pd.DataFrame:
    return flow_table(tiny, (128, 128, 128))


@pytest.fixture
def ax(flow):
    figure = network.u_shape(flow, title="the network")
    figure.canvas.draw()
    return figure.axes[0]


def boxes(ax) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_there_is_a_box_for_every_part_and_none_lies_over_another(ax, flow):
    found = [box.get_bbox() for box in boxes(ax)]
    assert len(found) == len(flow)
    assert not [(a, b) for i, a in enumerate(found) for b in found[:i] if a.overlaps(b)]


def test_its_text_is_the_tables_and_stays_in_its_box(ax, flow):
    texts = [text for text in ax.texts if text.get_text()]
    for number, (part, row) in enumerate(flow.iterrows()):
        box, (name, told) = boxes(ax)[number].get_window_extent(), texts[2 * number : 2 * number + 2]
        assert name.get_text() == part
        assert f"{row['channels']} x {' x '.join(map(str, row['grid']))}" in told.get_text()
        assert part == "scan" or f"{row['parameters']:,} parameters" in told.get_text()
        for text in (name, told):
            extent = text.get_window_extent()
            assert box.x0 < extent.x0 < extent.x1 < box.x1, f"{part}: {text.get_text()}"
            assert box.y0 < extent.y0 < extent.y1 < box.y1, f"{part}: {text.get_text()}"
        assert name.get_window_extent().y0 > told.get_window_extent().y1


def test_an_arrow_leads_from_every_input_to_its_part(ax, flow):
    place = dict(zip(flow.index, (box.get_bbox() for box in boxes(ax)), strict=True))
    arrows = [(text.xyann, text.xy) for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    wanted = [(before, part) for part, row in flow.iterrows() for before in row["after"]]
    assert len(arrows) == len(wanted)
    for ((x0, y0), (x1, y1)), (before, part) in zip(arrows, wanted, strict=True):
        for x, y, box in ((x0, y0, place[before]), (x1, y1, place[part])):
            assert box.x0 - 1e-9 <= x <= box.x1 + 1e-9
            assert box.y0 - 1e-9 <= y <= box.y1 + 1e-9

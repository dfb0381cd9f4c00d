"""Notebook 06 in a real browser, under JupyterLab and under Voila: it runs, the slider's slice is the one that is drawn, and a click shows that voxel.

Headless Chromium; screenshots are kept in build/browser. What is drawn is read back from the page pixel by pixel and compared with the arrays that the
notebook's kernel holds.
"""

import base64
import importlib.util
import io
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell

from homelib.study.demo import demo_run, trained
from homelib.study.workbook import notebooks
from homelib.view import explorer_state as logic

WAIT = 240_000  # ms, for a notebook to run through on a busy machine

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a trained smoke run, and notebook 06 set to it; at its end the notebook writes down what its explorer was given."""
    folder = tmp_path_factory.mktemp("lab")
    trained(demo_run("smoke", folder=folder / "demo"), progress=False)
    (source,) = (path for path in notebooks() if path.stem.startswith("06"))
    notebook = nbformat.read(source, as_version=4)
    values = {"profile": "smoke", "folder": str(folder / "demo"), "viewer": True}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    told = "import os, pickle\nopen('part', 'wb').write(pickle.dumps((explorer.shown, explorer.state)))\nos.replace('part', 'seen.pickle')"
    notebook.cells.append(new_code_cell(told))
    nbformat.write(notebook, folder / "routing.ipynb")
    return folder


@pytest.fixture(autouse=True)
def not_yet_run(workplace):
    (workplace / "seen.pickle").unlink(missing_ok=True)


def drawn(page, panel: int = 0) -> tuple[int, np.ndarray]:
    """The slice that a canvas says it shows, and its pixels."""
    index, url = page.locator(".home-canvas").nth(panel).evaluate("canvas => [Number(canvas.dataset.slice), canvas.toDataURL('image/png')]")
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(url.split(",")[1])), format="png")
    return index, (255 * picture[..., :3]).round().astype(np.uint8)


def wait_for_slice(page, index: int, panel: int = 0) -> None:
    page.wait_for_function("([panel, index]) => Number(document.querySelectorAll('.home-canvas')[panel].dataset.slice) === index", arg=[panel, index])


def slider_value(page) -> int:
    return int(page.locator(".widget-slider", has_text="Slice").locator(".widget-readout").inner_text())


def drag_slider(page, share: float) -> None:
    """Take the slider's handle to a place on its line, by the mouse, in several moves."""
    slider = page.locator(".widget-slider", has_text="Slice")
    line, handle = slider.locator(".noUi-base").bounding_box(), slider.locator(".noUi-handle").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    for part in np.linspace(0, 1, 6):
        x = handle["x"] + handle["width"] / 2
        page.mouse.move(x + part * (line["x"] + share * line["width"] - x), line["y"] + line["height"] / 2)
    page.mouse.up()


def choose(page, control: str, option: str) -> None:
    page.locator(".widget-dropdown", has_text=control).locator("select").select_option(label=option)


def look_into(page, workplace: Path, picture: Path) -> None:
    """All that a person does with the explorer, each step compared with the arrays."""
    page.locator(".home-canvas").first.wait_for(timeout=WAIT)
    deadline = time.monotonic() + WAIT / 1000
    while not (workplace / "seen.pickle").exists():
        assert time.monotonic() < deadline, "the notebook did not run to its end"
        page.wait_for_timeout(200)
    cases, state = pickle.loads((workplace / "seen.pickle").read_bytes())
    page.locator(".home-canvas").first.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('.home-canvas')[1].width > 300")

    def check(state: logic.State) -> None:
        for panel, case in enumerate(cases):
            index, picture = drawn(page, panel)
            assert index == state.index
            expected = logic.picture(case, state, reach=case.top(state.place))
            assert picture.shape == expected.shape
            assert np.array_equal(picture, expected), f"panel {panel}, slice {index}"

    assert slider_value(page) == state.index
    check(state)
    first = drawn(page)[1]

    last = cases[0].image.shape[1] - 1  # coronal
    for share in (0.05, 0.9):
        drag_slider(page, share)
        page.wait_for_timeout(300)
        index = slider_value(page)
        assert abs(index - share * last) <= 1
        wait_for_slice(page, index)
        wait_for_slice(page, index, 1)
        check(replace(state, index=index))
        assert not np.array_equal(drawn(page)[1], first)

    page.locator(".widget-slider", has_text="Slice").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    index -= 1
    wait_for_slice(page, index)
    assert slider_value(page) == index
    state = replace(state, index=index)

    canvas = page.locator(".home-canvas").first
    voxel = (cases[0].image.shape[0] // 3, index, cases[0].image.shape[2] // 3)
    across, down = logic.place_of(cases[0], replace(state, voxel=voxel))
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
    page.get_by_text(f"Voxel {voxel}").first.wait_for()
    for panel, case in enumerate(cases):
        told, groups = page.locator(".home-bars").nth(panel).inner_text(), logic.bars(case, replace(state, voxel=voxel))
        assert set(groups) == {"level 1, experts", "level 1, slots", "level 2, experts"}
        for bar in (bar for group in groups.values() for bar in group):
            assert re.search(rf"{bar.name}\s+{bar.share:.3f}", told), told
    page.screenshot(path=picture, full_page=False)

    page.keyboard.press("ArrowRight")  # the canvas has the focus since it was clicked
    page.get_by_text(f"Voxel {(voxel[0] - 1, *voxel[1:])}").first.wait_for()
    page.keyboard.press("PageUp")
    wait_for_slice(page, index + 1)
    assert slider_value(page) == index + 1

    for stage in (1, 0):  # a slot of another stage, and back
        choose(page, "Stage", str(stage))
        choose(page, "Weight of", "slot 1")
        page.wait_for_timeout(500)
        check(replace(state, index=index + 1, stage=stage, channel=("slot", 1)))
    page.get_by_role("button", name="winner").click()
    page.wait_for_timeout(500)
    check(replace(state, index=index + 1, show="winner"))
    page.get_by_role("button", name="axial").click()
    wait_for_slice(page, voxel[2])
    page.wait_for_timeout(500)
    assert slider_value(page) == voxel[2], "another plane goes through the picked voxel"
    check(replace(state, plane="axial", index=voxel[2], show="winner"))
    page.get_by_role("button", name="Save figure").click()
    page.get_by_text("saved: ").wait_for()
    assert page.errors == []


def test_in_jupyterlab(jupyterlab, page, workplace, screenshot):
    with jupyterlab(workplace) as address:
        page.goto(f"{address}/doc/tree/routing.ipynb?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=WAIT)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=WAIT)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        look_into(page, workplace, screenshot("jupyterlab"))


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason='needs Voila: pip install -e ".[voila]"')
def test_under_voila(served, page, workplace, screenshot):
    with served(workplace, "voila", "routing.ipynb", "--no-browser", "--port={port}", "--Voila.ip=127.0.0.1") as address:
        page.goto(address, wait_until="domcontentloaded", timeout=WAIT)
        look_into(page, workplace, screenshot("voila"))

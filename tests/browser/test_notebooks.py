"""Every notebook in JupyterLab in a real browser, in the profile smoke: it opens without a warning, runs to its end, and its widgets respond.

Headless Chromium, one JupyterLab, one kernel at a time; the demo's folder is shared, so that 03 trains for 04, 06 and 07. Screenshots of the whole of each
are kept in build/browser. The last tests say that what is wrong would be seen.
"""

import base64
import importlib.util
import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from homelib.data.cohort import default_folder
from homelib.data.manifest import load_manifest
from homelib.study.workbook import notebooks, parameters_of

SOURCES = {path.stem: path for path in notebooks()} | {f"on_data/{path.stem}": path for path in sorted((notebooks()[0].parent / "on_data").glob("*.ipynb"))}
WIDGETS = {"04_prediction_and_evaluation": ["NiiVue"], "06_expert_routing": ["Explorer", "NiiVue"]}  # of the whole workbook
TINY = {"data.patch_voxels": [16, 16, 16], "training.steps": 2, "training.validate_every": 2, "training.augment.contrast_phase": 0}
RUN_MS, RESPONSE_MS = 600_000, 30_000  # on a busy machine
PANEL = "window.jupyterapp.shell.currentWidget"
NO_PICTURE = re.compile(r"[A-Z]\w*\((children|value|description|options|layout)=|<(Figure size|IPython\.|pandas\.|\S+ object at 0x)|(Loading|Error \w+) widget")
NORMAL = ("is not trusted", "authentication is disabled", "websocket_ping")  # said of every notebook before it was run, and of how the tests start

_spec = importlib.util.spec_from_file_location("made_sets", Path(__file__).parents[1] / "run" / "conftest.py")
made_sets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_sets)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def data(own_cache, tmp_path_factory) -> dict[str, str]:
    """Four phantoms in two folds, prepared: what the notebooks on data sets are given."""
    made = made_sets.make(tmp_path_factory.mktemp("set"), "own_ct").set
    prepared = default_folder(load_manifest(made.manifest), made.root)
    prepared.parent.mkdir(parents=True, exist_ok=True)
    prepared.symlink_to(made.prepared)
    return {made.manifest: str(made.root)}


@pytest.fixture(scope="module")
def lab(jupyterlab, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """JupyterLab's address, and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    with jupyterlab(folder) as address:
        yield address, folder


def put(name: str, folder: Path, given: dict) -> Path:
    """A copy of a notebook, set by its parameters cell."""
    notebook = nbformat.read(SOURCES[name], as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    known = parameters_of(SOURCES[name])
    cell.source += "".join(f"\n{parameter} = {value!r}" for parameter, value in given.items() if parameter in known)
    copy = folder / f"{name}.ipynb"
    copy.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, copy)
    return copy


class Opened:
    """A notebook on a page: what it holds, and what a person would find wrong with it."""

    def __init__(self, page, address: str, folder: Path, file: Path):
        self.page, self.log = page, folder / "jupyterlab.log"
        self.read = len(self.log.read_text())
        page.goto(f"{address}/doc/tree/{file.relative_to(folder)}?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=RUN_MS)
        ready = f"window.jupyterapp && {PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"
        page.wait_for_function(f"{ready} || document.querySelector('.jp-Dialog')", timeout=RUN_MS)

    def run(self) -> None:
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ranAll = true }) }")
        self.page.wait_for_function("window.ranAll", timeout=RUN_MS)
        self.page.wait_for_function(f"{PANEL}.sessionContext.session.kernel.status === 'idle'", timeout=RUN_MS)
        self.page.wait_for_function("[...document.querySelectorAll('.jp-OutputArea img')].every(image => image.complete)")
        self.page.wait_for_function("!document.querySelector('.jp-Notebook').innerText.includes('Loading widget')", timeout=RESPONSE_MS)

    def cells(self) -> list[dict]:
        cells = json.loads(self.page.evaluate(f"JSON.stringify({PANEL}.content.model.toJSON())"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def outputs(self) -> list[dict]:
        return [output for cell in self.cells() for output in cell["outputs"]]

    def widgets(self) -> list[str]:
        """Names of the widgets' classes, in order."""
        told = [output["data"] for output in self.outputs() if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
        return [re.search(r"(\w+)(?= object at |[(:])", "".join(data["text/plain"])).group() for data in told]

    def around(self) -> list[str]:
        """What JupyterLab, its server and the console complain about."""
        found = [f"{kind}: {text}" for kind in (".jp-Dialog", ".Toastify__toast") for text in self.page.locator(kind).all_inner_texts()]
        found += [f"notifications: {text}" for text in self.page.locator(".jp-Notification-Status").all_inner_texts() if text.strip() not in ("", "0")]
        found += [f"page: {error}" for error in self.page.errors] + [f"console: {said}" for said in self.page.complaints]
        said = re.findall(r"^(?:\[[WEC] .*|.*\w+Warning: .*)", self.log.read_text()[self.read :], re.MULTILINE)
        return found + [f"server: {line}" for line in said if not any(word in line for word in NORMAL)]

    def inside(self) -> list[str]:
        """What is wrong with its cells, after they were run."""
        found = []
        for number, cell in enumerate(self.cells()):
            where, said = f"code cell {number}", "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stderr")
            found += [f"{where}: not run"] * (not cell["execution_count"]) + [f"{where}: stderr: {said[:200]}"] * bool(said)
            found += [f"{where}: error: {o['ename']}: {o['evalue'][:200]}" for o in cell["outputs"] if o["output_type"] == "error"]
            pictures = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
            found += [f"{where}: blank picture" for picture in pictures if blank(base64.b64decode("".join(picture)))]
        texts = self.page.locator(".jp-OutputArea-output").all_inner_texts()
        found += [f"text for a picture or a widget: {text[:80]}" for text in texts if NO_PICTURE.match(text.strip())]
        found += ["output left out by JupyterLab"] * self.page.locator(".jp-TrimmedOutputs").count()
        found += [f"formula: {text}" for text in self.page.locator("mjx-merror, mjx-container [style*='red']").all_inner_texts()]
        found += [f"formula as text: {text[:80]}" for text in self.page.locator(".jp-RenderedMarkdown").all_inner_texts() if "$" in text]
        shown = self.page.locator(".jp-OutputArea-output img").evaluate_all("images => images.map(image => image.naturalWidth > 0)")
        return found + ["a picture that is not shown"] * shown.count(False)

    def screenshots(self, place: Callable[[str], Path], name: str) -> None:
        """The whole of it, in parts from above."""
        for old in place(name).parent.glob(f"{name}-[0-9][0-9].png"):
            old.unlink()
        pane = self.page.locator(".jp-WindowedPanel-outer").first
        whole, high = pane.evaluate("pane => [pane.scrollHeight, pane.clientHeight]")
        for number, top in enumerate(range(0, whole, high)):
            pane.evaluate("(pane, top) => new Promise(done => { pane.scrollTop = top; requestAnimationFrame(() => requestAnimationFrame(done)) })", top)
            self.page.screenshot(path=place(f"{name}-{number:02}"))

    def responds(self, act: Callable[[], None], seen: Callable[[], object], *, within_ms: int = RESPONSE_MS) -> bool:
        """Whether what is seen changes after something was done."""
        before = seen()
        act()
        for _ in range(within_ms // 100):
            if seen() != before:
                return True
            self.page.wait_for_timeout(100)
        return False

    def close(self) -> None:
        self.page.evaluate(f"{PANEL}.sessionContext.shutdown()")


def blank(png: bytes) -> bool:
    return matplotlib.image.imread(io.BytesIO(png))[..., :3].std() < 0.05


@pytest.fixture
def opened(page, lab):
    """Open a notebook of the folder; at its end its kernel is shut down."""
    address, folder = lab
    there = []

    def start(file: Path) -> Opened:
        there.append(Opened(page, address, folder, file))
        return there[-1]

    yield start
    for one in there:
        one.close()
    with urllib.request.urlopen(f"{address}/api/kernels", timeout=60) as answer:
        assert json.load(answer) == []


@pytest.mark.parametrize("name", SOURCES)
def test_it_opens_without_a_warning_runs_to_its_end_and_its_widgets_respond(opened, lab, screenshot, request, name):
    folder = lab[1]
    given = {"profile": "smoke", "folder": str(folder / "demo"), "viewer": True}
    if name.startswith("on_data/"):
        given = {"profile": "smoke", "run_folder": str(folder / "run"), "data": request.getfixturevalue("data"), "fold": 1, "changes": TINY}
    notebook = opened(put(name, folder, given))
    assert notebook.around() == []
    notebook.run()
    try:
        assert notebook.around() == []
        assert notebook.inside() == []
        assert notebook.widgets() == WIDGETS.get(name, [])
        for widget in notebook.widgets():
            {"Explorer": every_control_responds, "NiiVue": the_viewer_turns}[widget](notebook)
        assert notebook.around() == []
    finally:
        notebook.screenshots(screenshot, name.replace("/", "-"))


def every_control_responds(notebook: Opened) -> None:
    """Each control of the explorer, moved by keyboard or mouse: what the kernel makes of it changes, pictures, bars, the scale of colours or the last line."""
    explorer = notebook.page.locator(".jp-OutputArea-output", has=notebook.page.locator(".home-canvas"))
    explorer.scroll_into_view_if_needed()

    def seen() -> list[str]:
        pictures = explorer.locator(".home-canvas").evaluate_all("pictures => pictures.map(picture => picture.toDataURL())")
        return pictures + explorer.locator(".home-bars, .home-scale, .widget-label:text('saved: ')").all_inner_texts()

    dead, touched = [], []

    def touch(name: str, act: Callable[[], None]) -> None:
        touched.append(name)
        if not notebook.responds(act, seen):
            dead.append(name)

    for slider in explorer.locator(".widget-slider").all():
        handle = slider.locator(".noUi-handle")
        touch(slider.locator("label").inner_text(), lambda handle=handle: handle.press("ArrowRight"))
    for dropdown in explorer.locator(".widget-dropdown").all():
        choice = dropdown.locator("select")
        others = choice.evaluate("choice => [...choice.options].filter(option => !option.selected).map(option => option.text)")
        if others:  # smoke's network has one block a stage
            touch(dropdown.locator("label").inner_text(), lambda choice=choice, others=others: choice.select_option(label=others[-1]))
    for box in explorer.locator(".widget-checkbox").all():
        touch(box.inner_text(), box.locator("input").click)
    for group in explorer.locator(".widget-toggle-buttons").all():
        for name in group.locator("button:not(.mod-active)").all_inner_texts():
            touch(name, group.get_by_role("button", name=name).click)
    play = explorer.locator(".widget-play button").first
    touch("Play", play.click)
    play.click()  # again, to stop
    notebook.page.wait_for_timeout(1000)
    touch("Save figure", explorer.get_by_role("button", name="Save figure").click)
    assert dead == []
    assert sorted(touched) == sorted(
        ["Slice", "Opacity", "Stage", "Level", "Weight of", "Colours", "Case 1", "Case 2", "Outlines of the label", "axial", "sagittal", "winner", "entropy"]
        + ["Play", "Save figure"]
    )


def the_viewer_turns(notebook: Opened) -> None:
    """A click into the 3D viewer moves its planes."""
    canvas = notebook.page.locator(".jp-OutputArea-output canvas:not(.home-canvas)").last
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for _ in range(RESPONSE_MS // 500):
        if not blank(canvas.screenshot()):
            break
        notebook.page.wait_for_timeout(500)
    else:
        raise AssertionError("the viewer shows nothing")
    assert notebook.responds(lambda: canvas.click(position={"x": box["width"] / 6, "y": box["height"] / 4}), canvas.screenshot)


def test_what_is_wrong_is_seen(opened, lab):
    sources = [
        "import sys\nprint('careful', file=sys.stderr)",
        "import matplotlib.pyplot as plt\nplt.figure().add_subplot().set_axis_off()",
        "from IPython.display import Markdown, display\ndisplay({'text/plain': 'IntSlider(value=3)'}, raw=True)",
        "display(Markdown(r'$\\nosuchcommand$ and $\\frac{1}{2$'))",
        "import ipywidgets as widgets\ndisplay(widgets.VBox([widgets.IntSlider(description='dead'), widgets.Label('nothing else')]))",
        "live, told = widgets.IntSlider(description='live'), widgets.Label('0')\n"
        "live.observe(lambda change: setattr(told, 'value', f'{live.value} now'), 'value')\ndisplay(widgets.VBox([live, told]))",
        "raise ValueError('no more')",
        "print('never')",
    ]
    file = lab[1] / "wrong.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources], metadata=kernel), file)
    notebook = opened(file)
    notebook.run()
    found = "\n".join(notebook.inside())
    for expected in ("0: stderr: careful", "1: blank picture", "widget: IntSlider", "formula: ", "6: error: ValueError: no more", "7: not run"):
        assert expected in found, found
    assert len(notebook.inside()) == 7, found  # two formulas
    assert notebook.widgets() == ["VBox", "VBox"]
    for number, (name, lives) in enumerate({"dead": False, "live": True}.items()):
        shown = notebook.page.locator(".widget-vbox").nth(number)
        handle = shown.locator(".noUi-handle")
        label = shown.locator(".widget-label").last
        assert notebook.responds(lambda handle=handle: handle.press("ArrowRight"), label.inner_text, within_ms=3000 if name == "dead" else RESPONSE_MS) == lives
    notebook.page.evaluate("console.error('of a script'); setTimeout(() => { throw new Error('uncaught') }, 0)")
    notebook.page.evaluate("window.jupyterapp.commands.execute('apputils:notify', {message: 'look here', type: 'warning', options: {autoClose: false}})")
    notebook.page.locator(".Toastify__toast").wait_for()
    found = "\n".join(notebook.around())
    for expected in ("console: of a script", "page: uncaught", ".Toastify__toast: look here"):
        assert expected in found, found


def test_a_notebook_without_a_kernel_and_ids_is_noticed_when_it_is_opened(opened, lab):
    notebook = json.loads(nbformat.writes(new_notebook(cells=[new_code_cell("1")])))
    del notebook["cells"][0]["id"]
    file = lab[1] / "no_ids.ipynb"
    file.write_text(json.dumps(notebook))
    found = "\n".join(opened(file).around())
    for expected in (".jp-Dialog: Select Kernel", "MissingIDFieldWarning"):
        assert expected in found, found

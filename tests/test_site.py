"""`make site`: executed notebooks and docs become pages that can be searched and read by all; what is not executed, or leads nowhere, is told."""

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "site.py"
NEEDED = [name for name in ("mkdocs", "material", "latex2mathml") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the clone: scripts/site.py is not installed"),
    pytest.mark.skipif(bool(NEEDED), reason=f'needs {", ".join(NEEDED)}: pip install -e ".[site]"'),
]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = "<style>\n\n th { color: black }\n</style>\n<table>\n"
TABLE += '<tr><th class="blank level0">&nbsp;</th><th>Dice</th></tr>\n\n <tr><td>liver</td><td>71.2</td></tr>\n</table>'


def executed(folder: Path, *, outputs: bool = True, text: str = "") -> Path:
    cell = new_code_cell("1 + 1")
    if outputs:
        cell.outputs = [
            new_output("stream", text="0%\r100% <done>\n\ntwo\n"),
            new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"}),
            new_output("display_data", {"text/html": TABLE, "text/plain": "liver"}),
        ]
    cells = [new_markdown_cell("# One question\n\nA formula $A_{k}$, and `$HOME` is none."), new_markdown_cell(text), cell]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), folder / "00_start_here.ipynb")
    return folder


def site(notebooks: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--notebooks", str(notebooks), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = site(executed(folder / "demo"), folder / "build" / "site")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "build" / "site"


def test_a_notebook_is_a_page_with_its_pictures_tables_and_formulas(built):
    page = (built / "notebooks" / "00_start_here.html").read_text()
    assert "<math" in page
    assert "$HOME" in page
    assert 'alt="One question, figure 1 of this page"' in page
    assert (built / "notebooks" / "00_start_here-01.png").exists()
    assert "<td>71.2</td>" in page
    assert "100% &lt;done&gt;" in page
    assert "0%\r" not in page


def test_pages_are_found_by_what_is_in_them(built):
    index = json.loads((built / "search" / "search_index.json").read_text())
    assert any("71.2" in page["text"] and page["location"].startswith("notebooks/00_start_here") for page in index["docs"])


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    done = site(executed(tmp_path / "demo", text="[gone](../docs/no-such-page.md)"), tmp_path / "build" / "site")
    assert done.returncode != 0
    assert "no-such-page.md" in done.stderr + done.stdout


@pytest.mark.parametrize(("outputs", "told"), [(False, "no outputs there, expected an executed notebook"), (None, "no executed notebooks there")])
def test_without_executed_notebooks_it_is_one_line(outputs, told, tmp_path):
    folder = executed(tmp_path / "demo", outputs=False) if outputs is False else tmp_path
    done = site(folder, tmp_path / "build" / "site")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert told in done.stderr
    assert "make demo" in done.stderr


@pytest.fixture
def served(built):
    """The site's address on this machine."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *told: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.browser
@pytest.mark.skipif("HOMELIB_TEST_BROWSER" not in os.environ, reason="drives a browser, on demand alone: HOMELIB_TEST_BROWSER=1")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("axe_playwright_python") is None, reason='needs axe-playwright-python: pip install -e ".[dev]"')
def test_no_page_has_a_serious_fault_of_accessibility(served, built):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    pages, found, elsewhere = [path.relative_to(built) for path in sorted(built.rglob("*.html"))], [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith((served, "data:", "blob:")) else None)
        for path in pages:
            page.goto(f"{served}/{path}")
            faults = Axe().run(page).response["violations"]
            grave = [fault for fault in faults if fault["impact"] in ("serious", "critical")]
            found += [f"{path}: {fault['impact']} {fault['id']}: {fault['nodes'][0]['html'][:120]}" for fault in grave]
        browser.close()
    assert len(pages) > 5
    assert not found, "\n".join(found)
    assert not elsewhere  # a page that is read offline is whole

"""What the tests in a browser share: headless Chromium, servers that end with who started them, and screenshots in build/browser."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SETTINGS = {  # of JupyterLab
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # else cells out of sight are taken off the page
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',  # else it asks whether it may look for news
}


@pytest.fixture(scope="session", autouse=True)
def on_demand():
    """Skips what it lacks, or was not asked for."""
    if "HOMELIB_TEST_BROWSER" not in os.environ:
        pytest.skip("drives a browser, on demand alone: HOMELIB_TEST_BROWSER=1")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip('needs playwright: pip install -e ".[dev]"')


@contextlib.contextmanager
def _served(folder: Path, *command: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    address, said = f"http://127.0.0.1:{port}", folder / f"{command[0]}.log"
    with open(said, "w") as log:
        process = subprocess.Popen([sys.executable, "-m", *(part.format(port=port) for part in command)], cwd=folder, stdout=log, stderr=log, env=inherited)
        try:
            for _ in range(240):
                assert process.poll() is None, said.read_text()[-3000:]
                try:
                    urllib.request.urlopen(address + ("/static/favicon.ico" if command[0] == "voila" else "/api"), timeout=60)
                    break
                except urllib.error.HTTPError:
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise AssertionError(f"{command[0]} did not answer in two minutes")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def served():
    """A server in a folder, given its command with {port} in it: a context, whose value is the address when it answers. What it says goes to <command>.log."""
    return _served


@pytest.fixture(scope="session")
def jupyterlab():
    """JupyterLab in a folder, with settings and workspaces of its own: a context, whose value is its address."""

    def start(folder: Path):
        for name, text in SETTINGS.items():
            file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return _served(
            folder, "jupyterlab", "--no-browser", "--allow-root", "--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
            f"--LabApp.user_settings_dir={folder / 'settings'}", f"--LabApp.workspaces_dir={folder / 'workspaces'}", "--LabApp.expose_app_in_browser=True",
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page; `errors` are those that no script caught, `complaints` what scripts wrote into the console as an error."""
    page = chromium.new_page(viewport={"width": 1400, "height": 1300})
    page.set_default_timeout(60_000)
    page.errors, page.complaints = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    yield page
    page.close()


@pytest.fixture(scope="session")
def screenshot():
    """Where the screenshot of a name is kept."""

    def place(name: str) -> Path:
        folder = ROOT / "build/browser"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"screenshot: {folder / name}.png")
        return folder / f"{name}.png"

    return place

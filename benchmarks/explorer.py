"""How long the explorer takes for another slice: in the kernel (choose, mix, pack), and in a browser from the key to the pixels.

    python -m benchmarks.explorer [kernel] [browser] [--shape 73 56 67] [--experts 4] [--panels 2]

Prints tables and writes benchmarks/results/explorer.json. Scan and maps are generated; the default shape is that of the demo. In a browser: a key
on the slider, until the canvas says that it has drawn that slice, under JupyterLab in headless Chromium; skipped with the reason where there is none.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks.measure import measure, save, table
from homelib.view.explorer import Explorer
from homelib.view.routed import Routed

ROOT = Path(__file__).parent.parent
WATCH = """() => {
  const canvas = document.querySelector('.home-canvas');
  window.took = [];
  document.addEventListener('keydown', () => { window.started = performance.now(); }, true);
  new MutationObserver(() => window.took.push(performance.now() - window.started)).observe(canvas, { attributeFilter: ['data-slice'] });
}"""


def generated(shape: tuple[int, ...], experts: int, panels: int) -> Explorer:
    """Smooth noise: what a scan and its maps cost to pack into a PNG."""
    from scipy.ndimage import gaussian_filter

    rng, cases = np.random.default_rng(0), []
    for number in range(panels):
        weights = np.exp(4 * np.stack([gaussian_filter(rng.standard_normal(shape).astype(np.float32), 2) for _ in range(experts)]) / 0.1)
        image = rng.normal(40, 60, shape).astype(np.float32)
        label = (gaussian_filter(image, 4) > 42).astype(np.uint8)
        maps = (weights / weights.sum(0)).astype(np.float16)
        cases.append(Routed(f"case {number}", image, {(0, 0, 1): maps}, (4.0, 4.0, 4.0), (-175, 250), label=label, class_names=("background", "organ")))
    explorer = Explorer(cases, panels=panels)
    explorer.show(index=shape[2] // 2)  # not at an end: a key has to lead to another slice
    return explorer


def kernel(explorer: Explorer) -> list[dict]:
    """One row a plane and view: a slice further, pictures packed and all."""
    rows = []
    for plane in ("axial", "coronal", "sagittal"):
        for show in ("winner", "weight", "entropy"):
            explorer.show(plane=plane, show=show, index=0)

            def further():
                explorer.show(index=(explorer.state.index + 1) % 50)

            took = measure(further, runs=40)
            rows.append(
                {"what": f"{plane}, {show}", "ms": 1e3 * took.seconds, "slowest ms": 1e3 * took.slowest, "KiB": len(explorer.views[0].canvas.png) / 1024}
            )
    return rows


def browser(arguments: argparse.Namespace, slices: int = 40) -> dict:
    """From a key on the slider to the drawn slice; {"skipped": reason} without a browser."""
    import nbformat

    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        return {"what": "browser", "skipped": "no Chromium"}
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        return {"what": "browser", "skipped": str(error)}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        source = f"from benchmarks.explorer import generated\ngenerated({tuple(arguments.shape)}, {arguments.experts}, {arguments.panels})"
        about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}  # else JupyterLab asks for one
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=about), f"{folder}/explorer.ipynb")
        options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
        command = [sys.executable, "-m", "jupyterlab", *options, "--LabApp.expose_app_in_browser=True"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, **quiet)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api")
                    break
                except OSError:
                    time.sleep(0.5)
            with sync_playwright() as playwright:
                page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(viewport={"width": 1300, "height": 1200})
                page.goto(f"http://127.0.0.1:{port}/doc/tree/explorer.ipynb?reset")
                page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
                page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
                page.wait_for_function("document.querySelector('.home-canvas')?.width > 300", timeout=120_000)
                page.evaluate(WATCH)
                page.locator(".widget-slider", has_text="Slice").locator(".noUi-handle").focus()
                for number in range(slices):
                    page.keyboard.press("ArrowLeft" if number % 2 else "ArrowRight")
                    page.wait_for_function(f"window.took.length > {number}")
                took = page.evaluate("window.took")[1:]
        finally:
            server.terminate()
            server.wait()
    return {"what": f"browser, {arguments.panels} panels", "ms": statistics.median(took), "slowest ms": max(took), "slices": len(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=["kernel", "browser", []], help="both, if none is named")
    parser.add_argument("--shape", nargs=3, type=int, default=[73, 56, 67])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--panels", type=int, default=2)
    arguments = parser.parse_args()
    results = {"shape": arguments.shape, "experts": arguments.experts, "panels": arguments.panels, "load": os.getloadavg()}
    if not arguments.parts or "kernel" in arguments.parts:
        results["kernel"] = kernel(generated(tuple(arguments.shape), arguments.experts, arguments.panels))
        table(f"a slice in the kernel, {arguments.panels} panels", results["kernel"], ["what", "ms", "slowest ms", "KiB"])
    if not arguments.parts or "browser" in arguments.parts:
        results["browser"] = browser(arguments)
        table("a slice in a browser", [results["browser"]], ["what", "ms", "slowest ms", "slices"])
    print(f"\nload of the machine (1, 5, 15 minutes): {results['load']}\n{save('explorer', results)}")


if __name__ == "__main__":
    main()

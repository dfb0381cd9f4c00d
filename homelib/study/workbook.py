"""The notebooks, run in order by papermill, each in a process of its own; executed copies and HTML in one folder.

A notebook that fails is named with its cell and its error; what the others made stays.
"""

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from tqdm.auto import tqdm

from ..errors import UserError
from ..paths import shipped

ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of the cells that papermill puts into an executed copy

# What the libraries below Python are told, unless the caller tells them. A thread that waits for work spins a little, then sleeps (see the
# Makefile). And glibc keeps freed memory for the next tensor: to give it back and fetch it anew costs a tenth of a training step.
ON_A_CPU = {"GOMP_SPINCOUNT": "10000", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


@dataclass(frozen=True)
class Executed:
    """One notebook's end. `error` is None when all went well, else cell, exception and message in one line."""

    name: str
    notebook: Path
    html: Path | None
    seconds: float
    error: str | None = None


def notebooks() -> list[Path]:
    """The workbook's notebooks, in order."""
    found = sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(f"{shipped('notebooks')}: no notebooks there, expected 00_start_here.ipynb and those after it. Restore the clone.")
    return found


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`. Raises UserError where there is none, or it holds more than literals."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
            except (AttributeError, ValueError, SyntaxError):
                raise UserError(f"{notebook.name}: its parameters cell holds more than `name = literal` lines.") from None
    raise UserError(f"{notebook.name}: no cell tagged 'parameters'.")


def run_notebook(notebook: Path, out: Path, parameters: Mapping[str, Any], *, log: Path) -> Executed:
    """Execute one notebook by papermill in a process of its own, and write its HTML beside.

    Args:
        notebook: to run; not changed.
        out: executed copy, `<name>.ipynb`.
        parameters: by name; one that the notebook does not have is an error (papermill would only warn).
        log: file for the kernel's and papermill's own output.
    """
    known = parameters_of(notebook)
    if unknown := [name for name in parameters if name not in known]:
        raise UserError(f"{notebook.name}: no parameter {', '.join(unknown)}; it has {', '.join(known)}.")
    if out.resolve() == notebook.resolve():
        raise UserError(f"{out}: found the notebook itself, expected another place for its executed copy. Choose another folder.")
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    html = out.with_suffix(".html")
    for earlier in (out, html):  # else a run that dies before its first cell would show those of the run before
        earlier.unlink(missing_ok=True)
    values = out.with_suffix(".parameters.yaml")
    values.write_text(yaml.safe_dump(dict(parameters)))
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "-k", "python3", "-f", str(values), "--no-progress-bar", "--log-level", "WARNING"]
    environment = ON_A_CPU | os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with open(log, "a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False).returncode
    values.unlink()
    error = _error(out, log) if status else None
    return Executed(notebook.stem, out, to_html(out) if out.exists() else None, time.perf_counter() - start, error)


def run_workbook(folder: str | Path, parameters: Mapping[str, Any], *, only: Sequence[str] = (), progress: bool = True) -> list[Executed]:
    """Run all notebooks in order, each given those of `parameters` that it knows; go on after a failure.

    Args:
        folder: for executed copies, HTML and `log.txt`.
        parameters: by name. One that no notebook knows is an error.
        only: beginnings of the names to run ("03"); empty is all.
    """
    chosen = [n for n in notebooks() if not only or n.stem.startswith(tuple(only))]
    if not chosen:
        raise UserError(f"notebooks: none begins with {', '.join(only)}; there are {', '.join(n.stem for n in notebooks())}.")
    known = {n: parameters_of(n) for n in notebooks()}
    if unknown := [name for name in parameters if not any(name in k for k in known.values())]:
        raise UserError(f"parameters: no notebook knows {', '.join(unknown)}; they have {', '.join(sorted(set().union(*known.values())))}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done, bar = [], tqdm(chosen, disable=not progress, unit="notebook")
    for notebook in bar:
        bar.set_description(notebook.stem)
        wanted = {name: value for name, value in parameters.items() if name in known[notebook]}
        done.append(run_notebook(notebook, folder / notebook.name, wanted, log=folder / "log.txt"))
        if done[-1].error:
            bar.write(f"{notebook.stem}: {done[-1].error}", file=sys.stderr)
    return done


def to_html(notebook: Path) -> Path:
    """A static page of an executed notebook, beside it."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    html = notebook.with_suffix(".html")
    html.write_text(page, encoding="utf-8")
    return html


def _error(out: Path, log: Path) -> str:
    """Which cell of the notebook failed, counted from 1 without those that papermill adds, and with what; the log's last words where no cell says so."""
    begun = None  # the cell at which a kernel died, for want of memory say
    if out.exists():
        own = [c for c in nbformat.read(out, as_version=4).cells if not ADDED & set(c.metadata.get("tags", []))]
        for number, cell in enumerate(own, start=1):
            begun = number if cell.metadata.get("papermill", {}).get("start_time") else begun
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    message = re.sub(r"\x1b\[[0-9;]*m", "", output.evalue).split("\n")[0]
                    return f"cell {number}: {output.ename}: {message}"
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    told = lines[-1] if lines else "papermill failed without a word"
    return f"cell {begun}: {told}" if begun else told

"""The notebooks, run in order by papermill, each in a process of its own; executed copies and HTML in one folder.

A notebook that fails is named with its cell and its error; what the others made stays.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..paths import shipped
from ..progress import bar
from .executing import check_call, environment, parameters_of, what_failed


@dataclass(frozen=True)
class Executed:
    """One notebook's end. `error` is None when all went well, else cell, exception and message in one line."""

    name: str
    notebook: Path
    html: Path | None
    seconds: float
    error: str | None = None


def notebooks() -> list[Path]:
    """The workbook's notebooks, in order. Raises UserError: none are there."""
    found = sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(f"{shipped('notebooks')}: no notebooks there, expected 00_start_here.ipynb and those after it. Restore the clone.")
    return found


def run_notebook(notebook: Path, out: Path, parameters: Mapping[str, Any], *, log: Path) -> Executed:
    """Execute one notebook by papermill in a process of its own, and write its HTML beside.

    Args:
        notebook: to run; not changed.
        out: executed copy, `<name>.ipynb`.
        parameters: by name; one that the notebook does not have is an error (papermill would only warn).
        log: file for the kernel's and papermill's own output.
    """
    check_call(notebook, out, parameters)
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    html = out.with_suffix(".html")
    for earlier in (out, html):  # else a run that dies before its first cell would show those of the run before
        earlier.unlink(missing_ok=True)
    values = out.with_suffix(".parameters.yaml")
    values.write_text(yaml.safe_dump(dict(parameters)))
    command = [sys.executable, "-m", "homelib.study.executing", str(notebook), str(out), str(values)]
    with open(log, "a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=stream, env=environment(), check=False).returncode
    values.unlink()
    error = what_failed(out, log) if status else None
    return Executed(notebook.stem, out, to_html(out) if out.exists() else None, time.perf_counter() - start, error)


def run_workbook(folder: str | Path, parameters: Mapping[str, Any], *, only: Sequence[str] = (), progress: bool = True) -> list[Executed]:
    """Run all notebooks in order, each given those of `parameters` that it knows; go on after a failure.

    Args:
        folder: for executed copies, HTML and `log.txt`.
        parameters: by name. One that no notebook knows is an error.
        only: beginnings of the names to run ("03"); empty is all.
        progress: show a bar, where there is a terminal, and a line at the end of each.

    Raises:
        UserError: a name that no notebook has, or a parameter that none knows.
    """
    chosen = [n for n in notebooks() if not only or n.stem.startswith(tuple(only))]
    if not chosen:
        raise UserError(f"notebooks: none begins with {', '.join(only)}; there are {', '.join(n.stem for n in notebooks())}.")
    known = {n: parameters_of(n) for n in notebooks()}
    if unknown := [name for name in parameters if not any(name in k for k in known.values())]:
        raise UserError(f"parameters: no notebook knows {', '.join(unknown)}; they have {', '.join(sorted(set().union(*known.values())))}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done, shown = [], bar(chosen, unit="notebook", desc="notebooks", show=progress)
    for notebook in shown:
        shown.set_description(notebook.stem)
        wanted = {name: value for name, value in parameters.items() if name in known[notebook]}
        done.append(run_notebook(notebook, folder / notebook.name, wanted, log=folder / "log.txt"))
        if progress:
            shown.write(f"{notebook.stem}: {done[-1].error or f'{done[-1].seconds:.0f} s'}", file=sys.stderr)
    return done


def to_html(notebook: Path) -> Path:
    """A static page of an executed notebook, beside it."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(embed_images=True).from_filename(str(notebook))
    html = notebook.with_suffix(".html")
    html.write_text(page, encoding="utf-8")
    return html

"""`home ablate`: from a question about the network, a grid, to a table."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import cli_complete as names
from .cli_help import command, epilog
from .errors import UserError

if TYPE_CHECKING:
    from .study.ablate import Sweep

app = typer.Typer(
    no_args_is_help=True,
    help="Ablations: the runs of a grid, planned, done, watched, gone on with, and collected into one table.",
    epilog=epilog(("home ablate plan laptop-tables", "home ablate run laptop-tables", "home ablate collect laptop-tables")),
)
console = Console(soft_wrap=True)

GridName = Annotated[str, typer.Argument(metavar="GRID", help="a grid by name, or the path of its YAML file", autocompletion=names.grids)]
Begun = Annotated[str, typer.Argument(metavar="GRID", help="a grid that was begun: its name, its file, or its folder", autocompletion=names.begun)]
Folder = Annotated[Path | None, typer.Option(help="of the grid's runs; default runs/ablations/NAME")]
Where = Annotated[
    str,
    typer.Option("--executor", help="local: processes on this machine; slurm: an array of jobs", autocompletion=names.one_of("local", "slurm")),
]
AtOnce = Annotated[int | None, typer.Option(min=1, help="runs at a time; default as many as fit by cores and memory, or one a GPU")]
Cores = Annotated[int | None, typer.Option(min=1, help="a run; default 1, beside a GPU its share. The same number gives the same result bit for bit")]
Limit = Annotated[float | None, typer.Option(help="minutes of wall-clock time a run, after which it has failed; default none")]
Failed = Annotated[bool, typer.Option("--failed", help="do those again that have failed, from where they were")]
Gpus = Annotated[int | None, typer.Option(min=0, help="local: GPUs to use, one a run, default all; slurm: 1 asks for one a job")]
Memory = Annotated[float | None, typer.Option(help="GiB a run; default estimated")]
Options = Annotated[list[str], typer.Option("--slurm", help="option of sbatch by submitit's name, partition=gpu; may be repeated")]
Roots = Annotated[list[Path], typer.Option("--root", help="folder of each data set that the grid names, in its order; may be repeated")]
Given = Annotated[list[str], typer.Option("--parameter", "-p", help="parameter of the notebooks, viewer=true; may be repeated")]


@command(app, examples=("home ablate plan laptop-tables", "home ablate plan experts --root amos22 --no-probe  # a grid on a data set, at once"))
def plan(
    grid: GridName,
    folder: Folder = None,
    root: Roots = [],  # noqa: B006  typer reads it, nobody writes
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="measure a few steps of every arm for the estimate of time")] = True,
    cores: Cores = None,
    parameter: Given = [],  # noqa: B006
) -> None:
    """The runs of a grid, their fingerprints and states, and how long they will take; nothing is done."""
    from .cli import parse_changes
    from .data.memory import free_memory_gib
    from .study.ablate import Sweep, check_parameters, default_folder, placed, shipped_notebooks
    from .study.ablate_report import print_plan
    from .study.executors import fitting, usable_cores
    from .study.grids import load_grid
    from .study.probe import probe as measured

    loaded, given = load_grid(grid), parse_changes(parameter, option="--parameter")
    check_parameters(shipped_notebooks(on_data=bool(loaded.data)), given, {name: "" for name in loaded.data})
    runs, place = loaded.runs(), folder or default_folder(loaded.name)
    there = {row.record.name: row for row in Sweep.open(place).rows()} if (place / "plan.json").exists() else {}
    arms = {run.arm: (run.changes, run.fold) for run in runs}
    figures: dict[str, Any] = {"figures": given["figures"]} if "figures" in given else {}
    probes = measured(loaded.profile, arms, data=placed(loaded, root), cores=cores or 1, **figures) if probe else {}
    most = max((one.gib for one in probes.values()), default=1.0)
    at_once = fitting(cores=usable_cores(), cores_a_run=cores or 1, gib_a_run=most, free_gib=free_memory_gib())
    print_plan(runs, there, probes, at_once=at_once, console=console)


@command(
    app,
    examples=(
        "home ablate run laptop-tables --limit 15 -p figures=false",
        "home ablate run experts --root amos22 --executor slurm --slurm partition=gpu --gpus 1",
    ),
)
def run(
    grid: GridName,
    folder: Folder = None,
    root: Roots = [],  # noqa: B006  typer reads it, nobody writes
    executor: Where = "local",
    at_once: AtOnce = None,
    cores: Cores = None,
    gpus: Gpus = None,
    memory: Memory = None,
    limit: Limit = None,
    failed: Failed = False,
    parameter: Given = [],  # noqa: B006
    slurm: Options = [],  # noqa: B006
) -> None:
    """Do the runs of a grid that are not done. Exit status 1 where any has failed.

    Ctrl-C stops all of them at a whole step; the same command goes on.
    """
    from .cli import parse_changes
    from .study.ablate import Sweep
    from .study.grids import load_grid

    sweep = Sweep.begin(load_grid(grid), folder or "", parameters=parse_changes(parameter, option="--parameter"), roots=root)
    _go_on(sweep, executor, at_once, cores, gpus, memory, limit, failed, slurm)


@command(app, examples=("home ablate resume laptop-tables --failed  # those that failed too",))
def resume(
    grid: Begun,
    folder: Folder = None,
    executor: Where = "local",
    at_once: AtOnce = None,
    cores: Cores = None,
    gpus: Gpus = None,
    memory: Memory = None,
    limit: Limit = None,
    failed: Failed = False,
    slurm: Options = [],  # noqa: B006
) -> None:
    """Go on with a grid as it was begun, whatever its file says now."""
    _go_on(_begun(grid, folder), executor, at_once, cores, gpus, memory, limit, failed, slurm)


@command(app, examples=("home ablate status laptop-tables", "home ablate status laptop-tables --watch 5"))
def status(
    grid: Begun,
    folder: Folder = None,
    watch: Annotated[float | None, typer.Option(min=0.5, help="seconds after which the table is drawn anew, until all runs have ended")] = None,
) -> None:
    """The state of every run: queued, running, done, failed (with its last words), stopped, or stale: left while it ran."""
    from .study.ablate_report import states_table
    from .study.states import ENDED

    sweep = _begun(grid, folder)
    if watch is None:
        console.print(states_table(sweep.rows()))
        return
    with _drawn_anew() as draw, contextlib.suppress(KeyboardInterrupt):
        while True:
            draw(rows := sweep.rows())
            if all(row.record.state in ENDED for row in rows):
                return
            time.sleep(watch)


@command(app, examples=("home ablate collect laptop-tables",))
def collect(grid: Begun, folder: Folder = None) -> None:
    """The metrics of all finished runs in one table, results.csv, and what each run took, runs.csv, in the grid's folder."""
    sweep = _begun(grid, folder)
    table = sweep.collect()
    done = table["run"].nunique()
    told = f"{done} of {len(sweep.tasks)} runs, {len(table)} rows. What they took: {sweep.folder / 'runs.csv'}"
    say(f"{sweep.folder / 'results.csv'}: {told}")


def _begun(grid: str, folder: Path | None) -> "Sweep":
    from .study.ablate import PLAN, Sweep, default_folder

    return Sweep.open(folder or (grid if (Path(grid) / PLAN).exists() else default_folder(Path(grid).stem)))


def _go_on(
    sweep: "Sweep",
    executor: str,
    at_once: int | None,
    cores: int | None,
    gpus: int | None,
    memory: float | None,
    limit: float | None,
    failed: bool,
    slurm: list[str],
) -> None:
    from .cli import parse_changes
    from .study.ablate_report import states_table
    from .study.executors import Local, Slurm, visible_gpus

    seconds = None if limit is None else 60 * limit
    where: Local | Slurm
    if executor == "local":
        if slurm:
            raise UserError("--slurm: found options of sbatch with --executor local; choose slurm, or leave them off.")
        names = visible_gpus()[:gpus]
        if at_once is None:
            here = Local.fitting(sweep.folder, gib_a_run=memory or sweep.memory_gib(), cores=cores, gpus=names)
        else:
            here = Local(sweep.folder, at_once=at_once, cores=cores or 1, gpus=names)
        each = "a GPU" if names else f"{here.cores} core" + "s" * (here.cores > 1)
        say(f"{sweep.folder}: {len(sweep.tasks)} runs, {here.at_once} at once, {each} each.")
        where = here
    elif executor == "slurm":
        asked: dict[str, Any] = {"name": sweep.folder.name, "cores": cores or 1, "gpus": gpus or 0, "gib": memory, "limit_seconds": seconds}
        where = Slurm(sweep.folder, at_once=at_once or 256, options=parse_changes(slurm, option="--slurm"), **asked)
    else:
        raise UserError(f"--executor: found {executor!r}, expected local or slurm.")
    try:
        with _drawn_anew() as draw:
            rows = sweep.run(where, limit_seconds=seconds, failed=failed, watch=draw)
    except KeyboardInterrupt:
        say(f"Stopped; nothing is left running. The same command, or home ablate resume {sweep.folder}, goes on.")
        raise typer.Exit(130) from None
    if not sys.stdout.isatty():
        console.print(states_table(rows))
    say(f"Next: home ablate collect {sweep.folder}")
    if any(row.record.state == "failed" for row in rows):
        raise typer.Exit(1)


@contextlib.contextmanager
def _drawn_anew() -> Iterator[Callable]:
    """The table of states and a bar, in place on a terminal, else a line at each change."""
    from .study.ablate_report import Pace, states_table, told_by_lines

    if not sys.stdout.isatty():
        yield told_by_lines(lambda line: say(line))
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    most, pace = max(5, console.height - 7), Pace()
    with Live(console=console, auto_refresh=False) as live:
        yield lambda rows: live.update(Group(states_table(rows, most=most), Text(pace(rows))), refresh=True)


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False)

"""`home evaluate`, `home compare`, `home tables`: numbers, and methods beside each other."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import cli_complete as names
from .cli_help import command
from .errors import UserError

app = typer.Typer()
console = Console(soft_wrap=True)


@command(
    app,
    examples=(
        "home evaluate labels REFERENCES --data amos_ct",
        "home evaluate labels/metrics.csv --convention nnunet  # nothing is measured again",
        "home evaluate runs/mine  # a run on the demo, beside baselines",
    ),
)
def evaluate(
    predicted: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|PRED|CSV", help="run folder; labels: a file, or a folder paired by case id; or a metrics.csv", autocompletion=names.runs
        ),
    ],
    reference: Annotated[Path | None, typer.Argument(metavar="[REF]", help="reference labels, as PRED")] = None,
    data: Annotated[
        str | None, typer.Option(help="data set whose raw labels the references hold; default: that of PRED's run", autocompletion=names.data_sets)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="PRED holds the data set's raw labels too")] = False,
    csv: Annotated[Path | None, typer.Option(help="one row a case, class and metric; default metrics.csv in the folder PRED")] = None,
    convention: Annotated[
        str, typer.Option(help=f"means as others make them: {', '.join(names.CONVENTIONS)}", autocompletion=names.one_of(*names.CONVENTIONS))
    ] = "own",
    lesions: Annotated[list[str], typer.Option(help="a class whose lesions are counted, pdac; may be repeated")] = [],  # noqa: B006
    tolerance: Annotated[list[float], typer.Option(help="mm of the surface distance NSD; may be repeated")] = [1.0, 2.0, 3.0],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default one a core")] = None,
) -> None:
    """Measure labels against references, on the files' own grids; or a run on the demo's patients, beside baselines.

    A metrics.csv in place of both is not measured again: its rows are averaged under another --convention.
    """
    if reference is None and predicted.suffix == ".csv":
        from .study.evaluation_report import evaluate_rows

        given = {"--csv": csv, "--raw": raw, "--lesions": lesions, "--tolerance": tolerance != [1.0, 2.0, 3.0], "--workers": workers}
        if unused := [name for name, value in given.items() if value]:
            raise UserError(f"{unused[0]}: found it with rows that were measured before, which it cannot change; expected it with PRED and REF. Leave it out.")
        evaluate_rows(predicted, console, data=data, convention=convention)
        return
    if reference is None:
        from .data.cases import demo_data
        from .run.folder import Run
        from .study.comparison import measure
        from .study.demo_report import print_dice

        run = Run.open(predicted)
        measure(run, demo_data(run.settings.profile), progress=True)
        print_dice(run, console)
        return
    from .study.evaluation_report import evaluate_files

    how: dict[str, Any] = {"convention": convention, "lesions": tuple(lesions), "tolerances_mm": tuple(tolerance), "workers": workers}
    if not evaluate_files(predicted, reference, console, data=data, raw=raw, csv=csv, **how):
        raise typer.Exit(1)


@command(app, examples=("home compare ours=labels unet=labels_unet --metric hd95", "home compare ours=seed0 ours=seed1 unet=labels_unet --against unet"))
def compare(
    methods: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH...", help="metrics.csv files, or folders with one; one name twice: two seeds of a method")
    ],
    metric: Annotated[str, typer.Option(help="dice, hd95, nsd_2mm, ...: as in the files")] = "dice",
    against: Annotated[str | None, typer.Option(help="test each other method against this one; default all pairs")] = None,
) -> None:
    """Methods beside each other on the same cases: intervals, ranking, paired tests, and how much of a difference is the seed."""
    from .study.compare_report import gather, print_comparison

    print_comparison(gather(methods), console, metric=metric, against=against)


@command(
    app,
    examples=("home tables runs/ablations/laptop-tables --paper T5 --latex", "home tables --paper T5  # the paper's alone", "home tables runs/mine --csv"),
)
def tables(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER...", help="run folders with a metrics.csv, or folders of grids", autocompletion=names.runs)
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="a table of the paper, T5: by itself, or beside a grid's", autocompletion=names.paper_tables)
    ] = None,
    grid: Annotated[str | None, typer.Option(help="the grid's name or file, where its folder does not tell", autocompletion=names.grids)] = None,
    metric: Annotated[list[str], typer.Option(help="of a grid; may be repeated")] = ["dice", "hd95"],  # noqa: B006
    costs: Annotated[bool, typer.Option("--costs", help="of a grid: parameters and FLOPs of every arm, and what its runs took")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="as Markdown; so are a grid's and the paper's where nothing is said")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="as LaTeX, with booktabs")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="as CSV")] = False,
) -> None:
    """Result tables of runs and of grids, and the paper's."""
    from .run.folder import Run
    from .study.ablation_tables import paper_table
    from .study.demo_report import print_dice
    from .study.tables_report import grid_table, is_grid, run_tables

    forms = [form for form, asked in (("markdown", markdown), ("latex", latex), ("csv", csv)) if asked]
    if len(forms) > 1:
        raise UserError(f"found {' and '.join('--' + form for form in forms)}, expected one of them.")
    if not folders and paper is None:
        raise UserError("FOLDER: found none, expected run folders or folders of grids; or --paper with a table of the paper.")
    form = forms[0] if forms else "markdown"
    if not folders and paper is not None:
        print(paper_table(paper).as_text(form))
    for folder in folders or []:
        if is_grid(folder):
            print(grid_table(folder, metrics=metric, paper=paper, grid=grid, costs=costs).as_text(form))
        elif forms:
            for table in run_tables(folder):
                print(table.as_text(form))
        else:
            print_dice(Run.open(folder), console)

"""`home`, the command line: the same functions and the same settings as the notebooks.

Heavy imports stand inside the commands, so that `home --help` answers at once.
"""

import errno
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from .cli_ablate import app as ablate_app
from .cli_data import app as data_app
from .cli_routing import routing
from .errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mamba-HoME for 3D medical image segmentation: train, predict, measure, and see where every expert looks.",
)
app.add_typer(data_app, name="data")
app.add_typer(ablate_app, name="ablate")
console = Console(soft_wrap=True)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a write that finds none does not say which file it was for

Profile = Annotated[str, typer.Option(help="smoke (phantoms, seconds), laptop (real scans, minutes), paper or released")]
Direction = Annotated[str, typer.Option(help="a-to-c trains on patient a and tests on c; c-to-a the other way round")]
Changes = Annotated[list[str], typer.Option("--set", help="a setting by dotted name, training.steps=100; may be repeated")]
Folder = Annotated[Path, typer.Argument(help="run folder, runs/<name>")]


@app.command()
def doctor() -> None:
    """Versions, device, scan backend, and why an optional part is not used."""
    from .study.doctor import examine

    for section, findings in examine().items():
        console.print(f"[bold]{section}[/]")
        for name, told in findings.items():
            console.print(f"  {name:18} {told}", highlight=False, markup=False)


@app.command()
def demo(
    profile: Profile = "laptop",
    only: Annotated[list[str], typer.Option(help="beginning of a notebook's name, 03; may be repeated")] = [],  # noqa: B006  typer reads it, nobody writes
    out: Annotated[Path | None, typer.Option(help="folder; default runs/demo")] = None,
) -> None:
    """Run the notebooks in order on the demo data; executed copies, HTML and runs in runs/demo."""
    from .config import preset
    from .data.demo import fetch_demo
    from .paths import runs_dir
    from .study.demo_report import report
    from .study.workbook import run_workbook

    preset(profile)  # an unknown one is refused before anything is fetched
    start, folder = time.perf_counter(), (out or runs_dir() / "demo").resolve()
    console.print(f"home demo: profile {profile}, into {folder}")
    if profile != "smoke":
        console.print(fetch_demo().message, highlight=False, markup=False)
    fetched = time.perf_counter()
    done = run_workbook(folder, {"profile": profile, "folder": str(folder)}, only=only)
    report(folder, done, console)
    took = time.perf_counter() - fetched
    console.print(f"home demo: {took / 60:.1f} minutes, and {fetched - start:.0f} s before that for the data.")
    if any(notebook.error for notebook in done):
        raise typer.Exit(1)


@app.command()
def train(
    folder: Folder,
    profile: Annotated[str | None, typer.Option(help="smoke, laptop, paper or released; default laptop for the demo, paper for --data")] = None,
    direction: Direction = "a-to-c",
    data: Annotated[list[str], typer.Option(help="data set by name, or the path of a manifest, instead of the demo; may be repeated")] = [],  # noqa: B006
    root: Annotated[list[Path], typer.Option(help="folder of each --data, in the same order")] = [],  # noqa: B006
    prepared: Annotated[list[Path], typer.Option(help="prepared cases of each --data; default where home data prepare puts them")] = [],  # noqa: B006
    fold: Annotated[str | None, typer.Option(help="which fold is validated on, 0 and up, or all; where the manifest has folds")] = None,
    faulty: Annotated[str, typer.Option(help="cases that home data check or prepare found faulty: refuse, leave-out or keep")] = "refuse",
    estimate: Annotated[bool, typer.Option("--estimate", help="measure a few steps, and tell hours, memory and disk rate; nothing is trained")] = False,
    set: Changes = [],  # noqa: A002, B006
) -> None:
    """Train a network on a demo patient, or on prepared data. A folder with an unfinished training is gone on with.

    SIGTERM and SIGUSR1 end it with a checkpoint and exit status 75; the same command goes on.

    Example: home train runs/mine --profile laptop --set training.steps=100

    Example: home train runs/amos --data amos_ct --root amos22
    """
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from .config import override, preset
    from .data.cases import demo_data, with_demo_cases
    from .data.cases import prepared as prepared_demo
    from .run.cohort import FAULTY, Cohort, DataSet, cohort, folds_of
    from .run.signals import STATUS, Stopped
    from .run.train import fit
    from .study.folds import train_folds
    from .study.routing_log import watch_of
    from .study.train_report import print_estimate, print_folds

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    console.quiet = bool(rank_zero_only.rank)  # of several processes one talks
    changes = parse_changes(set)
    start = preset(profile or ("paper" if data else "laptop"))
    if faulty not in FAULTY:
        raise UserError(f"--faulty: found {faulty!r}, expected one of {', '.join(FAULTY)}.")
    sets = [DataSet(name, *places, faulty) for name, places in zip(data, _places(data, root, prepared), strict=True)]
    if fold is not None and not (sets and (fold == "all" or fold.isdecimal())):
        raise UserError(f"--fold: found {fold!r}, expected a number from 0 or all, with --data.")
    if not sets:
        demo = demo_data(start.profile)
        settings = override(with_demo_cases(start, demo, direction=direction), changes)
        say(demo.message)
        made = Cohort(settings, tuple(prepared_demo(settings, demo)), ())
    elif fold != "all" or estimate:
        if fold == "all":
            say(f"Below is one fold; all {folds_of(sets)} take as many times as long.")
        made = cohort(start, sets, fold=None if fold is None else 0 if fold == "all" else int(fold), changes=changes)
    if estimate:
        print_estimate(made, console)
        return
    try:
        if fold == "all":
            print_folds(train_folds(start, sets, folder, changes=changes, say=say), folder, console)
            return
        if sets:
            made = made.at_hand(say)
        watch = watch_of(made.settings, folder, made.train, made.validation)
        run = fit(made.settings, made.train, folder, validation=made.validation, on_validation=watch)
    except Stopped as stopped:
        print(f"home: {stopped}", file=sys.stderr)
        raise typer.Exit(STATUS) from None
    last = f"{len(run.history)} steps, last loss {run.history['loss'].iloc[-1]:.3f}"
    best = f", best validation Dice {run.status['best']:.3f}" if run.status.get("best") is not None else ""
    say(f"{run.folder}: {last}{best}." + ("" if sets else f" Next: home evaluate {run.folder}"))


def _places(data: list[str], root: list[Path], prepared: list[Path]) -> list[tuple[Path, Path | None]]:
    if len(root) != len(data) or len(prepared) not in (0, len(data)):
        raise UserError(f"--root, --prepared: found {len(root)} and {len(prepared)} for {len(data)} --data, expected one each; --prepared may be left out.")
    return list(zip(root, prepared or [None] * len(data), strict=True))


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="run folder, runs/<name>; or a folder of runs fold-0, fold-1, ...")],
    images: Annotated[list[Path] | None, typer.Argument(metavar="INPUT...", help="NIfTI, NRRD or MetaImage files, folders of these or of DICOM slices")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for labels; for one scan also a file, .nii.gz say")] = Path("predictions"),
    join: Annotated[list[Path], typer.Option("--with", help="another run to average with; may be repeated")] = [],  # noqa: B006
    root: Annotated[Path | None, typer.Option(help="folder of the run's data set, in place of INPUT")] = None,
    part: Annotated[str, typer.Option(help="of that data set: train, validation, test, fold-0 or all")] = "test",
    modality: Annotated[str | None, typer.Option(help="CT, MRI or US, where the run's data sets have several")] = None,
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="average over mirror images; default the run's setting")] = None,
    one_piece: Annotated[list[str], typer.Option(help="keep the largest piece of a class; may be repeated; default the run's")] = [],  # noqa: B006
    probabilities: Annotated[bool, typer.Option("--probabilities", help="write each class's probability too")] = False,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu or cuda; default the run's setting")] = None,
) -> None:
    """Segment scans with a trained run, each on its own grid and in its own format. Called again, it does only what is missing."""
    from .run.inputs import find_inputs, find_part, manifest_for
    from .run.predict_all import Ensemble, Predicted, predict_all

    if bool(images) == bool(root):
        raise UserError("INPUT: expected scans, or a data set's folder by --root; found " + ("both." if root else "neither."))
    ensemble = Ensemble.of([folder, *join], accelerator=accelerator)
    changes = ({} if mirror is None else {"mirror": mirror}) | ({"one_piece": tuple(one_piece)} if one_piece else {})
    manifest = manifest_for(ensemble.settings.data, modality)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    cases = find_part(manifest, root, part) if root else find_inputs(images, manifest, modality=modality, say=say)

    def on_done(result: Predicted) -> None:
        if result.state == "predicted":
            found = ", ".join(f"{name} {voxels}" for name, voxels in result.voxels.items())
            say(f"{result.path}: {'x'.join(map(str, result.shape))} voxels; {found}")
        elif result.state == "failed" and len(cases) > 1:
            say(result.message)

    how = {"probabilities": probabilities, "progress": sys.stderr.isatty(), "say": say, "on_done": on_done}
    done = predict_all(cases, ensemble.with_prediction(**changes), out, **how)
    if len(cases) == 1 and done[0].state == "failed":
        raise UserError(done[0].message)
    count = {state: sum(result.state == state for result in done) for state in ("predicted", "unchanged", "failed")}
    say(f"{out}: {', '.join(f'{n} {state}' for state, n in count.items())}.")
    if count["failed"]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(metavar="RUN|PRED|CSV", help="run folder; labels: a file, or a folder paired by case id; or a metrics.csv")],
    reference: Annotated[Path | None, typer.Argument(metavar="[REF]", help="reference labels, as PRED")] = None,
    data: Annotated[str | None, typer.Option(help="data set whose raw labels the references hold; default: that of PRED's run")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="PRED holds the data set's raw labels too")] = False,
    csv: Annotated[Path | None, typer.Option(help="one row a case, class and metric; default metrics.csv in the folder PRED")] = None,
    convention: Annotated[str, typer.Option(help="means as others make them: own, monai, segmamba, nnunet, brats or paper")] = "own",
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
        measure(run, demo_data(run.settings.profile))
        print_dice(run, console)
        return
    from .study.evaluation_report import evaluate_files

    asked = {"data": data, "raw": raw, "csv": csv, "convention": convention, "lesions": tuple(lesions), "tolerances_mm": tuple(tolerance), "workers": workers}
    if not evaluate_files(predicted, reference, console, **asked):
        raise typer.Exit(1)


app.command()(routing)


@app.command()
def compare(
    methods: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH...", help="metrics.csv files, or folders with one; one name twice: two seeds of a method")
    ],
    metric: Annotated[str, typer.Option(help="dice, hd95, nsd_2mm, ...: as in the files")] = "dice",
    against: Annotated[str | None, typer.Option(help="test each other method against this one; default all pairs")] = None,
) -> None:
    """Methods beside each other on the same cases: intervals, ranking, paired tests, and how much of a difference is the seed.

    Example: home compare ours=labels/metrics.csv unet=labels_unet/metrics.csv --metric hd95
    """
    from .study.compare_report import gather, print_comparison

    print_comparison(gather(methods), console, metric=metric, against=against)


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="bundle (MONAI), hub (safetensors and a model card), or onnx")] = "bundle",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder; default RUN-bundle or RUN-hub")] = None,
    bits: Annotated[int, typer.Option(help="2 to 8: weights rounded, for a small file; 32: as they are")] = 32,
) -> None:
    """Write a run for others, with its weights, settings, manifest and a model card."""
    from .run.export import export as write
    from .run.folder import Run

    written = write(Run.open(folder), to, out or folder.with_name(f"{folder.name}-{to}"), bits=bits)
    console.print(f"{written}: written.", highlight=False, markup=False)


@app.command()
def tables(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER...", help="run folders with a metrics.csv, or folders of grids")] = None,
    paper: Annotated[str | None, typer.Option(help="a table of the paper, T5: by itself, or beside a grid's")] = None,
    grid: Annotated[str | None, typer.Option(help="the grid's name or file, where its folder does not tell")] = None,
    metric: Annotated[list[str], typer.Option(help="of a grid; may be repeated")] = ["dice", "hd95"],  # noqa: B006
    costs: Annotated[bool, typer.Option("--costs", help="of a grid: parameters and FLOPs of every arm, and what its runs took")] = False,
    markdown: Annotated[bool, typer.Option("--markdown")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="with booktabs")] = False,
    csv: Annotated[bool, typer.Option("--csv")] = False,
) -> None:
    """Result tables of runs and of grids, and the paper's.

    Example: home tables runs/ablations/laptop-tables --paper T5 --latex
    """
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
    if not folders:
        print(paper_table(paper).as_text(form))
    for folder in folders or []:
        if is_grid(folder):
            print(grid_table(folder, metrics=metric, paper=paper, grid=grid, costs=costs).as_text(form))
        elif forms:
            for table in run_tables(folder):
                print(table.as_text(form))
        else:
            print_dice(Run.open(folder), console)


def parse_changes(changes: list[str], *, option: str = "--set") -> dict[str, object]:
    """`name=value` texts to settings by dotted name; values are read as YAML (numbers, lists, true, null)."""
    parsed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"{option}: found {change!r}, expected name=value, training.steps=100 say.")
        try:
            parsed[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{option}: found {change!r}, whose value cannot be read; expected a number, text, true, null or [1, 2].") from None
    return parsed


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"home: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None and error.errno not in _NO_ROOM:
            raise
        print(f"home: {error.filename or 'a file'}: {error.strerror}. Choose another place, or make room there.", file=sys.stderr)
        sys.exit(2)

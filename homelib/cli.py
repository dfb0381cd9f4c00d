"""`home`, the command line: the same functions and the same settings as the notebooks.

Heavy imports stand inside the commands, so that `home --help` answers at once.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from . import cli_complete as names
from .cli_ablate import app as ablate_app
from .cli_data import app as data_app
from .cli_errors import Home
from .cli_help import command, epilog
from .cli_results import app as results_app
from .cli_routing import EXAMPLES, routing
from .errors import UserError

app = typer.Typer(
    cls=Home,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mamba-HoME for 3D medical image segmentation: train, predict, measure, and see where every expert looks.",
    epilog=epilog(("home doctor  # does it run here, and with what?", "home demo --profile smoke  # all notebooks on generated phantoms, 2 minutes")),
)
app.add_typer(results_app)
app.add_typer(data_app, name="data")
app.add_typer(ablate_app, name="ablate")
console = Console(soft_wrap=True)

Profile = Annotated[str, typer.Option(help="smoke (phantoms, seconds), laptop (real scans, minutes), paper or released", autocompletion=names.profiles)]
Direction = Annotated[
    str, typer.Option(help="a-to-c trains on patient a and tests on c; c-to-a the other way round", autocompletion=names.one_of("a-to-c", "c-to-a"))
]
Changes = Annotated[
    list[str],
    typer.Option("--set", help="a setting by dotted name, training.steps=100; may be repeated; home settings tells all", autocompletion=names.settings),
]
Folder = Annotated[Path, typer.Argument(help="run folder, runs/<name>", autocompletion=names.runs)]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="HOMELIB_DEBUG", help="show the traceback of an error; before or after COMMAND")] = False,
) -> None:
    """Read by `Home`, which tells of errors."""


@command(app, examples=("home doctor", "home doctor --report  # to paste in an issue"))
def doctor(report: Annotated[bool, typer.Option("--report", help="in Markdown, to paste in an issue; your home folder's name is left out")] = False) -> None:
    """Versions, devices, memory, room, data, backends; of what is not used why, and the line that would change it."""
    from .study.doctor import as_markdown, examine

    found = examine()
    if report:
        print(as_markdown(found))
        return
    for section, findings in found.items():
        console.print(f"[bold]{section}[/]")
        for name, finding in findings.items():
            console.print(f"  {name:18} {': '.join(filter(None, finding[:2]))}", highlight=False, markup=False)
            if finding.remedy:
                console.print(f"  {'':18} -> {finding.remedy}", highlight=False, markup=False)


@command(app, examples=("home settings training.augment", "home settings training model.depths --profile laptop"))
def settings(
    beginnings: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="of settings, or of groups of them; default all")] = None,
    profile: Profile = "paper",
) -> None:
    """All settings that --set takes: name, value in a profile, and what it is."""
    from .config import Settings, preset, values
    from .frozen import ended, leaves, unknown_field

    known, about = values(preset(profile)), leaves(Settings)
    for name in beginnings or []:
        if not any(one == name or one.startswith(f"{name}.") for one in known):
            raise UserError(ended(unknown_field(name, Settings)))
    for one, value in known.items():
        if not beginnings or any(one == name or one.startswith(f"{name}.") for name in beginnings):
            console.print(f"{one:34} {value:22} {about[one].description or ''}".rstrip(), highlight=False, markup=False)


@command(app, examples=("home demo", "home demo --profile smoke --only 03 --only 04  # two notebooks, on phantoms"))
def demo(
    profile: Profile = "laptop",
    only: Annotated[
        list[str], typer.Option(help="beginning of a notebook's name, 03; may be repeated", autocompletion=names.notebooks)
    ] = [],  # noqa: B006  typer reads it, nobody writes
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


@command(
    app,
    examples=(
        "home train runs/mine --profile laptop --set training.steps=100  # on the demo",
        "home train runs/amos --data amos_ct --root amos22 --estimate  # hours and memory; nothing is trained",
        "home train runs/cv --data amos_ct --root amos22 --fold all --set network=SwinUNETR",
    ),
)
def train(
    folder: Folder,
    profile: Annotated[
        str | None, typer.Option(help="smoke, laptop, paper or released; default laptop for the demo, paper for --data", autocompletion=names.profiles)
    ] = None,
    direction: Direction = "a-to-c",
    data: Annotated[
        list[str],
        typer.Option(help="data set by name, or the path of a manifest, instead of the demo; may be repeated", autocompletion=names.data_sets),
    ] = [],  # noqa: B006
    root: Annotated[list[Path], typer.Option(help="folder of each --data, in the same order")] = [],  # noqa: B006
    prepared: Annotated[list[Path], typer.Option(help="prepared cases of each --data; default where home data prepare puts them")] = [],  # noqa: B006
    fold: Annotated[str | None, typer.Option(help="which fold is validated on, 0 and up, or all; where the manifest has folds")] = None,
    faulty: Annotated[
        str,
        typer.Option(
            help="cases that home data check or prepare found faulty: refuse, leave-out or keep", autocompletion=names.one_of("refuse", "leave-out", "keep")
        ),
    ] = "refuse",
    estimate: Annotated[bool, typer.Option("--estimate", help="measure a few steps, and tell hours, memory and disk rate; nothing is trained")] = False,
    set: Changes = [],  # noqa: A002, B006
) -> None:
    """Train a network on a demo patient, or on prepared data. A folder with an unfinished training is gone on with.

    SIGTERM and SIGUSR1 end it with a checkpoint and exit status 75; the same command goes on.
    """
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from .config import override, preset
    from .data.cases import demo_data, with_demo_cases
    from .data.cases import prepared as prepared_demo
    from .run.cohort import FAULTY, Cohort, DataSet, Faulty, cohort, folds_of
    from .run.signals import STATUS, Stopped
    from .run.train import fit
    from .study.folds import train_folds
    from .study.routing_log import watch_of
    from .study.train_report import print_estimate, print_folds

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    console.quiet = bool(getattr(rank_zero_only, "rank", 0))  # of several processes one talks
    changes = parse_changes(set)
    start = preset(profile or ("paper" if data else "laptop"))
    wanted: Faulty | None = next((known for known in FAULTY if known == faulty), None)
    if wanted is None:
        raise UserError(f"--faulty: found {faulty!r}, expected one of {', '.join(FAULTY)}.")
    sets = [DataSet(name, *places, wanted) for name, places in zip(data, _places(data, root, prepared), strict=True)]
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
    its: list[Path | None] = [*prepared] or [None] * len(data)
    return list(zip(root, its, strict=True))


@command(
    app,
    examples=(
        "home predict runs/mine scan.nii.gz -o labels.nii.gz",
        "home predict runs/cv SCANS -o labels --mirror --one-piece liver  # all folds averaged",
        "home predict runs/amos --root amos22 --part test -o labels",
    ),
)
def predict(
    folder: Annotated[Path, typer.Argument(help="run folder, runs/<name>; or a folder of runs fold-0, fold-1, ...", autocompletion=names.runs)],
    images: Annotated[list[Path] | None, typer.Argument(metavar="INPUT...", help="NIfTI, NRRD or MetaImage files, folders of these or of DICOM slices")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for labels; for one scan also a file, .nii.gz say")] = Path("predictions"),
    join: Annotated[list[Path], typer.Option("--with", help="another run to average with; may be repeated", autocompletion=names.runs)] = [],  # noqa: B006
    root: Annotated[Path | None, typer.Option(help="folder of the run's data set, in place of INPUT")] = None,
    part: Annotated[
        str, typer.Option(help="of that data set: train, validation, test, fold-0 or all", autocompletion=names.one_of("train", "validation", "test", "all"))
    ] = "test",
    modality: Annotated[
        str | None, typer.Option(help="CT, MRI or US, where the run's data sets have several", autocompletion=names.one_of("CT", "MRI", "US"))
    ] = None,
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="average over mirror images; default the run's {prediction.mirror}")] = None,
    one_piece: Annotated[
        list[str], typer.Option(help="keep the largest piece of a class; may be repeated; default the run's {prediction.one_piece}")
    ] = [],  # noqa: B006
    probabilities: Annotated[bool, typer.Option("--probabilities", help="write each class's probability too")] = False,
    accelerator: Annotated[
        str | None,
        typer.Option(help="auto, cpu or cuda; default the run's {training.accelerator}", autocompletion=names.one_of("auto", "cpu", "cuda")),
    ] = None,
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

    cases = find_part(manifest, root, part) if root else find_inputs(images or [], manifest, modality=modality, say=say)

    def on_done(result: Predicted) -> None:
        if result.state == "predicted":
            found = ", ".join(f"{name} {voxels}" for name, voxels in (result.voxels or {}).items())
            say(f"{result.path}: {'x'.join(map(str, result.shape))} voxels; {found}")
        elif result.state == "failed" and len(cases) > 1:
            say(result.message)

    done = predict_all(cases, ensemble.with_prediction(**changes), out, probabilities=probabilities, say=say, on_done=on_done)
    if len(cases) == 1 and done[0].state == "failed":
        raise UserError(done[0].message)
    count = {state: sum(result.state == state for result in done) for state in ("predicted", "unchanged", "failed")}
    say(f"{out}: {', '.join(f'{n} {state}' for state, n in count.items())}.")
    if count["failed"]:
        raise typer.Exit(1)


command(app, examples=EXAMPLES)(routing)


@command(app, examples=("home export runs/mine", "home export runs/mine --to onnx -o mine-onnx"))
def export(
    folder: Folder,
    to: Annotated[
        str, typer.Option(help="bundle (MONAI), hub (safetensors and a model card), or onnx", autocompletion=names.one_of("bundle", "hub", "onnx"))
    ] = "bundle",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder; default RUN-bundle or RUN-hub")] = None,
    bits: Annotated[int, typer.Option(help="2 to 8: weights rounded, for a small file; 32: as they are")] = 32,
) -> None:
    """Write a run for others, with its weights, settings, manifest and a model card."""
    from .run.export import export as write
    from .run.folder import Run

    written = write(Run.open(folder), to, out or folder.with_name(f"{folder.name}-{to}"), bits=bits)
    console.print(f"{written}: written.", highlight=False, markup=False)


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
    """Entry point."""
    app(prog_name="home")

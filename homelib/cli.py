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

from .errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mamba-HoME for 3D medical image segmentation: train, predict, measure, and see where every expert looks.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets: what is known of them, and the demo data.")
app.add_typer(data_app, name="data")
console = Console(soft_wrap=True)

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
    from .run.cohort import Cohort, DataSet, cohort
    from .run.signals import STATUS, Stopped
    from .run.train import fit
    from .study.folds import train_folds
    from .study.train_report import print_estimate, print_folds

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    console.quiet = bool(rank_zero_only.rank)  # of several processes one talks
    changes = parse_changes(set)
    start = preset(profile or ("paper" if data else "laptop"))
    sets = [DataSet(name, *places) for name, places in zip(data, _places(data, root, prepared), strict=True)]
    if fold is not None and not (sets and (fold == "all" or fold.isdecimal())):
        raise UserError(f"--fold: found {fold!r}, expected a number from 0 or all, with --data.")
    if not sets:
        demo = demo_data(start.profile)
        settings = override(with_demo_cases(start, demo, direction=direction), changes)
        say(demo.message)
        made = Cohort(settings, tuple(prepared_demo(settings, demo)), ())
    elif fold != "all" or estimate:
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
        run = fit(made.settings, made.train, folder, validation=made.validation)
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
    modality: Annotated[str | None, typer.Option(help="CT, MRI or US, where the data set has several")] = None,
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="average over mirror images; default the run's setting")] = None,
    one_piece: Annotated[list[str], typer.Option(help="keep the largest piece of a class; may be repeated; default the run's")] = [],  # noqa: B006
    probabilities: Annotated[bool, typer.Option("--probabilities", help="write each class's probability too")] = False,
) -> None:
    """Segment scans with a trained run, each on its own grid and in its own format. Called again, it does only what is missing."""
    from .data.manifest import load_manifest
    from .run.inputs import find_inputs, find_part
    from .run.predict_all import Ensemble, predict_all

    if bool(images) == bool(root):
        raise UserError("INPUT: expected scans, or a data set's folder by --root; found " + ("both." if root else "neither."))
    ensemble = Ensemble.of([folder, *join])
    changes = ({} if mirror is None else {"mirror": mirror}) | ({"one_piece": tuple(one_piece)} if one_piece else {})
    manifest = load_manifest(ensemble.settings.data.manifest)
    cases = find_part(manifest, root, part) if root else find_inputs(images, manifest, modality=modality)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    alone = len(cases) == 1
    done = predict_all(cases, ensemble.with_prediction(**changes), out, probabilities=probabilities, progress=sys.stderr.isatty(), say=say)
    if alone and done[0].state == "failed":
        raise UserError(done[0].message)
    for result in done:
        if result.state == "predicted":
            found = ", ".join(f"{name} {voxels}" for name, voxels in result.voxels.items())
            say(f"{result.path}: {'x'.join(map(str, result.shape))} voxels; {found}")
        elif result.state == "failed":
            say(result.message)
    count = {state: sum(result.state == state for result in done) for state in ("predicted", "unchanged", "failed")}
    say(f"{out}: {', '.join(f'{n} {state}' for state, n in count.items())}.")
    if count["failed"]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(metavar="RUN|PRED", help="run folder; or labels: a file, or a folder of files paired by case id")],
    reference: Annotated[Path | None, typer.Argument(metavar="[REF]", help="reference labels, as PRED")] = None,
    data: Annotated[str | None, typer.Option(help="data set whose raw labels the references hold; default: labels.json beside PRED")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="PRED holds the data set's raw labels too")] = False,
    csv: Annotated[Path | None, typer.Option(help="one row a case, class and metric; default metrics.csv in the folder PRED")] = None,
    convention: Annotated[str, typer.Option(help="means as others make them: own, monai, segmamba, nnunet, brats or paper")] = "own",
    lesions: Annotated[list[str], typer.Option(help="a class whose lesions are counted, pdac; may be repeated")] = [],  # noqa: B006
    tolerance: Annotated[list[float], typer.Option(help="mm of the surface distance NSD; may be repeated")] = [1.0, 2.0, 3.0],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default one a core")] = None,
) -> None:
    """Measure labels against references, on the files' own grids; or a run on the demo's patients, beside baselines."""
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


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="bundle (MONAI), hub (safetensors and a model card), or onnx")] = "bundle",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder; default RUN-bundle or RUN-hub")] = None,
) -> None:
    """Write a run for others, with its weights, settings, manifest and a model card."""
    from .run.export import export as write
    from .run.folder import Run

    console.print(f"{write(Run.open(folder), to, out or folder.with_name(f'{folder.name}-{to}'))}: written.", highlight=False, markup=False)


@app.command()
def tables(folders: Annotated[list[Path], typer.Argument(help="run folders with a metrics.csv")]) -> None:
    """Result tables of runs, from their metrics.csv."""
    from .run.folder import Run
    from .study.demo_report import print_dice

    for folder in folders:
        print_dice(Run.open(folder), console)


@data_app.command("list")
def data_list() -> None:
    """The data sets with a manifest: name, modality, cases, how they are had, title."""
    from .data.manifest import list_manifests, load_manifest

    for name in list_manifests():
        manifest = load_manifest(name)
        cases = manifest.expected_cases or len(manifest.cases)
        console.print(f"{name:21} {'+'.join(manifest.modalities):6} {cases:5} cases  {manifest.access:12}  {manifest.title}", highlight=False)


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="data set by name, or the path of a manifest")],
    root: Annotated[Path, typer.Argument(help="folder of the data set, which is only read")],
    csv: Annotated[Path | None, typer.Option(help="write the findings to this file too")] = None,
    fix: Annotated[Path | None, typer.Option(help="write a repaired copy to this folder, new or empty")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default one a core")] = None,
    again: Annotated[bool, typer.Option("--again", help="read unchanged cases again too")] = False,
    show: Annotated[int, typer.Option(min=0, help="findings to print")] = 40,
) -> None:
    """Check every case of a data set: names and pairs, files, geometry, intensities, labels. Exit status 1 where there are errors."""
    from .data.check import check
    from .data.findings import count, table, write_findings
    from .data.fix import fix as write_fixed
    from .data.manifest import load_manifest

    if csv is not None and csv.exists():
        raise UserError(f"{csv}: exists already and is left as it is. Choose another --csv.")
    manifest = load_manifest(name)
    checked = check(manifest, root, workers=workers, again=again, progress=sys.stderr.isatty())
    if checked.findings:
        console.print(table(checked.findings[:show], root))
    if len(checked.findings) > show:
        console.print(f"... and {len(checked.findings) - show} more in the CSV.")
    if csv is not None:
        write_findings(checked.findings, csv)
    console.print(f"{root}: {len(checked.cases)} cases, {count(checked.findings)}.", highlight=False, markup=False)
    console.print(f"All findings: {csv or checked.folder / 'findings.csv'}. Cases: {checked.folder / 'cases.csv'}", highlight=False, markup=False)
    if fix is not None:
        repairs = write_fixed(checked, manifest, root, fix)
        console.print(f"{fix}: {len(repairs)} files repaired, the others linked. Next: home data check {name} {fix}", highlight=False, markup=False)
    if checked.errors:
        raise typer.Exit(1)


@data_app.command("cases")
def data_cases(
    name: Annotated[str, typer.Argument(help="data set by name, or the path of a manifest")],
    root: Annotated[Path, typer.Argument(help="folder of the data set, which is only read")],
) -> None:
    """The cases in a folder: id, modality, part or fold, and what the last check said."""
    from .data.findings import printable
    from .data.manifest import load_manifest
    from .data.overview import overview

    seen = overview(load_manifest(name), root)
    print("\n".join(f"{printable(case_id):30} {modality:4} {part or '-':10} {state}" for case_id, modality, part, state in seen.rows))
    console.print(str(seen), highlight=False, markup=False)
    if seen.why:
        console.print(seen.why, highlight=False, markup=False)


@data_app.command("import")
def data_import(
    root: Annotated[Path, typer.Argument(help="folder with images and labels, which is only read")],
    out: Annotated[Path, typer.Option("--out", "-o", help="manifest to write, its name will be the data set's: my_data.yaml")],
    modality: Annotated[str | None, typer.Option(help="CT, MRI or US; needed where the files do not say")] = None,
) -> None:
    """Write a manifest for data of your own: nnU-Net, Medical Segmentation Decathlon, BIDS, one folder a case, or pairs of files."""
    from .data.importing import import_folder

    manifest = import_folder(root, out, modality=modality)
    for line in manifest.unverified:
        console.print(f"look at: {line}", highlight=False, markup=False)
    told = f"{manifest.expected_cases} cases, {manifest.modality}; classes {', '.join(manifest.classes)}; images {', '.join(x.image for x in manifest.layouts)}"
    console.print(f"{out}: {told}. Next: home data check {out} {root}", highlight=False, markup=False)


@data_app.command("show")
def data_show(name: str) -> None:
    """One data set's manifest: classes, spacing, window, cases, source, licence, how to get it, what is unverified."""
    from .data.manifest import as_yaml, load_manifest

    console.print(as_yaml(load_manifest(name)), highlight=False, markup=False)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="demo, or a data set by name")],
    url: Annotated[str | None, typer.Option(help="of an archive of the data set, as its page gives it")] = None,
    sha256: Annotated[str | None, typer.Option(help="of that archive")] = None,
    md5: Annotated[str | None, typer.Option(help="of that archive, where the page gives no sha256")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default <cache>/sets/NAME")] = None,
) -> None:
    """Fetch data: `demo` is the real scans of the demo (82 MB, once). Of another data set its archives, or, where they are not known, the steps."""
    from .data.demo import DEMO_MANIFESTS, fetch_demo
    from .data.fetch import archive_of, fetch_archives, root_of, steps
    from .data.manifest import load_manifest
    from .paths import cache_dir

    if name == "demo" or name in DEMO_MANIFESTS:
        demo = fetch_demo()
        console.print(demo.message, highlight=False, markup=False)
        console.print(f"cache: {cache_dir()}", highlight=False)
        if not demo.real:
            raise typer.Exit(1)
        return
    manifest = load_manifest(name)
    archives = [archive_of(url, sha256=sha256, md5=md5)] if url else manifest.archives
    if manifest.cases:
        console.print(f"{manifest.title}: its cases are generated when they are asked for; there is nothing to fetch.", highlight=False, markup=False)
        return
    if not archives:
        console.print(steps(manifest), highlight=False, markup=False)
        raise typer.Exit(1)
    root = root_of(fetch_archives(archives, out or cache_dir() / "sets" / manifest.name))
    console.print(f"{root}: unpacked ({manifest.licence}). Next: home data check {name} {root}", highlight=False, markup=False)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="data set by name, or the path of a manifest")],
    root: Annotated[Path, typer.Argument(help="folder of the data set, which is only read")],
    out: Annotated[Path | None, typer.Option(help="folder for the prepared cases; default <cache>/prepared/NAME and a mark of ROOT")] = None,
    spacing: Annotated[tuple[float, float, float] | None, typer.Option(help="mm, right-left, front-back, up; default the manifest's")] = None,
    labels: Annotated[str, typer.Option(help="nearest; linear: each class as a mask; shares: how much of each class is in a voxel, too")] = "nearest",
    intensity: Annotated[str, typer.Option(help="kept, or scaled (clipped to the window, half the space)")] = "kept",
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default one a core")] = None,
) -> None:
    """Orient, resample and crop every case into files that patches are read from. Called again, it does only what is missing or has changed."""
    from .data.check import unsound
    from .data.cohort import TOLD, default_folder, open_all, prepare_all
    from .data.layouts import find_cases
    from .data.manifest import load_manifest
    from .data.memory import residence
    from .data.parallel import default_workers
    from .data.prepare import preparation

    manifest = load_manifest(name)
    settings = preparation(spacing_mm=spacing, labels=labels, intensity=intensity)
    found = find_cases(manifest, root)
    folder = out or default_folder(manifest, root)
    outcomes = prepare_all(found.cases, folder, settings, workers=workers or default_workers())
    count = {state: sum(outcome.state == state for outcome in outcomes) for state in ("prepared", "unchanged", "failed")}
    console.print(f"{folder}: {', '.join(f'{n} {state}' for state, n in count.items())} ({TOLD}).", highlight=False, markup=False)
    there = [case for case, outcome in zip(found.cases, outcomes, strict=True) if outcome.state != "failed"]
    if told := unsound(manifest, root, found.cases):
        console.print(f"{root}: {told}", highlight=False, markup=False)
    if there:
        console.print(f"For training here: {residence(open_all(there, folder))}", highlight=False, markup=False)
    if errors := sum(finding.severity == "error" for finding in found.findings):
        console.print(f"{root}: {errors} faults of names and pairs; home data check {name} {root} tells them.", highlight=False, markup=False)
    if count["failed"] or not outcomes:
        raise typer.Exit(1)


@data_app.command("plan")
def data_plan(
    name: Annotated[str, typer.Argument(help="data set by name, or the path of a manifest")],
    root: Annotated[Path, typer.Argument(help="folder of the data set, of which headers are read")],
    memory: Annotated[float | None, typer.Option(help="GiB of the device to train on; default the GPU's here")] = None,
    spacing: Annotated[tuple[float, float, float] | None, typer.Option(help="mm to plan for; default the data's median")] = None,
) -> None:
    """Spacing, patch and batch for a data set and a memory, with their reasons, and the paper's beside."""
    from rich.table import Table

    from .data.layouts import find_cases
    from .data.manifest import load_manifest
    from .data.plan import device_memory_gib, grids_of, plan

    manifest = load_manifest(name)
    cases = find_cases(manifest, root).cases
    grids, faults = grids_of(cases)
    for fault in faults:
        console.print(f"left out: {fault}", highlight=False, markup=False)
    done = plan(manifest, grids, memory_gib=memory or device_memory_gib(), cases=len(cases), spacing_mm=spacing)
    beside = "paper" if manifest.reference == manifest.name else "manifest"
    table = Table("", "planned", beside, "reason", title=f"{manifest.name}: a plan for the paper's network")
    for row in done.rows:
        table.add_row(row.what, row.value, row.paper or "-", row.reason)
    console.print(table, markup=False)


def parse_changes(changes: list[str]) -> dict[str, object]:
    """`name=value` texts to settings by dotted name; values are read as YAML (numbers, lists, true, null)."""
    parsed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set: found {change!r}, expected name=value, training.steps=100 say.")
        try:
            parsed[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set: found {change!r}, whose value cannot be read; expected a number, text, true, null or [1, 2].") from None
    return parsed


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"home: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None:
            raise
        print(f"home: {error.filename}: {error.strerror}. Choose another place, or make room there.", file=sys.stderr)
        sys.exit(2)

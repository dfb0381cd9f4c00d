"""`home data`: what is known of data sets, and from a downloaded folder to prepared cases."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import cli_complete as names
from .cli_help import command, epilog
from .errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    help="Data sets: what is known of them; checked, prepared and planned for; your own too.",
    epilog=epilog(("home data list", "home data import FOLDER -o mine.yaml  # yours; then check, prepare, plan")),
)
console = Console(soft_wrap=True)

Name = Annotated[str, typer.Argument(help="data set by name, or the path of a manifest", autocompletion=names.data_sets)]
Root = Annotated[Path, typer.Argument(help="folder of the data set, which is only read")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes; default one a core")]


@command(app, "list", examples=("home data list",))
def data_list() -> None:
    """The data sets with a manifest: name, modality, cases, how they are had, title."""
    from .data.manifest import list_manifests, load_manifest

    for name in list_manifests():
        manifest = load_manifest(name)
        cases = manifest.expected_cases or len(manifest.cases)
        console.print(f"{name:21} {'+'.join(manifest.modalities):6} {cases:5} cases  {manifest.access:12}  {manifest.title}", highlight=False)


@command(app, "check", examples=("home data check amos_ct amos22", "home data check mine.yaml FOLDER --fix COPY  # what can be repaired, in a copy"))
def data_check(
    name: Name,
    root: Root,
    csv: Annotated[Path | None, typer.Option(help="write the findings to this file too")] = None,
    fix: Annotated[Path | None, typer.Option(help="write a repaired copy to this folder: new, empty, or begun by a call that was stopped")] = None,
    workers: Workers = None,
    again: Annotated[bool, typer.Option("--again", help="read unchanged cases again too")] = False,
    show: Annotated[int, typer.Option(min=0, help="findings to print")] = 40,
) -> None:
    """Check every case of a data set: names and pairs, files, geometry, intensities, labels. Exit status 1 where there are errors."""
    from .data.check import check
    from .data.findings import count, table, write_findings
    from .data.fix import fit_for_copies, unmended
    from .data.fix import fix as write_fixed
    from .data.manifest import load_manifest

    if csv is not None and csv.exists():
        raise UserError(f"{csv}: exists already and is left as it is. Choose another --csv.")
    if fix is not None:
        fit_for_copies(root, fix)  # before all is read
    manifest = load_manifest(name)
    checked = check(manifest, root, workers=workers, again=again, progress=True)
    if checked.findings:
        console.print(table(checked.findings[:show], root))
    if len(checked.findings) > show:
        console.print(f"... and {len(checked.findings) - show} more in the CSV.")
    if csv is not None:
        write_findings(checked.findings, csv)
    console.print(f"{root}: {len(checked.cases)} cases, {count(checked.findings)}.", highlight=False, markup=False)
    console.print(f"All findings: {csv or checked.folder / 'findings.csv'}. Cases: {checked.folder / 'cases.csv'}", highlight=False, markup=False)
    if fix is not None:
        repairs = write_fixed(checked, manifest, root, fix, workers=workers, progress=True)
        if left := unmended(checked):
            told = f"{len(left)} files could be mended in another format alone ({left[0]} first), and are linked as they are: write them as NIfTI"
            console.print(f"{fix}: {told}.", highlight=False, markup=False)
        console.print(f"{fix}: {len(repairs)} files repaired, the others linked. Next: home data check {name} {fix}", highlight=False, markup=False)
    if checked.errors:
        raise typer.Exit(1)


@command(app, "cases", examples=("home data cases amos_ct amos22",))
def data_cases(
    name: Name,
    root: Root,
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


@command(app, "import", examples=("home data import FOLDER -o mine.yaml --modality CT",))
def data_import(
    root: Annotated[Path, typer.Argument(help="folder with images and labels, which is only read")],
    out: Annotated[Path, typer.Option("--out", "-o", help="manifest to write, its name will be the data set's: my_data.yaml")],
    modality: Annotated[
        str | None, typer.Option(help="CT, MRI or US; needed where the files do not say", autocompletion=names.one_of("CT", "MRI", "US"))
    ] = None,
) -> None:
    """Write a manifest for data of your own: nnU-Net, Medical Segmentation Decathlon, BIDS, one folder a case, or pairs of files."""
    from .data.importing import import_folder

    manifest = import_folder(root, out, modality=modality, progress=True)
    for line in manifest.unverified:
        console.print(f"look at: {line}", highlight=False, markup=False)
    told = f"{manifest.expected_cases} cases, {manifest.modality}; classes {', '.join(manifest.classes)}; images {', '.join(x.image for x in manifest.layouts)}"
    console.print(f"{out}: {told}. Next: home data check {out} {root}", highlight=False, markup=False)


@command(app, "show", examples=("home data show amos_ct",))
def data_show(name: Name) -> None:
    """One data set's manifest: classes, spacing, window, cases, source, licence, how to get it, what is unverified."""
    from .data.manifest import as_yaml, load_manifest

    console.print(as_yaml(load_manifest(name)), highlight=False, markup=False)


@command(
    app,
    "fetch",
    examples=(
        "home data fetch demo",
        "home data fetch msd_pancreas  # an open data set whose archive is known",
        "home data fetch panorama --url ADDRESS --md5 MD5 --into images  # by hand, as its page says",
    ),
)
def data_fetch(
    name: Annotated[str, typer.Argument(help="demo, or a data set by name", autocompletion=names.fetched)],
    url: Annotated[str | None, typer.Option(help="of an archive of the data set, as its page gives it")] = None,
    sha256: Annotated[str | None, typer.Option(help="of that archive")] = None,
    md5: Annotated[str | None, typer.Option(help="of that archive, where the page gives no sha256")] = None,
    into: Annotated[
        str | None, typer.Option(help="folder below the data set's to unpack it to, where the steps name one; several archives, one after the other")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default <cache>/sets/NAME")] = None,
) -> None:
    """Fetch data: `demo` is the real scans of the demo (82 MB, once). Of another data set its archives, or, where they are not known, the steps."""
    from .data.demo import DEMO_MANIFESTS, demo_root, fetch_cases, fetch_demo
    from .data.fetch import archive_of, fetch_archives, root_of, steps
    from .data.manifest import load_manifest
    from .paths import cache_dir

    options = {"--url": url, "--sha256": sha256, "--md5": md5, "--into": into, "--out": out}
    given = [option for option, value in options.items() if value is not None]
    manifest = None if name == "demo" else load_manifest(name)
    if given and (manifest is None or manifest.cases):
        told = f"its files are pinned, and go to {cache_dir() / 'demo'}; HOMELIB_CACHE moves the cache"
        raise UserError(f"{name}: found {', '.join(given)}, expected no option: {told}. Leave {'it' if len(given) == 1 else 'them'} out.")
    if url is None and (lone := [option for option in given if option != "--out"]):
        raise UserError(f"{', '.join(lone)}: found without --url, expected with the address of an archive. Give --url, or leave them out.")
    if manifest is None or name in DEMO_MANIFESTS:
        demo = fetch_demo()
        console.print(demo.message, highlight=False, markup=False)
        console.print(f"cache: {cache_dir()}", highlight=False)
        if not demo.real:
            raise typer.Exit(1)
        for each in DEMO_MANIFESTS:
            console.print(f"To look at: home data check {each} {demo_root(each)}", highlight=False, markup=False)
        return
    if manifest.cases:
        made = fetch_cases(manifest)
        console.print(f"{demo_root(name)}: {len(made)} cases, generated. Next: home data check {name} {demo_root(name)}", highlight=False, markup=False)
        return
    archives = [archive_of(url, sha256=sha256, md5=md5, into=into)] if url else manifest.archives
    if not archives:
        console.print(steps(manifest), highlight=False, markup=False)
        raise typer.Exit(1)
    root = root_of(fetch_archives(archives, out or cache_dir() / "sets" / manifest.name), archives)
    console.print(f"{root}: unpacked ({manifest.licence}). Next: home data check {name} {root}", highlight=False, markup=False)


@command(app, "prepare", examples=("home data prepare amos_ct amos22", "home data prepare mine.yaml FOLDER --spacing 1.5 1.5 2 --labels linear --out prepared"))
def data_prepare(
    name: Name,
    root: Root,
    out: Annotated[Path | None, typer.Option(help="folder for the prepared cases; default <cache>/prepared/NAME and a mark of ROOT")] = None,
    spacing: Annotated[tuple[float, float, float] | None, typer.Option(help="mm, right-left, front-back, up; default the manifest's")] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="nearest; linear: each class as a mask; shares: how much of each class is in a voxel, too",
            autocompletion=names.one_of("nearest", "linear", "shares"),
        ),
    ] = "nearest",
    intensity: Annotated[
        str, typer.Option(help="kept, or scaled (clipped to the window, half the space)", autocompletion=names.one_of("kept", "scaled"))
    ] = "kept",
    low_pass: Annotated[
        bool, typer.Option(help="smooth images before a coarser grid; without, linear interpolation alone, as MONAI has it; in a training {data.low_pass}")
    ] = True,
    workers: Workers = None,
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
    settings = preparation(spacing_mm=spacing, labels=labels, intensity=intensity, low_pass=low_pass)
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


@command(app, "plan", examples=("home data plan mine.yaml FOLDER --memory 24",))
def data_plan(
    name: Name,
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
    done = plan(manifest, grids, memory_gib=device_memory_gib() if memory is None else memory, cases=len(cases), spacing_mm=spacing)
    beside = "paper" if manifest.reference == manifest.name and not manifest.cases else "manifest"  # of the demo the paper says nothing
    table = Table("", "planned", beside, "reason", title=f"{manifest.name}: a plan for the paper's network")
    for row in done.rows:
        table.add_row(row.what, row.value, row.paper or "-", row.reason)
    console.print(table, markup=False)

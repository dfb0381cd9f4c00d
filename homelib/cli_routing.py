"""`home routing`: where every expert of a run looks in scans, as maps, tables and a page; what was made is kept if the rest is interrupted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import cli_complete as names
from .errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from .data.manifest import Case
    from .run.folder import Run
    from .study.expert_maps import RoutingMaps

EXAMPLES = (
    "home routing runs/mine ct-c --stage 2 --knock-out",
    "home routing runs/amos scan.nii.gz --label label.nii.gz --native -o looked",
    "home routing runs/amos 0001 0002 --root amos22  # and both together, by class",
)
console = Console(soft_wrap=True)


def routing(
    folder: Annotated[Path, typer.Argument(help="run folder, runs/<name>, of a MambaHoME", autocompletion=names.runs)],
    cases: Annotated[list[str], typer.Argument(metavar="CASE...", help="scans' paths; or case ids: of the demo, or of the run's data set with --root")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder; of several cases one for each in it; default RUN/routing/CASE")] = None,
    root: Annotated[Path | None, typer.Option(help="folder of the run's data set, where CASE is an id")] = None,
    label: Annotated[Path | None, typer.Option(help="label file of one scan given by its path, with the data set's raw labels")] = None,
    modality: Annotated[
        str | None, typer.Option(help="CT, MRI or US, where the data set has several", autocompletion=names.one_of("CT", "MRI", "US"))
    ] = None,
    stage: Annotated[list[int], typer.Option(help="encoder stage, from 0 (finest); may be repeated; default all")] = [],  # noqa: B006
    block: Annotated[list[int], typer.Option(help="block of a stage, from 0; may be repeated; default all")] = [],  # noqa: B006
    level: Annotated[list[int], typer.Option(help="1 (experts of tokens) or 2 (experts of slots); may be repeated; default both")] = [],  # noqa: B006
    slots: Annotated[bool, typer.Option("--slots", help="keep the map of every level-1 slot too")] = False,
    shifts: Annotated[int, typer.Option(min=20, help="of the label, for the band of what is there by chance")] = 200,
    knock_out: Annotated[
        bool, typer.Option("--knock-out", help="predict without each expert and layer, past each level, and with shuffled routing; a prediction each")
    ] = False,
    nifti: Annotated[bool, typer.Option("--nifti/--no-nifti", help="write the maps as NIfTI too")] = True,
    native: Annotated[bool, typer.Option("--native", help="the NIfTI on the scan's own grid, instead of the grid as prepared")] = False,
) -> None:
    """Where every expert of a run looks in scans: maps (NIfTI, npz), tables (CSV), a page (HTML), and a summary.

    Of several labelled scans, of one call or of several, also class and expert by modality and by data set.
    """
    import torch

    from .run.checkpoint import trained_network
    from .run.folder import Run
    from .run.inputs import find_one
    from .study.expert_maps import layers_of

    if label is not None and len(cases) > 1:
        raise UserError(f"--label: found it with {len(cases)} cases, expected it with one scan. Call home routing for each.")
    if native and not nifti:
        raise UserError("--native: found it with --no-nifti, expected one of them: it says where the NIfTI lie.")
    run = Run.open(folder)
    found = [find_one(case, run.settings, root=root, label=label, modality=modality) for case in dict.fromkeys(cases)]
    parent = out or run.folder / "routing"
    places = [out if out is not None and len(found) == 1 else parent / case.id for case in found]
    if len(set(places)) < len(places):
        raise UserError(f"CASE: found {', '.join(case.id for case in found)}, expected a name of its own for each. Look at them one by one, with --out.")
    for place in places:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{place}: exists already and is left as it is. Choose another --out, or delete it.")
    device = torch.device("cuda" if run.settings.training.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    network = trained_network(run).to(device)
    which: dict[str, Any] = {"stages": stage or None, "blocks": block or None, "levels": level or (1, 2)}
    layers_of(network, **which)  # refuses what is not there
    asked = _Asked(which, slots, shifts, knock_out, nifti, native)
    labelled = [_looked_at(case, place, run, network, asked) for case, place in zip(found, places, strict=True)]
    if labelled[-1] and (out is None or len(found) > 1):
        _together(parent, places[-1])


@dataclass(frozen=True)
class _Asked:
    """What is wanted of every case."""

    which: dict
    slots: bool
    shifts: int
    knock_out: bool
    nifti: bool
    native: bool


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False)


def _looked_at(found: "Case", out: Path, run: "Run", network: "nn.Module", asked: _Asked) -> bool:
    """One case: all that is made is written as soon as it is there, the maps first and the page last. Returns whether the case is labelled."""
    from .data.prepare import prepare
    from .progress import bar
    from .run.predict import windows_of
    from .study.association import associations
    from .study.balance import at_start, balance
    from .study.expert_maps import layers_of, routing_maps
    from .study.knockout import interventions
    from .study.map_files import write_nifti
    from .study.routing_groups import FILE, Kept, mark_of
    from .study.routing_tables import memory, routing_tables, summary, told_memory

    settings, layers = run.settings, layers_of(network, **asked.which)
    wanted = interventions(network, **asked.which) if asked.knock_out else []
    prepared = prepare(found, spacing_mm=settings.data.spacing_mm, low_pass=settings.data.low_pass)
    if wanted and prepared.label is None:
        raise UserError(f"--knock-out: found {found.id} without a label, expected one: Dice is measured. Give it by --label.")
    parts = memory(network, prepared, settings, layers, slots=asked.slots, knock_out=asked.knock_out, nifti=asked.nifti, native=asked.native)
    _say(f"{found.id}: {'x'.join(map(str, prepared.image.shape))} voxels as prepared, {len(layers)} layers; {told_memory(parts)}.")
    with bar(total=2 * windows_of(prepared, settings).count, desc="maps", unit="window") as shown:
        start = balance(at_start(prepared, settings, **asked.which, on_window=shown.update))  # first: its maps are gone when the run's are made
        maps = routing_maps(network, prepared, settings, **asked.which, slots=asked.slots, on_window=shown.update)
    maps.save(out / "maps.npz")
    files = write_nifti(maps, out / "nifti", native=prepared if asked.native else None) if asked.nifti else []
    associated = associations(maps, shifts=asked.shifts, progress=True) if maps.label is not None else None
    if associated is not None:
        Kept(maps.name, maps.modality, maps.data_set, mark_of(run.weights_file), associated).save(out / FILE)
    tables = {}
    with bar(total=len(wanted) + 1, desc="knock-out", unit="prediction", show=bool(wanted)) as shown:
        how = {"found": associated, "start": start, "wanted": wanted, "on_prediction": shown.update}
        for name, table in routing_tables(network, prepared, settings, maps, **how, on_rows=lambda rows: _write_table("knockout", rows, out)):
            tables[name] = table
            _write_table(name, table, out)
    lines = summary(tables)
    seed = f"labels {found.label_origin}; seed {settings.training.seed}"
    _write_page(out, f"{found.id}: where the experts of {run.name} look ({seed})", [*lines, _where(asked, out)], maps, tables)
    for line in lines:
        _say(line)
    caution = "knockout.csv tells what this network loses" if wanted else "--knock-out measures what depends on each"
    _say(f"{out}: maps.npz, {len(files)} files in nifti, {len(tables)} tables, report.html. {_where(asked, out)} Associated with is not caused by: {caution}.")
    return associated is not None


def _where(asked: _Asked, out: Path) -> str:
    """On which grid the NIfTI lie, in a sentence."""
    if not asked.nifti:
        return "No NIfTI."
    if asked.native:
        return "NIfTI lie on the scan's own grid, each voxel with the value of the nearest prepared one."
    return f"NIfTI lie on the grid as prepared, over {out.name}/nifti/image.nii.gz and not over the scan's file, whose grid --native takes."


def _write_table(name: str, table: "pd.DataFrame", out: Path) -> None:
    from .paths import written_whole

    with written_whole(out / f"{name}.csv") as part:
        table.to_csv(part, index=False)


def _write_page(out: Path, title: str, lines: list[str], maps: "RoutingMaps", tables: Mapping[str, "pd.DataFrame"]) -> None:
    import re

    import matplotlib

    matplotlib.use("Agg")
    from .paths import written_whole
    from .study.routing_tables import ABOUT
    from .view.page import page, png
    from .view.routed import Routed
    from .view.routing_page import pictures

    packed = {}
    for caption, figure in pictures(Routed.of(maps), tables):
        packed[caption] = png(figure)
        with written_whole(out / "panels" / f"{re.sub('[^a-z0-9]+', '_', caption.lower())}.png") as part:
            part.write_bytes(packed[caption])
    told = [*lines, "Groups are those of one window, the one in the middle: where they end, slots begin anew."]
    with written_whole(out / "report.html") as part:
        part.write_text(page(title, told, packed, {name: (ABOUT[name], table) for name, table in tables.items()}), encoding="utf-8")


def _together(folder: Path, newest: Path) -> None:
    """Class and expert by modality and by data set, of all cases below a folder that were looked at as the newest was; nothing for one alone."""
    from .study.routing_groups import FILE, Kept, alike, counted, grouped

    kept = [Kept.load(path) for path in sorted(folder.glob(f"*/{FILE}"))]
    same, others = alike(kept, Kept.load(newest / FILE))
    if len(same) < 2:
        return
    for name, table in grouped(same).items():
        _write_table(name, table, folder)
    left = f"; left out, being of other weights, layers or shifts: {', '.join(others)}" if others else ""
    _say(f"{folder}: {len(same)} cases together in lift_by_*.csv and information_by_*.csv ({counted(same)}){left}.")

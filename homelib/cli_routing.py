"""`home routing`: where every expert of a run looks in one scan, as maps, tables and a page."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import UserError

console = Console(soft_wrap=True)


def routing(
    folder: Annotated[Path, typer.Argument(help="run folder, runs/<name>, of a MambaHoME")],
    case: Annotated[str, typer.Argument(help="a scan's path; or a case id: of the demo, or of the run's data set with --root")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder; default RUN/routing/CASE")] = None,
    root: Annotated[Path | None, typer.Option(help="folder of the run's data set, where CASE is an id")] = None,
    label: Annotated[Path | None, typer.Option(help="label file of a scan given by its path, with the data set's raw labels")] = None,
    modality: Annotated[str | None, typer.Option(help="CT, MRI or US, where the data set has several")] = None,
    stage: Annotated[list[int], typer.Option(help="encoder stage, from 0 (finest); may be repeated; default all")] = [],  # noqa: B006
    block: Annotated[list[int], typer.Option(help="block of a stage, from 0; may be repeated; default all")] = [],  # noqa: B006
    level: Annotated[list[int], typer.Option(help="1 (experts of tokens) or 2 (experts of slots); may be repeated; default both")] = [],  # noqa: B006
    slots: Annotated[bool, typer.Option("--slots", help="keep the map of every level-1 slot too")] = False,
    shifts: Annotated[int, typer.Option(min=20, help="of the label, for the band of what is there by chance")] = 200,
    knock_out: Annotated[
        bool, typer.Option("--knock-out", help="predict without each expert, each level, and with shuffled routing; a prediction each")
    ] = False,
    nifti: Annotated[bool, typer.Option("--nifti/--no-nifti", help="write the maps as NIfTI too")] = True,
) -> None:
    """Where every expert of a run looks in one scan: maps (NIfTI, npz), tables (CSV), a page (HTML), and a summary.

    Example: home routing runs/mine ct-c --stage 2 --knock-out
    """
    import torch
    from tqdm import tqdm

    from .data.prepare import prepare
    from .run.checkpoint import trained_network
    from .run.folder import Run
    from .run.inputs import find_one
    from .run.predict import windows_of
    from .study.expert_maps import layers_of, maps_bytes, routing_maps
    from .study.map_files import write_nifti
    from .study.knockout import interventions
    from .study.routing_tables import routing_tables, summary

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    run = Run.open(folder)
    settings = run.settings
    found = find_one(case, settings, root=root, label=label, modality=modality)
    out = out or run.folder / "routing" / found.id
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is left as it is. Choose another --out, or delete it.")
    device = torch.device("cuda" if settings.training.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    network = trained_network(run).to(device)
    which = {"stages": stage or None, "blocks": block or None, "levels": level or (1, 2)}
    layers = layers_of(network, **which)
    wanted = interventions(network, **which) if knock_out else []
    prepared = prepare(found, spacing_mm=settings.data.spacing_mm)
    if wanted and prepared.label is None:
        raise UserError(f"--knock-out: found {found.id} without a label, expected one: Dice is measured. Give it by --label.")
    told = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in maps_bytes(network, prepared, settings, layers).items())
    say(f"{found.id}: {'x'.join(map(str, prepared.image.shape))} voxels as prepared, {len(layers)} layers; memory beyond the network, GiB: {told}.")
    quiet = not sys.stderr.isatty()
    with tqdm(total=windows_of(prepared, settings).count, desc="maps", unit="window", disable=quiet) as bar:
        maps = routing_maps(network, prepared, settings, **which, slots=slots, on_window=bar.update)
    with tqdm(total=len(wanted) + 1, desc="knock-out", unit="prediction", disable=quiet or not wanted) as bar:
        tables = routing_tables(network, prepared, settings, maps, shifts=shifts, wanted=wanted, on_prediction=bar.update)
    maps.save(out / "maps.npz")
    files = write_nifti(maps, out / "nifti") if nifti else []
    _write_tables(tables, out)
    lines = summary(tables)
    title = f"{found.id}: where the experts of {run.name} look (labels {found.label_origin}; seed {settings.training.seed})"
    _write_page(out, title, lines, maps, tables, prepared, settings)
    for line in lines:
        say(line)
    say(f"{out}: maps.npz, {len(files)} files in nifti, {len(tables)} tables, report.html. Associated with is not caused by: see --knock-out.")


def _write_tables(tables, out: Path) -> None:
    from .paths import written_whole

    for name, table in tables.items():
        with written_whole(out / f"{name}.csv") as part:
            table.to_csv(part, index=False)


def _write_page(out: Path, title: str, lines: list[str], maps, tables, prepared, settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np

    from .data.manifest import load_manifest
    from .paths import written_whole
    from .study.balance import LAYER
    from .study.expert_maps import window_groups
    from .study.routing_tables import ABOUT
    from .view import plots, routing_charts
    from .view import routing as drawn
    from .view.page import page, png

    at = plots.best_slices(maps.label)["axial"] if maps.label is not None else maps.image.shape[2] // 2
    middle = [maps.image.shape[0] // 2, maps.image.shape[1] // 2, at]
    limits = load_manifest(prepared.case.manifest).window_of(prepared.case.modality)
    place = {"spacing_mm": maps.spacing_mm, "limits": limits, "index": at, "label": maps.label, "class_names": maps.class_names}
    pictures = {}
    for layer, weights in maps.experts.items():
        name = "stage {}, block {}, level {}".format(*layer)
        groups = window_groups(prepared, settings, layer[0], middle)
        shown = f"{name}: experts in axial slice {at}"
        pictures[shown] = png(drawn.expert_panel(maps.image, weights.astype(np.float32), groups, title=f"{maps.name}, {shown}", **place))
        if "lift" in tables:
            lift = tables["lift"][(tables["lift"][LAYER] == list(layer)).all(axis=1)]
            pictures[f"{name}: lift by class"] = png(routing_charts.lift_matrix(lift, title=f"{maps.name}, {name}: lift of each expert in each class"))
    for caption, picture in pictures.items():
        with written_whole(out / "panels" / f"{caption.replace(':', '').replace(',', '').replace(' ', '_')}.png") as part:
            part.write_bytes(picture)
    told = [*lines, f"Groups are those of one window, the one in the middle: where they end, slots begin anew. Files: {out.name}/nifti, maps.npz, *.csv."]
    with written_whole(out / "report.html") as part:
        part.write_text(page(title, told, pictures, {name: (ABOUT[name], table) for name, table in tables.items()}), encoding="utf-8")

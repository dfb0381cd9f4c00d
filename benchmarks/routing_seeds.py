"""What the experts of several seeds have in common, and what is lost without them, on the patient that none of the networks saw.

    python -m benchmarks.routing_seeds [--profile laptop] [--direction a-to-c] [--seeds 0 1 2] [--folder runs/three_seeds]]

The runs are those of `python -m benchmarks.three_seeds`, which trains them. Writes benchmarks/results/routing_seeds.json (what was asked, the machine)
and tidy tables in the folder of that name, a row with its seed: balance, lift, information, stability (pairs of seeds) and knockout (every
expert, every level bypassed and shuffled, every layer).
"""

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import measure
from homelib.data.prepare import PreparedCase
from homelib.paths import written_whole
from homelib.run.checkpoint import trained_network
from homelib.run.folder import Run
from homelib.study.association import Association, associations, information_table, lift_table, stability
from homelib.study.balance import LAYER, at_start, balance
from homelib.study.demo import demo_run
from homelib.study.expert_maps import Layer, routing_maps
from homelib.study.knockout import effects, interventions


def of_seed(run: Run, case: PreparedCase, *, shifts: int) -> tuple[dict[str, pd.DataFrame], dict[Layer, Association]]:
    """The tables of one network, by name, and its associations."""
    network, settings = trained_network(run), run.settings
    maps = routing_maps(network, case, settings)
    found = associations(maps, shifts=shifts)
    wanted = interventions(network)
    with tqdm(total=len(wanted) + 1, desc=f"{run.name}, seed {settings.training.seed}", disable=not sys.stderr.isatty()) as bar:
        knocked = effects(network, [case], settings, wanted, on_prediction=bar.update)
    return {
        "balance": balance(maps, balance(at_start(case, settings))),
        "lift": lift_table(found),
        "information": information_table(found),
        "knockout": knocked,
    }, found


def stability_table(by_seed: dict[int, dict[Layer, Association]]) -> pd.DataFrame:
    """Of every layer: how alike the experts of each pair of seeds are, matched; first and second are seeds."""
    tables = []
    for layer in next(iter(by_seed.values())):
        table = stability({str(seed): found[layer] for seed, found in by_seed.items()})
        tables.append(table.assign(**dict(zip(LAYER, layer, strict=True))))
    return pd.concat(tables, ignore_index=True)[[*LAYER, "first", "second", "similarity", "low", "high", "p"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--direction", default="a-to-c", choices=("a-to-c", "c-to-a"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shifts", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/three_seeds"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    tables: dict[str, list[pd.DataFrame]] = {}
    by_seed: dict[int, dict[Layer, Association]] = {}
    began = time.perf_counter()
    for seed in told.seeds:
        demo = demo_run(told.profile, told.direction, folder=told.folder / f"MambaHoME-{seed}", changes={"training.seed": seed})
        if demo.run.state != "done":
            parser.error(f"{demo.run.folder}: found a run that is {demo.run.state}, expected a finished one. python -m benchmarks.three_seeds trains it.")
        found, by_seed[seed] = of_seed(demo.run, demo.test_case, shifts=told.shifts)
        for name, table in found.items():
            table.insert(0, "seed", seed)
            tables.setdefault(name, []).append(table)
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()} | {"stability": stability_table(by_seed)}
    what = "routing_seeds" if told.profile == "laptop" else f"routing_seeds-{told.profile}"
    for kind, table in whole.items():
        with written_whole(measure.RESULTS / what / f"{kind}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6g")
    case = demo.test_case.case
    about = {
        "profile": told.profile,
        "direction": told.direction,
        "seeds": told.seeds,
        "case": case.id,
        "label_origin": case.label_origin,
        "shifts": told.shifts,
    }
    print(measure.save(what, about | {"minutes": (time.perf_counter() - began) / 60}))


if __name__ == "__main__":
    main()

"""What preparation alone costs the demo's labels: Dice there and back, by case, spacing and the way a label is kept.

    python -m benchmarks.labels [--cases ct-a mr-spine] [--spacing 3 4 5]

Prints a table a case and writes benchmarks/results/labels.json. A structure counts from 500 voxels on.
"""

import argparse

from benchmarks.measure import save, table
from homelib.data.demo import fetch_demo
from homelib.data.manifest import load_manifest
from homelib.study.round_trip import WAYS, round_trip

LEAST_VOXELS = 500
GOAL = 0.98


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", help="all, if none is named")
    parser.add_argument("--spacing", nargs="*", type=float, default=[3.0, 4.0, 5.0], help="mm; the manifest's own is measured too")
    told = parser.parse_args()
    demo = fetch_demo().cases
    rows = []
    for name in told.cases or demo:
        own = load_manifest(demo[name].manifest).spacing_mm
        mine = []
        for spacing in dict.fromkeys([own, *((mm,) * 3 for mm in told.spacing)]):
            done = round_trip(demo[name], spacing_mm=spacing, ways=tuple(WAYS))
            done = done[done["reference_voxels"] > LEAST_VOXELS]
            for way, its in done.groupby("method", sort=False):
                values = dict(zip(its["class"], its["value"].round(3).tolist(), strict=True))
                mine.append({"what": f"{spacing[0]:g} mm, {way}", "least": min(values.values()), "goal": min(values.values()) >= GOAL, **values})
        table(f"{name}: Dice there and back, structures over {LEAST_VOXELS} voxels", mine, list(mine[0]))
        rows += [{"case": name} | row for row in mine]
    print(f"\n{save('labels', {'goal': GOAL, 'least_voxels': LEAST_VOXELS, 'labels': rows})}")


if __name__ == "__main__":
    main()

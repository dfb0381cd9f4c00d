"""Ten thousand cases: how long to list them, to look up what is known of each, and to split them.

    python -m benchmarks.catalogue [--cases 10000]

The files are empty; all have a kept result of a check, as after a full one. Prints a table and writes benchmarks/results/catalogue.json.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.measure import save, table
from homelib.data.check import kept_line, state
from homelib.data.examine import Report, Rules
from homelib.data.layouts import find_cases
from homelib.data.manifest import load_manifest
from homelib.data.overview import overview

LIMIT_SECONDS = 5  # for AbdomenAtlas's nine thousand and more, on a laptop


def catalogue(number: int) -> dict:
    """Seconds of each part; the manifest is read anew, as on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        root, kept = Path(folder) / "data", Path(folder) / "kept"
        kept.mkdir()
        for case in range(number):
            (root / f"BDMAP_{case:08}").mkdir(parents=True)
            for name in ("ct", "combined_labels"):
                os.close(os.open(root / f"BDMAP_{case:08}" / f"{name}.nii.gz", os.O_CREAT))
        manifest = load_manifest("abdomenatlas_1_1")
        rules = Rules.of(manifest)
        statistics = {
            "spacing_mm": [0.8, 0.8, 3.0],
            "orientation": "LPS",
            "voxels": dict.fromkeys(manifest.classes, 1),
            "ml": dict.fromkeys(manifest.classes, 0.1),
        }
        lines = [kept_line(state(case, rules), Report(case.id, [], statistics)) for case in find_cases(manifest, root).cases]
        (kept / "results.jsonl").write_text("".join(lines))

        rows, start = [], time.perf_counter()
        manifest = load_manifest("abdomenatlas_1_1")
        found = find_cases(manifest, root)
        rows.append({"what": "manifest read, cases listed and paired", "seconds": time.perf_counter() - start})
        start = time.perf_counter()
        seen = overview(manifest, root, kept=kept)
        rows.append({"what": "listed, state looked up, split", "seconds": time.perf_counter() - start})
        assert len(found.cases) == len(seen.rows) == number
        assert {row[3] for row in seen.rows} == {"good"}
    table(f"{number:,} cases", rows, ["what", "seconds"])
    print(f"{str(seen)} Limit: {LIMIT_SECONDS} s.")
    return {"cases": number, "limit_seconds": LIMIT_SECONDS, "catalogue": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    save("catalogue", catalogue(parser.parse_args().cases))

"""The weights that ship with the workbook: the demo's trained network in few bits, with a card, into homelib/weights/demo. After `make demo`.

    python scripts/weights.py [--folder runs/demo] [--out homelib/weights/demo] [--bits 6]

The test patient is segmented by the weights as they were trained and by those that are written, read back; the card has both.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from homelib.errors import UserError
from homelib.run.checkpoint import trained_network
from homelib.run.export import export
from homelib.run.packed import load
from homelib.run.predict import predict_label
from homelib.study.comparison import measure_labels
from homelib.study.demo import DemoRun, demo_run
from homelib.study.first_look import WEIGHTS
from homelib.study.tables import dice_table, to_markdown

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 3_000_000  # bytes, of the whole folder
FULL = "as trained"


def trained_demo(profile: str, folder: Path) -> DemoRun:
    """Raises UserError: a demo that was not run, or not on the real scans."""
    demo = demo_run(profile, "a-to-c", folder=folder)
    if demo.run.state != "done":
        raise UserError(f"{demo.run.folder}: found a run that is {demo.run.state}, expected one that is done. `make demo` trains it.")
    if not demo.data.real and profile != "smoke":
        raise UserError(f"{demo.run.folder}: the scans are not here, expected those that it was trained on. `home data fetch demo` gets them.")
    if (found := demo.run.settings.data.train_cases) != demo.settings.data.train_cases:
        expected = ", ".join(demo.settings.data.train_cases)
        raise UserError(f"{demo.run.folder}: found a run that was trained on {', '.join(found)}, expected {expected}. `make demo` trains it.")
    return demo


def made(demo: DemoRun, folder: Path, bits: int, command: str) -> str:
    """Markdown for the card: how the weights were made, and what rounding changes."""
    settings, case, stored = demo.run.settings, demo.test_case, f"{bits} bits"
    networks = {FULL: trained_network(demo.run), stored: load(folder).networks[0]}
    labels = {name: predict_label([network.cpu()], case, settings) for name, network in networks.items()}
    table = dice_table(measure_labels(labels, case).assign(role="test"), role="test")
    same = (labels[FULL] == labels[stored]).mean()
    patient = demo.train_case.case
    return "\n\n".join(
        [
            "## How they were made",
            f"`{command}`: profile {settings.profile}, trained on **one patient**, {patient.id} (labels {patient.label_origin}), tested on one other, "
            f"{case.case.id} (labels {case.case.label_origin}); {settings.training.steps} steps, seed {settings.training.seed}; "
            f"{demo.run.status['seconds'] / 60:.1f} minutes.",
            "## What rounding changes",
            f"Dice in percent on the file's own grid of {case.case.id}. The two agree in {100 * same:.2f} % of its voxels.",
            to_markdown(table),
            "## Licence",
            "They come under the licence of homelib, as far as that can be given. They hold no scan; but the package that the training scan is from says "
            "nothing of its scans, and nobody has asked its makers whether weights may be passed on (LICENSES.md). Not for clinical use.",
        ]
    )


def write(demo: DemoRun, out: Path, bits: int, command: str) -> Path:
    """Raises UserError: a folder that became too large."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".weights-") as place:
        folder = export(demo.run, "hub", Path(place) / "new", bits=bits)
        card = folder / "README.md"
        text = made(demo, folder, bits, command)
        card.write_text(card.read_text(encoding="utf-8").replace("## Limits", f"{text}\n\n## Limits"), encoding="utf-8")
        if (size := sum(file.stat().st_size for file in folder.iterdir())) >= LARGEST:
            raise UserError(f"--bits: {bits} make {size:,} bytes, expected fewer than {LARGEST:,}. Take fewer bits.")
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    print(text, f"{out}: {size:,} bytes.", sep="\n\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("HOMELIB_RUNS", ROOT / "runs")) / "demo", help="of the demo")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--profile", default="laptop", help="of the demo's run")
    given = parser.parse_args()
    command = "make demo && make weights" if given.profile == "laptop" else f"home demo --profile {given.profile}, python scripts/weights.py"
    try:
        write(trained_demo(given.profile, given.folder), given.out, given.bits, command)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The pictures of the README's map: from each executed notebook the first picture of the cell tagged `gallery`, made small, into docs/gallery.

    python scripts/gallery.py [--notebooks runs/demo] [--out docs/gallery]
"""

import argparse
import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 720  # pixels at most
QUALITY = 88  # of JPEG: a palette of 256 colours takes classes that are rare for others


def picture(notebook: Path) -> Image.Image | None:
    """None where no cell is tagged. Raises ValueError: the tagged cell shows no picture, for the notebook has not been executed say."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "gallery" in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            raise ValueError(f"{notebook}: its cell tagged gallery shows no picture, expected an executed notebook. `make demo` makes them.")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=Path(os.environ.get("HOMELIB_RUNS", ROOT / "runs")) / "demo")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery")
    given = parser.parse_args()
    try:
        found = {path.stem: shown for path in sorted(given.notebooks.glob("[0-9][0-9]_*.ipynb")) if (shown := picture(path)) is not None}
        if not found:
            raise ValueError(f"{given.notebooks}: no executed notebooks there. `make demo` makes them.")
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, shown in found.items():
        shown.thumbnail((WIDTH, 10 * WIDTH))
        shown.save(given.out / f"{name}.jpg", quality=QUALITY, optimize=True)
        print(given.out / f"{name}.jpg")


if __name__ == "__main__":
    main()

"""One slice in a browser, and the tables beside it: what the explorer is made of."""

import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import anywidget
import matplotlib as mpl
import matplotlib.image
import numpy as np
import traitlets
from matplotlib.colors import to_hex

from .explorer_state import Bar, State
from .plots import bar_mm
from .routed import expert_colours

HERE = Path(__file__).parent


class SliceCanvas(anywidget.AnyWidget):
    """A picture that is replaced as a whole, sent as a PNG. The browser tells what was done by messages of a `kind`:

    "pick" (across, down: shares of the picture), "step" (across, down: voxels), "slice" (by).
    """

    _esm = (HERE / "slice_canvas.js").read_text(encoding="utf-8")
    _css = (HERE / "slice_canvas.css").read_text(encoding="utf-8")
    png = traitlets.Bytes(b"").tag(sync=True)
    about = traitlets.Dict({}).tag(sync=True)
    number = traitlets.Int(0).tag(sync=True)  # of the picture: told last, when all of it is there

    def draw(
        self, picture: np.ndarray, *, size_mm: tuple[float, float], width_px: int, letters: str, cross: tuple[float, float] | None, told: str, index: int
    ) -> None:
        """Show (rows, columns, 3) uint8.

        Args:
            size_mm: width and height of all of it.
            width_px: on the page, where there is room.
            letters: at left, right, top and bottom.
            cross: shares of width and height, or None.
            told: what is seen, for who does not see it.
            index: of the slice.
        """
        mm = bar_mm(size_mm[0])
        about = {"aspect": str(size_mm[0] / size_mm[1]), "width_px": width_px, "letters": letters, "bar_mm": mm, "bar_share": mm / size_mm[0]}
        with self.hold_sync():
            self.png = png_of(picture)
            self.about = about | {"cross": cross, "told": told, "slice": index}
            self.number += 1


def png_of(picture: np.ndarray) -> bytes:
    """A PNG of (rows, columns, 3) uint8, packed lightly: that takes a few milliseconds."""
    packed = BytesIO()
    matplotlib.image.imsave(packed, picture, format="png", pil_kwargs={"compress_level": 1})
    return packed.getvalue()


def bars_html(told: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Bars as a table that a screen reader can read too: a row a bar with its name and its number."""
    lines = [f"<p>{html.escape(told)}</p>"]
    for title, bars in groups.items():
        longest = max(1e-9, *(bar.share for bar in bars))
        rows = [
            f"<tr><th scope='row'>{html.escape(bar.name)}</th>"
            f"<td class='home-long'><div style='width:{100 * bar.share / longest:.1f}%;background:{bar.colour}'></div></td><td>{bar.share:.3f}</td></tr>"
            for bar in bars
        ]
        lines.append(f"<table><caption>{html.escape(title)}</caption>{''.join(rows)}</table>")
    return f"<div class='home-bars'>{''.join(lines)}</div>"


def scale_html(state: State, *, experts: int, reach: float) -> str:
    """What the colours mean: a square an expert, or the colours of a weight or an entropy from end to end."""
    if state.show == "winner":
        squares = [f"<span><i style='background:{colour}'></i> {e}</span>" for e, colour in enumerate(expert_colours(experts))]
        return f"<div class='home-scale'>expert {''.join(squares)}</div>"
    stops = ",".join(to_hex(mpl.colormaps[state.colours](stop)) for stop in np.linspace(0, 1, 9))
    end = f"{reach:.2f}" if state.show == "weight" else "1 (even)"
    return f"<div class='home-scale'>{state.show} 0 <b style='background:linear-gradient(90deg,{stops})'></b> {end}</div>"

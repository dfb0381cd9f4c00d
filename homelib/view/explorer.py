"""The explorer: go through a scan slice by slice and see where every expert looks; click a voxel to see how its token is shared out.

One set of controls moves one panel, or several side by side: other runs, other modalities, or the same before and after training. Maps are made
beforehand, so that a new slice is a new picture and nothing else. All that is decided is decided in `explorer_state`; here are the widgets.
"""

from collections.abc import Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..errors import UserError
from . import explorer_state as logic
from .explorer_state import COLOUR_MAPS, SHOWS, State
from .plots import PLANES, class_legend, plane_letters
from .routed import Routed, expert_colours
from .slice_canvas import SliceCanvas, bars_html, scale_html

TALLEST_PX, WIDEST_PX = 440, 520  # of a picture on the page
PLAY_MILLISECONDS = 150  # between two slices
DESCRIPTION = {"description_width": "62px"}
WITHOUT_KERNEL = "Explorer: to move through the scan, run this notebook in JupyterLab."


class Panel:
    """One case of the explorer: its name to choose, its picture, what the colours mean, and the picked voxel's shares."""

    def __init__(self, description: str, names: Sequence[str], name: str):
        self.chooser = _dropdown(description, names, "Case and run that this panel shows", width="440px")
        self.chooser.value = name
        self.canvas, self.scale, self.table = SliceCanvas(), widgets.HTML(), widgets.HTML()
        self.widget = widgets.VBox([self.chooser, self.canvas, self.scale, self.table], layout=widgets.Layout(width=f"{WIDEST_PX + 20}px"))

    def draw(self, case: Routed, state: State, *, reach: float) -> None:
        size_mm, voxel = logic.size_mm(case, state.plane), logic.told_voxel(case, state)
        self.canvas.draw(
            logic.picture(case, state, reach=reach),
            size_mm=size_mm,
            width_px=round(min(WIDEST_PX, TALLEST_PX * size_mm[0] / size_mm[1])),
            letters=PLANES[state.plane][1],
            cross=logic.place_of(case, state),
            told=f"{logic.told(case, state)}. {voxel}",
            index=state.index,
        )
        self.scale.value = scale_html(state, experts=len(case.weights(state.place)), reach=reach)
        self.table.value = bars_html(voxel, logic.bars(case, state))


def _dropdown(description: str, options: Sequence, about: str, *, width: str = "210px") -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=description, tooltip=about, style=DESCRIPTION, layout=widgets.Layout(width=width))


class Explorer:
    """Pictures of routing maps with their controls; the last line of a cell shows it.

    Args:
        cases: to choose from, with names of their own.
        panels: side by side; the second begins with the second case.
        folder: for saved figures, made when the first is saved.

    Raises:
        UserError: no case, two of one name, more panels than cases, or cases without a common (stage, block, level).

    >>> Explorer([trained, untrained], panels=2)   # doctest: +SKIP
    """

    def __init__(self, cases: Sequence[Routed], *, panels: int = 1, folder: str | Path = "figures"):
        names = [case.name for case in cases]
        if not 1 <= panels <= len(names) or len(set(names)) < len(names):
            raise UserError(
                f"explorer: found {len(names)} cases ({', '.join(names)}) for {panels} panels, expected one or more a panel, each with its own name."
            )
        if not logic.places(cases):
            raise UserError(f"explorer: found no stage, block and level that all of {', '.join(names)} have, expected at least one. Trace the same stages.")
        self._cases, self.folder = {case.name: case for case in cases}, Path(folder)
        self._tops: dict[tuple, float] = {}
        self._updating = False
        self.panels = tuple(names[:panels])
        self.state = logic.start(self.shown)
        self._build()
        self.show()

    @property
    def shown(self) -> list[Routed]:
        """The cases in the panels, from left to right."""
        return [self._cases[name] for name in self.panels]

    def show(self, *, panels: Sequence[str] | None = None, **changes: Any) -> State:
        """Change what is shown, as the controls do: fields of `State`, or the names of the cases in the panels. Returns the new state."""
        if panels is not None:
            self.panels = tuple(panels)
        self.state = logic.changed(self.state, self.shown, **changes)
        self._set_controls()
        self._draw()
        return self.state

    def figure(self) -> Figure:
        """What is seen now, as a figure that needs no browser."""
        figure, axes = plt.subplots(2, len(self.panels), figsize=(5.2 * len(self.panels), 7.6), layout="constrained", squeeze=False, height_ratios=[2.2, 1])
        for (above, below), case in zip(axes.T, self.shown, strict=True):
            state = logic.for_case(self.state, case, self.shown[0])
            reach, (wide, tall) = self._reach(case, state), logic.size_mm(case, state.plane)
            above.imshow(logic.picture(case, state, reach=reach), extent=(0, wide, tall, 0), interpolation="nearest")
            plane_letters(above, state.plane)
            if state.show == "winner":
                handles = [Patch(color=colour, label=f"expert {e}") for e, colour in enumerate(expert_colours(len(case.weights(state.place))))]
                above.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6, fontsize=7, frameon=False)
            else:
                colours = ScalarMappable(Normalize(0, reach if state.show == "weight" else 1), state.colours)
                figure.colorbar(colours, ax=above, shrink=0.8, label=state.show)
            above.set(xlabel="mm", ylabel="mm")
            above.set_title(logic.told(case, state).replace(": ", "\n", 1).replace(", stage", "\nstage"), fontsize=9)
            if cross := logic.place_of(case, state):
                above.axvline(cross[0] * wide, color="white", lw=0.7)
                above.axhline(cross[1] * tall, color="white", lw=0.7)
            below.set_title(logic.told_voxel(case, state), fontsize=8)
            below.set_axis_off()
            place = 0
            for title, bars in logic.bars(case, state).items():
                below.set_axis_on()
                below.bar(range(place, place + len(bars)), [bar.share for bar in bars], color=[bar.colour for bar in bars], label=title)
                below.text(place - 0.4, 0.99, title.replace(", ", "\n"), transform=below.get_xaxis_transform(), fontsize=7, va="top")
                place += len(bars) + 1
            ticks = [
                (bars[i].get_x() + 0.4, bar.name)
                for bars, group in zip(below.containers, logic.bars(case, state).values(), strict=True)
                for i, bar in enumerate(group)
            ]
            below.set_xticks([x for x, _ in ticks], [name for _, name in ticks], rotation=90, fontsize=7)
            below.set(ylabel="share", ylim=(0, 1.25), yticks=(0, 0.25, 0.5, 0.75, 1))  # of all panels alike; above 1 are the names
            below.spines[["top", "right"]].set_visible(False)
        named = {tuple(case.class_names) for case in self.shown if case.label is not None and case.class_names}
        if len(named) == 1:  # panels may show scans of other classes, whose colours then mean others
            class_legend(figure, *named)
        return figure

    def save(self) -> Path:
        """Write `figure()` into the folder, under a name that nothing has yet: what is there stays. Raises UserError where a thousand such are there."""
        figure, packed = self.figure(), BytesIO()
        figure.savefig(packed, format="png", dpi=150)
        plt.close(figure)
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"routing-{'-'.join(self.panels)}-{self.state.plane}-{self.state.index}-{datetime.now():%Y%m%d-%H%M%S}"
        stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in stem)
        for number in range(1, 1000):
            path = self.folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                with open(path, "xb") as file:  # fails where there is a file
                    file.write(packed.getvalue())
                return path
            except FileExistsError:
                continue
        raise UserError(f"{self.folder}: found a thousand figures named {stem}, expected room for one more. Choose another folder.")

    def _repr_mimebundle_(self, **how: Any) -> Any:
        bundle = self.widget._repr_mimebundle_(**how)
        if bundle:  # what a page shows that cannot show a widget
            bundle["text/plain"] = WITHOUT_KERNEL
        return bundle

    # ---------------------------------------------------------------- widgets

    def _build(self) -> None:
        buttons, wrapped = DESCRIPTION | {"button_width": "80px"}, widgets.Layout(flex_flow="row wrap")
        self.controls = {
            "plane": widgets.ToggleButtons(options=list(PLANES), description="Plane", style=buttons, layout=widgets.Layout(width="auto")),
            "show": widgets.ToggleButtons(options=list(SHOWS), description="Show", style=buttons, layout=widgets.Layout(width="auto")),
            "index": widgets.IntSlider(description="Slice", min=0, max=1, style=DESCRIPTION, layout=widgets.Layout(width="460px")),
            "stage": _dropdown("Stage", [0], "Encoder stage, 0 is the finest"),
            "block": _dropdown("Block", [0], "Layer of the stage"),
            "level": _dropdown("Level", [1], "1: within a group of tokens; 2: over the slots of all groups"),
            "channel": _dropdown("Weight of", [("expert 0", ("expert", 0))], "Expert or slot whose weight is shown"),
            "colours": _dropdown("Colours", COLOUR_MAPS, "Colours of a weight and of the entropy"),
            "opacity": widgets.FloatSlider(description="Opacity", min=0, max=1, step=0.05, style=DESCRIPTION, layout=widgets.Layout(width="320px")),
            "outline": widgets.Checkbox(description="Outlines of the label", indent=False, layout=widgets.Layout(width="auto")),
        }
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._chosen(**{name: change["new"]}), names="value")
        self._play = widgets.Play(interval=PLAY_MILLISECONDS, min=0, max=1, description="Play over the slices")
        widgets.jslink((self.controls["index"], "value"), (self._play, "value"))  # the first is what both begin with
        self._save = widgets.Button(description="Save figure", tooltip="Write what is seen as a PNG; nothing is overwritten")
        self._save.on_click(self._saved)
        self._said = widgets.Label()
        words = ["Case"] if len(self.panels) == 1 else [f"Case {number + 1}" for number in range(len(self.panels))]
        self.views = [Panel(word, list(self._cases), name) for word, name in zip(words, self.panels, strict=True)]
        for number, view in enumerate(self.views):
            view.chooser.observe(lambda _: self._chosen(panels=[view.chooser.value for view in self.views]), names="value")
            view.canvas.on_msg(lambda _, message, buffers, number=number: self._done_in(number, message))
        rows = [("plane", "show"), ("index",), ("stage", "block", "level", "channel"), ("colours", "opacity", "outline")]
        lines = [[self.controls[name] for name in row] for row in rows]
        lines[1].append(self._play)
        lines += [[view.widget for view in self.views], [self._save, self._said]]
        self.widget = widgets.VBox([widgets.HBox(line, layout=wrapped) for line in lines])

    def _set_controls(self) -> None:
        """Bring every control to the state, without their telling so."""
        self._updating, state, cases = True, self.state, self.shown
        there = logic.places(cases)
        options: dict[str, list] = {
            "stage": sorted({place[0] for place in there}),
            "block": sorted({place[1] for place in there if place[0] == state.stage}),
            "level": sorted({place[2] for place in there if place[:2] == (state.stage, state.block)}),
            "channel": [(" ".join(map(str, channel)), channel) for channel in logic.channels(cases, state.place)],
        }
        last = cases[0].image.shape[PLANES[state.plane][0]] - 1
        try:
            for name, values in options.items():
                if self.controls[name].options != tuple(values):
                    self.controls[name].options = values
            self.controls["index"].max = max(last, self.controls["index"].value)  # not less than its value, which is set below
            for name, control in self.controls.items():
                if control.value != getattr(state, name):
                    control.value = getattr(state, name)
            self.controls["index"].max = last
            if self._play.max != last:  # only then: the browser links their values, and while it plays a word of the kernel's would come late
                with self._play.hold_sync():
                    self._play.max = max(last, self._play.value)
                    self._play.value, self._play.max = state.index, last
            for view, name in zip(self.views, self.panels, strict=True):
                view.chooser.value = name
            self.controls["channel"].disabled = state.show != "weight"
            self.controls["colours"].disabled = state.show == "winner"
        finally:
            self._updating = False

    def _draw(self) -> None:
        for view, case in zip(self.views, self.shown, strict=True):
            state = logic.for_case(self.state, case, self.shown[0])
            view.draw(case, state, reach=self._reach(case, state))

    def _reach(self, case: Routed, state: State) -> float:
        """The upper end of the colours of a weight, which is the same for all slices, experts and slots of a place."""
        key = (case.name, state.place)
        if key not in self._tops:
            self._tops[key] = case.top(state.place)
        return self._tops[key]

    def _chosen(self, **changes: Any) -> None:
        if not self._updating:
            self.show(**changes)

    def _done_in(self, number: int, message: dict) -> None:
        """A message of a panel's canvas."""
        first, case = self.shown[0], self.shown[number]
        state = logic.for_case(self.state, case, first)
        if message["kind"] == "slice":
            self.show(index=self.state.index + message["by"])
            return
        find = logic.voxel_at if message["kind"] == "pick" else logic.stepped
        voxel = list(logic.voxel_in(find(case, state, message["across"], message["down"]), case, first))
        voxel[PLANES[state.plane][0]] = self.state.index  # rounded between two grids it might be in the next slice
        self.show(voxel=tuple(voxel))

    def _saved(self, _: object) -> None:
        self._said.value = f"saved: {self.save()}"

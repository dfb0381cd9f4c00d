"""A scan and a label over it in a viewer that turns, for JupyterLab with WebGL2: niivue. Its picture without a browser is `routing.solid_experts`."""

from pathlib import Path
from typing import Any

from ..errors import UserError

OVER = {"colormap": "actc", "opacity": 0.4}


def in_3d(image: str | Path, over: str | Path) -> Any:
    """The viewer, a widget: the last line of a cell shows it.

    Args:
        image, over: NIfTI files; they may have grids of their own, and are laid over each other in mm.

    Raises:
        UserError: a file that is not there.
    """
    from ipyniivue import NiiVue  # 1 s

    for path in map(Path, (image, over)):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a NIfTI file to show.")
    viewer = NiiVue()
    viewer.load_volumes([{"path": str(image)}, {"path": str(over)} | OVER])
    return viewer

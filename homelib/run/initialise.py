"""Weights to start from: of another run, a safetensors file, or the authors' checkpoint; and a table of what was taken, resized or left.

Fine-tuning keeps what fits. The head is new where the classes are others, except for those rows whose class has a namesake in the run that it comes
from; and where the file does not name its classes (the authors'), unless it is asked for. A tensor is resized where only its number of slots or
experts differs: what there is is taken, the rest stays at its random start.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from ..config import Settings
from ..errors import UserError
from ..network.published import published_name
from ..network.swin_weights import is_swin, swin_state
from .checkpoint import read_state
from .folder import Run
from .mixture import label_space

COLUMNS = ("tensor", "what", "found", "expected")
HEADS = ("head.", "final_conv.", "out.", "out_0.", "out_tr.", "conv_final.", "output_block.", "decoder.seg_layers.")  # of ours, and of the zoo's


def start_from(network: nn.Module, source: str | Path, class_names: Sequence[str], *, head: Literal["by_name", "as_it_is"] = "by_name") -> pd.DataFrame:
    """Load what fits of some weights into a network.

    Args:
        network: at its random start, which stays where nothing fits.
        source: a run folder, a safetensors file, or a checkpoint (.pt, .pth) of the authors, or for Swin UNETR of SuPreM or VoCo, of which tensors
            alone are read.
        class_names: of this network, background first.
        head: whether rows of a head are taken by their class's name, and none from a file that names no classes; or as they are, if they are as many.

    Returns:
        One row a tensor: tensor, what (taken, resized, new, left: in the file alone), found and expected shapes.

    Raises:
        UserError: nothing there, a damaged file, or one of which nothing fits.
    """
    state, theirs = _read(Path(os.path.expandvars(source)).expanduser(), network)
    rows, own = [], network.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            found = state.get(name)
            what = "new"
            if found is not None and name.startswith(HEADS) and head == "by_name" and theirs != tuple(class_names):
                what = _by_class(tensor, found, theirs, class_names) if theirs is not None else "new"
            elif found is not None and found.shape == tensor.shape:
                tensor.copy_(found)
                what = "taken"
            elif found is not None and not name.startswith(HEADS):
                what = _resized(tensor, found)
            rows.append((name, what, _shape(found), _shape(tensor)))
    rows += [(name, "left", _shape(tensor), "") for name, tensor in state.items() if name not in own]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if not table["what"].isin(["taken", "resized"]).any():
        raise UserError(
            f"training.init_from: {source}: found {len(state)} tensors, none of which fits {type(network).__name__}. Check the file and the network."
        )
    return table


def summary(table: pd.DataFrame) -> str:
    """The table in a line."""
    return ", ".join(f"{(table['what'] == what).sum()} tensors {what}" for what in ("taken", "resized", "new", "left"))


def _by_class(tensor: Tensor, found: Tensor, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Rows of a head whose class has the same name in both."""
    shared = [(ours.index(name), theirs.index(name)) for name in ours if name in theirs]
    if found.shape[0] != len(theirs) or found.shape[1:] != tensor.shape[1:] or len(shared) < 2:
        return "new"
    for to, at in shared:
        tensor[to] = found[at]
    return "resized"


def _resized(tensor: Tensor, found: Tensor) -> str:
    """What is common to both along an axis in which alone they differ."""
    differ = [axis for axis in range(tensor.dim()) if found.dim() == tensor.dim() and found.shape[axis] != tensor.shape[axis]]
    if len(differ) != 1:
        return "new"
    common = min(tensor.shape[differ[0]], found.shape[differ[0]])
    tensor.narrow(differ[0], 0, common).copy_(found.narrow(differ[0], 0, common))
    return "resized"


def _shape(tensor: Tensor | None) -> str:
    return "" if tensor is None else "x".join(map(str, tensor.shape)) or "1"


# ---------------------------------------------------------------- what there is to read


def _read(path: Path, network: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Tensors by our names, and the classes of the run that they come from, where it says."""
    if path.is_dir():
        path = Run.open(path).weights_file
    if not path.is_file():
        raise UserError(f"training.init_from: {path}: no such file; expected a run folder, a safetensors file, or a checkpoint in the authors' layout.")
    if path.suffix == ".safetensors":
        try:
            state, told = read_state(path)
        except UserError as error:
            raise UserError(f"training.init_from: {error}") from None
        return _in_our_names(state, network, path), _classes(told)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"training.init_from: {path}: cannot be read as tensors alone ({type(error).__name__}); expected weights. Is it whole?") from None
    if not isinstance(state, dict):
        raise UserError(f"training.init_from: {path}: found a {type(state).__name__}, expected names and tensors.")
    return _in_our_names(state, network, path), None


def _classes(told: dict[str, str]) -> tuple[str, ...] | None:
    """That the header of a weights file names; of older files, those of its settings' data set. None where it has neither, or that is not known here."""
    try:
        if "run" in told:
            return tuple(json.loads(told["run"])["classes"])
        return label_space(Settings(**json.loads(told["settings"])).data).class_names
    except (UserError, ValueError, KeyError, TypeError):
        return None


def _in_our_names(state: dict, network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The authors' names put into ours, experts stacked; ours are left as they are. Of a Swin UNETR the names of SuPreM and VoCo too, strictly."""
    if is_swin(network):
        try:
            return swin_state(state, network)
        except UserError as error:
            raise UserError(f"training.init_from: {path}: {error}") from None
    if isinstance(state.get("model"), dict):
        state = state["model"]
    state = {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    own = list(network.state_dict())
    if any(name in state for name in own):
        return state
    renamed = {}
    for name in own:
        theirs = published_name(name)
        if "{e}" not in theirs:
            parts = state.pop(theirs, None)
        else:
            experts: list[Tensor] = []
            while (expert := state.pop(theirs.format(e=len(experts)), None)) is not None:
                experts.append(expert)
            alike = experts and len({expert.shape for expert in experts}) == 1
            parts = torch.stack(experts) if alike else None
        if parts is not None:
            renamed[name] = parts
    return renamed | state

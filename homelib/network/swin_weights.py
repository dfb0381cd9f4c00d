"""Weights that others trained for Swin UNETR, SuPreM's and VoCo's, put into its own names.

SuPreM keeps them under "net", as `module.backbone.swinViT. ...`, of version 1 (62.2 M parameters); VoCo under "state_dict", "network_weights",
"student" or nothing, as `module.swin_vit. ...`, of version 2. Both have a backbone, some a decoder, some a head of other classes.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import UserError

HOLDERS = ("state_dict", "network_weights", "net", "student", "model")
PREFIXES = ("module.", "backbone.")
BACKBONE, HEAD = "swinViT.", "out."
NAMES_TOLD = 3


def is_swin(network: nn.Module) -> bool:
    """Whether a network is Swin UNETR."""
    return any(name.startswith(BACKBONE) for name in network.state_dict())


def swin_state(state: Mapping, network: nn.Module) -> dict[str, Tensor]:
    """Tensors of a checkpoint by Swin UNETR's names; its backbone is whole and fits, or it is refused.

    Args:
        state: what the file holds.
        network: Swin UNETR, of the version and width that the weights are for.

    Raises:
        UserError: no backbone, or one of another version or width: what is missing, too much, or of another shape.
    """
    for holder in HOLDERS:
        if isinstance(state.get(holder), Mapping):
            state = state[holder]
    found = {_own_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    theirs, ours = ({n: tuple(t.shape) for n, t in s.items() if n.startswith(BACKBONE)} for s in (found, network.state_dict()))
    if not theirs:
        raise UserError(f"weights: found {len(found)} tensors, none of a Swin UNETR's backbone ({BACKBONE} or swin_vit.). Is this the right file?")
    missing, more = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    other = [f"{n} (found {theirs[n]}, expected {ours[n]})" for n in ours if n in theirs and theirs[n] != ours[n]]
    faults = [_told(names, kind) for names, kind in ((missing, "missing"), (more, "not in this network"), (other, "of another shape")) if names]
    if faults:
        raise UserError(
            f"weights: the backbone is of another Swin UNETR: {'; '.join(faults)}. "
            "SuPreM's go into SwinUNETR-V1, VoCo's into SwinUNETR, each with model.width as it was trained."
        )
    return found


def _own_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace("swin_vit.", BACKBONE, 1) if name.startswith("swin_vit.") else name


def _told(names: list[str], kind: str) -> str:
    return f"{len(names)} tensors {kind} ({', '.join(names[:NAMES_TOLD])}{', ...' if len(names) > NAMES_TOLD else ''})"

"""What a stopped training needs to go on, and what a prediction needs: written whole, read without running code from the file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import Settings
from ..errors import UserError
from ..network.unet import MambaHoME, SegMamba
from .folder import Run, written_whole

NETWORKS = {"MambaHoME": MambaHoME, "SegMamba": SegMamba}


def build_network(settings: Settings) -> nn.Module:
    """The network of the settings, at its random start (from torch's global generator)."""
    return NETWORKS[settings.network](settings.model)


def save_weights(network: nn.Module, path: Path, settings: Settings) -> None:
    """Weights as safetensors, with the settings in the header."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with written_whole(path) as part:
        save_file(state, part, metadata={"settings": settings.model_dump_json()})


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a safetensors file into a network, strictly. Raises UserError: missing, damaged, or made for another network."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; expected the weights of a trained run. Train first, or check the name of the run.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}). Restore it, or train again.") from None
    faults = network.load_state_dict(state, strict=False) if _same_shapes(network, state, path) else None
    if faults.missing_keys or faults.unexpected_keys:
        raise UserError(f"{path}: weights of another network: {len(faults.missing_keys)} missing ({faults.missing_keys[:3]}), {len(faults.unexpected_keys)} unexpected ({faults.unexpected_keys[:3]}).")
    return network


def _same_shapes(network: nn.Module, state: dict, path) -> bool:
    own = network.state_dict()
    wrong = [f"{n} (found {tuple(t.shape)}, expected {tuple(own[n].shape)})" for n, t in state.items() if n in own and own[n].shape != t.shape]
    if wrong:
        raise UserError(f"{path}: weights of another network: {len(wrong)} of another shape, {', '.join(wrong[:3])}.")
    return True


def trained_network(run: Run) -> nn.Module:
    """The run's network with its weights, in eval mode."""
    return load_weights(build_network(run.settings), run.weights_file).eval()


def save_checkpoint(path: Path, state: dict) -> None:
    with written_whole(path) as part:
        torch.save(state, part)


def load_checkpoint(path: Path) -> dict:
    """Raises UserError on a damaged file. `weights_only`: tensors and plain values alone, never code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: damaged or no checkpoint ({type(error).__name__}). Delete it to train from the start.") from None

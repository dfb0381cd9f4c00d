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

LAYOUT = torch.channels_last_3d  # of convolutions' weights and what they return: faster on a CPU (see benchmarks), values stay the same
NETWORKS = {"MambaHoME": MambaHoME, "SegMamba": SegMamba}


def build_network(settings: Settings) -> nn.Module:
    """The network of the settings, at its random start (from torch's global generator)."""
    return NETWORKS[settings.network](settings.model).to(memory_format=LAYOUT)


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
    faults = _faults(network.state_dict(), state)
    if faults:
        raise UserError(f"{path}: weights of another network: {'; '.join(faults)}. Check the settings that it was trained with.")
    network.load_state_dict(state)
    return network


def _faults(own: dict, state: dict) -> list[str]:
    """What keeps `state` from being loaded, at most three names of a kind."""
    missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
    reshaped = [f"{n} (found {tuple(t.shape)}, expected {tuple(own[n].shape)})" for n, t in state.items() if n in own and own[n].shape != t.shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for kind, names in kinds if names]


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

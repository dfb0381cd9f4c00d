"""What a stopped training needs to go on, and what a prediction needs: safetensors files, written whole, on which no code can ride.

A checkpoint is one safetensors file: all tensors under their place in the tree, and the tree itself, with all that is no tensor, as JSON in the
file's header, beside a CRC-32 of the tensors' bytes. Two generations are kept.
"""

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import OURS, Settings
from ..errors import UserError
from ..network import zoo
from .folder import Run, written_whole
from .mixture import label_space
from .quantise import AS_THEY_ARE, dequantise, quantise

LAYOUT = torch.channels_last_3d  # of convolutions' weights and what they return: faster on a CPU (see benchmarks), values stay the same
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"  # what JSON cannot say


def build_network(settings: Settings) -> nn.Module:
    """The network of the settings, at its random start (from torch's global generator)."""
    network = zoo.build(settings.network, settings.model, settings.data.patch_voxels)
    if settings.network not in OURS:
        return network
    return network.to(memory_format=LAYOUT)  # type: ignore[call-overload]  # which PyTorch's types leave out


def save_weights(network: nn.Module, path: Path, settings: Settings, *, class_names: Sequence[str] | None = None, bits: int = AS_THEY_ARE) -> None:
    """Weights as safetensors, with the settings and the names of the classes in the header.

    class_names: background first; None: those of the settings' data sets. They are said by name, for the manifests that the settings name may be gone, or
    be others, where the weights are read.
    bits: 2 to 8, for a small file (`homelib.run.quantise`); 32: as they are.

    Raises UserError: other bits, or a full disk.
    """
    save_state(network.state_dict(), path, settings, class_names=class_names, bits=bits)


def save_state(state: dict[str, Tensor], path: Path, settings: Settings, *, class_names: Sequence[str] | None = None, bits: int = AS_THEY_ARE) -> None:
    """As `save_weights`, of a state that is at hand already."""
    names = label_space(settings.data).class_names if class_names is None else class_names
    tensors, rounded = quantise({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, bits)
    about = {"settings": settings.model_dump(mode="json"), "classes": list(names)}
    if rounded:  # every code is a valid one: damage would not show
        about["rounded"] = rounded | {"crc32": _checksum(tensors)}
    _write(path, tensors, {"run": json.dumps(about)})  # in one: several come in any order


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file by name, those of few bits as float32 again, and what its header tells. Raises UserError: a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}). Restore it, or train again.") from None
    rounded = _rounded(told)
    if rounded and rounded.get("crc32") != _checksum(tensors):
        raise UserError(f"{path}: damaged: its bytes are not those that were written. Restore it, or export the run again.")
    try:
        return dequantise(tensors, rounded), told
    except UserError as error:
        raise UserError(f"{path}: {error} Restore it, or export the run again.") from None


def _rounded(told: dict[str, str]) -> dict[str, Any]:
    """What a header tells of weights in few bits; empty where it tells nothing, as those of others."""
    try:
        return dict(json.loads(told["run"])["rounded"])
    except (KeyError, ValueError, TypeError):
        return {}


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a safetensors file into a network, strictly. Raises UserError: missing, damaged, or made for another network."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; expected the weights of a trained run. Train first, or check the name of the run.")
    state, _ = read_state(path)
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


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, state: dict, *, previous: Path | None = None) -> None:
    """Write a tree of dicts, lists, tuples, plain values and tensors; on disk before it takes its name. What had the name becomes `previous`.

    Raises UserError where the disk is full; the file that was there is then as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _without_tensors(state, "", tensors)
    _write(path, tensors, {"tree": json.dumps(tree), "crc32": str(_checksum(tensors))}, previous=previous)


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` was given. Raises UserError on a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        if int(told["crc32"]) != _checksum(tensors):
            raise ValueError("its bytes have changed")
        return _with_tensors(json.loads(told["tree"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged or no checkpoint ({type(error).__name__}: {error}). Delete it to train from the start.") from None


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, by its header alone; None where that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["tree"])["step"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def load_newest(path: Path, previous: Path, *, say: Callable[[str], None]) -> dict | None:
    """The newest checkpoint that can be read, None where there is none. A damaged one is put aside, and said so; the one before it is used.

    Raises UserError where all that there are are damaged.
    """
    if not path.exists() and not previous.exists():
        return None
    try:
        return load_checkpoint(path) if path.exists() else load_checkpoint(previous)
    except UserError as error:
        if not path.exists() or not previous.exists():
            raise
        state = load_checkpoint(previous)
        aside = path.with_name("damaged.ckpt")
        with contextlib.suppress(FileNotFoundError):  # another process of this training was faster
            os.replace(path, aside)
        say(f"{error} It is now {aside.name}, and {previous.name} is used, of step {state.get('step')}.")
        return state


def _write(path: Path, tensors: dict[str, Tensor], told: dict[str, str], *, previous: Path | None = None) -> None:
    try:
        with written_whole(path) as part:
            save_file(tensors, part, metadata=told)
            _onto_disk(part)
            if previous is not None and path.exists():
                os.replace(path, previous)
        _onto_disk(path.parent)
    except (SafetensorError, OSError) as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "no space left" not in str(error).lower():
            raise
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20
        kept = f"; {path.name} is as it was" if path.exists() else ""
        raise UserError(f"{path}: no room for {size:.0f} MiB on the disk{kept}. Make room; the same command goes on from there.") from None


def _onto_disk(path: Path) -> None:
    """Have the system write a file, or a folder's names, before anything else happens: a power cut then leaves one whole generation."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(tensors: dict[str, Tensor]) -> int:
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), check))
    return check


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON can hold it; tensors go to `tensors`, each copied, for safetensors wants no two in one memory."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: place}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _without_tensors(item, f"{place}/{key}", tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _without_tensors(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place}: a checkpoint holds tensors and plain values, not a {type(value).__name__}")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_with_tensors(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _with_tensors(item, tensors) for key, item in value[_ITEMS]}
    return {key: _with_tensors(item, tensors) for key, item in value.items()}

"""The state of a training, out of its parts and back into them: what a checkpoint holds, and what it must agree with to be gone on from."""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig, Settings
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from .folder import HISTORY
from .mixture import label_space

NAMES_TOLD = 3
SAID = {"validation": "what was in its validation cases", "loading": "how its manifests had the images seen"}  # not by the oldest checkpoints


def identity(settings: Settings, cases: Sequence[PreparedCase], validation: Sequence[PreparedCase] = ()) -> dict:
    """What must be the same for a checkpoint to be gone on from: network, classes, the cases' contents, and what their manifests say of loading them; and
    the code's version, which is told."""
    return {
        "network": {"network": settings.network} | settings.model.model_dump(mode="json", exclude={"scan_backend"}),
        "classes": list(label_space(settings.data).class_names),
        "data": {case.case.id: fingerprint(case) for case in cases},
        "validation": {case.case.id: fingerprint(case) for case in validation},
        "loading": _loading([*cases, *validation]),
        "code": code_version(),
    }


def _loading(cases: Sequence[PreparedCase]) -> dict:
    """What is read off manifests when a prepared case becomes a patch, by the manifest's name and field. Classes stand in the cases' contents."""
    told: dict[str, list | dict] = {}
    for reference in dict.fromkeys(case.case.manifest for case in cases):
        manifest, own = load_manifest(reference), [case.case for case in cases if case.case.manifest == reference]
        told[f"{manifest.name}.intensity_range"] = list(manifest.intensity_range)
        for modality in sorted({case.modality for case in own}):
            told[f"{manifest.name}.intensity_window of {modality}"] = list(manifest.window_of(modality))
        for case in own:
            ranges = manifest.contrast_of(case.id)
            where = f"{manifest.name}.contrast_ranges" + (f" of {case.id}" if ranges != manifest.contrast_ranges else "")
            told[where] = {name: list(span) for name, span in ranges.items()}
    return told


def fingerprint(case: PreparedCase) -> str:
    """Of a case's contents: what its file was prepared from, whether it is read from there or kept in memory; without a file, its voxels."""
    if case.fingerprint:
        return case.fingerprint[:16]
    told = hashlib.sha256(repr((case.image.shape, case.affine.tolist())).encode())
    for volume in (case.image, case.label):
        told.update(np.ascontiguousarray(volume).tobytes() if volume is not None else b"none")
    return told.hexdigest()[:16]


@cache
def code_version() -> str:
    """The package's version, and a hash of its source files."""
    from homelib import __version__

    package, told = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        told.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return f"{__version__} ({told.hexdigest()[:12]})"


def check_identity(path: Path, found: dict, expected: dict) -> str | None:
    """Raises UserError with what differs; returns a line where only the code does, or where the checkpoint is too old to say all."""
    told, before = [], ModelConfig().model_dump(mode="json") | found["network"]  # a setting that is newer than the checkpoint had its default
    differ = [name for name in expected["network"] if before.get(name) != expected["network"][name]]
    told += [f"{name} was {before.get(name)}, is {expected['network'][name]}" for name in differ]
    if found["classes"] != expected["classes"]:
        told.append(f"classes were {', '.join(found['classes'])}, are {', '.join(expected['classes'])}")
    told += _cases_that_differ(found["data"], expected["data"], "trained")
    told += _cases_that_differ(found.get("validation", expected["validation"]), expected["validation"], "validated")
    was, now = found.get("loading", expected["loading"]), expected["loading"]
    told += [f"{name} was {was.get(name, 'not there')}, is {now.get(name, 'not there')}" for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if told:
        raise UserError(f"{path}: of another training: {'; '.join(told)}. Give what it was made with, or choose another name for the run.")
    remarks = [f"the checkpoint is of homelib {found['code']}, this is {expected['code']}"] if found["code"] != expected["code"] else []
    if missing := [what for name, what in SAID.items() if name not in found]:
        remarks.append(f"the checkpoint does not say {' and '.join(missing)}, which may have changed unseen")
    return "; ".join(remarks) or None


def _cases_that_differ(found: dict[str, str], expected: dict[str, str], done: str) -> list[str]:
    kinds = {
        f"were {done} on and are not given": [name for name in found if name not in expected],
        "are new": [name for name in expected if name not in found],
        "have other contents": [name for name in expected if name in found and found[name] != expected[name]],
    }
    return [f"{len(ids)} cases {kind} ({', '.join(ids[:NAMES_TOLD])}{', ...' if len(ids) > NAMES_TOLD else ''})" for kind, ids in kinds.items() if ids]


# ---------------------------------------------------------------- random numbers


def random_states() -> dict:
    """Of this process: of Python, NumPy, torch and its GPUs. Patches need none of them: they are functions of seed, step and place."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002  libraries may use it
    kind, keys, at, has_gauss, gauss = of_numpy
    state: dict[str, Any] = {"python": random.getstate(), "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(at), int(has_gauss), float(gauss))}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_states(kept: Sequence[dict] | dict, rank: int = 0) -> None:
    """Undo what has happened since, in the process `rank`. A process that has no state of its own takes the first one's: that of a checkpoint which one
    process made alone, or of an older one, which held no other. A checkpoint that was made with another number of GPUs has no state for them.
    """
    states = [kept] if isinstance(kept, dict) else kept
    state = states[rank] if rank < len(states) else states[0]
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------- network and optimiser


def all_finite(network: nn.Module) -> bool:
    """Whether no weight of this process is infinite or NaN; one look at a device, however many tensors."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    return bool(torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all())


def gather(network: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> tuple[dict[str, Tensor], dict]:
    """Weights and optimiser state, whole. Under FSDP all processes must call it, and the first one gets them."""
    if not sharded:
        return network.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    offload = next(network.parameters()).device.type != "cpu"  # on a CPU it would copy nothing, and hand out memory that FSDP then frees
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    found: Any
    if optimizer.state:
        found = get_state_dict(network, optimizer, options=options)
    else:  # before the first step: PyTorch would make one to see what the state looks like, and AdamW count it
        found = get_model_state_dict(network, options=options), {}
    weights, state = found
    return {name: tensor if offload else tensor.clone() for name, tensor in weights.items()}, state


def scatter(network: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict, *, sharded: bool) -> None:
    """Put back what `gather` took."""
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        if state:
            set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
        else:
            set_model_state_dict(network, weights, options=options)
    else:
        network.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():  # the fused step wants them in the parameter's own memory format, which the file does not keep
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def as_table(rows: Sequence[dict]) -> dict:
    """Rows of numbers as one float64 tensor, NaN where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = [[float(row.get(name, float("nan"))) for name in columns] for row in rows]
    return {"columns": columns, "values": torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(columns))}


def as_rows(table: dict) -> list[dict]:
    """What `as_table` was given; steps are integers again. What every row has may be NaN, in a step that was skipped."""
    lines = (zip(table["columns"], line, strict=True) for line in table["values"].tolist())
    rows = [{name: value for name, value in line if value == value or name in HISTORY} for line in lines]
    return [row | {"step": int(row["step"])} for row in rows]

"""The authors' parameter layout <-> ours: their checkpoints load here, and ours can be read by their code.

Only names differ, and that the authors keep every expert's weights apart where we stack them. A rule below is a pattern of our names and
what it reads in theirs; `{e}` stands for the expert, the first axis of our stacked tensor.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

HOME = [
    (r"expert_gate$", "expert_gates"),
    (r"group_gate\.", "group_gate_mlp."),
    (r"local_router\.token_norm\.", "norm."),
    (r"local_router\.slot_embed\.", "to_slot_embeds.0."),
    (r"local_router\.slot_norm\.", "to_slot_embeds.2."),
    (r"local_experts\.(weight|bias)_in", r"experts_first.{e}.0.\1"),
    (r"local_experts\.(weight|bias)_out", r"experts_first.{e}.3.\1"),
    (r"global_norm\.", "dynamic_slots_soft_moe.norm."),
    (r"global_router\.slot_embed\.", "dynamic_slots_soft_moe.to_slot_embeds.0."),
    (r"global_router\.slot_norm\.", "dynamic_slots_soft_moe.to_slot_embeds.2."),
    (r"global_experts\.(weight|bias)_in", r"dynamic_slots_soft_moe.experts.{e}.0.\1"),
    (r"global_experts\.(weight|bias)_out", r"dynamic_slots_soft_moe.experts.{e}.3.\1"),
]
GSC = [(r"wide\.0\.0\.", "proj."), (r"wide\.1\.0\.", "proj2."), (r"narrow\.0\.", "proj3."), (r"fuse\.0\.", "proj4.")]
NETWORK = [
    (r"stages\.0\.downsample\.", "mamba_encoder.downsample_layers.0.0."),
    (r"stages\.(\d)\.downsample\.", r"mamba_encoder.downsample_layers.\1."),
    (r"stages\.(\d)\.gsc\.", r"mamba_encoder.gscs.\1."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mamba_norm\.", r"mamba_encoder.mamba_blocks.\1.\2.norm."),
    (r"stages\.(\d)\.blocks\.(\d+)\.mamba\.", r"mamba_encoder.mamba_blocks.\1.\2.mamba."),
    (r"stages\.(\d)\.blocks\.(\d+)\.home_norm\.", r"mamba_encoder.norm_moe.\1.\2."),
    (r"stages\.(\d)\.blocks\.(\d+)\.home\.", r"mamba_encoder.moe_layers.\1.\2.mlp."),
    *((rf"lift\.{k}\.", f"encoder{k + 1}.") for k in range(5)),
    *((rf"up\.{k}\.", f"decoder{5 - k}.") for k in range(4)),
    (r"refine\.", "decoder1."),
    (r"head\.", "out.conv.conv."),
]


def published_name(ours: str) -> str:
    """One of our parameter names (of a network, a HoME layer, a GatedSpatialConv ...) in the authors' words; `{e}` where experts are stacked."""
    head, tail = _rename(ours, NETWORK)
    inner, tail = _rename(tail, HOME + GSC)
    return head + inner + tail


def _rename(name: str, rules: list[tuple[str, str]]) -> tuple[str, str]:
    for pattern, theirs in rules:
        if match := re.match(pattern, name):
            return match.expand(theirs), name[match.end() :]
    return "", name


def to_published(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters under the authors' names, one entry an expert (views, detached)."""
    published = {}
    for ours, tensor in module.state_dict().items():
        name = published_name(ours)
        entries = {name.format(e=e): part for e, part in enumerate(tensor)} if "{e}" in name else {name: tensor}
        published.update(entries)
    return published


def load_published(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load weights in the authors' names into a network, or into one of its layers; all of them, or none.

    Args:
        module: MambaHoME, SegMamba, HoME, MambaMixer, GatedSpatialConv or DynamicTanh.
        state: name -> tensor or array; a checkpoint `{"model": ...}` and names that begin with `module.` (left by DDP) are accepted.

    Raises:
        UserError: no mapping of names; or names that are missing, unexpected, of another shape, or no real numbers, all listed.
    """
    state = _unwrap(state)
    target = to_published(module)
    faults = _faults({name: tuple(t.shape) for name, t in target.items()}, {name: tuple(_shape(t)) for name, t in state.items()})
    faults += [f"{name} holds {state[name].dtype}, expected real numbers" for name in target if name in state and not _is_real(state[name])]
    if faults:
        raise UserError(
            f"weights in the authors' layout do not fit {type(module).__name__}: {'; '.join(faults)}. Check the network's settings and the classes."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(torch.as_tensor(state[name]))


def _unwrap(state: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        kind = f"a {type(state).__name__}" + (" whose keys are no text" if isinstance(state, Mapping) else "")
        raise UserError(f"weights in the authors' layout: found {kind}, expected name -> tensor, as torch.load of their checkpoint gives.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else (f"a {type(value).__name__}",)


def _is_real(value: Any) -> bool:
    """Of a tensor or array: floating or whole numbers. Of anything else its shape tells already."""
    dtype = getattr(value, "dtype", None)
    return not getattr(dtype, "is_complex", False) and getattr(dtype, "kind", "f") in "fiub"


def _faults(expected: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [f"{name} (found {found[name]}, expected {expected[name]})" for name in expected if name in found and found[name] != expected[name]]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped))
    return [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names]

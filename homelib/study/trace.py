"""What the routers of HoME decide, read while the network runs: level 1, level 2, and the gates between them.

    level 1, token k:  sum over the slots s of expert e of A[g,k,e,s]                the share of the token that expert e works on
    level 2, token k:  sum_m A[g,k,m] sum_p combine[(g m),e,p]                       how much of expert e's output the token reads, through its slots

Both sum to one over the experts at every token. A group is K consecutive tokens in raster order: a strip along the last axes of the stage's grid.

B batch, G groups, K tokens a group, E experts of a level, S slots an expert of level 1, M = E S slots a group, P slots an expert of level 2,
n >= G M entries of level 2, in the order (g e s), then fill up to a multiple of its experts. D, H, W the stage's grid of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..axes import three
from ..config import OTHER_ROUTES
from ..errors import UserError
from ..network.home import HoME, at_least_float32
from ..network.unet import Stage

LEVELS = (1, 2)
REDUCTIONS = ("experts", "slots", "winner", "entropy")


@dataclass(frozen=True)
class Routing:
    """What one HoME layer decided.

    stage, block: where, from 0. assignment: A (B, G, K, E, S). grid: (D, H, W) of the stage's tokens; the last group's fill is beyond it.
    dispatch, combine: (B, n, E, P) of level 2. group_gate: (B, G), and expert_gate: (E,), both of level 1. affine: (4, 4), from a token's index to mm, or
    to voxels of the input where the trace was given no affine. What was not watched is None.
    """

    stage: int
    block: int
    assignment: Tensor
    grid: tuple[int, int, int]
    dispatch: Tensor | None = None
    combine: Tensor | None = None
    group_gate: Tensor | None = None
    expert_gate: Tensor | None = None
    affine: np.ndarray | None = None

    @property
    def expert_weights(self) -> Tensor:
        """(B, E, D, H, W): each level-1 expert's share of every token; over the experts they sum to one."""
        return self.weights(1)

    def weights(self, level: int = 1) -> Tensor:
        """(B, E, D, H, W): each expert's weight at every token, as the module's docstring defines it for the level; they sum to one.

        Raises UserError: level 2, which was not watched or did not run.
        """
        A = at_least_float32(self.assignment)
        if level == 1:
            return self._in_space(A.sum(-1))
        if self.combine is None:
            raise UserError(f"level: found {level}, which was not watched or did not run, expected 1. Trace with levels=(1, 2).")
        G, (E, S) = A.shape[1], A.shape[-2:]
        read = at_least_float32(self.combine)[:, : G * E * S].sum(-1)  # (B, G M, E2); beyond are the fill's
        return self._in_space(torch.einsum("bgkm,bgme->bgke", A.flatten(-2), rearrange(read, "b (g m) e -> b g m e", g=G)))

    @property
    def slots(self) -> Tensor:
        """(B, M, D, H, W): the weight with which every token fills each slot of its group, those of an expert side by side."""
        return self._in_space(at_least_float32(self.assignment).flatten(-2))

    def winner(self, level: int = 1) -> Tensor:
        """(B, D, H, W) int64: the expert with the largest weight."""
        return self.weights(level).argmax(1)

    def entropy(self, level: int = 1) -> Tensor:
        """(B, D, H, W): of the weights, over its largest value: 0 is one expert alone, 1 all alike."""
        return entropy(self.weights(level), 1)

    @property
    def groups(self) -> Tensor:
        """(D, H, W) int64: the group of every token."""
        return groups_of(self.grid, self.assignment.shape[2])

    @property
    def bytes(self) -> int:
        """Of the routers' tensors."""
        kept = (self.assignment, self.dispatch, self.combine, self.group_gate)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def _in_space(self, weights: Tensor) -> Tensor:
        """(B, G, K, n) to (B, n, D, H, W), without the last group's fill."""
        D, H, W = self.grid
        return rearrange(rearrange(weights, "b g k n -> b n (g k)")[..., : D * H * W], "b n (d h w) -> b n d h w", d=D, h=H, w=W)


@dataclass(frozen=True)
class Reduced:
    """What is kept of one HoME layer where a trace reduces on the fly: by level, in half precision; the routers' own tensors are gone.

    experts: (B, E, D, H, W) float16. slots: (B, M, D, H, W) float16, of level 1. winner: (B, D, H, W) uint8, int16 beyond 256 experts. entropy:
    (B, D, H, W) float16. Empty where not asked for.
    """

    stage: int
    block: int
    grid: tuple[int, int, int]
    group_size: int
    affine: np.ndarray | None
    experts: dict[int, Tensor]
    slots: dict[int, Tensor]
    winner: dict[int, Tensor]
    entropy: dict[int, Tensor]

    @property
    def expert_weights(self) -> Tensor:
        """(B, E, D, H, W), as `Routing.expert_weights`, in half precision."""
        return self.experts[1]

    @property
    def groups(self) -> Tensor:
        """(D, H, W) int64: the group of every token."""
        return groups_of(self.grid, self.group_size)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for kind in (self.experts, self.slots, self.winner, self.entropy) for tensor in kind.values())


@dataclass
class Trace:
    """The routings of the latest forward pass, in the order of the network."""

    routings: list[Routing | Reduced] = field(default_factory=list)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """`trace[stage, block]`: its `Routing`, or its `Reduced` where the trace reduces. Raises KeyError for a layer that was not watched."""
        for routing in self.routings:
            if (routing.stage, routing.block) == place:
                return routing
        raise KeyError(f"stage, block: found {place}, expected one of {[(r.stage, r.block) for r in self.routings]}")


@contextmanager
def trace_routing(
    network: nn.Module,
    stages: Sequence[int] | None = None,
    *,
    levels: Sequence[int] = LEVELS,
    reduce: Sequence[str] = (),
    affine: np.ndarray | None = None,
) -> Iterator[Trace]:
    """Watch the routers of a network while the block runs. The forward pass is unchanged, and nothing is left behind.

    Args:
        network: MambaHoME.
        stages: to watch, from 0; None is all.
        levels: 1, 2 or both.
        reduce: of "experts", "slots", "winner" and "entropy", what to make of each layer as soon as it has run, in half precision, and keep
            instead of the routers' own tensors (`Reduced`). Empty: keep these (`Routing`).
        affine: (4, 4) of the network's input, voxel to mm; every routing then has its tokens' own.

    Raises:
        UserError: a network without HoME, or a stage, level or reduction that does not exist.

    >>> with trace_routing(network, stages=[0]) as trace:   # doctest: +SKIP
    ...     network(image)
    >>> trace[0, 0].weights(level=2).shape   # doctest: +SKIP
    torch.Size([1, 8, 32, 24, 24])
    """
    watched = checked_stages(network, stages)
    for name, found, known in (("levels", levels, LEVELS), ("reduce", reduce, REDUCTIONS)):
        if unknown := [one for one in found if one not in known]:
            raise UserError(f"{name}: found {unknown[0]!r}, expected some of {', '.join(map(str, known))}.")
    trace, hooks = Trace(), []
    try:
        encoder = stages_of(network)
        hooks.append(encoder[0].register_forward_pre_hook(lambda module, args: trace.routings.clear()))
        for stage in watched:
            layers = [_Layer(trace, stage, block, layer.home, levels, reduce, affine) for block, layer in enumerate(encoder[stage].blocks)]
            hooks.append(encoder[stage].gsc.register_forward_hook(partial(_see_grid, layers)))
            hooks += [hook for layer in layers for hook in layer.hooks()]
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def stages_of(network: nn.Module) -> Sequence[Stage]:
    """The encoder of a MambaHoME, also of one that is wrapped, whose type says nothing of it."""
    stages: Any = network.stages
    return stages


def checked_stages(network: nn.Module, stages: Sequence[int] | None) -> list[int]:
    """Stages in order; None is all. Raises UserError: a network without HoME, a stage that it does not have."""
    if not getattr(network, "with_home", False):
        raise UserError(f"network: found {type(network).__name__}, expected a MambaHoME; only HoME routes.")
    config: Any = network.config
    if other := [name for name in OTHER_ROUTES if name in config.changed_switches]:
        raise UserError(f"model.{other[0]}: found {getattr(config, other[0])!r}, expected the released form; routing is traced in that alone.")
    known = range(len(stages_of(network)))
    if unknown := [stage for stage in stages or () if stage not in known]:
        raise UserError(f"stages: found {unknown[0]}, expected 0 to {len(known) - 1}.")
    return list(known) if stages is None else sorted(set(stages))


def token_affine(affine: np.ndarray, stage: int) -> np.ndarray:
    """(4, 4) of a stage's token grid, of its input's affine: a token is a cube of 2^(stage + 1) voxels, and lies in its middle."""
    side = 2 ** (stage + 1)
    step = np.diag([side, side, side, 1.0])
    step[:3, 3] = (side - 1) / 2
    return affine @ step


def groups_of(grid: tuple[int, int, int], group_size: int) -> Tensor:
    """(D, H, W) int64: the group of every token of a stage's grid."""
    D, H, W = grid
    return rearrange(torch.arange(D * H * W) // group_size, "(d h w) -> d h w", d=D, h=H, w=W)


def entropy(weights: Tensor, axis: int) -> Tensor:
    """Of weights of any shape that sum to one along an axis, over log of how many there are: 0 hard, 1 even. One weight alone has 0."""
    count = weights.shape[axis]
    return -torch.special.xlogy(weights, weights).sum(axis) / np.log(max(count, 2))


class _Layer:
    """The hooks of one HoME layer: what its routers give is gathered, and kept or reduced when the layer is done."""

    def __init__(self, trace: Trace, stage: int, block: int, home: HoME, levels: Sequence[int], reduce: Sequence[str], affine: np.ndarray | None):
        self.trace, self.place, self.home, self.levels, self.reduce = trace, (stage, block), home, levels, reduce
        self.affine = token_affine(np.eye(4) if affine is None else np.asarray(affine, float), stage)
        self.grid = (0, 0, 0)  # `_see_grid` tells it, before the layer runs
        self.seen: dict[str, Tensor] = {}

    def hooks(self) -> list:
        watched: list[tuple[nn.Module, Callable]] = [(self.home.local_router, self._keep("assignment")), (self.home.group_gate, self._keep("gate"))]
        if 2 in self.levels:
            watched.append((self.home.global_router, self._see_global))
        return [module.register_forward_hook(hook) for module, hook in (*watched, (self.home, self._done))]

    @property
    def recorded(self) -> bool:
        """A checkpointed block computes all of it again in the backward pass."""
        return self.place in {(r.stage, r.block) for r in self.trace.routings}

    def _keep(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not self.recorded:
                self.seen[name] = output.detach()

        return hook

    def _see_global(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        if not self.recorded:
            self.seen |= {name: tensor.detach() for name, tensor in zip(("dispatch", "combine"), output, strict=True)}

    def _done(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.recorded:
            return
        seen, self.seen, (stage, block) = self.seen, {}, self.place
        routing = Routing(
            stage,
            block,
            seen["assignment"],
            self.grid,
            dispatch=seen.get("dispatch"),
            combine=seen.get("combine"),
            group_gate=self.home.open_gate(seen["gate"]).squeeze(-1),
            expert_gate=self.home.expert_gate.detach().clone(),
            affine=self.affine,
        )
        self.trace.routings.append(_reduced(routing, self.levels, self.reduce) if self.reduce else routing)


def _see_grid(layers: list[_Layer], module: nn.Module, args: tuple, output: Tensor) -> None:
    for layer in layers:
        layer.grid = three(output.shape[2:])


@torch.no_grad()
def _reduced(routing: Routing, levels: Sequence[int], reduce: Sequence[str]) -> Reduced:
    kept: dict[str, dict[int, Tensor]] = {name: {} for name in REDUCTIONS}
    for level in levels:
        weights = routing.weights(level)
        if "experts" in reduce:
            kept["experts"][level] = weights.half()
        if "winner" in reduce:
            kept["winner"][level] = weights.argmax(1).to(torch.uint8 if weights.shape[1] <= 256 else torch.int16)
        if "entropy" in reduce:
            kept["entropy"][level] = entropy(weights, 1).half()
    if "slots" in reduce:
        kept["slots"][1] = routing.slots.half()
    return Reduced(routing.stage, routing.block, routing.grid, routing.assignment.shape[2], routing.affine, **kept)

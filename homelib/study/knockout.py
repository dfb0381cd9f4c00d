"""What a network can do without: one expert, a level, or the routing taken away, and the change of Dice in each class.

What is done, exactly, in one HoME layer (stage, block):

    expert   the output of one expert of a level is zero. Its slots stay: level 2 still sees a level-1 expert's entries, now all zero, and gives them
             what it gives to any zero entry.
    expert, renormalised   besides, no token reads from it: its weights are zero, and those of the others grow to sum to one again (where it had all
             of a token, the token reads nothing). Level 1: A, on the way in and back. Level 2: combine.
    bypass   a level is left out: what comes to it goes on as it is. Level 1: the slots go to level 2 without experts and gates, with the same A. Level 2:
             what level 1 made goes back to the tokens. So is seen what the level itself adds.
    layer    the layer adds nothing to its tokens: the outputs of all experts of level 2 are zero. (Were those of level 1 zero, it would add the same to
             every token, which the InstanceNorm after the stage takes out again: no other experiment.)
    shuffle  every token of a group (level 1), or entry of level 2, has the weights of another, drawn at random: each expert is used as much as
             before, but not where.

A change of Dice of exactly zero has two causes that Dice cannot tell apart, so that two numbers stand beside it: how many voxels change their class, and
by how much any logit changes.

Maps and lifts show association (`homelib.study.association`). Only here is anything said about cause, and of this network alone: it was trained with
the expert there, and another might learn to do without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..run.mixture import label_space
from ..run.predict import case_rows, device_of, windows_of
from ..run.validate import beside_label
from .expert_maps import CPU, experts_of, layers_of
from .scan_interval import Counts, Draws
from .statistics import interval
from .trace import stages_of

WHAT = ["stage", "block", "level", "what", "expert", "renormalised"]
BOTH = 0  # in place of a level: the layer


@dataclass(frozen=True)
class Intervention:
    """What is taken away, as above; `level` is 0 for the layer, `expert` its number, -1 where it is not one expert."""

    stage: int
    block: int
    level: int
    what: Literal["expert", "bypass", "layer", "shuffle"]
    expert: int = -1
    renormalised: bool = False

    def __str__(self) -> str:
        place = f"stage {self.stage}, block {self.block}" + (f", level {self.level}" if self.level != BOTH else "")
        told = {"expert": f"without expert {self.expert}", "bypass": "bypassed", "layer": "without the layer", "shuffle": "shuffled"}[self.what]
        return f"{place}, {told}" + (", renormalised" if self.renormalised else "")


def interventions(
    network: nn.Module,
    *,
    stages: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    levels: Sequence[int] = (1, 2),
    what: Sequence[str] = ("expert", "bypass", "shuffle", "layer"),
    renormalised: bool = False,
) -> list[Intervention]:
    """Of the chosen layers (None: all): each expert, the level bypassed and shuffled; then the layer. Raises UserError as `layers_of`."""
    found, layers = [], layers_of(network, stages, blocks, levels)
    for number, layer in enumerate(layers):
        found += [Intervention(*layer, "expert", e, renormalised) for e in range(experts_of(network, layer)) if "expert" in what]
        found += [Intervention(*layer, one) for one in ("bypass", "shuffle") if one in what]
        if "layer" in what and layer[:2] not in [other[:2] for other in layers[number + 1 :]]:
            found.append(Intervention(*layer[:2], BOTH, "layer"))
    return found


@contextmanager
def knocked_out(network: nn.Module, intervention: Intervention, *, seed: int = 0) -> Iterator[None]:
    """The network without what the intervention takes away, while the block runs. A trace begun inside sees the routing that is used.

    Args:
        network: MambaHoME.
        intervention: which.
        seed: of a shuffle, whose order is drawn anew in every forward pass, the same ones in each block.

    Raises:
        UserError: a layer, an expert or a combination that does not exist.
    """
    what, level = intervention.what, intervention.level
    if (what == "layer") != (level == BOTH):
        raise UserError(f"level: found {level} for {what}, expected {'0, both' if what == 'layer' else '1 or 2'}.")
    layer = layers_of(network, [intervention.stage], [intervention.block], [level or 2])[0]
    experts = experts_of(network, layer)
    if what == "expert" and intervention.expert not in range(experts):
        raise UserError(f"expert: found {intervention.expert}, expected 0 to {experts - 1} in stage {layer[0]}, level {level}.")
    if intervention.renormalised and what != "expert":
        raise UserError(f"renormalised: found it with a {what}, expected one expert: there is nothing else to grow.")
    home = stages_of(network)[layer[0]].blocks[layer[1]].home
    router, workers = (home.local_router, home.local_experts) if level == 1 else (home.global_router, home.global_experts)
    with ExitStack() as undone:

        def hook(module: nn.Module, function: Callable) -> None:
            undone.callback(module.register_forward_hook(function).remove)

        if what == "shuffle":
            hook(router, _shuffled(level, torch.Generator().manual_seed(seed)))
        elif what == "bypass" and level == 1:
            hook(workers, lambda module, args, y: args[0])
            hook(home.group_gate, lambda module, args, logit: torch.full_like(logit, torch.inf))  # wide open
            undone.callback(setattr, home.expert_gate, "data", home.expert_gate.data)
            home.expert_gate.data = torch.ones_like(home.expert_gate.data)
        elif what == "bypass":
            undone.callback(setattr, home, "levels", home.levels)
            home.levels = 1
        else:
            stays = torch.tensor([what == "expert" and e != intervention.expert for e in range(experts)])
            hook(workers, lambda module, args, y: y * stays[:, None, None].to(y))
            if intervention.renormalised:
                hook(router, _renormalised(level, stays))
        yield


def effects(
    network: nn.Module,
    cases: Sequence[PreparedCase],
    settings: Settings,
    wanted: Sequence[Intervention],
    *,
    seed: int = 0,
    on_prediction: Callable[[int], None] = lambda count: None,
    on_rows: Callable[[pd.DataFrame], None] = lambda rows: None,
) -> pd.DataFrame:
    """Dice of each case and class with and without, on the prepared grid, before `prediction.one_piece`. One prediction of each case, and one more an
    intervention.

    Args:
        network: MambaHoME, in eval mode.
        cases: prepared and labelled.
        settings: of the run.
        wanted: interventions.
        seed: of shuffles.
        on_prediction: called with 1 after each.
        on_rows: called with all rows so far after each intervention, so that what is interrupted is not lost.

    Returns:
        Columns of `Intervention`, case, class, intact and without (Dice), change (without less intact), scan_low and scan_high: a 95 % interval of the change
        within this scan (`homelib.study.scan_interval`), which says nothing of other patients; and of the whole scan, the same for all classes: flipped
        (voxels whose class is another) and logit_change (the largest change of any logit; what is rounding is about 1e-5 of the largest logit, at most).

    Raises:
        UserError: a case without a label.
    """
    if unlabelled := [case.case.id for case in cases if case.label is None]:
        raise UserError(f"cases: found {', '.join(unlabelled)} without a label, expected labelled ones.")
    names, rows = label_space(settings.data).class_names, []
    columns = [*WHAT, "case", "class", "intact", "without", "change", "scan_low", "scan_high", "flipped", "logit_change"]
    for case in cases:
        logits = np.empty((settings.model.out_channels, *case.image.shape), np.float32)
        intact, _ = _predicted(network, case, settings, keep_in=logits)
        draws = Draws(Counts.of(*beside_label(intact, case, settings)))
        on_prediction(1)
        for intervention in wanted:
            with knocked_out(network, intervention, seed=seed):
                without, logit_change = _predicted(network, case, settings, beside=logits)
            on_prediction(1)
            of_scan = {"flipped": int((without != intact).sum()), "logit_change": logit_change}
            for index, found in draws.change(Counts.of(*beside_label(without, case, settings))).items():
                rows.append(asdict(intervention) | {"case": case.case.id, "class": names[index]} | found | of_scan)
            on_rows(pd.DataFrame(rows, columns=columns))
    return pd.DataFrame(rows, columns=columns)


@torch.inference_mode()
def _predicted(
    network: nn.Module, case: PreparedCase, settings: Settings, *, keep_in: np.ndarray | None = None, beside: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Class indices (D, H, W) uint8, and the largest change of a logit from those of `beside` (C, D, H, W). Slab by slab: only what is kept is whole."""
    windows, largest = windows_of(case, settings), 0.0
    predicted = np.empty(case.image.shape, np.uint8)
    how = {"device": device_of(network), "accumulate_on": CPU, "finish": lambda blended: blended}
    for first, rows in case_rows([network], case, settings, windows, **how):
        logits = np.moveaxis(rows.numpy(), 1, 1 + windows.axis)
        box = (slice(None),) * windows.axis + (slice(first, first + rows.shape[1]),)
        predicted[box] = logits.argmax(0)
        if keep_in is not None:
            keep_in[(slice(None), *box)] = logits
        if beside is not None:
            largest = max(largest, float(np.abs(logits - beside[(slice(None), *box)]).max()))
    return predicted, largest


def effect_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an intervention and class, and one for the mean over classes (`mean`), over cases: cases, intact, without, change, low and high.

    low, high: 95 % by bootstrap over cases, NaN for one case; of one case and class `scan_low` and `scan_high` are all there is, and are given as such.
    flipped: voxels in all cases; logit_change: the largest of any case.
    """
    lines = []
    for told, part in rows.groupby(WHAT, sort=False):
        groups = [*part.groupby("class", sort=False), ("mean", part)]
        of_scans = part.drop_duplicates("case")
        changed = {"flipped": int(of_scans["flipped"].sum()), "logit_change": of_scans["logit_change"].max()}
        for name, group in groups:
            by_case = group.groupby("case", sort=False)[["intact", "without", "change"]].mean()
            low, high = interval(by_case["change"].to_numpy())
            within = group[["scan_low", "scan_high"]].iloc[0].tolist() if len(group) == 1 else (float("nan"), float("nan"))
            line = dict(zip(WHAT, told, strict=True)) | {"class": name, "cases": int(by_case["change"].notna().sum())} | by_case.mean().to_dict()
            lines.append(line | {"low": low, "high": high, "scan_low": within[0], "scan_high": within[1]} | changed)
    return pd.DataFrame(lines)


def _renormalised(level: int, stays: Tensor) -> Callable:
    def of_level_1(module: nn.Module, args: tuple, A: Tensor) -> Tensor:  # (B, G, K, E, S)
        return _to_one(A * stays[:, None].to(A))

    def of_level_2(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # (B, n, E, P)
        dispatch, combine = output
        return dispatch, _to_one(combine * stays[:, None].to(combine))

    return of_level_1 if level == 1 else of_level_2


def _to_one(weights: Tensor) -> Tensor:
    """Over the two last axes; weights that are all zero stay so."""
    total = weights.sum((-2, -1), keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(weights.dtype).tiny), 0)


def _shuffled(level: int, generator: torch.Generator) -> Callable:
    def of_level_1(module: nn.Module, args: tuple, A: Tensor) -> Tensor:  # (B, G, K, E, S)
        padded = args[2]
        drawn = torch.rand(A.shape[1:3], generator=generator)
        order = (drawn if padded is None else drawn + padded.cpu()).argsort(1).to(A.device)  # fill stays behind the tokens of its group
        return A[:, torch.arange(A.shape[1], device=A.device)[:, None], order]

    def of_level_2(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # (B, n, E, P), the first `entries` real
        entries, n = args[1], output[0].shape[1]
        order = torch.cat([torch.randperm(entries, generator=generator), torch.arange(entries, n)]).to(output[0].device)
        return output[0][:, order], output[1][:, order]

    return of_level_1 if level == 1 else of_level_2

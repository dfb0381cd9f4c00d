"""What a network can do without: one expert, a level, or the routing taken away, and the change of Dice in each class.

What is done, exactly, in one HoME layer (stage, block):

    expert   the output of one expert of a level is zero. Its slots stay: level 2 still sees a level-1 expert's entries, now all zero, and gives them
             what it gives to any zero entry.
    expert, renormalised   besides, no token reads from it: its weights are zero, and those of the others grow to sum to one again (where it had all
             of a token, the token reads nothing). Level 1: A, on the way in and back. Level 2: combine.
    level    the outputs of all experts of a level are zero. Without level 2 the layer adds nothing to its tokens. Without level 1 what it adds is the
             same everywhere: level 2 sees zeros.
    shuffle  every token of a group (level 1), or entry of level 2, has the weights of another, drawn at random: each expert is used as much as
             before, but not where.

Maps and lifts show association (`homelib.study.association`). Only here is anything said about cause, and of this network alone: it was trained with
the expert there, and another might learn to do without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..run.mixture import label_space
from ..run.validate import predicted_beside_label
from .expert_maps import experts_of, layers_of
from .scan_interval import Counts, change
from .statistics import interval

WHAT = ["stage", "block", "level", "what", "expert", "renormalised"]


@dataclass(frozen=True)
class Intervention:
    """What is taken away, as above; `expert` is its number, -1 for a level or a shuffle."""

    stage: int
    block: int
    level: int
    what: Literal["expert", "level", "shuffle"]
    expert: int = -1
    renormalised: bool = False

    def __str__(self) -> str:
        told = f"expert {self.expert}" if self.what == "expert" else self.what
        return f"stage {self.stage}, block {self.block}, level {self.level}: {told}" + (", renormalised" if self.renormalised else "")


def interventions(
    network: nn.Module,
    *,
    stages: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    levels: Sequence[int] = (1, 2),
    what: Sequence[str] = ("expert", "level", "shuffle"),
    renormalised: bool = False,
) -> list[Intervention]:
    """Of the chosen layers (None: all): each expert, the level, the shuffle. Raises UserError as `layers_of`."""
    found = []
    for layer in layers_of(network, stages, blocks, levels):
        found += [Intervention(*layer, "expert", e, renormalised) for e in range(experts_of(network, layer)) if "expert" in what]
        found += [Intervention(*layer, one) for one in ("level", "shuffle") if one in what]
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
    level = intervention.level
    layer = layers_of(network, [intervention.stage], [intervention.block], [level])[0]
    experts = experts_of(network, layer)
    if intervention.what == "expert" and intervention.expert not in range(experts):
        raise UserError(f"expert: found {intervention.expert}, expected 0 to {experts - 1} in stage {layer[0]}, level {level}.")
    if intervention.renormalised and intervention.what != "expert":
        raise UserError(f"renormalised: found it with a {intervention.what}, expected one expert: there is nothing else to grow.")
    home = network.stages[layer[0]].blocks[layer[1]].home
    router, workers = (home.local_router, home.local_experts) if level == 1 else (home.global_router, home.global_experts)
    hooks = []
    try:
        if intervention.what == "shuffle":
            generator = torch.Generator().manual_seed(seed)
            hooks.append(router.register_forward_hook(_shuffled(level, generator)))
        else:
            stays = torch.tensor([intervention.what == "expert" and e != intervention.expert for e in range(experts)])
            hooks.append(workers.register_forward_hook(lambda module, args, y: y * stays[:, None, None].to(y)))
            if intervention.renormalised:
                hooks.append(router.register_forward_hook(_renormalised(level, stays)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def effects(
    network: nn.Module,
    cases: Sequence[PreparedCase],
    settings: Settings,
    wanted: Sequence[Intervention],
    *,
    seed: int = 0,
    on_prediction: Callable[[int], None] = lambda count: None,
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

    Returns:
        Columns of `Intervention`, case, class, intact and without (Dice), change (without less intact), scan_low and scan_high: a 95 % interval of the change
        within this scan (`homelib.study.scan_interval`), which says nothing of other patients.

    Raises:
        UserError: a case without a label.
    """
    if unlabelled := [case.case.id for case in cases if case.label is None]:
        raise UserError(f"cases: found {', '.join(unlabelled)} without a label, expected labelled ones.")
    names, rows = label_space(settings.data).class_names, []
    for case in cases:
        intact = Counts.of(*predicted_beside_label(network, case, settings))
        on_prediction(1)
        for intervention in wanted:
            with knocked_out(network, intervention, seed=seed):
                without = Counts.of(*predicted_beside_label(network, case, settings))
            on_prediction(1)
            for index, found in change(intact, without).items():
                about = asdict(intervention) | {"case": case.case.id, "class": names[index]}
                rows.append(about | found)
    return pd.DataFrame(rows, columns=[*WHAT, "case", "class", "intact", "without", "change", "scan_low", "scan_high"])


def effect_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an intervention and class, and one for the mean over classes (`mean`), over cases: cases, intact, without, change, low and high.

    low, high: 95 % by bootstrap over cases, NaN for one case; of one case and class `scan_low` and `scan_high` are all there is, and are given as such.
    """
    lines = []
    for told, part in rows.groupby(WHAT, sort=False):
        groups = [*part.groupby("class", sort=False), ("mean", part)]
        for name, group in groups:
            by_case = group.groupby("case", sort=False)[["intact", "without", "change"]].mean()
            low, high = interval(by_case["change"].to_numpy())
            within = group[["scan_low", "scan_high"]].iloc[0].tolist() if len(group) == 1 else (float("nan"), float("nan"))
            line = dict(zip(WHAT, told, strict=True)) | {"class": name, "cases": int(by_case["change"].notna().sum())} | by_case.mean().to_dict()
            lines.append(line | {"low": low, "high": high, "scan_low": within[0], "scan_high": within[1]})
    return pd.DataFrame(lines)


def _renormalised(level: int, stays: Tensor) -> Callable:
    def of_level_1(module, args, A: Tensor) -> Tensor:  # (B, G, K, E, S)
        return _to_one(A * stays[:, None].to(A))

    def of_level_2(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # (B, n, E, P)
        dispatch, combine = output
        return dispatch, _to_one(combine * stays[:, None].to(combine))

    return of_level_1 if level == 1 else of_level_2


def _to_one(weights: Tensor) -> Tensor:
    """Over the two last axes; weights that are all zero stay so."""
    total = weights.sum((-2, -1), keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(torch.finfo(weights.dtype).tiny), 0)


def _shuffled(level: int, generator: torch.Generator) -> Callable:
    def of_level_1(module, args, A: Tensor) -> Tensor:  # (B, G, K, E, S)
        padded = args[2]
        drawn = torch.rand(A.shape[1:3], generator=generator)
        order = (drawn if padded is None else drawn + padded.cpu()).argsort(1).to(A.device)  # fill stays behind the tokens of its group
        return A[:, torch.arange(A.shape[1], device=A.device)[:, None], order]

    def of_level_2(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # (B, n, E, P), of which the first `entries` are real
        entries, n = args[1], output[0].shape[1]
        order = torch.cat([torch.randperm(entries, generator=generator), torch.arange(entries, n)]).to(output[0].device)
        return output[0][:, order], output[1][:, order]

    return of_level_1 if level == 1 else of_level_2

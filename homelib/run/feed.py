"""From patches to the batches of each step: the same ones for any number of processes that make them, and for any number of devices.

A batch of a step is `batch_size x accumulate x devices` patches, numbered; each is a function of seed, step and number. So what a training has
seen is told by its step alone, and no worker has a state of its own to be kept.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import TrainingConfig
from ..data.parallel import new_processes
from ..errors import UserError

Batch = tuple[Tensor, ...]  # images (B, 1, D, H, W) float32, labels (B, 1, D, H, W) int64, and for several data sets labelled (B, classes) bool
AHEAD = 2  # batches that a worker makes before they are asked for


class Source(Protocol):
    """`homelib.data.loading.Patches`, or `homelib.run.mixture.Mixture`."""

    def patch(self, step: int, place: int) -> tuple[Tensor, ...]:
        """Image (1, D, H, W) float32, label (1, D, H, W) int64, and of several data sets labelled (classes,) bool; the same for the same step and place."""
        ...


class Feed:
    """The batches of one device, in the order in which they are used.

    >>> for step, batches in Feed(patches, config, rank=0, world=1).steps(0, 100):   # doctest: +SKIP
    ...     image, label = batches[0]
    """

    def __init__(self, source: Source, config: TrainingConfig, *, rank: int = 0, world: int = 1):
        self.source, self.config, self.rank, self.world = source, config, rank, world

    def steps(self, first: int, end: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its `accumulate` batches) for each step from `first`, before `end`. Its workers end with it.

        A batch: images (B, 1, D, H, W) float32, labels (B, 1, D, H, W) int64, and of several data sets labelled (B, classes) bool.
        """
        config = self.config
        order = _InOrder(self.source, config, range(first, end), self.rank, self.world)
        if not config.workers:
            first_items = range(0, len(order), config.batch_size)
            batches: Iterator[Batch] = (_stacked([order[item] for item in range(start, start + config.batch_size)]) for start in first_items)
        else:
            generator = torch.Generator()  # so that torch's own is left alone
            context = new_processes(type(self.source).__module__)
            loader = DataLoader(
                order, batch_size=config.batch_size, num_workers=config.workers, collate_fn=_stacked, multiprocessing_context=context, generator=generator,
                prefetch_factor=AHEAD, pin_memory=config.accelerator != "cpu" and torch.cuda.is_available(),
            )  # fmt: skip
            batches = _told_in_a_line(loader)
        for step in range(first, end):
            yield step, [tuple(next(batches)) for _ in range(config.accumulate)]


def _told_in_a_line(loader: DataLoader) -> Iterator[Batch]:
    """A user's mistake that a loading process finds arrives with that process's traceback as its text; the mistake itself stands in the last line."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rstrip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from None


class _InOrder(Dataset):
    """The patches of some steps of one device, one after the other."""

    def __init__(self, source: Source, config: TrainingConfig, steps: range, rank: int, world: int):
        self.source, self.steps, self.rank, self.world = source, steps, rank, world
        self.size, self.accumulate = config.batch_size, config.accumulate
        self.batches = len(steps) * config.accumulate

    def __len__(self) -> int:
        return self.batches * self.size

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        batch, item = divmod(number, self.size)
        step, part = divmod(batch, self.accumulate)
        return self.source.patch(self.steps[step], (part * self.world + self.rank) * self.size + item)


def _stacked(items: list[tuple[Tensor, ...]]) -> Batch:
    return tuple(torch.stack(parts) for parts in zip(*items, strict=True))

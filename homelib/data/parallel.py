"""One function over many items, in processes: results as they come, and an item that kills its process takes no other with it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class Died(RuntimeError):
    """The process that worked on an item ended without an answer: killed for its memory, or a crash in a reader."""


def default_workers() -> int:
    """One a core that this process may use, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def over(function: Callable[[Any], Any], items: Sequence[Any], *, workers: int) -> Iterator[tuple[int, Any]]:
    """(index of the item, its result or the exception it raised), in the order in which they are done.

    Args:
        function: a module's own function; it and the items are sent to processes that start fresh.
        items: what to work on.
        workers: processes; 1 or fewer works in this one.

    An item during which a process dies is tried once more, alone; if it dies again its result is `Died`.
    """
    if workers <= 1 or len(items) < 2:
        for index, item in enumerate(items):
            yield index, _try(function, item)
        return
    left = dict(enumerate(items))
    try:
        yield from _in_pool(function, left, workers)
    except BrokenProcessPool:
        for index in list(left):  # one of these is to blame; each gets a process of its own
            try:
                yield from _in_pool(function, {index: left[index]}, 1)
            except BrokenProcessPool:
                yield index, Died("its process ended without an answer")


def _in_pool(function: Callable, left: dict[int, Any], workers: int) -> Iterator[tuple[int, Any]]:
    """As `over`; what is done is taken out of `left`. Raises BrokenProcessPool when a process dies."""
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_try, function, item): index for index, item in left.items()}
        try:
            for future in as_completed(waiting):
                result = future.result()
                del left[waiting[future]]
                yield waiting[future], result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _try(function: Callable, item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error

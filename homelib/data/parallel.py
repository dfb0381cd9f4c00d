"""One function over many items, in processes: results as they come, and an item that kills its process takes no other with it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any

_AHEAD = 2  # items a process that are handed out at a time: those, and no others, are under suspicion when one dies


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

    When a process dies, the few items that were handed out then are tried once more, each in a process of its own; the one with
    which it dies again has the result `Died`.
    """
    if workers <= 1 or len(items) < 2:
        yield from ((index, _try(function, item)) for index, item in enumerate(items))
        return
    left = deque(enumerate(items))
    while left:
        for index, item in (yield from _in_pool(function, left, min(workers, len(left)))):
            alone = deque([(index, item)])
            if (yield from _in_pool(function, alone, 1)) or alone:
                yield index, Died("its process ended without an answer")


def _in_pool(function: Callable, left: deque, workers: int) -> Generator[tuple[int, Any], None, list[tuple[int, Any]]]:
    """As `over`, taking items off `left`; ends early when a process dies, and returns the items that were handed out then."""
    waiting: dict = {}
    pool = ProcessPoolExecutor(workers, mp_context=new_processes(function.__module__), initializer=_start_worker)
    try:
        while left or waiting:
            while left and len(waiting) < _AHEAD * workers:
                waiting[pool.submit(_try, function, left[0][1])] = left[0]
                left.popleft()
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                result = future.result()
                index, _ = waiting.pop(future)
                yield index, result
    except BrokenProcessPool:
        return list(waiting.values())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return []


def _try(function: Callable, item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error


def new_processes(module: str) -> BaseContext:
    """New processes, not copies of this one: a copy of a process that has used PyTorch's threads may hang. Where the system can, they are
    copies of one that has imported a module and done nothing else, which start at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that started them answers it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the items are the parallel part
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)

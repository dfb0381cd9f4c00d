"""One function over many items, in processes: results as they come, and an item that kills its process takes no other with it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which a system need not have
    from multiprocessing.context import ForkServerContext, SpawnContext


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

    Every process has one item at a time and a pipe of its own, so that one that dies is known with its item. Such an item is tried once
    more when the others are done, alone, for memory that was short may suffice then; if its process dies again its result is `Died`.
    """
    if workers <= 1 or len(items) < 2:
        yield from ((index, _try(function, item)) for index, item in enumerate(items))
        return
    again = []
    for index, result in _in_processes(function, list(enumerate(items)), workers):
        if isinstance(result, Died):
            again.append((index, items[index]))
        else:
            yield index, result
    yield from _in_processes(function, again, 1)


def _in_processes(function: Callable, items: Sequence[tuple[int, Any]], workers: int) -> Iterator[tuple[int, Any]]:
    """As `over`, without a second try, for items that carry their index."""
    context, left = new_processes(function.__module__), deque(items)
    at_work: dict[Connection, tuple[multiprocessing.process.BaseProcess, int]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        hand_out(ours, process)

    def hand_out(pipe: Connection, process: multiprocessing.process.BaseProcess) -> None:
        index, item = left.popleft()
        at_work[pipe] = process, index
        with contextlib.suppress(BrokenPipeError):  # it died before its item came: found below
            pipe.send(item)

    try:
        for _ in range(min(workers, len(left))):
            start()
        while at_work:
            ready: list[Any] = wait(list(at_work))
            for pipe in ready:
                process, index = at_work[pipe]
                try:
                    result, alive = pipe.recv(), True
                except (EOFError, ConnectionError):
                    result, alive = Died("its process ended without an answer"), False
                del at_work[pipe]
                if left and alive:
                    hand_out(pipe, process)
                else:
                    pipe.close()
                    process.join()
                    if left:
                        start()
                yield index, result
    finally:
        for pipe, (process, _) in at_work.items():
            process.kill()
            process.join()
            pipe.close()


def _worker(pipe: Connection, function: Callable) -> None:
    """Items in, results out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that started them answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the other end is closed, or its process was killed
        while True:
            pipe.send(_try(function, pipe.recv()))


def _try(function: Callable, item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error


def new_processes(module: str) -> "SpawnContext | ForkServerContext":
    """New processes, not copies of this one: a copy of a process that has used PyTorch's threads may hang. Where the system can, they are
    copies of one that has imported a module and done nothing else, which start at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # in a worker
    parent.join()
    os._exit(1)

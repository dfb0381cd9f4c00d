"""Other processes to work in: new ones, not copies of this one, for a copy of a process that has used PyTorch's threads may hang."""

import multiprocessing
from multiprocessing.context import BaseContext

NEEDED = ["homelib.data.cohort", "homelib.data.loading"]  # what the workers' work imports


def new_processes() -> BaseContext:
    """Where the system can, copies of one process that has imported all it needs and done nothing else: they start at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context

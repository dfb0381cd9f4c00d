"""One at a time in a folder: a lock that the system lets go of when its process ends, by a crash or a power cut too.

Who holds it is at work there; so what says that it is worked on, while nobody holds its lock, was left. Folders that several machines see need a
file system whose locks hold between them. The file stays where it is: to remove it would let two in.
"""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

KNOWS_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


@contextmanager
def held(path: Path, *, patience: float = 0) -> Iterator[bool]:
    """A lock by its file, whose folder is there: whether it was got, within `patience` seconds, or somebody else has it.
    Where the file system knows none, a warning says so, and it counts as got."""
    lock, got = FileLock(path), True
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        got = False
    except (OSError, NotImplementedError) as error:  # older versions of filelock raise the latter
        if isinstance(error, OSError) and error.errno not in KNOWS_NONE:
            raise
        warnings.warn(f"{path}: the file system knows no locks ({error}); nothing keeps a second process out", stacklevel=3)
    try:
        yield got
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether somebody is at work there just now."""
    if not path.exists():
        return False
    with held(path) as got:
        return not got

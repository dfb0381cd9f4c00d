"""Where things lie: the user's cache, the run folders, and what ships with the workbook; and how a file is written whole."""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder for fetched and prepared data: `$HOMELIB_CACHE`, else the user's cache folder. Created on first use."""
    folder = Path(os.environ.get("HOMELIB_CACHE") or platformdirs.user_cache_dir("homelib")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runs_dir() -> Path:
    """Folder for run folders: `$HOMELIB_RUNS`, else `runs/` below the current folder. Not created here."""
    return Path(os.environ.get("HOMELIB_RUNS") or "runs").expanduser()


def shipped(name: str) -> Path:
    """A folder that ships with the workbook (`"notebooks"`, `"data_manifests"`, `"benchmarks"`): beside the package in a clone, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / name, package / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}/ is neither beside nor inside {package}: install homelib from a clone (`make env`).")


def mark_of(root: str | Path) -> str:
    """A short mark of a folder of the user's, to tell what is kept of it from what is kept of others."""
    place = str(Path(root).expanduser().resolve())
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:12]


_PART = re.compile(r"\.[0-9a-f]{32}\..+")  # what `written_whole` writes to


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto it when all went well, removed when not. So a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}{''.join(path.suffixes[-2:])}")  # no mkstemp: its files can be read by their owner alone
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Remove what a process that was killed has left of `written_whole`. For who holds the folder's lock: it would take another's part from under it."""
    for left in folder.glob(".*"):
        if _PART.fullmatch(left.name):
            left.unlink(missing_ok=True)

"""Prepare all cases of a data set: in parallel, each case by itself, and again only what changed.

A case's file is written beside and renamed, so that whatever kills a run, every finished case stays and a rerun makes the rest, in the same
bytes. A case that cannot be prepared is told and passed over.
"""

import csv
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..locks import held
from ..paths import cache_dir, clear_parts, mark_of, written_whole
from ..progress import bar
from .cache import DAMAGED, CaseFile
from .findings import write_rows
from .manifest import Case, Manifest, load_manifest
from .parallel import Died, over
from .prepare import Preparation, PreparedCase, fingerprint, prepare_into, sha256_of
from .reading import files_of

TOLD = "cases.csv"  # in the folder: what became of every case
SAVED_EVERY_SECONDS = 60  # what is known of the input files: after a kill, no more than what was read since is read again
_MARK = ".prepared"  # in the folder: that it is ours
_STAMPS = ".inputs.json"  # in the folder: sha256 of input files by place, size and time, so that they are not read again


@dataclass(frozen=True)
class Outcome:
    """What became of a case. message: the file or field, what was found, what is expected, and the remedy; of a failed case, or one that deserves a look."""

    case: str
    state: Literal["prepared", "unchanged", "failed"]
    message: str = ""


def prepare_all(cases: Iterable[Case], folder: str | Path, settings: Preparation | None = None, *, workers: int = 1, progress: bool = True) -> list[Outcome]:
    """Prepare cases into a folder, a file each (`case_path`), and tell of them in its `cases.csv`.

    Args:
        cases: of one or more data sets; ids must differ.
        folder: for the files; made if need be. Files of cases that are not asked for stay.
        settings: of the preparation; None is the manifest's spacing, nearest labels, intensities as they are.
        workers: processes; each holds up to four volumes of a case at a time. 1 works in this process.
        progress: show a bar, where there is a terminal, and a line for a case that deserves a look.

    Returns:
        One outcome a case, in the order asked.

    Raises:
        UserError: two cases with one id, a folder that holds something else, or another preparation at work in it.
    """
    cases, folder, settings = list(cases), Path(folder), settings or Preparation()
    ids = [case.id for case in cases]
    if twice := sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []:
        raise UserError(f"cases: found {', '.join(twice[:5])} more than once, expected a name of its own for each case. Rename them.")
    _claim(folder)
    with held(folder / ".lock") as ours:
        if not ours:
            raise UserError(f"{folder}: another preparation is at work there. Wait for it, or choose another folder.")
        clear_parts(folder)
        stamps = _Stamps.load(folder / _STAMPS)
        jobs = [(case, case_path(folder, case.id), settings, stamps.of(case)) for case in cases]
        done: dict[str, Outcome] = {}
        shown, saved = bar(total=len(cases), unit="case", desc="prepare", show=progress), time.monotonic()
        for number, result in over(_one, jobs, workers=workers):
            outcome, read = result if isinstance(result, tuple) else (_unforeseen(cases[number], result), {})
            done[outcome.case] = outcome
            stamps.known |= read
            shown.update()
            if outcome.message and progress:
                shown.write(f"{outcome.case}: {outcome.message}", file=sys.stderr)
            if time.monotonic() - saved > SAVED_EVERY_SECONDS:
                stamps.save(folder / _STAMPS)
                saved = time.monotonic()
        shown.close()
        stamps.save(folder / _STAMPS)
        outcomes = [done[name] for name in ids]
        write_rows(map(asdict, outcomes), ["case", "state", "message"], folder / TOLD)
    return outcomes


def default_folder(manifest: Manifest, root: str | Path) -> Path:
    """Where the prepared cases of one data set's folder are kept, unless a user says otherwise; no other folder's, whatever its manifest's name."""
    return cache_dir() / "prepared" / f"{manifest.name}-{mark_of(root)}"


def open_all(cases: Iterable[Case], folder: str | Path) -> list[PreparedCase]:
    """The prepared cases of a folder, to be read by slices. Raises UserError for one that is not there, or was prepared for another manifest."""
    cases = list(cases)
    manifests = {name: load_manifest(name) for name in {case.manifest for case in cases}}  # once, for thousands of cases
    return [PreparedCase.open(case, case_path(folder, case.id), manifests[case.manifest]) for case in cases]


def failed_in(folder: str | Path) -> set[str]:
    """The cases that the last preparation into a folder failed on, though a file from before may be there; none where there was no preparation."""
    try:
        with (Path(folder) / TOLD).open(newline="", encoding="utf-8") as stream:
            return {row["case"] for row in csv.DictReader(stream) if row["state"] == "failed"}
    except (OSError, ValueError, KeyError):
        return set()


def case_path(folder: str | Path, case_id: str) -> Path:
    """A case's file. An id that is no plain file name is told by as much of it as is plain, and a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", case_id).lstrip(".")[:80]
    if plain == case_id != "":
        return Path(folder) / f"{plain}.zip"
    return Path(folder) / f"{plain}-{sha256(case_id.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}.zip"  # any bytes may be in a file's name


def _claim(folder: Path) -> None:
    """Make the folder, or see that it is one of prepared cases: a file of the user's that has a case's name is never written over."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _MARK).exists():
        if other := next(folder.iterdir(), None):
            raise UserError(f"{folder}: holds {other.name}, expected an empty folder or one of prepared cases. Choose another with --out.")
        (folder / _MARK).write_text("Cases that homelib has prepared. It may replace any file here.\n")


def _one(job: tuple[Case, Path, Preparation, dict[str, str]]) -> tuple[Outcome, dict[str, str]]:
    """Prepare one case unless its file is there and of the same inputs; with the sha256 of the input files that were read for it."""
    case, path, settings, known = job
    stamps = _Stamps(known)
    try:
        told = fingerprint(case, settings, stamps.sha256_of)
        kept = _facts(path)
        healthy = kept.get("counts") == {}  # no voxel of any class, which the manifest may have ceased to allow
        if kept.get("fingerprint") == told and (not healthy or load_manifest(case.manifest).may_be_empty):
            return Outcome(case.id, "unchanged", _remark(case, kept)), stamps.read
        prepare_into(path, case, settings, told=told)
        return Outcome(case.id, "prepared", _remark(case, _facts(path))), stamps.read
    except UserError as error:
        return Outcome(case.id, "failed", str(error)), stamps.read
    except OSError as error:
        what = f"{error.filename or path}: {error.strerror or error}; check that it is there and can be read, and that there is room on the disk."
        return Outcome(case.id, "failed", what), stamps.read


def _unforeseen(case: Case, error: Exception) -> Outcome:
    """A case that failed of what nobody thought of, or whose process ended."""
    if isinstance(error, (MemoryError, Died)):
        return Outcome(case.id, "failed", f"{case.image}: {str(error) or 'no memory left'}; it takes up to four of its volumes. Use fewer workers, or crop it.")
    reason = " ".join(str(error).split())[:200]
    return Outcome(case.id, "failed", f"{case.image}: {type(error).__name__}: {reason}; expected a volume that can be prepared. Check it.")


def _remark(case: Case, facts: dict) -> str:
    return f"{case.label}: {facts['remark']}" if "remark" in facts else ""


def _facts(path: Path) -> dict:
    """Of a prepared case; none where there is no whole file."""
    try:
        return CaseFile.open(path).facts
    except DAMAGED:
        return {}


class _Stamps:
    """sha256 of input files; a file whose size and time of change are as before is not read again. `read` holds those that were. Folders, and headers
    whose voxels lie in other files, are read each time."""

    def __init__(self, known: dict[str, str]):
        self.known = known
        self.read: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> "_Stamps":
        try:
            return cls(json.loads(path.read_text()))
        except (OSError, ValueError):  # none yet, or spoilt: files are read again
            return cls({})

    def of(self, case: Case) -> dict[str, str]:
        """What is known of a case's files, for the process that prepares it."""
        stamps = [_stamp(Path(path)) for path in (case.image, case.label) if path and Path(path).is_file()]
        return {stamp: self.known[stamp] for stamp in stamps if stamp in self.known}

    def sha256_of(self, path: str | Path) -> str:
        path = Path(path)
        if not path.is_file() or files_of(path) != [path]:
            return sha256_of(path)
        stamp = _stamp(path)
        if stamp not in self.known:
            self.known[stamp] = self.read[stamp] = sha256_of(path)
        return self.known[stamp]

    def save(self, path: Path) -> None:
        with written_whole(path) as part:
            part.write_text(json.dumps(self.known, indent=0, sort_keys=True))


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"

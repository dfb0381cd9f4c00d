"""Repaired copies of a data set: what can be mended without a judgement is written anew, everything else is linked to.

The folder that comes out is whole: the same manifest and a new check apply to it. The input is only read: links are made file by file, never of
a folder, so that no path below the copy leads back into it. A file is mended by itself, in processes, and told in `repairs.csv` as soon as it
is there: called again for the same folder and findings, only what is missing is done.
"""

import csv
import hashlib
import io
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..paths import written_whole
from ..progress import bar
from .check import Checked, state
from .examine import Rules, apart_mm, orientation_change, turned
from .findings import printable, write_rows
from .manifest import Case, Manifest
from .parallel import default_workers, over
from .reading import ReadFault, Volume, files_of, has_suffix, read

_WRITABLE = (".nii", ".nii.gz", ".nrrd", ".mha")
_TOLD = "repairs.csv"  # in the copy: every file that was written anew
_MARK = ".copy"  # in the copy: of which data it is, in which state


@dataclass(frozen=True)
class Repair:
    """One file that was written anew, and the checks that it failed before."""

    case: str
    file: str
    mended: str


_COLUMNS = [field.name for field in fields(Repair)]


@dataclass(frozen=True)
class _Job:
    """One file to be mended: its role in a case, where it goes to, and the checks that it failed."""

    case: Case
    role: str
    target: Path
    checks: str

    @property
    def repair(self) -> Repair:
        return Repair(printable(self.case.id), printable(str(self.target)), self.checks)


def fix(checked: Checked, manifest: Manifest, root: str | Path, out: str | Path, *, workers: int | None = 1, progress: bool = False) -> list[Repair]:
    """Write the repaired copy of a checked data set to `out`; `repairs.csv` in it lists what was mended.

    Args:
        checked: what `check` found.
        manifest: of the data set.
        root: its folder; only read.
        out: a new or empty folder, or one that was begun for the same data in the same state, which is then finished.
        workers: processes; None is one a core. 1 works in this process.
        progress: show a bar, where there is a terminal.

    Raises:
        UserError: `out` holds something else, or lies in the data set's folder, or around it; files that could not be mended, when all others are.
    """
    given, root, out = Path(root).expanduser(), Path(root).expanduser().resolve(), fit_for_copies(root, out)
    _claim(out, checked, manifest, root)
    jobs: list[_Job] = []
    links: dict[Path, Path] = {}
    for case in checked.cases:
        wrong: dict[str, list[str]] = {}
        for f in checked.reports[case.id].findings:
            if f.fixable:
                wrong.setdefault(f.file, []).append(f.check)
        for role in ("image", "label"):
            if (file := getattr(case, role)) is None:
                continue
            if str(file) in wrong and has_suffix(file, _WRITABLE):
                jobs.append(_Job(case, role, out / os.path.relpath(file, given), ", ".join(wrong[str(file)])))
            else:
                links |= {out / place: part for part in _parts(file) if not (place := os.path.relpath(part, given)).startswith("..")}
    links |= {out / name: root / name for name in (manifest.split.lists if manifest.split else {}).values() if (root / name).is_file()}
    for job in jobs:
        links.pop(job.target, None)  # a label among an image's slices, say
    for folder in {target.parent for target in [*links, *(job.target for job in jobs)]}:
        _make(folder, out)
    for target, file in links.items():
        _link(file, target)
    repairs, unmended_files = _mend_all(jobs, out, workers, progress)
    if unmended_files:
        told = f"{len(unmended_files)} files could not be mended, {unmended_files[0]} first; all others are"
        raise UserError(f"--fix: {out}: {told}. Mend the cause, and call it again: it goes on from there.")
    return repairs


def unmended(checked: Checked) -> list[str]:
    """Files with faults that could be mended, were they in a format that is written here: no header apart from its voxels, and no folder of masks."""
    return sorted({str(f.file) for f in checked.findings if f.fixable and not has_suffix(f.file, _WRITABLE)})


def fit_for_copies(root: str | Path, out: str | Path) -> Path:
    """The folder for repaired copies, resolved. Raises UserError as `fix`."""
    root, out = Path(root).expanduser().resolve(), Path(out).expanduser().resolve()
    if out == root or root in out.parents or out in root.parents:
        raise UserError(f"--fix: found {out}, expected a folder beside {root}, not in or around it. Choose another one.")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARK).is_file())):
        raise UserError(f"--fix: {out} exists already and is left as it is; expected a new or empty folder. Choose another one.")
    return out


def _claim(out: Path, checked: Checked, manifest: Manifest, root: Path) -> None:
    """Mark the folder as a copy of these data as they are now, or see that it is one."""
    rules = Rules.of(manifest)
    told = [(case.id, state(case, rules), [f.check for f in checked.reports[case.id].findings if f.fixable]) for case in checked.cases]
    mark = hashlib.sha256(f"{root}{told}".encode("utf-8", "surrogateescape")).hexdigest() + "\n"
    if not (out / _MARK).exists():
        with written_whole(out / _MARK) as part:
            part.write_text(mark)
    elif (out / _MARK).read_text() != mark:
        raise UserError(f"--fix: {out} holds a copy of other data, or of these before they changed; it is left as it is. Choose another folder.")


def _parts(file: Path) -> list[Path]:
    """The files that make up an image or a label: of a folder, those right in it, which are all that its readers look at."""
    if not file.is_dir():
        return files_of(file)
    try:
        return [entry for entry in file.iterdir() if not entry.is_dir()]
    except OSError:  # a closed folder: its copy is closed too
        return [file]


def _make(folder: Path, out: Path) -> None:
    """A folder of the copy; never one behind a link that leads out of it."""
    if not folder.resolve().is_relative_to(out):
        raise UserError(f"--fix: {folder} lies behind a link that leads out of {out}; nothing is written there. Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _link(file: Path, target: Path) -> None:
    """A link to an unchanged file; a copy where links cannot be made."""
    if target.is_symlink() or target.exists():
        return  # of an earlier call
    try:
        target.symlink_to(file.absolute())
    except OSError:
        with written_whole(target) as part:
            shutil.copy2(file, part)


def _mend_all(jobs: list[_Job], out: Path, workers: int | None, progress: bool) -> tuple[list[Repair], list[str]]:
    """Mend what an earlier call has not; every repair, and what could not be mended and why."""
    done = _done(out)
    left = [job for job in jobs if job.repair not in done]
    write_rows(map(asdict, sorted(done, key=lambda repair: repair.file)), _COLUMNS, out / _TOLD)
    failed = []
    with (out / _TOLD).open("a", newline="", encoding="utf-8") as told, bar(
        total=len(jobs), initial=len(jobs) - len(left), unit="file", desc="fix", show=progress
    ) as shown:
        for index, result in over(_mend, left, workers=default_workers() if workers is None else workers):
            job = left[index]
            if isinstance(result, Exception):
                failed.append(f"{job.target} ({type(result).__name__}: {' '.join(str(result).split())[:160]})")
            elif result:
                csv.DictWriter(told, _COLUMNS).writerow(asdict(job.repair))
                told.flush()
                done.add(job.repair)
            else:
                _link(getattr(job.case, job.role), job.target)
            shown.update()
    repairs = [job.repair for job in jobs if job.repair in done]
    write_rows(map(asdict, repairs), _COLUMNS, out / _TOLD)
    return repairs, failed


def _done(out: Path) -> set[Repair]:
    """What earlier calls have mended; a row that a killed one cut short is passed over."""
    try:
        whole, _, _ = (out / _TOLD).read_text(encoding="utf-8").rpartition("\n")
    except OSError:
        return set()
    return {Repair(**row) for row in csv.DictReader(io.StringIO(whole, newline="")) if None not in row.values()}


def _mend(job: _Job) -> bool:
    """Whether there was anything to be mended."""
    file = getattr(job.case, job.role)
    mended = _mended_image(read(file)) if job.role == "image" else _mended_label(read(file), _image_of(job.case.image))
    if mended is not None:
        save(mended, job.target)
    return mended is not None


def _image_of(path: Path) -> Volume | None:
    try:
        return read(path)
    except ReadFault:
        return None


def _mended_image(image: Volume) -> Volume | None:
    """The image with numbers throughout, and a plain header; None where there is no number at all."""
    data = image.data
    if data.dtype.kind == "f" and not (finite := np.isfinite(data)).all():
        if not finite.any():
            return None
        data = np.where(finite, data, data[finite].min()).astype(data.dtype)
    return Volume(data, image.affine)


def _mended_label(label: Volume, image: Volume | None) -> Volume:
    """The label on its image's axes where it is less than half a voxel off, and stored as integers where it holds nothing else."""
    from nibabel.orientations import apply_orientation

    data, affine = label.data, label.affine
    if image is not None:
        shape, turned_affine = turned(label, image.affine)
        if shape == image.data.shape and apart_mm(image.affine, turned_affine, shape) <= min(image.spacing_mm) / 2:
            data, affine = apply_orientation(data, orientation_change(label.affine, image.affine)), image.affine
    if data.dtype.kind == "f" and np.isfinite(data).all() and (data == np.rint(data)).all() and 0 <= data.min() and data.max() < 2**16:
        data = data.astype(np.uint8 if data.max() < 2**8 else np.uint16)
    return Volume(data, affine)


def save(volume: Volume, path: Path) -> None:
    """Write a volume as NIfTI, NRRD or MetaImage by the path's suffix; whole or not at all."""
    with written_whole(path) as part:
        if has_suffix(path, (".nii", ".nii.gz")):
            import nibabel

            data = volume.data.astype(np.int32) if volume.data.dtype.name in ("int64", "uint64") else volume.data
            image = nibabel.Nifti1Image(data.astype(np.uint8) if data.dtype == bool else data, volume.affine)
            image.set_sform(volume.affine, code=1)
            image.set_qform(volume.affine, code=1)
            if not np.allclose(image.get_qform(), volume.affine, atol=1e-3):  # a shear, which a qform cannot hold
                image.set_qform(None, code=0)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, part)
        else:
            import SimpleITK as sitk

            of_itk = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.T))
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
            of_itk.SetOrigin(affine[:3, 3].tolist())
            of_itk.SetSpacing(volume.spacing_mm)
            of_itk.SetDirection((affine[:3, :3] / volume.spacing_mm).ravel().tolist())
            sitk.WriteImage(of_itk, str(part), useCompression=True)

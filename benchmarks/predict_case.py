"""What is measured of prediction: a scan from file to file through a network of one product, in a process that does nothing else."""

import time
from pathlib import Path

import torch

from benchmarks.measure import Measured, hand_back_freed_memory, memory_now, memory_peak

GIB = 2**30


class OnePoint(torch.nn.Module):
    """A convolution of 1x1x1 voxels to as many classes as asked, as a product: it holds its output and nothing else, so that the memory that is
    measured is the prediction's."""

    def __init__(self, classes: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, classes).view(1, -1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def predict_scan(*, image: str, classes: int, patch: int, out: str) -> tuple[dict, Measured]:
    """Read, prepare at the scan's own spacing, predict with overlap 0.5, write.

    Detail: GiB of the whole process at its peak, of what was there before (Python and libraries), and of what `home predict` says that it will take.
    """
    from benchmarks.data_cases import SCAN_MM
    from homelib.config import override, preset
    from homelib.data.header import read_header
    from homelib.data.manifest import Case, load_manifest
    from homelib.run import needed
    from homelib.run.predict_all import Ensemble, predict_all

    names = [f"class_{index}" for index in range(1, classes)]
    text = load_manifest("demo_ct").model_copy(update={"name": "many", "classes": {name: (index,) for index, name in enumerate(names, start=1)}})
    manifest = _written(text, Path(out).parent / "many.yaml")
    changes = {"data.manifest": str(manifest), "data.spacing_mm": SCAN_MM, "data.patch_voxels": (patch,) * 3, "model.out_channels": classes}
    settings = override(preset("paper"), changes | {"training.accelerator": "cpu"})
    said = []

    hand_back_freed_memory()  # as of all that is measured
    start, before = time.perf_counter(), memory_now("cpu")
    case = Case("scan", Path(image), None, "CT", "SYNTHETIC", str(manifest))
    (done,) = predict_all([case], Ensemble((OnePoint(classes),), settings, ""), out, progress=False, say=said.append)
    seconds = time.perf_counter() - start
    assert done.state == "predicted", done.message
    shape = tuple(int(n) for n in said[-1].split(": ")[1].split(" ")[0].split("x"))
    stated = needed.predicting(shape, done.shape, settings)
    header = read_header(image)
    detail = {
        "peak_gib": memory_peak("cpu") / GIB,
        "before_gib": before / GIB,
        "buffer_gib": stated["buffer"] / GIB,
        "predicting_gib": sum(stated.values()) / GIB,
        "preparing_gib": sum(needed.preparing(header, needed.prepared_shape(header, SCAN_MM)).values()) / GIB,
        "prepared": shape,
    }
    return {}, Measured(seconds, seconds, seconds, 1, memory_peak("cpu") / 2**20, detail)


def _written(manifest, path: Path) -> Path:
    from homelib.data.manifest import as_yaml

    plain = manifest.model_copy(update={"labels": {}, "contrast_ranges": {}, "split": None, "cases": manifest.cases[:0], "packages": {}})
    text = as_yaml(plain)
    if not plain.layouts:
        text += 'layouts: [{name: files, image: "{case}.nii.gz"}]\n'
    path.write_text(text)
    return path

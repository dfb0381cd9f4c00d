"""What is measured of prediction: a scan from file to file through a network of one convolution, in a process that does nothing else."""

import time
from pathlib import Path

import torch

from benchmarks.measure import Measured, memory_peak


class OneConvolution(torch.nn.Module):
    """As many classes as asked; its own memory is that of a window."""

    def __init__(self, classes: int):
        super().__init__()
        self.convolution = torch.nn.Conv3d(1, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)


def predict_scan(*, image: str, classes: int, patch: int, out: str) -> tuple[dict, Measured]:
    """Read, prepare at the scan's own spacing, predict with overlap 0.5, write. Peak: of the whole process, Python and libraries included."""
    from benchmarks.data_cases import SCAN_MM
    from homelib.config import override, preset
    from homelib.data.manifest import Case, load_manifest
    from homelib.run.predict_all import Ensemble, predict_all
    from homelib.run.sliding import Windows

    names = [f"class_{index}" for index in range(1, classes)]
    text = load_manifest("demo_ct").model_copy(update={"name": "many", "classes": {name: (index,) for index, name in enumerate(names, start=1)}})
    manifest = _written(text, Path(out).parent / "many.yaml")
    changes = {"data.manifest": str(manifest), "data.spacing_mm": SCAN_MM, "data.patch_voxels": (patch,) * 3, "model.out_channels": classes}
    settings = override(preset("paper"), changes | {"training.accelerator": "cpu"})
    shape = []

    def say(line: str) -> None:
        shape[:] = [int(n) for n in line.split(": ")[1].split(" ")[0].split("x")]

    start = time.perf_counter()
    case = Case("scan", Path(image), None, "CT", "SYNTHETIC", str(manifest))
    (done,) = predict_all([case], Ensemble((OneConvolution(classes),), settings, ""), out, progress=False, say=say)
    seconds = time.perf_counter() - start
    assert done.state == "predicted", done.message
    buffer = Windows.over(shape, (patch,) * 3, overlap=settings.prediction.overlap).buffer_bytes(classes)
    detail = {"peak_gib": memory_peak("cpu") / 2**30, "buffer_gib": buffer / 2**30, "prepared": shape}
    return {}, Measured(seconds, seconds, seconds, 1, memory_peak("cpu") / 2**20, detail)


def _written(manifest, path: Path) -> Path:
    from homelib.data.manifest import as_yaml

    plain = manifest.model_copy(update={"labels": {}, "contrast_ranges": {}, "split": None, "cases": manifest.cases[:0], "packages": {}})
    text = as_yaml(plain)
    if not plain.layouts:
        text += 'layouts: [{name: files, image: "{case}.nii.gz"}]\n'
    path.write_text(text)
    return path

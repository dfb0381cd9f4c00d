"""The network as an ONNX graph for windows of the training patch. ONNX has every operator of it but the selective scan, which becomes one of its
Scan nodes a layer (`onnx_scan`): a small graph that is carried out token by token.

Needs the extra `onnx`. A runtime works through the tokens one by one, far slower than the compiled scan here; for programs that take nothing but ONNX.
"""

from pathlib import Path

import torch
from torch import nn

from ..config import Settings
from ..errors import UserError
from ..network.scan import backends

OPSET = 18  # that the exporter works in


def write_onnx(network: nn.Module, settings: Settings, path: Path) -> Path:
    """Write the network for input `image` (1, C, *patch) float32, intensities windowed, to `logits` (1, classes, *patch).

    Raises UserError where the extra `onnx` is not installed.
    """
    try:
        import onnx  # noqa: F401  the exporter's

        from .onnx_scan import selective_scan
    except ImportError as missing:
        raise UserError(f"--to onnx: the package {missing.name} is not installed, expected onnx and onnxscript. pip install 'homelib[onnx]'") from None
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = "numba"  # whose operator is translated
    backends.resolve("numba", "cpu", torch.float32)  # tried now: while the network is traced it could not be
    program = torch.onnx.export(
        network.cpu().eval(),
        (torch.zeros(1, settings.model.in_channels, *settings.data.patch_voxels),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        custom_translation_table={torch.ops.homelib.selective_scan_cpu.default: selective_scan},
        verbose=False,
    )
    program.save(str(path), external_data=False)
    return path

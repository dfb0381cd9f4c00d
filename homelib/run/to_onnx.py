"""The network as an ONNX graph for windows of the training patch. ONNX has every operator of it but the selective scan, which becomes one of its
Scan nodes a layer (`onnx_scan`): a small graph that is carried out token by token.

Needs the extra `onnx`. A runtime works through the tokens one by one, far slower than the compiled scan here; for programs that take nothing but ONNX.
"""

from pathlib import Path

import torch
from torch import nn

from ..config import Settings
from ..errors import UserError
from ..network.mamba import MambaMixer
from ..network.scan import backends

OPSET = 18  # that the exporter works in


def write_onnx(network: nn.Module, settings: Settings, path: Path) -> Path:
    """Write the network for input `image` (1, C, *patch) float32, intensities windowed, to `logits` (1, classes, *patch).

    Raises UserError: the extra `onnx` is not installed, or the network has an operator that the exporter cannot write.
    """
    try:
        import onnx  # noqa: F401  the exporter's

        from .onnx_scan import selective_scan
    except ImportError as missing:
        raise UserError(f"--to onnx: the package {missing.name} is not installed, expected onnx and onnxscript. pip install 'homelib[onnx]'") from None
    for module in network.modules():
        if isinstance(module, MambaMixer):
            module.backend = "numba"  # whose operator is translated
    backends.resolve("numba", "cpu", torch.float32)  # tried now: while the network is traced it could not be
    try:
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
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"--to onnx: {settings.network} cannot be written: {_reason(error)}; expected operators that ONNX has. Take --to bundle or --to hub instead."
        ) from None
    assert program is not None  # None where a file is asked for
    program.save(str(path), external_data=False)
    return path


def _reason(error: BaseException) -> str:
    """What the exporter says at the bottom of its causes, the first line of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}".rstrip(". ")

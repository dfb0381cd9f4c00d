"""homelib: Mamba-HoME for 3D medical image segmentation, in full (NeurIPS 2025, arXiv 2507.06363).

The public names are imported when they are first used: `home --help` need not wait seconds for PyTorch and MONAI.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "config",
    "Settings": "config",
    "UserError": "errors",
    "HoME": "network.home",
    "MambaMixer": "network.mamba",
    "selective_scan": "network.scan",
    "DynamicTanh": "network.unet",
    "GatedSpatialConv": "network.unet",
    "MambaHoME": "network.unet",
    "SegMamba": "network.unet",
    "trace_routing": "study.routing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

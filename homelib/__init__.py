"""homelib: Mamba-HoME for 3D medical image segmentation, in full (NeurIPS 2025, arXiv 2507.06363)."""

from .config import ModelConfig, Settings
from .errors import UserError
from .network.home import HoME
from .network.mamba import MambaMixer
from .network.scan import selective_scan
from .network.unet import DynamicTanh, GatedSpatialConv, MambaHoME, SegMamba

__version__ = "0.1.0"
__all__ = ["DynamicTanh", "GatedSpatialConv", "HoME", "MambaHoME", "MambaMixer", "ModelConfig", "SegMamba", "Settings", "UserError", "selective_scan"]

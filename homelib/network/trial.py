"""Whether a kernel is used in PyTorch's place on a device: where it is made for that device, can be used, and agrees with PyTorch on a tiny case."""

from collections.abc import Callable

import torch

TOLERANCE = 1e-4  # of the largest number


def tried(kernel: str, device: str, devices: tuple[str, ...], difference: Callable[[str], float]) -> str:
    """The kernel's name where it works, else "PyTorch", and why in brackets.

    Args:
        kernel: its name.
        device: to try it on, as "cuda:1".
        devices: kinds that it is made for, as ("cuda",).
        difference: runs both on a device; their largest difference over the largest number, NaN where there is one. Whatever it raises is a reason.
    """
    if torch.device(device).type not in devices:
        return f"PyTorch ({kernel} needs a {' or '.join(devices)} device)"
    try:
        error = difference(device)
    except Exception as fault:  # a package built for another CUDA, a compiler or a driver raises anything
        return f"PyTorch ({kernel} cannot be used: {type(fault).__name__}: {(str(fault).splitlines() or [''])[0]})"
    return kernel if error <= TOLERANCE else f"PyTorch ({kernel} differs from it by {error:.1e} of the largest number on a small case)"

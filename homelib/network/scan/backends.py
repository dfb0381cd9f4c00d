"""Which backends there are, whether each of them works on a device, and which one "auto" means: all of the choice is made here.

A backend works when its module imports, it is made for the device, and it agrees with the plain loop on a tiny case, in value and in every
gradient. That is tried once a process and device, before its first use; one that fails is refused with its reason, never used in silence.
"""

import contextlib
import difflib
import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import UserError
from . import reference

MODULES = {"reference": "reference", "blocked": "blocked", "numba": "numba_cpu", "triton": "triton_gpu", "mamba_ssm": "mamba_ssm_gpu"}
LOADED: dict[str, ModuleType] = {}
AUTOMATIC = {"cpu": ("numba",), "cuda": ("triton", "mamba_ssm")}  # the fastest of those that work; "blocked" where none does
MARGIN = 1.2  # the first is left only for one that is so many times as fast: what "auto" means must not change from call to call
TOLERANCE = 1e-4  # of the largest number
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether a backend works on a device, and why not."""

    works: bool
    reason: str = "works"


def backend(name: str) -> ModuleType:
    """The backend's module: `scan`, the `DEVICES` it is made for (None: any), and whether it takes `FLOAT64`."""
    if name not in LOADED:
        LOADED[name] = importlib.import_module(f".{MODULES[known(name)]}", __package__)
    return LOADED[name]


def known(name: str) -> str:
    """The name itself. Raises UserError where no backend bears it."""
    if name not in ("auto", *MODULES):
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"backend: found {name!r}, expected 'auto' or one of {', '.join(map(repr, MODULES))}.{hint}")
    return name


@torch.compiler.assume_constant_result
def resolve(name: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that is used when `name` is asked for, on a device ("cuda:1") and for a type. It is in `LOADED` then.

    Raises:
        UserError: a backend that does not work here, with the reason.
    """
    if known(name) == "auto":
        name = automatic(device) if dtype != torch.float64 else "blocked"
        backend(name)
        return name
    found = health(name, device)
    if not found.works:
        raise UserError(f"backend: found {name!r} on {device}, where it cannot be used: {found.reason}. Take 'auto' or 'blocked'.")
    if dtype == torch.float64 and not backend(name).FLOAT64:
        raise UserError(f"backend: found {name!r} for {dtype}, expected float32, float16 or bfloat16: its state is float32. Take 'auto' or 'blocked'.")
    return name


@functools.cache
def automatic(device: str) -> str:
    """What "auto" means on a device, told to the log once."""
    candidates = AUTOMATIC.get(torch.device(device).type, ())
    working = [name for name in candidates if health(name, device).works]
    chosen = _fastest(tuple(working), device) if working else "blocked"
    refused = [f"{name}: {health(name, device).reason}" for name in candidates if name not in working]
    tell = log.warning if candidates and not working else log.info
    tell("selective scan on %s: %s%s", device, chosen, f" ({'; '.join(refused)})" if refused else "")
    return chosen


def report(device: str) -> dict[str, str]:
    """Every backend on a device, for `home doctor`: chosen, working, or why not."""
    chosen = automatic(device)
    seconds = _race(device) if chosen in AUTOMATIC.get(torch.device(device).type, ()) else {}
    lines = {}
    for name in MODULES:
        time_told = f", {seconds[name] * 1e3:.1f} ms forward and backward" if len(seconds) > 1 and name in seconds else ""
        lines[name] = ("chosen by auto" if name == chosen else health(name, device).reason) + time_told
    return lines


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves outside whatever the caller is doing: autocast, inference, tracing, counting of operations, checkpointing (whose hooks would take the
    tensors that are saved here for the caller's, and miss them when it computes again)."""
    with contextlib.ExitStack() as stack:
        own = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        for quiet in (_disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), own):
            stack.enter_context(quiet)
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@functools.cache
@undisturbed()
def health(name: str, device: str) -> Health:
    """Import a backend and compare it with the plain loop on the device."""
    try:
        module = backend(name)
    except Exception as error:  # a package built for another CUDA raises anything
        return Health(False, f"cannot be imported: {_first_line(error)}")
    if module.DEVICES is not None and torch.device(device).type not in module.DEVICES:
        return Health(False, f"needs a {' or '.join(module.DEVICES)} device")
    if module is reference:
        return Health(True)
    try:
        return _parity(module.scan, device)
    except Exception as error:  # whatever a compiler or a driver raises
        return Health(False, f"fails on a small case: {_first_line(error)}")


def _parity(scan: Callable[..., Tensor], device: str) -> Health:
    found, expected = (_results(f, _tiny_case(device)) for f in (scan, reference.scan))
    for name in expected:
        error = ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        if not error <= TOLERANCE:  # NaN, too
            return Health(False, f"{name} of a small case differs from the plain loop's by {error:.1e} of the largest number, {TOLERANCE:.0e} is allowed")
    return Health(True)


def _results(scan: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient, for one fixed direction."""
    given = {name: t.requires_grad_() for name, t in given.items()}
    y = scan(*given.values(), True)
    gradients = torch.autograd.grad(y, list(given.values()), torch.sin(torch.arange(y.numel(), device=y.device)).view_as(y))
    return {"y": y.detach()} | {f"the gradient of {name}": g for name, g in zip(given, gradients, strict=True)}


def _tiny_case(device: str) -> dict[str, Tensor]:
    """Odd sizes, more than one chunk or tile of every backend."""
    return _case(device, batch=2, channels=5, tokens=150, state=4)


def _case(device: str, *, batch: int, channels: int, tokens: int, state: int) -> dict[str, Tensor]:
    """Arguments of a scan, fixed by a seed. The global random state stays as it is."""
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(batch, channels, tokens, generator=generator) for _ in range(3))
    B, C = (torch.randn(batch, state, tokens, generator=generator) for _ in range(2))
    A = -torch.rand(channels, state, generator=generator) - 0.5
    D, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    return {name: t.to(device) for name, t in given.items()}


def _fastest(names: tuple[str, ...], device: str) -> str:
    if len(names) == 1:
        return names[0]
    seconds = _race(device)
    best = min(names, key=seconds.__getitem__)
    return best if seconds[names[0]] > MARGIN * seconds[best] else names[0]


@functools.cache
@undisturbed()
def _race(device: str) -> dict[str, float]:
    """Seconds of forward and backward at a size of practice, of each automatic backend that works; the median of three."""
    working = [name for name in AUTOMATIC[torch.device(device).type] if health(name, device).works]
    if len(working) < 2:
        return {}
    given, seconds = _case(device, batch=1, channels=96, tokens=32_768, state=16), {}
    for name in working:
        times = []
        for _ in range(4):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            _results(backend(name).scan, given)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds[name] = sorted(times[1:])[1]
    return seconds


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

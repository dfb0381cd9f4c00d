"""What is measured: a case a process (`python -m benchmarks.cases '{"kind": "scan", ...}'`), told on standard output as JSON; or several in turn
(`'{"kind": "home", ..., "in_turn": {"stacked": {"looped": false}, "loop": {"looped": true}}}'`): what is asked of all, and by name what differs.

Each kind is a function that makes ready what it is told, and returns details and what to time.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module

import torch
from torch import nn

from benchmarks import bare, peers
from benchmarks.measure import measure_in_turn, synchronize
from homelib.errors import UserError


def scan_inputs(*, batch: int, channels: int, tokens: int, state: int, device: str, backward: bool, dtype: str = "float32") -> list[torch.Tensor]:
    """Arguments of a scan as a Mamba layer makes them at its start: steps of 0.001 to 0.1, A from -1 to -N."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    u, z, delta = (torch.randn(batch, channels, tokens, device=device, dtype=kind) for _ in range(3))
    B, C = (torch.randn(batch, state, tokens, device=device, dtype=kind) for _ in range(2))
    A = -torch.arange(1.0, state + 1, device=device).repeat(channels, 1)
    D, bias = torch.ones(channels, device=device), torch.empty(channels, device=device).uniform_(-6.9, -2.3)
    return [t.requires_grad_(backward) for t in (u, delta, A, B, C, D, z, bias)]


Ready = tuple[dict, Callable[[], dict | None]]


def scan(*, peer: str, backward: bool, device: str = "cpu", **sizes) -> Ready:
    function = peers.SCANS[peer]()
    given = scan_inputs(device=device, backward=backward, **sizes)
    small = [t.detach()[..., :200].clone() if t.dim() == 3 else t.detach() for t in given]
    expected = peers.homelib("reference")(*small)
    error = ((function(*small) - expected).abs().max() / expected.abs().max()).item()
    direction = torch.randn_like(given[0])

    def run():
        if not backward:
            with torch.no_grad():
                function(*given)
        else:
            torch.autograd.grad(function(*given), given, direction)

    return {"error": error}, run


def home(*, stage: int, tokens: int, looped: bool, backward: bool, batch: int = 1, device: str = "cpu", dtype: str = "float32") -> Ready:
    """The HoME layer of a stage of the paper's network, with stacked experts or with a loop over them."""
    from homelib import HoME, ModelConfig

    config, i = ModelConfig(), stage - 1
    torch.manual_seed(0)
    layer = HoME(
        config.channels[i],
        group_size=config.group_size[i],
        experts_local=config.experts_local[i],
        slots_per_expert=config.slots_per_expert,
        experts_global=config.experts_global[i],
    ).to(device, getattr(torch, dtype))
    x = torch.randn(batch, tokens, config.channels[i], device=device, dtype=getattr(torch, dtype), requires_grad=backward)
    direction = torch.randn_like(x)

    def run():
        with experts(looped):
            if backward:
                torch.autograd.grad(layer(x), [x, *layer.parameters()], direction)
            else:
                with torch.no_grad():
                    layer(x)

    with torch.no_grad():
        stacked = layer(x)
        with experts(looped):
            error = ((layer(x) - stacked).abs().max() / stacked.abs().max()).item()
    return {"error": error}, run


@contextmanager
def experts(looped: bool):
    """HoME's experts in a loop, within."""
    from homelib.network.home import Experts

    stacked = Experts.forward
    Experts.forward = experts_in_a_loop if looped else stacked
    try:
        yield
    finally:
        Experts.forward = stacked


@contextmanager
def recipe(published: bool):
    """The layers as the authors' code has them, within: experts in a loop, PyTorch's instance norm."""
    from homelib.network.layers import InstanceNorm

    ours = InstanceNorm.forward
    InstanceNorm.forward = nn.InstanceNorm3d.forward if published else ours
    try:
        with experts(published):
            yield
    finally:
        InstanceNorm.forward = ours


def experts_in_a_loop(self, x: torch.Tensor) -> torch.Tensor:
    """`Experts.forward`, one expert after the other, as the released code does it."""
    outputs = []
    for e in range(x.shape[0]):
        h = nn.functional.linear(x[e], self.weight_in[e], self.bias_in[e])
        if self.glu:
            h, gate = h.chunk(2, dim=-1)
            h = h * nn.functional.gelu(gate)
        else:
            h = nn.functional.gelu(h)
        outputs.append(nn.functional.linear(h, self.weight_out[e], self.bias_out[e]))
    return torch.stack(outputs)


def conv(*, channels: int, tokens: int, naive: bool, backward: bool, batch: int = 1, device: str = "cpu") -> Ready:
    """The convolution of a Mamba layer over half of its projection (B, L, 2 D), as the layer has it."""
    from homelib.network.causal_conv import causal_conv

    torch.manual_seed(0)
    projection = torch.randn(batch, tokens, 2 * channels, device=device)
    layer = nn.Conv1d(channels, channels, 4, groups=channels, padding=3).to(device)
    given = [projection[..., :channels].mT.detach().requires_grad_(backward), layer.weight, layer.bias]

    def plain(*given):
        return nn.functional.silu(nn.functional.conv1d(*given, padding=3, groups=channels)[..., :tokens])

    direction = torch.randn(batch, channels, tokens, device=device)

    forward = plain if naive else causal_conv

    def run():
        if backward:
            torch.autograd.grad(forward(*given), given, direction)
        else:
            with torch.no_grad():
                forward(*given)

    return {}, run


def network(
    *, which: str, size: int, backend: str = "auto", channels_last: bool = False, width: int = 48, classes: int = 3, device: str = "cpu",
    dtype: str = "float32", parts: bool = False,
) -> Ready:  # fmt: skip
    """A forward pass of a cube. `width`: channels of the first stage, 48 in the paper. bfloat16 is by autocast."""
    model = build(which, backend=backend, width=width, classes=classes, device=device).eval()
    x = torch.randn(1, 1, size, size, size, device=device)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)
    seconds: dict[str, float] = {}

    def run():
        half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.no_grad(), half, timed_parts(seconds, device) if parts else _nothing():
            model(x)
        return dict(seconds)

    return {"parameters": sum(p.numel() for p in model.parameters())}, run


def step(
    *, which: str, size: int, batch: int, dtype: str, published: bool = False, backend: str = "auto", channels_last: bool = False,
    checkpointing: bool = False, width: int = 48, classes: int = 3, device: str = "cpu",
) -> Ready:  # fmt: skip
    """A training step: forward, Dice + cross-entropy, backward, AdamW. On a GPU with the most memory that the process held: weights, their gradients and
    the optimiser's state among it, which are there before a step is measured."""
    from homelib.run.loss import segmentation_loss

    model = build(which, backend=backend, width=width, classes=classes, device=device)
    if checkpointing:
        model.set_checkpointing(True)
    x = torch.randn(batch, 1, size, size, size, device=device)
    y = torch.randint(0, classes, x.shape, device=device)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)

    def run():
        with recipe(published):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(x)
            loss = segmentation_loss(logits, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        held = {} if device == "cpu" else {"held_mib": torch.cuda.max_memory_allocated(device) / 2**20}
        return {"loss": loss.item()} | held

    return {}, run


def block(
    *, stage: int, tokens: int, compiled: bool, backward: bool, batch: int = 1, dtype: str = "float32", device: str = "cpu", compiler: str = "inductor"
) -> Ready:
    """A layer of a stage of the paper's network, Mamba and HoME, as it is or through `torch.compile`; and the seconds of its first calls at this length,
    at half of it and at a third of it, in which the compiler works."""
    from homelib import ModelConfig
    from homelib.network.parts import home_of, mixer_of
    from homelib.network.unet import Block

    torch.manual_seed(0)
    config = ModelConfig()
    layer = Block(config.channels[stage - 1], mixer_of(config, stage - 1), home_of(config, stage - 1)).to(device)
    called = torch.compile(layer, backend=compiler) if compiled else layer
    x = torch.randn(batch, tokens, config.channels[stage - 1], device=device, requires_grad=backward)

    def run(x=x):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"), torch.set_grad_enabled(backward):
            y = called(x, (x.shape[1], 1, 1))
        if backward:
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    first = {}
    for told, length in (("this length", tokens), ("half of it", tokens // 2), ("a third of it", tokens // 3)):
        given = x[:, :length].detach().requires_grad_(backward)
        synchronize(device)
        start = time.perf_counter()
        run(given)
        synchronize(device)
        first[told] = time.perf_counter() - start
    return {"first calls": first}, run


def prediction(*, size: int, patch: int, width: int = 48, classes: int = 3, dtype: str = "float32", device: str = "cpu") -> Ready:
    """Labels of a cube by sliding windows that overlap by half, blended, as `home predict` makes them, from memory to memory."""
    import numpy as np

    from homelib.config import PredictionConfig
    from homelib.run.sliding import Windows, finished_rows

    model = build("MambaHoME", backend="auto", width=width, classes=classes, device=device).eval()
    image = np.random.default_rng(0).standard_normal((size,) * 3, np.float32)
    windows = Windows.over(image.shape, (patch,) * 3, overlap=0.5)
    given = {"prepare": lambda x: x, "beyond": 0.0, "device": torch.device(device), "finish": lambda blended: blended.argmax(0).to(torch.uint8).cpu()}

    def run():
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            rows = sum(labels.shape[0] for _, labels in finished_rows([model], image, windows, PredictionConfig(), **given))
        assert rows == size
        return {"windows": windows.count}

    return {}, run


def build(which: str, *, backend: str, width: int = 48, classes: int = 3, device: str = "cpu") -> nn.Module:
    from homelib import MambaHoME, ModelConfig, SegMamba

    torch.manual_seed(0)
    ours = {"MambaHoME": MambaHoME, "SegMamba": SegMamba}
    channels = tuple(width * 2**i for i in range(4))
    with torch.device(device):  # random weights made there: of 170 million numbers that takes a GPU no time
        if which in ours:
            return ours[which](ModelConfig(out_channels=classes, channels=channels, hidden_channels=2 * channels[-1], scan_backend=backend))
        return peers.networks(classes)[which]()


@contextmanager
def timed_parts(seconds: dict[str, float], device: str):
    """Seconds of scan, HoME and convolutions (normalisation and activation are the rest) within one forward pass."""
    from homelib.network import home, layers, mamba

    seconds.clear()
    totals, within = defaultdict(float), []

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*arguments, **keywords):
            if within:  # one part calls another
                return function(*arguments, **keywords)
            within.append(name)
            synchronize(device)
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            synchronize(device)
            totals[within.pop()] += time.perf_counter() - start
            return result

        return wrapper

    places = [
        (mamba, "selective_scan", "scan"), (home.HoME, "forward", "HoME"), (nn.Conv3d, "forward", "convolutions"),
        (nn.ConvTranspose3d, "forward", "convolutions"), (layers.PointwiseConv, "forward", "convolutions"),
        (layers.InstanceNorm, "forward", "instance norm"),
    ]  # fmt: skip
    before = [getattr(place, name) for place, name, _ in places]
    for (place, name, part), function in zip(places, before, strict=True):
        setattr(place, name, timed(part, function))
    start = time.perf_counter()
    try:
        yield
    finally:
        for (place, name, _), function in zip(places, before, strict=True):
            setattr(place, name, function)
        whole = time.perf_counter() - start
        seconds.update(totals | {"rest": whole - sum(totals.values())})


@contextmanager
def _nothing():
    yield


KINDS: dict[str, Callable[..., Ready]] = {
    "scan": scan, "conv": conv, "home": home, "network": network, "step": step, "block": block, "prediction": prediction,
}  # fmt: skip
NOT_HERE = (ImportError, UserError, torch.cuda.OutOfMemoryError)  # what is skipped with its reason: not installed, made for another device, too large
MEASURE_THEMSELVES = {  # kind: its module, imported where it is asked for: these need all of homelib, the others little more than torch
    **dict.fromkeys(("prepare", "data_set", "patches"), "data_cases"),
    **dict.fromkeys(("loop", "loading"), "training_cases"),
    "predict_scan": "predict_case",
}
IN_TURN = {"tracing": ("tracing", "steps")}  # kind: module and function of those that measure several things by turns


def measured(case: dict) -> dict:
    """What a process is told, as it tells it: time and memory of its case, or by name of its cases in turn."""
    if case["kind"] in IN_TURN:
        module, function = IN_TURN[case.pop("kind")]
        return {name: asdict(found) for name, found in getattr(import_module(f"benchmarks.{module}"), function)(**case).items()}
    if case["kind"] in MEASURE_THEMSELVES:
        kind = case.pop("kind")
        detail, found = getattr(import_module(f"benchmarks.{MEASURE_THEMSELVES[kind]}"), kind)(**case)
        return asdict(found) | {"detail": found.detail | detail}
    in_turn, kind = case.pop("in_turn", {"": {}}), KINDS[case.pop("kind")]
    how = {"runs": case.pop("runs", 5), "warm_up": case.pop("warm_up", 1) - 1, "device": case.get("device", "cpu")}
    ready, results = {}, {}
    for name, differs in in_turn.items():
        try:
            detail, run = kind(**case | differs)
            run()  # the first to warm up: what cannot be had, or does not fit, shows here
            ready[name] = detail, run
        except Exception as error:  # of one beside others, which go on without it
            if not name:
                raise
            results[name] = skipped(error)
    found = measure_in_turn({name: run for name, (_, run) in ready.items()}, **how)
    results |= {name: asdict(result) | {"detail": result.detail | ready[name][0]} for name, result in found.items()}
    return results.get("", results)


def skipped(error: Exception) -> dict:
    return {"skipped": f"{type(error).__name__}: {(str(error).splitlines() or ['no word'])[0]}"}


def main() -> None:
    bare.ready()
    try:
        print(json.dumps(measured(json.loads(sys.argv[1]))))
    except NOT_HERE as error:
        print(json.dumps(skipped(error)))


if __name__ == "__main__":
    main()

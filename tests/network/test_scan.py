"""The selective scan: a case by hand, every fast backend against the plain loop in value and each gradient, memory, errors."""

import logging
import math
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homelib import UserError, selective_scan
from homelib.network.scan import backends, blocked, numba_cpu, reference
from homelib.network.scan.backends import MODULES, health, resolve

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def inputs(batch=2, channels=3, tokens=40, state=4, *, without=(), dtype=torch.float64, delta_scale=1.0, seed=0):
    """Random arguments by name, with gradients. A is negative, as in Mamba."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (batch, channels, tokens), "delta": (batch, channels, tokens), "A": (channels, state), "B": (batch, state, tokens),
        "C": (batch, state, tokens), "D": (channels,), "z": (batch, channels, tokens), "delta_bias": (channels,),
    }  # fmt: skip
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items() if name not in without}
    given["A"] = -given["A"].exp()
    given["delta"] *= delta_scale
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}


def scan_and_gradients(given, backend, *, softplus=True):
    """y, and the gradient of each argument for one fixed random direction."""
    y = selective_scan(**given, delta_softplus=softplus, backend=backend)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, list(given.values()), direction)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(given, gradients, strict=True)}


def cast(given, dtype):
    return {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}


def assert_agree(ours, oracle, tolerance):
    """Every result within `tolerance` of the oracle's largest number."""
    assert ours.keys() == oracle.keys()
    for name in oracle:
        error = (ours[name] - oracle[name]).abs().max() / oracle[name].abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def triton_as_python(monkeypatch):
    """Triton's kernels, run as Python in chunks of 16 tokens. Its own loop over single numbers in `associative_scan` is replaced by one over
    slices, a hundred times as fast; what a kernel combines, and how, stays its own."""
    if not backends_on_cpu("triton"):
        pytest.skip(f"triton on a CPU: {health('triton', 'cpu').reason}")
    from triton.runtime.interpreter import ScanOps

    from homelib.network.scan import triton_gpu

    def scan_by_slices(self, given):
        slices = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in given]
        taken = [tuple(self.to_tensor(s[i].copy(), tensor.dtype) for s, tensor in zip(slices, given, strict=True)) for i in range(len(slices[0]))]
        done = taken[:1]
        for values in taken[1:]:
            combined = self.combine_fn.fn(*done[-1], *values)
            done.append(combined if isinstance(combined, tuple) else (combined,))
        stacked = [np.stack([values[i].handle.data for values in done]) for i in range(len(given))]
        return [self.to_tensor(np.moveaxis(s, 0, self.axis), tensor.dtype) for s, tensor in zip(stacked, given, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", scan_by_slices)
    monkeypatch.setattr(triton_gpu, "TOKENS", 16)


def backends_on_cpu(*names):
    return [name for name in names or MODULES if health(name, "cpu").works]


@pytest.fixture(params=["blocked, 16 tokens a block", "blocked", "numba", "triton"])
def fast(request, monkeypatch):
    """A check of float64 arguments: the backend, in its own precision, against the loop in float64."""
    backend = request.param.split(",")[0]
    assert backend in MODULES
    if "16" in request.param:  # else these small cases would fit into one block
        monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", 1)
    if backend == "triton":
        request.getfixturevalue("triton_as_python")
    dtype, tolerance = (torch.float64, 1e-11) if backend == "blocked" else (torch.float32, 2e-5)

    def check(given, *, softplus=True):
        tokens, states = given["u"].shape[-1], given["A"].shape[-1]
        if backend == "triton" and (tokens > 300 or tokens * states > 1_100):
            pytest.skip("Triton's kernels run as Python are too slow for so many tokens and states")
        if backend == "triton" and (tokens > 100 or tokens * states > 600) and "HOMELIB_TEST_LONG" not in os.environ:
            pytest.skip("takes long, on demand alone: HOMELIB_TEST_LONG=1")
        ours = scan_and_gradients(cast(given, dtype) if dtype != torch.float64 else given, backend, softplus=softplus)
        assert all(torch.isfinite(tensor).all() for tensor in ours.values())
        assert_agree(ours, scan_and_gradients(given, "reference", softplus=softplus), tolerance)

    check.backend = backend
    return check


def test_every_backend_is_tested_here():
    assert set(MODULES) == {"reference", "blocked", "numba", "triton", "mamba_ssm"}
    assert {"reference", "blocked", "numba"} <= set(backends_on_cpu())


@pytest.mark.parametrize("backend", ["reference", "blocked", "numba"])
def test_three_tokens_by_hand(backend):
    """exp(delta A) is 2^-delta for the first state and 1 for the second. delta u = 1, 2, 6.

    First state: 1, 1/2 + 2*2 = 4.5, 4.5/4 + 6 = 7.125, read by C = 1, 1, 2. Second: 1, 3, 9, read by 0, 1, 0. Then D u = 0.5, 1, 1.5.
    """
    u, delta = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0, 2.0]]])
    A = torch.tensor([[-math.log(2), 0.0]])
    B, C = torch.tensor([[[1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 1.0, 2.0], [0.0, 1.0, 0.0]]])
    y = selective_scan(u, delta, A, B, C, torch.tensor([0.5]), backend=backend)
    torch.testing.assert_close(y, torch.tensor([[[1.5, 8.5, 15.75]]]))

    z = torch.tensor([[[0.0, 1.0, -1.0]]])  # silu: 0, 1 / (1 + 1/e), -1 / (1 + e)
    gated = selective_scan(u, delta, A, B, C, torch.tensor([0.5]), z=z, backend=backend)
    torch.testing.assert_close(gated, torch.tensor([[[0.0, 8.5 / (1 + math.exp(-1)), -15.75 / (1 + math.e)]]]))

    raw = torch.log(torch.expm1(delta)) - 0.25  # softplus(raw + 0.25) = delta
    again = selective_scan(u, raw, A, B, C, torch.tensor([0.5]), delta_bias=torch.tensor([0.25]), delta_softplus=True, backend=backend)
    torch.testing.assert_close(again, y)


@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 255, 1000])
@pytest.mark.parametrize("state", [1, 8, 16, 64])
def test_agrees_with_the_loop(tokens, state, fast):
    fast(inputs(tokens=tokens, state=state))


@pytest.mark.parametrize("without", [("z",), ("D",), ("delta_bias",), ("z", "D", "delta_bias")], ids=" ".join)
def test_agrees_without_what_is_optional(without, fast):
    fast(inputs(without=without))


@pytest.mark.parametrize("softplus", [True, False])
def test_agrees_for_steps_so_large_that_the_state_forgets_all(softplus, fast):
    given = inputs(tokens=100, delta_scale=200.0)
    if not softplus:
        given["delta"] = given["delta"].detach().abs().requires_grad_()
    fast(given, softplus=softplus)


@pytest.mark.parametrize("shape", [(1, 1, 65, 16), (1, 7, 100, 5), (3, 1, 100, 3), (1, 33, 40, 4), (2, 70, 20, 3)], ids=str)
def test_agrees_for_few_and_odd_channels(shape, fast):
    fast(inputs(*shape))


def test_agrees_on_views_with_any_strides(fast):
    views = {name: t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t for name, t in inputs(tokens=50).items()}
    assert not views["u"].is_contiguous()
    fast(views)


def test_agrees_for_a_gradient_that_is_one_number_in_memory(fast):
    given = inputs(tokens=70, without=("z", "D"))
    dtype = torch.float64 if fast.backend == "blocked" else torch.float32
    ours, oracle = cast(given, dtype), given
    for arguments, backend in ((ours, fast.backend), (oracle, "reference")):
        selective_scan(**arguments, delta_softplus=True, backend=backend).sum().backward()
    for name in given:
        torch.testing.assert_close(ours[name].grad.double(), oracle[name].grad, rtol=1e-4, atol=1e-4)


def test_blocked_agrees_in_float32(monkeypatch):
    monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", 1)
    given = inputs(tokens=500, state=16, dtype=torch.float32)
    assert_agree(scan_and_gradients(given, "blocked"), scan_and_gradients(given, "reference"), 1e-5)


@pytest.mark.parametrize("in_float32", [("A", "D", "delta_bias"), ()], ids=["as the mixer hands them over", "all bfloat16"])
def test_bfloat16_in_and_out_and_float32_between(in_float32, fast):
    """Both backends compute in float32, so they agree far better than bfloat16 could (0.4 % a step), but for the last place, which may be rounded otherwise."""
    given = inputs(tokens=250, dtype=torch.bfloat16, without=() if in_float32 else ("delta_bias",))
    given = {name: (t.detach().float() if name in in_float32 else t.detach()).requires_grad_() for name, t in given.items()}
    ours, oracle = scan_and_gradients(given, fast.backend), scan_and_gradients(given, "reference")
    assert ours["y"].dtype == torch.bfloat16
    assert all(ours[f"d{name}"].dtype == t.dtype for name, t in given.items())
    assert_agree(ours, oracle, 2**-7)
    exact = scan_and_gradients(cast(given, torch.float64), "reference")
    for name in exact:
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2**-7, f"{name}: {error:.1e}"


def test_the_same_call_gives_the_same_bits(fast):
    given = cast(inputs(channels=9, tokens=70 if fast.backend == "triton" else 200, state=5), torch.float32)  # as Python it takes 16 at a time
    first, again = scan_and_gradients(given, fast.backend), scan_and_gradients(given, fast.backend)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", ["reference", "blocked", "numba"])
def test_autocast_leaves_the_recurrence_in_float32(backend):
    given = inputs(tokens=200, dtype=torch.float32)
    plain = selective_scan(**given, delta_softplus=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**given, delta_softplus=True, backend=backend), plain)


@pytest.mark.parametrize("backend", ["reference", "blocked"])  # those that take float64
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 5, 3), (1, 2, 18, 2)], ids=str)
def test_gradients_are_those_of_finite_differences(backend, shape, monkeypatch):
    monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", 1)
    given = inputs(*shape)

    def scan(*tensors):
        return selective_scan(**dict(zip(given, tensors, strict=True)), delta_softplus=True, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(given.values()))


@settings(max_examples=40, deadline=None, derandomize=True)  # always the same: a gradient that happens to cancel has no relative error
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 5), tokens=st.integers(1, 70), state=st.integers(1, 9),
    numbers=st.sampled_from([1, 500, 2**18]), seed=st.integers(0, 99),
)  # fmt: skip
def test_agrees_for_any_shape_and_block(batch, channels, tokens, state, numbers, seed):
    given = inputs(batch, channels, tokens, state, seed=seed)
    oracle = scan_and_gradients(given, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocked.BLOCK_NUMBERS, "cpu", numbers)
        assert_agree(scan_and_gradients(given, "blocked"), oracle, 1e-11)
    assert_agree(scan_and_gradients(cast(given, torch.float32), "numba"), oracle, 1e-4)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 2), channels=st.integers(1, 18), tokens=st.integers(1, 34), state=st.integers(1, 2), seed=st.integers(0, 99))
def test_triton_agrees_for_any_shape(batch, channels, tokens, state, seed, triton_as_python):
    """Few and small ones: the kernels run as Python. 16 tokens a chunk and 16 channels a program, so that some fill several and some not one."""
    given = inputs(batch, channels, tokens, state, seed=seed)
    assert_agree(scan_and_gradients(cast(given, torch.float32), "triton"), scan_and_gradients(given, "reference"), 1e-4)


def test_the_result_does_not_depend_on_the_block(monkeypatch):
    given = inputs(tokens=1000, state=8)
    results = []
    for numbers in (1, 5000, 2**18):
        monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", numbers)
        results.append(scan_and_gradients(given, "blocked"))
    layouts = {blocked.block_layout("cpu", 2, 3, 8)}
    assert_agree(results[0], results[2], 1e-12)
    assert_agree(results[1], results[2], 1e-12)
    assert layouts == {(64, 64)}


@pytest.mark.parametrize("numbers", [1, 100, 2**18])
def test_a_block_is_no_larger_than_asked(numbers, monkeypatch):
    monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", numbers)
    for channels in (1, 7, 96, 5000):
        steps, runs = blocked.block_layout("cpu", 2, channels, 16)
        assert 1 <= steps * runs <= max(16, numbers // (2 * channels * 16))


class PeakNumbers(TorchDispatchMode):
    """The most numbers that lived at one time in tensors made under this mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // tensor.element_size()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(numbers for _, numbers in self.alive.values()))
        return out


def test_training_never_holds_all_states(monkeypatch):
    """The states of all tokens are B D L N numbers; forward and backward together hold less than half of that at any time (measured 0.37)."""
    channels, tokens, state = 32, 2048, 64
    all_states = channels * tokens * state
    given = inputs(1, channels, tokens, state, dtype=torch.float32, without=("z", "D", "delta_bias"))

    def peak(numbers: int) -> int:
        monkeypatch.setitem(blocked.BLOCK_NUMBERS, "cpu", numbers)
        with PeakNumbers() as mode:
            scan_and_gradients(given, "blocked")
        return mode.peak

    assert peak(2**14) < all_states / 2
    assert peak(2**30) > all_states  # one block: the count above sees what there is to see


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_names_the_argument(name):
    given = inputs()
    given[name] = torch.zeros(2, 3, 39, 1) if name == "u" else torch.zeros(*given[name].shape[:-1], given[name].shape[-1] + 1)
    if name == "A":
        given[name] = torch.zeros(4, 4)
    with pytest.raises(UserError, match=rf"^{name}: found shape .*expected"):
        selective_scan(**given)


@pytest.mark.parametrize(("name", "sizes"), [("u", {"tokens": 0}), ("u", {"batch": 0}), ("u", {"channels": 0}), ("A", {"state": 0})], ids=str)
def test_what_is_empty_is_refused_by_its_name(name, sizes):
    with pytest.raises(UserError, match=rf"^{name}: found shape .* with at least one "):
        selective_scan(**inputs(**sizes))


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="backend: found 'blokced'.*Did you mean 'blocked'"):
        selective_scan(**inputs(), backend="blokced")


def test_a_backend_for_another_type_or_device_is_refused_with_the_reason():
    with pytest.raises(UserError, match="backend: found 'numba' for torch.float64, expected float32"):
        selective_scan(**inputs(), backend="numba")
    with pytest.raises(UserError, match="backend: found 'numba' on meta, where it cannot be used: needs a cpu device"):
        resolve("numba", "meta")
    with pytest.raises(UserError, match="backend: found 'mamba_ssm' on cpu, where it cannot be used: (needs a cuda device|cannot be imported)"):
        selective_scan(**inputs(dtype=torch.float32), backend="mamba_ssm")


# ---------------------------------------------------------------- choice


@pytest.fixture
def fresh():
    """What was found out about backends is forgotten, before and after."""

    def forget():
        for cached in (backends.health, backends.automatic, backends._race):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def candidates(fresh, monkeypatch):
    """Two more backends, first and second, which "auto" tries on a CPU: modules of these tests."""

    def set_up(**scans):
        modules = {name: SimpleNamespace(scan=scan, DEVICES=("cpu",), FLOAT64=False) for name, scan in scans.items()}
        monkeypatch.setattr(backends, "MODULES", MODULES | dict.fromkeys(modules, ""))
        monkeypatch.setattr(backends, "AUTOMATIC", {"cpu": tuple(modules)})
        monkeypatch.setattr(backends, "LOADED", backends.LOADED | modules)

    return set_up


def wrong_in(name):
    """The plain loop, but for one result that is a thousandth too large."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.001 * gradient

    def scan(*arguments):
        *tensors, softplus = arguments
        if name == "y":
            return 1.001 * reference.scan(*tensors, softplus).detach() + 0 * reference.scan(*tensors, softplus)
        tensors[NAMES.index(name)] = Off.apply(tensors[NAMES.index(name)])
        return reference.scan(*tensors, softplus)

    assert NAMES == ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")  # the order in which a backend takes them
    return scan


def test_automatic_choices_on_this_cpu():
    assert resolve("auto", "cpu", torch.float32) == "numba"
    assert resolve("auto", "cpu", torch.float64) == "blocked"
    assert resolve("auto", "meta", torch.float32) == "blocked"
    given = inputs()
    assert torch.equal(selective_scan(**given), selective_scan(**given, backend="blocked"))


@pytest.mark.parametrize("name", ["y", *NAMES])
def test_a_backend_that_is_off_in_one_result_is_refused_by_its_name_and_never_taken_in_silence(name, candidates, caplog):
    candidates(first=wrong_in(name))
    told = "y" if name == "y" else f"the gradient of {name}"
    with pytest.raises(UserError, match=rf"backend: found 'first' on cpu, where it cannot be used: {told} of a small case differs .* by [\d.]+e-0[3-4]"):
        resolve("first")
    with caplog.at_level(logging.INFO, logger="homelib"):
        assert resolve("auto") == resolve("auto") == "blocked"
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert f"selective scan on cpu: blocked (first: {told} of a small case differs" in caplog.text


def test_a_backend_that_raises_or_gives_nan_is_refused_with_its_error(candidates):
    def raises(*_):
        raise RuntimeError("no kernel image is available\nand more")

    candidates(first=raises, second=lambda *arguments: reference.scan(*arguments) * torch.nan)
    with pytest.raises(UserError, match="cannot be used: fails on a small case: RuntimeError: no kernel image is available. Take"):
        resolve("first")
    with pytest.raises(UserError, match="cannot be used: y of a small case differs from the plain loop's by nan"):
        resolve("second")


def test_a_package_that_is_broken_or_absent_is_told_of(fresh, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert health("mamba_ssm", "cpu").reason.startswith("cannot be imported: ModuleNotFoundError: ")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text('raise RuntimeError("undefined symbol: cudaFoo\\nand more")')
    monkeypatch.delitem(sys.modules, "mamba_ssm")
    monkeypatch.syspath_prepend(tmp_path)
    health.cache_clear()
    assert health("mamba_ssm", "cpu").reason == "cannot be imported: RuntimeError: undefined symbol: cudaFoo"


@pytest.mark.long
def test_of_two_that_work_the_second_is_taken_where_it_is_clearly_faster(candidates, monkeypatch):
    candidates(first=reference.scan, second=reference.scan)
    for seconds, expected in (((1.0, 1.1), "first"), ((1.0, 0.9), "first"), ((1.0, 0.5), "second")):
        backends.automatic.cache_clear()
        monkeypatch.setattr(backends, "_race", lambda device, seconds=seconds: dict(zip(("first", "second"), seconds, strict=True)))
        assert resolve("auto") == expected
        told = backends.report("cpu")
        assert told[expected].startswith("chosen by auto, ")
        assert told["first"].endswith("1000.0 ms forward and backward")


def test_the_choice_is_made_in_peace_whatever_the_caller_does(fresh):
    """Under autocast, inference, fake tensors or a counter of operations the same is found, and nothing of it is seen outside."""
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), PeakNumbers() as mode:
        assert health("blocked", "cpu").works
        assert health("numba", "cpu").works
    assert mode.peak == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_mamba_ssm_is_handed_what_its_kernels_take(fresh, monkeypatch):
    seen = {}

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        seen.update(types=[t.dtype for t in (u, delta, B, C, z)], others=[t.dtype for t in (A, D, delta_bias)])
        return reference.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan_fn
    monkeypatch.delitem(sys.modules, "homelib.network.scan.mamba_ssm_gpu", raising=False)
    monkeypatch.setattr(backends, "LOADED", {})
    module = backends.backend("mamba_ssm")
    given = cast(inputs(dtype=torch.float32), torch.bfloat16) | {"delta": inputs(dtype=torch.float32)["delta"]}
    y = module.scan(*given.values(), True)
    assert y.dtype == torch.bfloat16
    assert set(seen["types"]) == {torch.bfloat16}
    assert set(seen["others"]) == {torch.float32}
    assert health("mamba_ssm", "cpu").reason == "needs a cuda device"
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    health.cache_clear()
    assert health("mamba_ssm", "cpu").works
    del sys.modules["homelib.network.scan.mamba_ssm_gpu"]


def test_a_compiled_function_goes_through_the_operator():
    given = cast(inputs(tokens=30), torch.float32)

    def twice(u, **rest):
        return 2 * selective_scan(u, **rest, delta_softplus=True, backend="numba")

    expected = scan_and_gradients(given, "numba")
    y = torch.compile(twice, fullgraph=True, backend="aot_eager")(**given)
    torch.testing.assert_close(y, 2 * expected["y"])
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    for name, gradient in zip(given, torch.autograd.grad(y, list(given.values()), direction), strict=True):
        torch.testing.assert_close(gradient, 2 * expected[f"d{name}"])


# ---------------------------------------------------------------- numba


@pytest.mark.parametrize("pieces", [2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 300, 16), (2, 5, 113, 3)], ids=str)
def test_numba_in_pieces_is_numba_in_one(pieces, shape, monkeypatch):
    """What the cores do where channels are too few for them: the last pieces begin and end inside a tile's run, and what enters each is learnt first."""
    given = cast(inputs(*shape), torch.float32)
    whole = scan_and_gradients(given, "numba")
    asked = []
    monkeypatch.setattr(numba_cpu, "pieces_for", lambda *a: asked.append(a) or pieces)
    assert_agree(scan_and_gradients(given, "numba"), whole, 1e-5)
    assert asked


def test_the_sequence_is_cut_only_where_channels_are_too_few_for_the_cores():
    assert numba_cpu.pieces_for(2, 96, 100_000, 2) == numba_cpu.pieces_for(2, 96, 100_000, 8) == 1
    assert numba_cpu.pieces_for(1, 16, 100_000, 2) == 1  # a second pass would cost what the second core gains
    assert numba_cpu.pieces_for(1, 16, 100_000, 8) == 8
    assert numba_cpu.pieces_for(1, 16, 300, 8) == 1  # pieces of 256 tokens at least


def test_lanes_are_those_that_end_sooner():
    """Two cores: 96 channels as twice 48 end before three times 32; where both end together, 32."""
    assert [numba_cpu.lanes_for(1, channels, 2) for channels in (1, 32, 64, 96, 100, 192)] == [32, 32, 32, 48, 32, 32]
    assert [numba_cpu.lanes_for(batch, 96, threads) for batch, threads in ((2, 2), (1, 1), (1, 3), (1, 4))] == [32, 32, 32, 32]


@pytest.mark.long  # it compiles for every number of lanes
@pytest.mark.parametrize("channels", [5, 48, 100])
def test_numba_gives_the_same_with_more_lanes(channels, monkeypatch):
    given = cast(inputs(channels=channels, tokens=70), torch.float32)
    narrow = scan_and_gradients(given, "numba")
    asked = []
    monkeypatch.setattr(numba_cpu, "lanes_for", lambda *a: asked.append(a) or 48)
    assert_agree(scan_and_gradients(given, "numba"), narrow, 1e-5)
    assert asked


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_numba_lets_no_nan_disappear(name):
    given = {key: t.detach().clone() for key, t in cast(inputs(channels=2, tokens=30), torch.float32).items()}
    given[name].view(-1)[-1] = float("nan")
    assert selective_scan(**given, delta_softplus=True, backend="numba").isnan().any()


def test_numbas_operator_is_one_that_pytorch_can_trace():
    """Schema, fake tensors, autograd registration and compilation, by PyTorch's own check."""
    given = cast(inputs(channels=3, tokens=20), torch.float32)
    torch.library.opcheck(numba_cpu._scan, (*given.values(), True, True))
    without = cast(inputs(channels=3, tokens=20, without=("D", "z", "delta_bias")), torch.float32)
    torch.library.opcheck(numba_cpu._scan, (*without.values(), None, None, None, False, False))


def test_numba_keeps_no_state_but_those_at_the_tiles_borders():
    """Forward and backward together hold less than a third of the B D L N numbers of all states, gradients included (measured 0.27)."""
    channels, tokens, state = 32, 4096, 64
    given = inputs(1, channels, tokens, state, dtype=torch.float32)
    with PeakNumbers() as mode:
        scan_and_gradients(given, "numba")
    assert mode.peak < channels * tokens * state / 3


def test_numba_keeps_nothing_where_no_backward_pass_will_follow():
    given = inputs(1, 32, 4096, 64, dtype=torch.float32)
    tensors = [t.detach() for t in given.values()]
    for keep, tiles in ((True, 4096 // int(numba_cpu.T)), (False, 0)):
        y, kept = numba_cpu._scan(*tensors, True, keep)
        assert kept.shape == (1, tiles, 64, 32)
    with torch.no_grad(), PeakNumbers() as mode:
        selective_scan(**given, delta_softplus=True, backend="numba")
    assert mode.peak < 1.1 * y.numel()


# ---------------------------------------------------------------- GPU


@pytest.fixture(params=["blocked", "triton", "mamba_ssm"])
def on_gpu(request):
    """A backend on the last GPU, for the index must not matter."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    if not health(request.param, device).works:
        pytest.skip(f"{request.param} on {device}: {health(request.param, device).reason}")
    return request.param, device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(2, 96, 5000, 16), (1, 1, 1, 1), (1, 3, 63, 8), (3, 17, 129, 64), (1, 768, 300, 16)], ids=str)
def test_agrees_with_the_loop_on_a_gpu(shape, on_gpu):
    backend, device = on_gpu
    given = {name: t.detach().to(device).requires_grad_() for name, t in inputs(*shape).items()}
    assert_agree(scan_and_gradients(cast(given, torch.float32), backend), scan_and_gradients(given, "reference"), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("without", [("z",), ("D",), ("delta_bias",), ("z", "D", "delta_bias")], ids=" ".join)
def test_agrees_without_what_is_optional_and_on_views_on_a_gpu(without, on_gpu):
    backend, device = on_gpu
    given = {name: t.detach().to(device).requires_grad_() for name, t in inputs(channels=40, tokens=333, without=without).items()}
    ours = {name: (t.detach().float().mT.contiguous().mT if t.dim() > 1 else t.detach().float()).requires_grad_() for name, t in given.items()}
    assert_agree(scan_and_gradients(ours, backend), scan_and_gradients(given, "reference"), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(2, 96, 5000, 16), (1, 3, 63, 8)], ids=str)
def test_bfloat16_on_a_gpu_is_as_near_as_its_rounding(shape, on_gpu):
    backend, device = on_gpu
    given = {name: t.detach().to(device, torch.float32 if name in ("A", "D", "delta_bias") else torch.bfloat16) for name, t in inputs(*shape).items()}
    given = {name: t.requires_grad_() for name, t in given.items()}
    ours, exact = scan_and_gradients(given, backend), scan_and_gradients(cast(given, torch.float64), "reference")
    assert ours["y"].dtype == torch.bfloat16
    assert all(ours[f"d{name}"].dtype == t.dtype for name, t in given.items())
    for name in exact:
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2**-7, f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("softplus", [True, False])
def test_agrees_on_a_gpu_for_steps_so_large_that_the_state_forgets_all(softplus, on_gpu):
    backend, device = on_gpu
    given = {name: t.detach().to(device) for name, t in inputs(channels=20, tokens=1000, delta_scale=200.0).items()}
    given = {name: (t.abs() if name == "delta" and not softplus else t).requires_grad_() for name, t in given.items()}
    ours = scan_and_gradients(cast(given, torch.float32), backend, softplus=softplus)
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert_agree(ours, scan_and_gradients(given, "reference", softplus=softplus), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_same_call_on_a_gpu_gives_the_same_bits(on_gpu):
    backend, device = on_gpu
    if backend == "mamba_ssm":
        pytest.skip("mamba_ssm's kernels add in no fixed order")
    given = {name: t.detach().float().to(device).requires_grad_() for name, t in inputs(channels=40, tokens=2000, state=16).items()}
    first, again = scan_and_gradients(given, backend), scan_and_gradients(given, backend)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_is_given_a_backend_made_for_it():
    assert resolve("auto", "cuda:0") in ("triton", "mamba_ssm")


def test_the_first_choice_of_a_process_may_fall_into_a_checkpointed_block():
    code = """
import torch
from homelib import MambaMixer
from homelib.network.scan.backends import automatic
from torch.utils.checkpoint import checkpoint
mixer, x = MambaMixer(8), torch.randn(1, 40, 8)
assert automatic.cache_info().currsize == 0
plain = checkpoint(mixer, x, use_reentrant=False)
plain.sum().backward()
print(automatic("cpu"), all(p.grad.isfinite().all() for p in mixer.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["numba", "True"], done.stderr[-2000:]

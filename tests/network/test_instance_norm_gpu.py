"""Instance norm in Triton beside PyTorch's in float64: exact, in either layout, in the same bits each time; and used only where it agrees.

Without a GPU the kernels run as Python on the CPU.
"""

import re
import sys

import pytest
import torch
import torch.nn.functional as F

from homelib.network import instance_norm as choice
from homelib.network.layers import InstanceNorm

EPS = 1e-5
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels last"])
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")])


@pytest.fixture
def gpu():
    return pytest.importorskip("homelib.network.instance_norm_gpu", reason="triton is not installed")


@pytest.fixture(params=["cpu", GPU])
def device(request, gpu):
    """On a GPU the last one, for the index must not matter."""
    if request.param not in gpu.DEVICES:
        pytest.skip("Triton compiles here: it does not run its kernels as Python (TRITON_INTERPRET=1)")
    return "cpu" if request.param == "cpu" else f"cuda:{torch.cuda.device_count() - 1}"


@pytest.fixture(params=[1, 8], ids=["few splits", "many splits"])
def splits(request, gpu, monkeypatch):
    """Of the voxels: on a CPU as if that had so many multiprocessors."""
    for name in ("PROGRAMS", "PROGRAMS_BACKWARD"):
        monkeypatch.setattr(gpu, name, request.param * getattr(gpu, name))


def results(norm, x, dy):
    """y and dx."""
    x = x.detach().requires_grad_()
    y = norm(x, eps=EPS)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def exact(x, dy):
    """Of contiguous tensors: PyTorch's gradient for one of channels_last is wrong on a CPU, for a batch of one."""
    return results(F.instance_norm, x.cpu().double().contiguous(), dy.cpu().double().contiguous())


def assert_exact(found, x, dy):
    """Up to rounding in float32: of results, of what a gradient is a small difference of, and of the mean, which may be large beside the distances to it."""
    space, wide = (2, 3, 4), x.cpu().double()
    scale = (wide.var(space, correction=0, keepdim=True) + EPS).rsqrt()
    rounding = 3e-6 + 2e-7 * wide.mean(space, keepdim=True).abs() * scale
    sizes = 1, dy.cpu().double().abs().amax(space, keepdim=True) * scale
    for tensor, expected, size in zip(found, exact(x, dy), sizes, strict=True):
        assert ((tensor.cpu() - expected).abs() <= rounding * (expected.abs() + size)).all()


CASES = [((1, 6, 5, 7, 9), 0), ((3, 5, 8, 13, 21), 0), ((3, 5, 8, 13, 21), 1000), ((1, 70, 3, 3, 4), 0), ((3, 3, 2, 1, 1), 0), ((2, 1, 4, 5, 6), 1000)]


@LAYOUTS
@pytest.mark.parametrize(("shape", "mean"), CASES, ids=str)
def test_it_is_exact_in_either_layout_and_keeps_it(shape, mean, layout, device, gpu, splits):
    x, dy = ((torch.randn(shape) + about).contiguous(memory_format=layout).to(device) for about in (mean, 0))
    y, dx = results(gpu.instance_norm, x, dy)
    assert y.stride() == dx.stride() == x.stride()
    assert y.dtype == dx.dtype == torch.float32
    assert_exact((y, dx), x, dy)


@LAYOUTS
def test_a_gradient_may_come_in_any_layout(layout, device, gpu):
    x, dy = (torch.randn(2, 3, 4, 5, 6, device=device) for _ in range(2))
    x, turned = x.contiguous(memory_format=layout), dy.transpose(2, 4).contiguous().transpose(2, 4)
    for gradient in (dy, dy.contiguous(memory_format=torch.channels_last_3d), turned, dy[..., :1, :1, :1].expand(x.shape)):
        y, dx = results(gpu.instance_norm, x, gradient)
        assert dx.stride() == x.stride()
        assert_exact((y, dx), x, gradient)


@LAYOUTS
@pytest.mark.parametrize(("kind", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_is_rounded_once(kind, rounding, layout, device, gpu):
    """Statistics in float32: a result errs by what it is rounded by. (Triton's interpreter cuts bfloat16 off, which is twice as much.)"""
    x, dy = ((torch.randn(2, 6, 9, 8, 7) + mean).to(kind).contiguous(memory_format=layout) for mean in (3, 0))
    rounding *= 2 if (kind, device) == (torch.bfloat16, "cpu") else 1
    for found, expected in zip(results(gpu.instance_norm, x.to(device), dy.to(device)), exact(x, dy), strict=True):
        assert found.dtype == kind
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1.01 * rounding, atol=3e-6)


@LAYOUTS
def test_a_constant_channel_gives_zeros_and_finite_gradients(layout, device, gpu, splits):
    x = torch.randn(2, 3, 9, 8, 7)
    x[:, 1] = 1234.5
    y, dx = results(gpu.instance_norm, x.contiguous(memory_format=layout).to(device), torch.randn(x.shape).to(device))
    assert torch.isfinite(y).all()
    assert torch.isfinite(dx).all()
    assert (y[:, 1] == 0).all()


@LAYOUTS
def test_the_same_call_gives_the_same_bits(layout, device, gpu, splits):
    x, dy = (torch.randn(2, 5, 17, 16, 9).contiguous(memory_format=layout).to(device) for _ in range(2))
    first, again = (results(gpu.instance_norm, x, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_view_is_taken_as_it_lies_and_infinity_stays_in_its_channel(device, gpu):
    x, dy = torch.randn(2, 9, 6, 5, 8).transpose(2, 4)[:, ::3, 1:], torch.randn(2, 3, 7, 5, 6)
    x[0, 1, 2, 3, 4] = torch.inf
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    for found, expected in zip(results(gpu.instance_norm, x.to(device), dy.to(device)), exact(x, dy), strict=True):
        torch.testing.assert_close(found.cpu().double()[others], expected[others], rtol=1e-5, atol=1e-5)
        assert found[0, 1].isnan().any()


def test_what_comes_after_it_may_change_its_result_in_place(device, gpu):
    x, dy = torch.randn(1, 2, 4, 5, 6), torch.randn(1, 2, 4, 5, 6)
    ours, expected = (results(lambda x, eps, f=f: F.relu_(f(x, eps=eps)), x.to(device), dy.to(device)) for f in (gpu.instance_norm, F.instance_norm))
    torch.testing.assert_close(ours, expected)


def test_it_is_an_operator_as_pytorch_wants_it(device, gpu):
    """What a compiler is told of shapes and strides is so, and autograd goes through it."""
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(2, 3, 4, 5, 6, device=device).contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(gpu._instance_norm, (x, EPS), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert gpu.instance_norm(mode.from_tensor(x), EPS).stride() == x.stride()


# ---------------------------------------------------------------- the choice


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of these tests, tried on the CPU as if that were a GPU."""

    def install(function):
        monkeypatch.setattr(choice, "DEVICES", ("cpu",))
        monkeypatch.setattr(choice, "kernel", function)
        monkeypatch.setattr("homelib.network.layers.kernel", function)
        choice._tried.cache_clear()

    yield install
    monkeypatch.undo()
    choice._tried.cache_clear()


def normalised(x, eps):
    return F.instance_norm(x.contiguous(), eps=eps).contiguous(memory_format=torch.channels_last_3d)


def test_on_a_cpu_it_says_that_the_kernel_is_for_cuda():
    assert choice.used_on("cpu") == "PyTorch (triton needs a cuda device)"
    assert not choice.has_kernel(torch.randn(1, 2, 3, 4, 5))


@LAYOUTS
def test_a_kernel_that_agrees_is_used_by_the_layer_where_it_fits(layout, kernel):
    shapes = []

    def agrees(x, eps):
        shapes.append(tuple(x.shape))
        return normalised(x, eps)

    kernel(agrees)
    x, norm = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=layout), InstanceNorm(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # the trial is not disturbed by them
        torch.testing.assert_close(norm(x), F.instance_norm(x.contiguous()))
    assert choice.used_on("cpu") == "triton"
    assert shapes[-1] == (2, 3, 4, 5, 6)
    tried = len(shapes)
    norm(x.double()), norm(x[0])
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        norm(x[:, :, :1, :1, :1])
    assert len(shapes) == tried


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x, eps: 1.001 * normalised(x, eps), r"differs from it by [\d.]+e-0[34] of the largest number"),
        (lambda x, eps: normalised(x, eps) * torch.nan, "differs from it by nan"),
        (lambda x, eps: 1 / 0, "cannot be used: ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_a_kernel_that_fails_is_not_used_and_the_reason_is_kept_and_logged_once(function, told, kernel, caplog):
    kernel(function)
    x = torch.randn(2, 3, 4, 5, 6)
    for _ in range(2):
        torch.testing.assert_close(InstanceNorm(3)(x), F.instance_norm(x))
    assert re.search(rf"^PyTorch \(triton {told}", choice.used_on("cpu"))
    assert [record.message for record in caplog.records if record.name == choice.__name__] == [f"instance norm on cpu: {choice.used_on('cpu')}"]


def test_without_triton_it_says_so(kernel, monkeypatch):
    kernel(choice.kernel)
    monkeypatch.setitem(sys.modules, "homelib.network.instance_norm_gpu", None)
    assert re.search(r"cannot be used: (ImportError|ModuleNotFoundError)", choice.used_on("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 48, 48, 48, 48), (1, 96, 24, 24, 24), (2, 768, 6, 6, 6), (1, 1, 96, 96, 96), (2, 3, 65, 33, 17)], ids=str)
def test_the_layer_takes_the_kernel_on_a_gpu_and_is_exact(shape, layout):
    device = f"cuda:{torch.cuda.device_count() - 1}"
    assert choice.used_on(device) == "triton"
    for kind, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        x, dy = ((torch.randn(shape, device=device) + mean).to(kind).contiguous(memory_format=layout) for mean in (3, 0))
        norm = InstanceNorm(shape[1])
        assert choice.has_kernel(x)
        y, dx = results(lambda x, eps, norm=norm: norm(x), x, dy)
        for found, expected in zip((y, dx), exact(x, dy), strict=True):
            assert found.stride() == x.stride()
            assert (found.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()

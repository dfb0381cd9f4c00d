"""Properties of the Mamba mixer. Its numbers: test_parity; the scan inside: test_scan."""

import re

import pytest
import torch
import torch.nn.functional as F

from homelib import MambaMixer, UserError


def test_a_token_sees_nothing_that_comes_after_it():
    mixer, x = MambaMixer(6, state_dim=4).double(), torch.randn(2, 40, 6, dtype=torch.float64)
    later = x.clone()
    later[:, 25:] = torch.randn(2, 15, 6, dtype=torch.float64)
    before, after = mixer(x), mixer(later)
    torch.testing.assert_close(after[:, :25], before[:, :25])
    assert (after[:, 25] - before[:, 25]).abs().max() > 1e-6


def test_a_token_sees_further_back_than_the_convolution():
    mixer, x = MambaMixer(6, state_dim=4, conv_width=2).double(), torch.randn(1, 40, 6, dtype=torch.float64)
    earlier = x.clone()
    earlier[:, 0] += 1
    assert (mixer(earlier) - mixer(x))[:, 20].abs().max() > 1e-9


@pytest.mark.parametrize("width", [1, 2, 4])
def test_any_conv_width_keeps_the_length(width):
    assert MambaMixer(6, conv_width=width)(torch.zeros(1, 9, 6)).shape == (1, 9, 6)


def test_step_sizes_start_between_a_thousandth_and_a_tenth():
    bias = MambaMixer(256).dt_proj.bias.detach()
    steps = F.softplus(bias)
    assert steps.min() > 0.99e-3
    assert steps.max() < 0.101
    assert steps.log().std() > 1  # spread over the whole range, which is ln 100 = 4.6 wide


def test_bfloat16_autocast_is_close_to_float32():
    mixer, x = MambaMixer(16), torch.randn(1, 200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    exact = mixer(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.05 * exact.norm()


def test_a_wrong_backend_is_found_when_the_network_is_built():
    with pytest.raises(UserError, match=r"^backend: found 'numbra', expected 'auto' or one of .*Did you mean 'numba'\?$"):
        MambaMixer(8, backend="numbra")


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 5, 8), (2, 5, 9)], ids=str)
def test_an_empty_or_wrong_input_is_refused_in_one_line(shape):
    with pytest.raises(UserError, match=rf"^input: found shape {re.escape(str(shape))}, expected \(B, L, 8\) with at least one item and token\.$"):
        MambaMixer(8)(torch.zeros(shape))


def test_a_size_of_nothing_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"^state_dim: found 0, expected at least 1\.$"):
        MambaMixer(8, state_dim=0)


def test_the_mixer_compiles_in_one_piece():
    """The choices of backends are constants to `torch.compile`; the scan stays one operator."""
    mixer, x = MambaMixer(8), torch.randn(1, 30, 8)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x))

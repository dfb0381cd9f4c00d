"""HoME against its equations in plain loops, and the properties that follow from them."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from homelib import HoME, UserError
from homelib.network.equations import EquationHoME
from homelib.network.home import Experts, GlobalRouter, LocalRouter, RMSNorm
from homelib.network.published import load_published, to_published

EVEN = {"tokens": 24, "group_size": 8, "experts_local": 3, "slots_per_expert": 2, "experts_global": 6}  # 18 slots for 6 experts: no fill
RAGGED = {"tokens": 21, "group_size": 8, "experts_local": 3, "slots_per_expert": 2, "experts_global": 7}  # 3 tokens and 3 slots of fill
FEW = {"tokens": 3, "group_size": 8, "experts_local": 1, "slots_per_expert": 1, "experts_global": 4}  # one slot for 4 experts
CHANNELS = 5


def layer_and_input(shape: dict, *, batch: int = 2, dtype=torch.float64, **options) -> tuple[HoME, torch.Tensor]:
    """A HoME layer with random weights everywhere (gates and gammas too, positive) and tokens for it."""
    shape = dict(shape)
    tokens = shape.pop("tokens")
    layer = HoME(CHANNELS, **shape, **options).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(1 + 0.1 * noise if "gamma" in name or name == "expert_gate" else 0.5 * noise)
    return layer, torch.randn(batch, tokens, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def routing(layer: HoME, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the two routers and the local experts give for x, seen by hooks."""
    seen = {}
    hooks = [
        layer.local_router.register_forward_hook(lambda _, __, A: seen.update(A=A)),
        layer.local_experts.register_forward_hook(lambda _, __, y: seen.update(local=y)),
        layer.global_router.register_forward_hook(lambda _, __, out: seen.update(dispatch=out[0], combine=out[1])),
    ]
    seen["y"] = layer(x)
    for hook in hooks:
        hook.remove()
    return {name: tensor.detach() for name, tensor in seen.items()}


# ---------------------------------------------------------------- the equations, one number at a time


def rms(v, gamma):
    return v / max(np.linalg.norm(v), 1e-8) * math.sqrt(len(v)) * gamma


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def gelu(v):
    return np.array([0.5 * t * (1 + math.erf(t / math.sqrt(2))) for t in v])


def feed_forward(v, w, prefix, glu):
    h = w[f"{prefix}.0.weight"] @ v + w[f"{prefix}.0.bias"]
    if glu:
        value, gate = np.split(h, 2)
        h = value * gelu(gate)
    else:
        h = gelu(h)
    return w[f"{prefix}.3.weight"] @ h + w[f"{prefix}.3.bias"]


def home_by_loops(x, w, *, group_size, experts_local, slots_per_expert, experts_global, glu, mask):
    """The layer on one sequence x (N, d), weights w by the authors' names; reference/README.md, "HoME layer", line by line."""
    N, d = x.shape
    K, M = group_size, experts_local * slots_per_expert
    G = math.ceil(N / K)
    x = np.vstack([x, np.zeros((G * K - N, d))])

    A, slot_outputs = np.zeros((G, K, M)), []
    for g in range(G):
        group = x[g * K : (g + 1) * K]
        mu = sum(group) / K
        phi = [rms(part, w["to_slot_embeds.2.gamma"]) for part in np.split(w["to_slot_embeds.0.weight"] @ mu, M)]
        for k in range(K):
            padded = g * K + k >= N
            A[g, k] = softmax([0.0 if padded else rms(group[k], w["norm.gamma"]) @ phi[m] for m in range(M)])
        group_gate = 1 / (1 + math.exp(-(w["group_gate_mlp.weight"][0] @ mu + w["group_gate_mlp.bias"][0])))
        group_gate = min(max(group_gate, 0.01), 1.0)
        for m in range(M):
            slot = sum(A[g, k, m] * group[k] for k in range(K))
            e = m // slots_per_expert
            slot_outputs.append(feed_forward(slot, w, f"experts_first.{e}", glu) * w["expert_gates"][e] * group_gate)

    entries, E = len(slot_outputs), experts_global
    z = [rms(v, w["dynamic_slots_soft_moe.norm.gamma"]) for v in slot_outputs]
    P = math.ceil(entries / E)
    z += [np.zeros(d)] * (P * E - entries)
    phi2 = {}
    for p in range(P):
        run = z[p * E : (p + 1) * E]
        real = min(E, entries - p * E)
        mean = sum(run) / (real if mask else E)
        for e, part in enumerate(np.split(w["dynamic_slots_soft_moe.to_slot_embeds.0.weight"] @ mean, E)):
            phi2[e, p] = rms(part, w["dynamic_slots_soft_moe.to_slot_embeds.2.gamma"])
    taking_part = range(entries if mask else len(z))
    expert_outputs = {}
    for (e, p), phi in phi2.items():
        dispatch = softmax([z[n] @ phi for n in taking_part])
        slot = sum(weight * z[n] for weight, n in zip(dispatch, taking_part, strict=True))
        expert_outputs[e, p] = feed_forward(slot, w, f"dynamic_slots_soft_moe.experts.{e}", glu)
    out = []
    for n in range(entries):
        combine = softmax([z[n] @ phi for phi in phi2.values()])
        out.append(sum(weight * expert_outputs[key] for weight, key in zip(combine, phi2, strict=True)))

    y = [sum(A[g, k, m] * out[g * M + m] for m in range(M)) for g in range(G) for k in range(K)]
    return np.array(y[:N])


@pytest.mark.parametrize("mask", [False, True], ids=["fill counts", "fill masked"])
@pytest.mark.parametrize("glu", [True, False], ids=["GEGLU", "GELU"])
@pytest.mark.parametrize("shape", [EVEN, RAGGED, FEW], ids=["even", "ragged", "few"])
def test_the_layer_is_its_equations_in_loops(shape, glu, mask):
    layer, x = layer_and_input(shape, batch=1, expert_glu=glu, mask_padding=mask)
    weights = {name: tensor.numpy() for name, tensor in to_published(layer).items()}
    sizes = {name: size for name, size in shape.items() if name != "tokens"}
    expected = home_by_loops(x[0].numpy(), weights, **sizes, glu=glu, mask=mask)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_what_is_left_unsaid_is_the_released_form():
    (layer, x), (plain, _) = (layer_and_input(RAGGED, **options) for options in ({"expert_mult": 2, "expert_glu": True, "mask_padding": False}, {}))
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=0)
    entries = F.pad(torch.randn(2, 18, CHANNELS), (0, 0, 0, 3))
    dispatch, _ = GlobalRouter(CHANNELS, 7)(entries, 18)
    assert (dispatch[:, 18:] > 0).all()  # fill counts
    assert LocalRouter(CHANNELS, 3, 2)(torch.randn(2, 3, 8, CHANNELS), torch.randn(2, 3, CHANNELS), None).shape == (2, 3, 8, 3, 2)  # one assignment both ways


@pytest.mark.parametrize("glu", [True, False], ids=["GEGLU", "GELU"])
def test_weights_begin_as_those_of_a_linear_layer(glu):
    """Alike between plus and minus one over the root of what is summed."""
    experts = Experts(3, 64, mult=2, glu=glu)
    for parameters, inputs in (((experts.weight_in, experts.bias_in), 64), ((experts.weight_out, experts.bias_out), experts.weight_out.shape[-1])):
        for parameter in parameters:
            assert parameter.min() == pytest.approx(-(inputs**-0.5), rel=0.05)
            assert parameter.max() == pytest.approx(inputs**-0.5, rel=0.05)
            assert parameter.abs().mean() == pytest.approx(inputs**-0.5 / 2, rel=0.1)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("mask", [False, True], ids=["fill counts", "fill masked"])
@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_routing_weights_sum_to_one(shape, mask):
    layer, x = layer_and_input(shape, mask_padding=mask)
    seen = routing(layer, x)
    ones = torch.ones((), dtype=x.dtype)
    A, dispatch, combine = seen["A"], seen["dispatch"], seen["combine"]
    assert A.shape == (2, 3, 8, 3, 2)
    assert dispatch.shape == combine.shape == ((2, 18, 6, 3) if shape is EVEN else (2, 21, 7, 3))
    for total in (A.sum((3, 4)), dispatch.sum(1), combine.sum((2, 3))):  # over the slots; over the entries; over the slots
        torch.testing.assert_close(total, ones.expand_as(total))
    if shape is RAGGED:
        torch.testing.assert_close(A[:, -1, -3:], torch.full_like(A[:, -1, -3:], 1 / 6))  # fill tokens spread evenly
        assert (dispatch[:, 18:] == 0).all() if mask else (dispatch[:, 18:] > 0).all()


def test_zeros_that_fill_the_last_group_change_nothing():
    layer, x = layer_and_input(RAGGED)
    torch.testing.assert_close(layer(F.pad(x, (0, 0, 0, 3)))[:, :21], layer(x))


def test_masking_matters_where_there_is_fill_and_only_there():
    for shape, same in ((EVEN, True), (RAGGED, False)):
        layer, x = layer_and_input(shape)
        masked, _ = layer_and_input(shape, mask_padding=True)
        load_published(masked, to_published(layer))
        assert torch.allclose(masked(x), layer(x), rtol=0, atol=1e-12) is same


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_volumes_of_a_batch_do_not_see_each_other(shape):
    layer, x = layer_and_input(shape, batch=3)
    alone = torch.cat([layer(volume[None]) for volume in x])
    torch.testing.assert_close(layer(x), alone)


def test_level_1_sees_its_own_group_alone_and_level_2_sees_all():
    layer, x = layer_and_input(EVEN)
    changed = x.clone()
    changed[:, 8:] = torch.randn(2, 16, CHANNELS, dtype=x.dtype)  # the other groups' tokens
    before, after = routing(layer, x), routing(layer, changed)
    torch.testing.assert_close(after["A"][:, 0], before["A"][:, 0])
    outputs_before, outputs_after = (seen["local"].unflatten(1, (2, 3, 2)) for seen in (before, after))  # (E, B, G, S, d)
    torch.testing.assert_close(outputs_after[:, :, 0], outputs_before[:, :, 0])
    assert (after["A"][:, 1] - before["A"][:, 1]).abs().max() > 0.01
    assert (after["y"][:, :8] - before["y"][:, :8]).abs().max() > 0.01


def test_tokens_of_a_group_in_another_order_give_the_same_in_that_order():
    layer, x = layer_and_input(EVEN)
    order = torch.cat([torch.randperm(8), 8 + torch.randperm(8), 16 + torch.randperm(8)])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_groups_in_another_order_give_the_same_in_that_order():
    layer, x = layer_and_input(EVEN)  # a group's 6 slots are one run of level 2
    order = torch.arange(24).view(3, 8)[[2, 0, 1]].flatten()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("glu", [True, False], ids=["GEGLU", "GELU"])
def test_stacked_experts_are_each_expert_on_its_own_rows(glu):
    experts = Experts(3, CHANNELS, mult=2, glu=glu).double()
    x = torch.randn(3, 11, CHANNELS, dtype=torch.float64)
    y = experts(x)
    for e in range(3):
        h = F.linear(x[e], experts.weight_in[e], experts.bias_in[e])
        h = h[:, : h.shape[1] // 2] * F.gelu(h[:, h.shape[1] // 2 :]) if glu else F.gelu(h)
        torch.testing.assert_close(y[e], F.linear(h, experts.weight_out[e], experts.bias_out[e]))


def test_the_hidden_width_is_two_thirds_with_geglu():
    assert Experts(2, 48, mult=2, glu=True).weight_in.shape == (2, 128, 48)  # 2 x int(48 * 2 * 2 / 3)
    assert Experts(2, 48, mult=2, glu=False).weight_in.shape == (2, 96, 48)


def test_level_2s_norm_cancels_the_gates_as_in_the_released_network():
    """Every slot output is normalised before level 2, so a positive factor on it has no effect, and its gradient is rounding noise."""
    layer, x = layer_and_input(EVEN, dtype=torch.float32)
    y = layer(x)
    y.square().mean().backward()
    largest = max(p.grad.norm() for p in layer.parameters())
    for gate in (layer.group_gate.weight, layer.group_gate.bias, layer.expert_gate):
        assert gate.grad.norm() < 1e-5 * largest
    with torch.no_grad():
        for bias in (-3.0, 3.0):
            layer.group_gate.bias.fill_(bias)
            assert (layer(x) - y).abs().max() < 1e-4 * y.abs().max()
        layer.expert_gate *= torch.tensor([0.2, 1.0, 5.0])
        assert (layer(x) - y).abs().max() < 1e-4 * y.abs().max()
        layer.expert_gate *= -1  # a sign is no norm
        assert (layer(x) - y).abs().max() > 0.1 * y.abs().max()


def test_the_group_gate_is_the_sigmoid_of_the_group_mean_kept_above_a_hundredth():
    layer, x = layer_and_input(EVEN)
    slots, mean = torch.randn(2, 3, 3, 2, CHANNELS, dtype=x.dtype), torch.randn(2, 3, CHANNELS, dtype=x.dtype)
    ungated = torch.stack([layer.local_experts(s.permute(1, 0, 2, 3).flatten(1, 2)) for s in slots])  # (B, E, G S, d)
    ungated = ungated.unflatten(2, (3, 2)).transpose(1, 2) * layer.expert_gate[:, None, None]
    for bias, gate in ((0.3, None), (-20.0, 0.01)):
        layer.group_gate.bias.data.fill_(bias)
        expected = torch.sigmoid(mean @ layer.group_gate.weight[0] + bias) if gate is None else torch.full((2, 3), gate, dtype=x.dtype)
        torch.testing.assert_close(layer._local(slots, mean), ungated * expected[..., None, None, None])


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_bfloat16_autocast_is_close_to_float32(shape):
    layer, x = layer_and_input(shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    exact = layer(x)
    assert (y - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_gradients_are_those_of_finite_differences(shape):
    layer, x = layer_and_input(shape, batch=1)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_tokens_that_are_all_zero_have_finite_output_and_gradients():
    layer, x = layer_and_input(RAGGED, dtype=torch.float32)
    x = torch.zeros_like(x, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rms_norm_gives_length_root_d_however_short_the_vector(dtype):
    norm, v = RMSNorm(4), torch.tensor([[3.0, 0.0, 0.0, 4.0], [3e-6, 0.0, 0.0, 4e-6], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    norm.gamma.data = torch.tensor([1.0, 1.0, 1.0, 0.5])
    found = norm(v)
    assert found.dtype == dtype
    expected = torch.tensor([[1.2, 0.0, 0.0, 0.8], [1.2, 0.0, 0.0, 0.8], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


@torch.no_grad()
def test_a_compiled_layer_takes_sequences_of_any_length():
    """The second length is what makes the compiler think of lengths that vary; it is shorter than a group."""
    layer = HoME(8, group_size=32, experts_local=2, slots_per_expert=2, experts_global=3)
    compiled = torch.compile(layer, backend="aot_eager")
    for tokens in (60, 30):
        x = torch.randn(1, tokens, 8)
        torch.testing.assert_close(compiled(x), layer(x))


SIZES = {"channels": 8, "group_size": 4, "experts_local": 2, "slots_per_expert": 2, "experts_global": 3, "expert_mult": 2}


@pytest.mark.parametrize("form", [HoME, EquationHoME])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_nothing_is_refused_by_its_name(form, name):
    with pytest.raises(UserError, match=rf"^{name}: found 0, expected at least 1\.$"):
        form(**SIZES | {name: 0})


@pytest.mark.parametrize("form", [HoME, EquationHoME])
@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 5, 8), (2, 5, 9), (5, 8)], ids=str)
def test_an_empty_or_wrong_input_is_refused_in_one_line(form, shape):
    with pytest.raises(UserError, match=rf"^input: found shape {re.escape(str(shape))}, expected \(B, L, 8\) with at least one item and token\.$"):
        form(**SIZES)(torch.zeros(shape))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9])
def test_any_number_of_tokens(tokens):
    layer, _ = layer_and_input(EVEN, dtype=torch.float32)
    assert layer(torch.randn(1, tokens, CHANNELS)).shape == (1, tokens, CHANNELS)

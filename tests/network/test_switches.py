"""Switches of the network: each computes what its equation says, in plain loops; gradients reach every parameter; the default is as it was."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from homelib import GatedSpatialConv, HoME, MambaHoME, MambaMixer, ModelConfig, SegMamba, UserError, selective_scan
from homelib.config import Settings
from homelib.network.equations import EquationHoME
from homelib.network.home import Experts
from homelib.network.mlp import PlainMLP
from homelib.network.order import groups_of
from homelib.network.parts import home_of

SIZES = {"group_size": 8, "experts_local": 3, "slots_per_expert": 2, "experts_global": 4}
TINY = {
    "depths": (1, 1, 1, 1),
    "channels": (4, 4, 8, 8),
    "hidden_channels": 8,
    "group_size": (32, 16, 8, 4),
    "experts_local": (2, 2, 2, 2),
    "experts_global": (4, 4, 4, 4),
    "slots_per_expert": 2,
    "state_dim": 2,
}
GRID = (3, 2, 4)  # 24 tokens


def random_(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, gates and norms too, in float64."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def tokens(n: int, channels: int = 5) -> torch.Tensor:
    return torch.randn(2, n, channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def expert(experts: Experts, e: int, v: torch.Tensor) -> torch.Tensor:
    h = experts.weight_in[e] @ v + experts.bias_in[e]
    value, gate = h.chunk(2)
    return experts.weight_out[e] @ (value * F.gelu(gate)) + experts.bias_out[e]


def close(found: torch.Tensor, expected) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-11 * float(torch.as_tensor(expected).abs().max()))


# ---------------------------------------------------------------- HoME


def equations_by_loops(layer: EquationHoME, x: torch.Tensor) -> torch.Tensor:
    """Eq. 3 to 13 on one sequence (N, d), one number at a time. Fill tokens are zero and take part in nothing."""
    (N, d), K, E1, S, E2 = x.shape, *SIZES.values()
    M, G = E1 * S, math.ceil(N / K)
    slot_embed, y = layer.local_router.slot_embed, torch.zeros(N, d, dtype=x.dtype)
    for g in range(G):
        group = x[g * K : (g + 1) * K]
        A = torch.stack([torch.stack([t @ slot_embed[m] for m in range(M)]).softmax(0) for t in group])  # Eq. 3 and 5
        slots = [sum(A[k, m] * group[k] for k in range(len(group))) for m in range(M)]  # Eq. 6
        router_1 = layer.local_weights.mlp(sum(slots) / M).softmax(0)  # Eq. 7
        y1 = [sum(router_1[e] * expert(layer.local_experts, e, slot) for e in range(E1)) for slot in slots]  # Eq. 8 and 9
        router_2 = [layer.global_weights.mlp(v).softmax(0) for v in y1]  # Eq. 10
        y2 = [sum(r[e] * expert(layer.global_experts, e, v) for e in range(E2)) for r, v in zip(router_2, y1, strict=True)]  # Eq. 11 and 12
        for k in range(len(group)):
            y[g * K + k] = sum(A[k, m] * y2[m] for m in range(M))  # Eq. 13
    return y


@pytest.mark.parametrize("n", [16, 21], ids=["even", "ragged"])
def test_the_papers_equations(n):
    layer, x = random_(EquationHoME(5, **SIZES)), tokens(n)
    with torch.no_grad():
        close(layer(x), torch.stack([equations_by_loops(layer, sequence) for sequence in x]))


@pytest.mark.parametrize("n", [16, 21], ids=["even", "ragged"])
def test_dispatch_over_tokens_is_soft_moes(n):
    """Level 1 alone, so that nothing stands between: D sums to one over the tokens of a group, fill left out; the read-out is A as before."""
    layer, x = random_(HoME(5, **SIZES | {"experts_global": None}, dispatch="tokens")), tokens(n)
    K, E, S = SIZES["group_size"], SIZES["experts_local"], SIZES["slots_per_expert"]
    with torch.no_grad():
        for sequence, found in zip(x, layer(x), strict=True):
            for g in range(math.ceil(n / K)):
                group = sequence[g * K : (g + 1) * K]
                mean = group.sum(0) / K
                embed = layer.local_router.slot_norm(layer.local_router.slot_embed(mean).view(E * S, 5))
                logits = layer.local_router.token_norm(group) @ embed.T
                gate = torch.sigmoid(layer.group_gate(mean)).clamp(0.01, 1)
                slots = logits.softmax(0).T @ group  # a weighted mean of tokens
                y = torch.stack([expert(layer.local_experts, m // S, slot) * layer.expert_gate[m // S] * gate for m, slot in enumerate(slots)])
                close(found[g * K : (g + 1) * K], logits.softmax(1) @ y)


def test_without_level_2_tokens_read_level_1():
    layer, x = random_(HoME(5, **SIZES | {"experts_global": None})), tokens(24)
    assert not any("global" in name for name, _ in layer.named_parameters())
    full = random_(HoME(5, **SIZES))
    full.load_state_dict(layer.state_dict(), strict=False)
    full._global = lambda z: z
    with torch.no_grad():
        close(layer(x), full(x))


@pytest.mark.parametrize("order", ["blocks", "hilbert"])
@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 3, 3)], ids=["64 tokens", "27 tokens"])
def test_another_order_groups_the_tokens_that_it_says(order, grid):
    """The released layer on tokens that were put in that order beforehand. With fill in several groups (27 in boxes of 8), group by group."""
    N, K = math.prod(grid), SIZES["group_size"]
    layer = random_(HoME(5, **SIZES | {"experts_global": None}, group_order=order))
    plain = HoME(5, **SIZES | {"experts_global": None}).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens(N)
    expected = torch.full_like(x, math.nan)
    with torch.no_grad():
        for group in groups_of(order, grid, K):
            members = group[group < N]
            expected[:, members] = plain(x[:, members])
        close(layer(x, grid), expected)


def test_the_order_of_a_group_does_not_matter_but_who_is_in_it_does():
    x, grid = tokens(64), (4, 4, 4)
    with torch.no_grad():
        outputs = {order: random_(HoME(5, **SIZES | {"experts_global": None}, group_order=order))(x, grid) for order in ("raster", "blocks", "hilbert")}
    assert not torch.allclose(outputs["raster"], outputs["blocks"])
    torch.testing.assert_close(outputs["blocks"], outputs["hilbert"])  # eight tokens along the curve are a block of 2x2x2
    with pytest.raises(UserError, match="grid: found none"):
        HoME(5, **SIZES, group_order="blocks")(torch.zeros(1, 24, 5))


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_the_plain_mlp_has_as_many_parameters(stage, glu):
    with torch.device("meta"):
        mlp, home = (sum(p.numel() for p in home_of(ModelConfig(home=form, expert_glu=glu), stage).parameters()) for form in ("mlp", "released"))
    assert mlp == pytest.approx(home, rel=1e-3)


def test_the_plain_mlp_is_one():
    mlp, x = random_(PlainMLP(5, parameters=300, glu=True)), tokens(3)
    with torch.no_grad():
        value, gate = (x @ mlp.wide.weight.T + mlp.wide.bias).chunk(2, -1)
        close(mlp(x), (value * F.gelu(gate)) @ mlp.narrow.weight.T + mlp.narrow.bias)


# ---------------------------------------------------------------- Mamba


def scan_by_hand(mixer: MambaMixer, weights, u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """One direction on u, z (L, D) with the weights of one: convolution token by token, then the scan of PyTorch's plain loop."""
    (L, D), W = u.shape, weights.conv1d.weight.shape[-1]
    padded = torch.cat([torch.zeros(W - 1, D, dtype=u.dtype), u])
    u = F.silu(torch.stack([(padded[i : i + W].T * weights.conv1d.weight[:, 0]).sum(1) + weights.conv1d.bias for i in range(L)]))
    rank, N = weights.dt_proj.in_features, weights.A_log.shape[1]
    dt, B, C = (u @ weights.x_proj.weight.T).split([rank, N, N], -1)
    delta = dt @ weights.dt_proj.weight.T
    A = -weights.A_log.float().exp().to(u.dtype)
    given = [t.T[None] for t in (u, delta)] + [A] + [t.T[None] for t in (B, C)] + [weights.D]
    y = selective_scan(*given, z=z.T[None], delta_bias=weights.dt_proj.bias, delta_softplus=True, backend="reference")
    return y[0].T


@pytest.mark.parametrize("direction", ["forward", "backward", "both", "three"])
def test_directions_share_projections_and_add_their_scans(direction):
    mixer, x = random_(MambaMixer(5, state_dim=3, direction=direction)), tokens(24)
    slices = [d * 8 + h * 4 + w for h in range(2) for w in range(4) for d in range(3)]
    orders = {"forward": list(range(24)), "backward": list(range(23, -1, -1)), "slices": slices}
    with torch.no_grad():
        for sequence, found in zip(x, mixer(x, GRID), strict=True):
            u, z = (sequence @ mixer.in_proj.weight.T).chunk(2, -1)
            total = torch.zeros_like(u)
            for name, weights in zip(mixer.directions, (mixer, *mixer.others), strict=True):
                total[orders[name]] += scan_by_hand(mixer, weights, u[orders[name]], z[orders[name]])
            torch.testing.assert_close(found, total @ mixer.out_proj.weight.T, rtol=0, atol=1e-5)  # A is exp of float32


def test_three_directions_have_segmambas_parameters():
    """66.85 M with one direction and 67.36 M with three, counted on SegMamba's own code, which has MLPs on its skips besides: 4 c^2 + 3 c a stage."""
    widths = (48, 96, 192, 384)
    with torch.device("meta"):
        counts = {direction: sum(p.numel() for p in SegMamba(ModelConfig(scan_direction=direction)).parameters()) for direction in ("forward", "three")}
    assert counts["three"] - counts["forward"] == 2 * 2 * sum(2 * d * (5 + d // 16 + 32 + d // 16 + 1 + 16 + 1) for d in widths)
    mlps = sum(4 * c * c + 3 * c for c in widths)
    assert round((counts["forward"] + mlps) / 1e6, 2) == 66.85
    assert round((counts["three"] + mlps) / 1e6, 2) == 67.36


# ---------------------------------------------------------------- GSC and norm


def unit(block, x):
    """A convolution, its instance norm, ReLU."""
    convolution = block[0]
    y = F.conv3d(x, convolution.weight, convolution.bias, padding=convolution.weight.shape[-1] // 2)
    return F.relu((y - y.mean((2, 3, 4), keepdim=True)) / (y.var((2, 3, 4), keepdim=True, unbiased=False) + 1e-5).sqrt())


@pytest.mark.parametrize("form", ["sum", "product", "segmamba"])
def test_gsc_adds_or_multiplies(form):
    gsc, x = random_(GatedSpatialConv(3, form)), torch.randn(2, 3, 4, 5, 3, dtype=torch.float64)
    wide = x
    for block in gsc.wide:
        wide = unit(block, wide)
    narrow = unit(gsc.narrow, x)
    with torch.no_grad():
        close(gsc(x), x + unit(gsc.fuse, wide + narrow if form == "sum" else wide * narrow))
    assert (len(gsc.wide), gsc.fuse[0].kernel_size) == ((1, (3, 3, 3)) if form == "segmamba" else (2, (1, 1, 1)))


# ---------------------------------------------------------------- the whole network

SWITCHES = {
    "no Mamba": ("MambaHoME", {"mixer": "none"}),
    "neither": ("SegMamba", {"mixer": "none"}),
    "backward": ("MambaHoME", {"scan_direction": "backward"}),
    "both": ("SegMamba", {"scan_direction": "both"}),
    "three": ("MambaHoME", {"scan_direction": "three"}),
    "equations": ("MambaHoME", {"home": "equations"}),
    "equations in blocks": ("MambaHoME", {"home": "equations", "group_order": "blocks"}),
    "level 1 alone": ("MambaHoME", {"home": "local"}),
    "MLP": ("MambaHoME", {"home": "mlp"}),
    "over tokens": ("MambaHoME", {"dispatch": "tokens"}),
    "blocks": ("MambaHoME", {"group_order": "blocks"}),
    "Hilbert": ("MambaHoME", {"group_order": "hilbert"}),
    "product": ("MambaHoME", {"gsc": "product"}),
    "SegMamba's gate": ("SegMamba", {"gsc": "segmamba"}),
    "no gate": ("MambaHoME", {"gsc": "none"}),
    "LayerNorm": ("MambaHoME", {"norm": "layernorm"}),
}
NETWORKS = {"MambaHoME": MambaHoME, "SegMamba": SegMamba}
SILENT = ("group_gate", "slot_norm.gamma")  # may be zero: the norm of level 2 divides the gate out


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_reach_every_parameter_and_the_output_is_finite(switch):
    name, changes = SWITCHES[switch]
    torch.manual_seed(0)
    network = NETWORKS[name](ModelConfig(**TINY, **changes)).train()
    network.set_checkpointing(switch in ("blocks", "three"))
    y = network(torch.randn(1, 1, 32, 20, 36))
    assert y.shape == (1, 3, 32, 20, 36)
    y.square().mean().backward()
    lacking = [n for n, p in network.named_parameters() if p.grad is None]
    assert not lacking
    still = [n for n, p in network.named_parameters() if not p.grad.abs().max() > 0 and not any(mark in n for mark in SILENT) and not _before_a_norm(n)]
    assert not still
    assert np.isfinite(y.detach().numpy()).all()


def _before_a_norm(name: str) -> bool:
    """The bias of a convolution that an instance norm follows: it is taken out again, its gradient is rounding."""
    return name.endswith("bias")


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_output(switch):
    name, changes = SWITCHES[switch]
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    released, changed = (NETWORKS[name](ModelConfig(**TINY, **more)).eval() for more in ({}, changes))
    own = changed.state_dict()
    shared = {n: tensor for n, tensor in released.state_dict().items() if n in own and own[n].shape == tensor.shape}
    changed.load_state_dict(shared, strict=False)
    with torch.no_grad():
        assert not torch.allclose(released(x), changed(x), atol=1e-6)


def test_the_released_network_has_no_new_names():
    names = set(MambaHoME(ModelConfig(**TINY)).state_dict())
    assert not any("others" in name or "weights." in name for name in names)
    assert len(names) == len(set(MambaHoME(ModelConfig(**TINY, mixer="mamba", home="released", gsc="sum")).state_dict()))


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ModelConfig(mixer="none", scan_direction="both"), r"scan_direction: found 'both' with mixer 'none'"),
        (lambda: ModelConfig(home="mlp", group_order="blocks"), r"group_order: found 'blocks' with home 'mlp', which has no groups"),
        (lambda: ModelConfig(home="mlp", dispatch="tokens"), r"dispatch: found 'tokens' with home 'mlp'"),
        (lambda: ModelConfig(home="equations", dispatch="tokens"), r"dispatch: found 'tokens' with home 'equations', whose Eq\. 5 is over slots"),
        (lambda: ModelConfig(home="local", mask_padding=True), r"mask_padding: found true with home 'local', which has no level 2 to fill"),
        (lambda: Settings(network="SegMamba", model={"home": "mlp"}), r"model\.home: found 'mlp', which network SegMamba does not have"),
        (lambda: Settings(network="VNet", model={"norm": "layernorm"}), r"model\.norm: found 'layernorm', which network VNet does not have"),
        (lambda: Settings(model={"width": 8}), r"model\.width: found 8, expected none for MambaHoME"),
        (lambda: ModelConfig(gsc="times"), r"gsc: found 'times'; Input should be 'sum', 'product', 'segmamba' or 'none'"),
        (lambda: Settings(network="VNet", training={"frozen_steps": 5}), r"training\.frozen_steps: found 5, expected 0 for network VNet"),
    ],
)
def test_what_does_not_go_together_is_one_line(make, told):
    with pytest.raises(UserError, match=rf"^{told}") as caught:
        make()
    assert "\n" not in str(caught.value)

"""Which tokens share a group: K in raster order (as released), a 3D block of K tokens, or K along a Hilbert curve; and the directions of a scan.

D H W the grid of a stage's tokens, N = D H W tokens in raster order (last axis fastest), G groups, K tokens a group. Orders other than raster are
switches of the ablation (`ModelConfig.group_order`, `ModelConfig.scan_direction`): the paper says "divides the input sequence", which is raster.
"""

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import UserError
from .scan.backends import undisturbed

Grid = tuple[int, int, int]
SCANS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward"), "three": ("forward", "backward", "slices")}


def check_tokens(x: Tensor, channels: int) -> None:
    """Raises UserError unless x is (B, N, C) of these channels, with at least one token in at least one item."""
    if x.dim() != 3 or x.shape[2] != channels or not x.numel():
        raise UserError(f"input: found shape {tuple(x.shape)}, expected (B, L, {channels}) with at least one item and token.")


def fill_of(n: int, multiple: int) -> int:
    """How many more make a multiple: -n % multiple, written so that PyTorch's compiler takes it for lengths that vary (2.13 fails on a negative number).

    >>> [fill_of(n, 4) for n in (0, 1, 4, 7)]
    [0, 3, 0, 1]
    """
    return (multiple - n % multiple) % multiple


@lru_cache(maxsize=64)  # a handful of grids a network: its stages, for each patch
@undisturbed()  # a table that is kept must not be one of the moment's: of inference, or of a count of operations
def groups_of(order: str, grid: Grid | None, group_size: int, device: str = "cpu") -> Tensor:
    """(G, K) int64: the token, by its place in raster order, that stands at each place of each group; N where it is fill.

    Args:
        order: "blocks" or "hilbert"; "raster" needs no table.
        grid: (D, H, W) of the tokens.
        group_size: K.

    Raises:
        UserError: no grid. A sequence of tokens alone does not say which are neighbours.

    >>> groups_of("blocks", (2, 2, 4), 8)[0].tolist()
    [0, 1, 4, 5, 8, 9, 12, 13]
    """
    if grid is None:
        raise UserError(f"grid: found none, expected (D, H, W) of the tokens for group_order {order!r}.")
    groups = {"blocks": _blocks, "hilbert": _along_hilbert}[order](grid, group_size)
    return groups.to(device)


def gathered(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, C) in their groups, (B, G, K, C), zeros where there is fill; and where that is, (G, K), None where there is none."""
    fill = groups == x.shape[1] if groups.numel() > x.shape[1] else None
    x = F.pad(x, (0, 0, 0, 1)).index_select(1, groups.flatten())
    return rearrange(x, "b (g k) c -> b g k c", k=groups.shape[1]), fill


def scattered(y: Tensor, groups: Tensor, tokens: int) -> Tensor:
    """The inverse of `gathered`: (B, G, K, C) to (B, N, C) in raster order."""
    return rearrange(y, "b g k c -> b (g k) c").index_select(1, groups.flatten().argsort()[:tokens])


def block_shape(grid: Grid, group_size: int) -> Grid:
    """Sides of a block of K tokens: those whose blocks, over the whole grid, have the least surface in all. Near to a cube where that fits the grid."""
    sides = [(a, b, group_size // a // b) for a, b in itertools.product(_divisors(group_size), repeat=2) if group_size % (a * b) == 0]

    def surface(side: Grid) -> int:
        a, b, c = side
        return math.prod(math.ceil(n / s) for n, s in zip(grid, side, strict=True)) * (a * b + b * c + c * a)

    return min(sides, key=surface)


def hilbert_rank(place: Tensor, bits: int) -> Tensor:
    """Place on the Hilbert curve through a cube of side 2^bits: (3, N) int64 coordinates to (N,) int64, neighbours on the curve being neighbours in space.

    Skilling, "Programming the Hilbert curve" (AIP Conf. Proc. 707, 2004): reflections and exchanges of axes from the coarsest bit to the finest, then
    a Gray code.
    """
    x = list(place)
    for bit in range(bits - 1, 0, -1):
        high, low = 1 << bit, (1 << bit) - 1
        for i in range(3):
            reflected = (x[i] & high) > 0
            exchanged = torch.where(reflected, 0, (x[0] ^ x[i]) & low)
            x[0] = torch.where(reflected, x[0] ^ low, x[0] ^ exchanged)
            if i:
                x[i] = x[i] ^ exchanged
    for i in (1, 2):
        x[i] = x[i] ^ x[i - 1]
    flips = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flips = torch.where((x[2] >> bit) & 1 > 0, flips ^ ((1 << bit) - 1), flips)
    rank = torch.zeros_like(x[0])
    for bit, axis in itertools.product(range(bits - 1, -1, -1), range(3)):
        rank = (rank << 1) | (((x[axis] ^ flips) >> bit) & 1)
    return rank


def turned(x: Tensor, direction: str, grid: Grid | None) -> Tensor:
    """Tokens (B, C, N) in the order in which a direction of the scan meets them; "slices" goes through all slices (axis D) at one place, then the next."""
    if direction == "slices":
        D, H, W = _grid_of(grid)
        return rearrange(x, "b c (d h w) -> b c (h w d)", d=D, h=H, w=W)
    return x.flip(-1) if direction == "backward" else x


def turned_back(x: Tensor, direction: str, grid: Grid | None) -> Tensor:
    """The inverse of `turned`, (B, C, N) again in raster order."""
    if direction == "slices":
        D, H, W = _grid_of(grid)
        return rearrange(x, "b c (h w d) -> b c (d h w)", d=D, h=H, w=W)
    return x.flip(-1) if direction == "backward" else x


def _grid_of(grid: Grid | None) -> Grid:
    if grid is None:
        raise UserError("grid: found none, expected (D, H, W) of the tokens for a scan from slice to slice.")
    return grid


def _blocks(grid: Grid, group_size: int) -> Tensor:
    a, b, c = block_shape(grid, group_size)
    tokens = torch.arange(math.prod(grid)).view(grid)
    beyond = [n for size, side in zip(reversed(grid), (c, b, a), strict=True) for n in (0, -size % side)]
    tokens = F.pad(tokens, beyond, value=tokens.numel())
    return rearrange(tokens, "(i a) (j b) (l c) -> (i j l) (a b c)", a=a, b=b, c=c)


def _along_hilbert(grid: Grid, group_size: int) -> Tensor:
    """Where the grid is no cube of side 2^n, the curve through the cube around it, without what lies outside: a step may then be longer than one."""
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    curve = hilbert_rank(place, max(1, (max(grid) - 1).bit_length())).argsort()
    return F.pad(curve, (0, -len(curve) % group_size), value=len(curve)).view(-1, group_size)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

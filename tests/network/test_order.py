"""Orders of tokens: blocks and the Hilbert curve against plain loops, and there and back again."""

import itertools
import math

import pytest
import torch

from homelib import UserError
from homelib.network.order import SCANS, block_shape, gathered, groups_of, hilbert_rank, scattered, turned, turned_back

GRIDS = [((4, 4, 4), 8), ((4, 6, 8), 16), ((5, 3, 7), 8), ((1, 1, 9), 4), ((2, 2, 2), 64)]


@pytest.mark.parametrize("order", ["blocks", "hilbert"])
@pytest.mark.parametrize(("grid", "K"), GRIDS)
def test_every_token_stands_in_one_group_and_comes_back(order, grid, K):
    N = math.prod(grid)
    groups = groups_of(order, grid, K)
    assert groups.shape[1] == K
    assert sorted(groups[groups < N].tolist()) == list(range(N))
    assert (groups <= N).all()
    assert ((groups < N).any(1)).all()  # no group is fill alone
    x = torch.randn(2, N, 3)
    there, fill = gathered(x, groups)
    assert torch.equal(scattered(there, groups, N), x)
    assert (fill is None) == (groups.numel() == N)
    if fill is not None:
        assert torch.equal(fill, groups == N)
        assert (there[:, fill] == 0).all()


@pytest.mark.parametrize(("grid", "K"), GRIDS)
def test_a_block_is_a_box_of_neighbours(grid, K):
    sides = block_shape(grid, K)
    assert math.prod(sides) == K
    for group in groups_of("blocks", grid, K):
        places = [divmod(divmod(n, grid[2])[0], grid[1]) + (n % grid[2],) for n in group.tolist() if n < math.prod(grid)]
        low, high = ([extreme(place[axis] for place in places) for axis in range(3)] for extreme in (min, max))
        assert all(b - a < side and a % side == 0 for a, b, side in zip(low, high, sides, strict=True))
        assert len(places) == math.prod(b - a + 1 for a, b in zip(low, high, strict=True))


def test_blocks_are_as_near_to_cubes_as_the_grid_lets_them():
    assert sorted(block_shape((64, 64, 64), 2048)) == [8, 16, 16]
    assert block_shape((8, 8, 8), 512) == (8, 8, 8)
    assert block_shape((1, 1, 64), 64) == (1, 1, 64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_hilbert_curve_visits_every_cell_of_a_cube_step_by_step(bits):
    side = 2**bits
    places = torch.tensor(list(itertools.product(range(side), repeat=3))).T
    rank = hilbert_rank(places, bits)
    assert sorted(rank.tolist()) == list(range(side**3))
    walk = places[:, rank.argsort()]
    assert ((walk[:, 1:] - walk[:, :-1]).abs().sum(0) == 1).all()
    assert walk[:, 0].tolist() == [0, 0, 0]


def test_directions_are_permutations_that_are_undone():
    x, grid = torch.arange(24.0).view(1, 1, 24), (2, 3, 4)
    assert turned(x, "forward", None) is x
    assert turned(x, "backward", None).flatten().tolist() == list(reversed(range(24)))
    expected = [d * 12 + h * 4 + w for h in range(3) for w in range(4) for d in range(2)]  # one place of all slices, then the next place
    assert turned(x, "slices", grid).flatten().tolist() == expected
    for direction in SCANS["three"]:
        assert torch.equal(turned_back(turned(x, direction, grid), direction, grid), x)


def test_an_order_without_a_grid_is_one_line():
    with pytest.raises(UserError, match=r"^grid: found none, expected \(D, H, W\) of the tokens for group_order 'hilbert'\.$"):
        groups_of("hilbert", None, 8)
    with pytest.raises(UserError, match=r"^grid: found none, expected \(D, H, W\)"):
        turned(torch.zeros(1, 1, 8), "slices", None)

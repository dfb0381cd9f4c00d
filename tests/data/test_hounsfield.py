"""CTs in HU pass, whatever surrounds them; shifted and windowed ones are told; a crop to tissue is left alone."""

import numpy as np
import pytest

from homelib.data.hounsfield import shifted, windowed

WINDOW = (-175.0, 250.0)


@pytest.fixture(scope="module")
def abdomen() -> np.ndarray:
    """Air, lung, fat, organs, vessels and bone, in the shares and with the noise of a real scan of the abdomen, 10 % of it a table and air."""
    rng = np.random.default_rng(0)
    tissues = {(-1000, 15): 40, (-860, 40): 8, (-100, 15): 16, (45, 18): 25, (110, 20): 6, (300, 90): 3, (700, 250): 1.2, (1300, 200): 0.2}
    return np.concatenate([rng.normal(middle, noise, int(share * 2000)) for (middle, noise), share in tissues.items()]).round().clip(-1024, 3071)


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """A head in air: brain, fluid, fat, and a skull as dense as there are any."""
    rng = np.random.default_rng(1)
    parts = [rng.normal(-1000, 10, 60000), rng.normal(32, 6, 50000), rng.normal(8, 6, 5000), rng.normal(-90, 15, 8000), rng.uniform(300, 1800, 14000)]
    return np.concatenate(parts).round()


def crop(image: np.ndarray) -> np.ndarray:
    """Without any air, and not a single voxel of it: fat, organs and bone."""
    return image[image > -200]


def filled(image: np.ndarray, value: float, share: float = 0.3) -> np.ndarray:
    return np.concatenate([image, np.full(int(share * image.size), value)])


def told(image: np.ndarray, window=WINDOW) -> str:
    return shifted(image) or windowed(image, window)


@pytest.mark.parametrize("scan", ["abdomen", "head"])
@pytest.mark.parametrize("padding", [None, -1000, -1024, -2000, -2048, -3024])
def test_ct_in_hu_passes_whatever_surrounds_it(scan, padding, request):
    image = request.getfixturevalue(scan)
    for seen in (image, crop(image)):
        padded = seen if padding is None else filled(seen, padding)
        assert told(padded) == ""
        assert told(padded, (-1000.0, 1000.0)) == ""


@pytest.mark.parametrize("scan", ["abdomen", "head"])
@pytest.mark.parametrize("offset", [1000, 1024])
@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: filled(x, -2000), lambda x: filled(x, -1024), lambda x: filled(x, 0, 3.0), lambda x: np.append(x, -1)],
    ids=["as it is", "padded with -2000", "padded with -1024", "much air", "one voxel below 0"],
)
def test_shifted_ones_are_told_whatever_surrounds_them(scan, offset, change, request):
    image = request.getfixturevalue(scan) + offset
    assert "dense bone" in shifted(change(image))
    assert "dense bone" in shifted(change(crop(image)))


@pytest.mark.parametrize(("low", "high", "zero"), [(-160, 240, 0), (-160, 240, -128), (-1000, 1000, 0), (0, 80, 0), (0, 3071, 0)])
def test_grey_values_are_told_where_there_was_air(low, high, zero, abdomen):
    scale = 255 if high < 3000 else high - low
    grey = ((abdomen.clip(low, high) - low) * scale / (high - low)).round() + zero
    assert "and no air" in windowed(grey, WINDOW)


def test_cut_off_at_the_window_itself_nothing_is_lost(abdomen):
    assert told(abdomen.clip(*WINDOW)) == ""
    assert told(abdomen.clip(-500, 1000)) == ""


def test_nothing_but_air_or_padding_is_not_judged():
    assert told(np.full(100, -1000.0)) == told(np.full(100, -3024.0)) == ""


def test_a_gas_filled_bowel_in_a_crop_says_that_it_is_hu(abdomen):
    rng = np.random.default_rng(2)
    assert told(np.concatenate([crop(abdomen), rng.normal(-980, 20, crop(abdomen).size // 40)])) == ""


def test_the_demos_phantoms_are_in_hu(phantoms):
    from homelib.data.prepare import read_array

    for case in phantoms.values():
        assert told(read_array(case.image)[0].ravel().astype(np.float32)) == ""

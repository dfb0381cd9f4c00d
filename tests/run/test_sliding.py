"""Windows and their sums against MONAI's sliding window; memory that does not grow with the scan."""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from homelib.config import PredictionConfig
from homelib.run.sliding import Windows, finished_rows

CPU = torch.device("cpu")


class Network(torch.nn.Module):
    """Three classes that depend on the neighbourhood and on the place in the window, so that every window and weight counts."""

    def __init__(self, patch, classes=3):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, classes, 3, padding=1)
        self.place = torch.randn(classes, *patch, generator=torch.Generator().manual_seed(1))

    def forward(self, x):
        return self.conv(x) + self.place


def whole(networks, image, patch, settings, *, beyond=0.0, **how):
    windows = Windows.over(image.shape, patch, overlap=settings.overlap)
    parts = list(finished_rows(networks, image, windows, settings, prepare=lambda x: x, beyond=beyond, device=CPU, **how))
    rows = [first for first, _ in parts]
    assert rows == sorted(rows)
    assert rows[0] == 0
    return torch.cat([part for _, part in parts], 1).movedim(1, 1 + windows.axis), windows


@pytest.mark.parametrize("shape", [(20, 31, 17), (40, 9, 13), (8, 8, 8), (5, 30, 6)], ids=str)
@pytest.mark.parametrize(("overlap", "blend"), [(0.5, "gaussian"), (0.0, "constant"), (0.6, "gaussian")])
@torch.inference_mode()
def test_the_finished_rows_are_what_monai_accumulates_whole(shape, overlap, blend):
    patch = (8, 10, 8)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    network = Network(patch)
    settings = PredictionConfig(overlap=overlap, blend=blend, window_batch=3)
    found, windows = whole([network], image, patch, settings, beyond=-1.0)
    seen = torch.from_numpy(image)[None, None]
    expected = sliding_window_inference(seen, patch, 1, network, overlap=overlap, mode=blend, cval=-1.0)[0].softmax(0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert windows.count == len(windows.starts[0]) * len(windows.starts[1]) * len(windows.starts[2])


def test_the_slab_axis_is_the_one_whose_buffer_is_smallest_and_the_buffer_is_as_long_as_the_patch():
    windows = Windows.over((512, 512, 600), (96, 96, 96), overlap=0.5)
    assert windows.axis == 2
    assert windows.buffer_bytes(26) == 4 * 27 * 96 * 512 * 512
    assert windows.buffer_bytes(26) == Windows.over((512, 512, 6000), (96, 96, 96), overlap=0.5).buffer_bytes(26)
    assert Windows.over((400, 300, 200), (64, 128, 128), overlap=0.5).axis == 0


@torch.inference_mode()
def test_networks_and_mirrors_are_averaged_in_their_logits():
    patch = (8, 8, 8)
    image = np.random.default_rng(0).standard_normal(patch).astype(np.float32)
    networks = [Network(patch), Network(patch)]
    x = torch.from_numpy(image)[None, None]
    found, _ = whole(networks, image, patch, PredictionConfig())
    np.testing.assert_allclose(found, (sum(network(x) for network in networks) / 2)[0].softmax(0), atol=1e-5)
    found, _ = whole(networks[:1], image, patch, PredictionConfig(mirror=True))
    flips = [axes for bits in range(8) if (axes := tuple(2 + a for a in range(3) if bits >> a & 1)) is not None]
    mean = sum(networks[0](x.flip(axes)).flip(axes) if axes else networks[0](x) for axes in flips) / 8
    np.testing.assert_allclose(found, mean[0].softmax(0), atol=1e-5)


@torch.inference_mode()
def test_windows_are_read_one_by_one_and_never_the_whole_scan():
    class Far:
        shape, largest = (64, 12, 12), 0

        def __getitem__(self, box):
            size = [part.stop - part.start for part in box]
            self.largest = max(self.largest, int(np.prod(size)))
            return np.zeros(size, np.float32)

    far = Far()
    windows = Windows.over(far.shape, (8, 8, 8), overlap=0.5)
    settings = PredictionConfig(window_batch=2)
    done = []
    for _, rows in finished_rows([Network((8, 8, 8))], far, windows, settings, prepare=lambda x: x, beyond=0.0, device=CPU, on_window=done.append):
        assert rows.shape[1] <= 8
    assert far.largest == 8**3
    assert sum(done) == windows.count


def test_the_nearest_window_has_the_voxel_nearest_its_middle():
    windows = Windows.over((40, 6, 20), (16, 8, 16), overlap=0.5)
    assert windows.starts[0] == (0, 8, 16, 24)
    assert windows.before == (0, 1, 0)
    for place in range(40):
        start = windows.nearest((place, 3, 10))[0]
        assert abs(start + 8 - place) == min(abs(other + 8 - place) for other in windows.starts[0])
    assert windows.nearest((0, 0, 0)) == (0, 0, 0)
    assert windows.nearest((39, 5, 19)) == (24, 0, 4)


@torch.inference_mode()
def test_what_is_handed_on_may_be_the_blend_itself():
    patch, image = (8, 8, 8), np.random.default_rng(0).standard_normal((12, 8, 9)).astype(np.float32)
    network, settings = Network(patch), PredictionConfig()
    blended, _ = whole([network], image, patch, settings, finish=lambda x: x)
    probabilities, _ = whole([network], image, patch, settings)
    np.testing.assert_allclose(blended.softmax(0), probabilities, atol=1e-6)

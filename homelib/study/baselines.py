"""What a trained network must beat: an untrained one, no answer at all, and a rule that a person would write in an hour."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import median_filter

from ..config import Settings
from ..data.prepare import PreparedCase
from ..run.checkpoint import build_network
from ..run.predict import one_hot, predict_probabilities


def untrained(case: PreparedCase, settings: Settings) -> np.ndarray:
    """Probabilities (classes, D, H, W) of the run's network at its random start."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.training.seed)
        network = build_network(settings).eval()
    return predict_probabilities(network, case, settings)


def all_background(case: PreparedCase, settings: Settings) -> np.ndarray:
    """Probabilities (classes, D, H, W) that are certain of the background."""
    return one_hot(np.zeros(case.image.shape, np.uint8), settings.model.out_channels)


@dataclass(frozen=True)
class ThresholdAndPosition:
    """A rule: a voxel is of a class when its intensity and its place in the body's box are as they were in the training patient.

    intensity: (classes, 2) percentile bounds, in HU for CT. place: (classes, 3, 2) percentile bounds, from 0 to 1 along each axis.
    size: (classes,) voxels in the training patient; where two classes claim a voxel, the smaller one gets it.
    """

    intensity: np.ndarray
    place: np.ndarray
    size: np.ndarray
    percentiles = (5, 95)

    @classmethod
    def fit(cls, case: PreparedCase, classes: int) -> "ThresholdAndPosition":
        """Read the bounds off a labelled training patient; a class that is not there claims nothing."""
        intensity, place, size = np.full((classes, 2), np.nan), np.full((classes, 3, 2), np.nan), np.zeros(classes, int)
        places = _places(case.image.shape)
        for index in range(1, classes):
            mask = np.asarray(case.label) == index
            size[index] = mask.sum()
            if size[index]:
                intensity[index] = np.percentile(case.image[mask], cls.percentiles)
                place[index] = [np.percentile(axis[mask], cls.percentiles) for axis in places]
        return cls(intensity, place, size)

    def __call__(self, case: PreparedCase) -> np.ndarray:
        """Probabilities (classes, D, H, W), certain, for another patient; freed of lone voxels by a median filter."""
        label = np.zeros(case.image.shape, np.uint8)
        places = _places(case.image.shape)
        smooth = median_filter(case.image, 3)
        for index in np.argsort(-self.size):  # the larger first, so that the smaller has the last word
            if index and self.size[index]:
                low, high = self.intensity[index]
                claimed = (smooth >= low) & (smooth <= high)
                for axis, (start, end) in zip(places, self.place[index], strict=True):
                    claimed &= (axis >= start) & (axis <= end)
                label[claimed] = index
        return one_hot(label, len(self.size))


def _places(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Place along each axis, 0 to 1, for every voxel."""
    return [np.broadcast_to(np.linspace(0, 1, n).reshape([-1 if a == axis else 1 for a in range(3)]), shape) for axis, n in enumerate(shape)]

"""What the tests of homelib/study share: a finished smoke run, and cases made from arrays."""

from pathlib import Path

import numpy as np
import pytest

from homelib.data.manifest import Case
from homelib.data.prepare import PreparedCase
from homelib.study.demo import DemoRun, demo_run, trained

SPACING_MM = (4.0, 5.0, 6.0)


@pytest.fixture(scope="session")
def case_of():
    """A prepared case (of the manifest demo_ct) from an image in HU and a label."""

    def make(image: np.ndarray, label: np.ndarray | None = None, *, name: str = "made") -> PreparedCase:
        affine = np.diag([*SPACING_MM, 1.0])
        source = Case(name, Path("none.nii.gz"), None, "CT", "SYNTHETIC", "demo_ct")
        return PreparedCase(source, image.astype(np.float32), None if label is None else label.astype(np.uint8), affine, image.shape, affine)

    return make


@pytest.fixture(scope="session")
def smoke_demo(own_cache, tmp_path_factory) -> DemoRun:
    """The smoke profile's demo, a-to-c, trained for its four steps."""
    demo = demo_run("smoke", "a-to-c", folder=tmp_path_factory.mktemp("demo"), changes={"training.accelerator": "cpu"})
    trained(demo, progress=False)
    return demo

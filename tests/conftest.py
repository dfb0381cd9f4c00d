"""What the tests share: a cache of their own, a tiny network, phantom cases, and settings that fit them.

No test reads or writes the user's cache or run folders.
"""

import os
import re
import shutil
import signal
import sys

# Before torch and Triton: threads that spin while they wait make a busy machine several times slower, and without a GPU Triton runs its kernels as Python.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "0" if shutil.which("nvidia-smi") else "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a script starts in the background ignores Ctrl-C, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

from homelib import ModelConfig, Settings, cli  # noqa: E402
from homelib.config import override, preset  # noqa: E402
from homelib.data.demo import DemoData, fetch_demo, phantom_cases  # noqa: E402
from homelib.data.prepare import PreparedCase, prepare  # noqa: E402


def pytest_xdist_auto_num_workers() -> int:
    """-n auto: one more than there are cores, for a worker waits now and then for a process that it has started; 8 at most, for the memory."""
    return min(8, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first, for no test takes as long as they do. Tests marked `long` wait for who asks for them, as CI does: `make test` is to be over in ten
    minutes on two cores."""
    items.sort(key=lambda item: "notebooks" not in item.path.parts)
    if "HOMELIB_TEST_LONG" not in os.environ:
        skip = pytest.mark.skip(reason="takes long, on demand alone: HOMELIB_TEST_LONG=1")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Everything cached lands in a temporary folder, the same for the whole session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMELIB_CACHE", str(folder))
        patch.setenv("HOMELIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """The smallest network in which every part still does something: several groups, experts and slots in every stage of a 32-voxel cube."""
    return ModelConfig(
        depths=(1, 1, 1, 1), channels=(4, 4, 8, 8), hidden_channels=8, group_size=(512, 64, 8, 4),
        experts_local=(2, 3, 2, 2), experts_global=(4, 4, 2, 2), slots_per_expert=2, state_dim=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def smoke() -> Settings:
    """The smoke preset, on the CPU: there a run repeats bit by bit."""
    return override(preset("smoke"), {"training.accelerator": "cpu"})


@pytest.fixture(scope="session")
def phantoms(own_cache):
    """Two synthetic CTs of 48 voxels a side as files: phantom-a, phantom-c."""
    return phantom_cases()


@pytest.fixture(scope="session")
def real_demo(own_cache, tmp_path_factory) -> DemoData:
    """The demo's scans, fetched once for all workers (82 MB) into a folder that goes with the session; a test that asks for it is marked `network`."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    with FileLock(shared / "demo.lock"):
        data = fetch_demo(cache=shared / "demo-cache")
    if not data.real:
        pytest.skip(f"the demo's scans cannot be fetched: {data.message}")
    return data


@pytest.fixture(scope="session")
def prepared(phantoms, smoke) -> PreparedCase:
    """phantom-a at the smoke preset's spacing (12 mm)."""
    return prepare(phantoms["phantom-a"], spacing_mm=smoke.data.spacing_mm)


@pytest.fixture
def home(monkeypatch, capsys):
    """`home ARGUMENTS` in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["home", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def mistake(home):
    """`home ARGUMENTS` that must be refused: the one line on stderr."""

    def call(*arguments) -> str:
        status, out, err = home(*arguments)
        assert status == 2, (out, err)
        assert re.fullmatch(r"home: [^\n]+\n", err), err
        assert "Traceback" not in out + err
        return err[len("home: ") :].strip()

    return call

"""Which cases a run is trained and tested on: the demo's two patients, in either direction, or the phantoms in their place."""

from pathlib import Path

from ..config import Settings, override
from ..errors import UserError
from .demo import DemoData, fetch_demo, phantom_cases
from .manifest import load_manifest
from .prepare import PreparedCase, prepare

DIRECTIONS = {"a-to-c": ("a", "c"), "c-to-a": ("c", "a")}  # trained on, tested on


def with_demo_cases(settings: Settings, *, direction: str = "a-to-c", cache: Path | None = None) -> tuple[Settings, DemoData]:
    """Point settings at the demo's patients.

    Args:
        settings: of a preset. The `smoke` profile takes small generated phantoms, the others the real scans (phantoms when offline).
        direction: "a-to-c" trains on patient a and tests on patient c; "c-to-a" the other way round.
        cache: folder of the data; None is the user's cache.

    Returns:
        Settings with `data.train_cases`, `data.test_cases` and the classes of the data set, and the data, whose `message` says what is real.
    """
    if direction not in DIRECTIONS:
        raise UserError(f"direction: found {direction!r}, expected one of {', '.join(DIRECTIONS)}.")
    if settings.profile == "smoke":
        demo = DemoData(cases=phantom_cases(cache), real=False, message="phantom-a, phantom-c: SYNTHETIC, generated (profile smoke).")
    else:
        demo = fetch_demo(cache=cache)
    prefix = "ct" if "ct-a" in demo.cases else "phantom"
    train, test = (f"{prefix}-{letter}" for letter in DIRECTIONS[direction])
    manifest = load_manifest(settings.data.manifest)
    if manifest.name != demo.cases[train].manifest:
        raise UserError(f"data.manifest: found {settings.data.manifest!r}, expected {demo.cases[train].manifest}, the data set of the demo's patients.")
    return override(settings, {"data.train_cases": (train,), "data.test_cases": (test,), "model.out_channels": len(manifest.class_names)}), demo


def prepared(settings: Settings, demo: DemoData, which: str = "train") -> list[PreparedCase]:
    """The prepared cases of one role, `"train"` or `"test"`. Raises UserError for a case that the data does not hold."""
    wanted = settings.data.train_cases if which == "train" else settings.data.test_cases
    for case_id in wanted:
        if case_id not in demo.cases:
            raise UserError(f"data.{which}_cases: found {case_id!r}, expected one of {', '.join(demo.cases)}.")
    return [prepare(demo.cases[case_id], spacing_mm=settings.data.spacing_mm) for case_id in wanted]

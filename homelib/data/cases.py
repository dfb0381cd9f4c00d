"""Which cases a run is trained and tested on: the demo's two patients, in either direction, or the phantoms in their place."""

from pathlib import Path

from ..config import Settings, override
from ..errors import UserError
from .demo import DemoData, fetch_demo, phantom_cases
from .manifest import load_manifest
from .prepare import PreparedCase, prepare

DIRECTIONS = {"a-to-c": ("a", "c"), "c-to-a": ("c", "a")}  # trained on, tested on


def demo_data(profile: str, *, cache: Path | None = None) -> DemoData:
    """The demo's cases: small generated phantoms for the profile "smoke", else the real scans (phantoms when offline). `cache` None is the user's."""
    if profile == "smoke":
        return DemoData(cases=phantom_cases(cache), real=False, message="phantom-a, phantom-c: SYNTHETIC, generated (profile smoke).")
    return fetch_demo(cache=cache)


def with_demo_cases(settings: Settings, demo: DemoData, *, direction: str = "a-to-c") -> Settings:
    """A preset's settings with the demo's patients and the classes of their data set. What a user sets is set after, and wins.

    Args:
        settings: of a preset.
        demo: the cases.
        direction: "a-to-c" trains on patient a and tests on patient c; "c-to-a" the other way round.

    Raises:
        UserError: another direction.
    """
    if direction not in DIRECTIONS:
        raise UserError(f"direction: found {direction!r}, expected one of {', '.join(DIRECTIONS)}.")
    prefix = "ct" if "ct-a" in demo.cases else "phantom"
    train, test = (f"{prefix}-{letter}" for letter in DIRECTIONS[direction])
    name = demo.cases[train].manifest
    classes = len(load_manifest(name).class_names)
    return override(settings, {"data.manifest": name, "data.train_cases": (train,), "data.test_cases": (test,), "model.out_channels": classes})


def prepared(settings: Settings, demo: DemoData, which: str = "train") -> list[PreparedCase]:
    """The prepared cases of one role, `"train"` or `"test"`. Raises UserError for a case that the data does not hold, or of another data set."""
    wanted = settings.data.train_cases if which == "train" else settings.data.test_cases
    for case_id in wanted:
        if case_id not in demo.cases:
            raise UserError(f"data.{which}_cases: found {case_id!r}, expected one of {', '.join(demo.cases)}.")
        if (theirs := demo.cases[case_id].manifest) != load_manifest(settings.data.manifest).name:
            raise UserError(f"data.manifest: found {settings.data.manifest!r}, expected {theirs}, the data set of {case_id}.")
    return [prepare(demo.cases[case_id], spacing_mm=settings.data.spacing_mm, low_pass=settings.data.low_pass) for case_id in wanted]


def the_one(settings: Settings, demo: DemoData, which: str) -> PreparedCase:
    """The one prepared case of a role: the demo's table and figures are of one training and one test patient. Raises UserError for more or none."""
    wanted = settings.data.train_cases if which == "train" else settings.data.test_cases
    if len(wanted) != 1:
        raise UserError(f"data.{which}_cases: found {len(wanted)} cases ({', '.join(wanted) or 'none'}), expected one patient in the demo.")
    return prepared(settings, demo, which)[0]

"""What a run will take: what it is made of, counted by hand; and the plan that tells it."""

from types import SimpleNamespace

import pytest

from homelib.config import override, preset
from homelib.study import probe as module
from homelib.study.probe import NOTEBOOK_SECONDS, PROCESS_GIB, Probe, Scans, scans_of

DATA = {"amos_ct": "/data"}


def test_scans_that_a_run_looks_at_on_the_demo_are_two_measured_and_more_with_pictures(smoke):
    assert scans_of(smoke, data={}, figures=False) == Scans(validation=2, once=1, measured=2)  # predicted, and traced; at the start too
    assert scans_of(smoke, data={}, figures=True) == Scans(validation=2, once=3, measured=2)
    assert scans_of(override(smoke, {"network": "SegMamba"}), data={}, figures=False) == Scans(validation=1, once=0, measured=2)


def test_on_a_data_set_every_case_that_is_not_trained_on_is_measured():
    names = {"data.train_cases": ("a",), "data.validation_cases": ("b", "c"), "data.test_cases": ("d", "e", "f")}
    assert scans_of(override(preset("paper"), names), data=DATA, figures=True) == Scans(validation=2, once=0, measured=5)


def test_the_seconds_of_a_run_are_those_of_its_parts(monkeypatch, own_cache):
    """10 steps of 2 s with two patches of 0.5 s, validated 4 times; a scan 3 s, the distances 5 s of one patient and 9 s of the other."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("homelib.run.estimate.estimate", lambda settings, cases: SimpleNamespace(step_seconds=2.0, patch_seconds=0.5))
    monkeypatch.setattr("homelib.run.predict.predict_probabilities", lambda network, case, settings: None)
    monkeypatch.setattr(module, "_measured", lambda case, classes: {"phantom-a": 5.0, "phantom-c": 9.0}[case.case.id])
    changes = {"training.steps": 10, "training.batch_size": 2, "training.validate_every": 3, "training.accelerator": "cpu"}
    found = module._probe("smoke", {"home": (changes, "c-to-a"), "none": (changes | {"network": "SegMamba"}, "a-to-c")}, {}, None, False)
    assert found["home"].seconds == 10 * (2 + 2 * 0.5) + (4 * 2 + 1) * 3 + 2 * 3 + 5 + 9 + NOTEBOOK_SECONDS
    assert found["none"].seconds == 10 * (2 + 2 * 0.5) + 4 * 1 * 3 + 2 * 3 + 5 + 9 + NOTEBOOK_SECONDS
    assert found["home"].gib > found["none"].gib > PROCESS_GIB


def test_a_real_probe_of_the_smallest_run_tells_more_for_more_steps(own_cache):
    arms = {name: ({"training.steps": steps, "training.accelerator": "cpu"}, "a-to-c") for name, steps in (("short", 2), ("long", 2000))}
    found = module._probe("smoke", arms, {}, None, True)
    assert NOTEBOOK_SECONDS < found["short"].seconds < found["long"].seconds


# ---------------------------------------------------------------- home ablate plan


def test_a_plan_tells_runs_fingerprints_and_minutes(home, monkeypatch):
    asked = {}

    def probe(profile, arms, *, data, cores, **more):
        asked.update(profile=profile, cores=cores, **more)
        return {arm: Probe(seconds=600.0, gib=2.0) for arm in arms}

    monkeypatch.setattr(module, "probe", probe)
    monkeypatch.setattr("homelib.study.executors.usable_cores", lambda: 2)
    monkeypatch.setattr("homelib.data.memory.free_memory_gib", lambda: 100.0)
    status, out, err = home("ablate", "plan", "smoke", "-p", "figures=false")
    assert status == 0, err
    assert asked == {"profile": "smoke", "cores": 1, "figures": False}
    assert "fingerprint" in out  # names and numbers are folded in a narrow terminal
    assert "6 runs; left: about 30 minutes, 2 at once here, each up to 2.0 GiB." in out
    home("ablate", "plan", "smoke", "--cores", "2")
    assert asked["cores"] == 2


def test_a_plan_without_a_probe_measures_nothing(home, monkeypatch):
    monkeypatch.setattr(module, "probe", None)
    status, out, err = home("ablate", "plan", "smoke", "--no-probe")
    assert status == 0, err
    assert "6 runs; --probe estimates their time." in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("smoke", "-p", "figurs=false"), "parameters: no notebook knows figurs; they have"), (("experts",), "--root: found 0 for 1 data sets (amos_ct)")],
)
def test_a_plan_of_what_could_not_be_run_is_one_line(arguments, told, mistake):
    assert mistake("ablate", "plan", *arguments).startswith(told)

"""The demo's two runs: patients never shared, settings checked, trained once."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from homelib import UserError
from homelib.config import override, preset
from homelib.run.checkpoint import trained_network
from homelib.run.evaluate import evaluate
from homelib.run.predict import predict_probabilities
from homelib.study import demo as module
from homelib.study.demo import DemoRun, demo_run, trained, trained_side_by_side


def ids(demo: DemoRun) -> tuple[str, str]:
    assert demo.settings.data.train_cases == (demo.train_case.case.id,)
    assert demo.settings.data.test_cases == (demo.test_case.case.id,)
    return demo.train_case.case.id, demo.test_case.case.id


def test_the_two_directions_swap_two_different_patients(tmp_path):
    there, back = (demo_run("smoke", direction, folder=tmp_path) for direction in ("a-to-c", "c-to-a"))
    assert ids(there) == ("phantom-a", "phantom-c")
    assert ids(back) == ("phantom-c", "phantom-a")
    assert there.run.folder == tmp_path / "training" / "smoke-a-to-c"
    assert back.run.folder == tmp_path / "training" / "smoke-c-to-a"
    assert (there.train_case.image == back.test_case.image).all()
    assert there.train_case.image.shape != there.test_case.image.shape or (there.train_case.image != there.test_case.image).any()


def test_setting_up_writes_no_run_and_says_what_is_synthetic(tmp_path):
    demo = demo_run("smoke", folder=tmp_path)
    assert not any(tmp_path.iterdir())
    assert "SYNTHETIC" in demo.data.message
    assert not demo.data.real
    assert demo.class_names[0] == "background"
    assert len(demo.class_names) == demo.settings.model.out_channels
    assert demo.window == (-175, 250)
    assert demo.train_case.spacing_mm == demo.settings.data.spacing_mm


def test_the_folder_is_runs_demo_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMELIB_RUNS", str(tmp_path))
    assert demo_run("smoke").run.folder == tmp_path / "demo" / "training" / "smoke-a-to-c"


def test_changes_are_settings_by_dotted_name(tmp_path):
    demo = demo_run("smoke", folder=tmp_path, changes={"training.steps": 3, "data.spacing_mm": [14, 14, 14]})
    assert demo.settings.training.steps == 3
    assert demo.train_case.spacing_mm == (14, 14, 14)


@pytest.mark.parametrize("profile", ["smoke", "laptop", "paper"])
def test_the_number_of_classes_follows_the_data(profile, tmp_path):
    assert demo_run(profile, folder=tmp_path).settings.model.out_channels == 9


def test_a_run_of_a_grid_is_never_of_phantoms_in_place_of_the_real_scans(tmp_path, smoke_demo, monkeypatch):
    monkeypatch.setattr(module, "demo_data", lambda profile: smoke_demo.data)
    with pytest.raises(UserError, match=r"^profile: found 'laptop' without the real scans, expected them in a grid\. `home data fetch demo`"):
        demo_run("laptop", run_folder=tmp_path / "run")
    assert not any(tmp_path.iterdir())
    assert demo_run("laptop", folder=tmp_path).run.folder.parent == tmp_path / "training"  # the demo itself says what it is of
    assert demo_run("smoke", run_folder=tmp_path / "run").run.folder == tmp_path / "run"


def test_what_a_user_sets_wins_over_the_direction(tmp_path):
    swapped = demo_run("smoke", folder=tmp_path, changes={"data.train_cases": ["phantom-c"], "data.test_cases": ["phantom-a"]})
    assert ids(swapped) == ("phantom-c", "phantom-a")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.train_cases": ["phantom-c"]}, r"^data\.train_cases and data\.test_cases share phantom-c;"),
        ({"data.test_cases": ["ct-a"]}, r"^data\.test_cases: found 'ct-a', expected one of phantom-a, phantom-c\.$"),
        ({"data.test_cases": []}, r"^data\.test_cases: found 0 cases \(none\), expected one patient in the demo\.$"),
        ({"data.manifest": "demo_mr_spine"}, r"^data\.manifest: found 'demo_mr_spine', expected demo_ct, the data set of phantom-a\.$"),
    ],
)
def test_cases_that_the_demo_cannot_take_are_named(changes, told, tmp_path):
    with pytest.raises(UserError, match=told):
        demo_run("smoke", folder=tmp_path, changes=changes)


def test_a_number_of_classes_that_is_not_the_datas_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^model\.out_channels: found 3, expected 9"):
        trained(demo_run("smoke", folder=tmp_path, changes={"model.out_channels": 3}), progress=False)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"profile": "smoke", "changes": {"training.step": 3}}, r"^training\.step: no such field; did you mean training\.steps\?"),
        ({"profile": "smoke", "changes": {"training.steps": "many"}}, r"^training\.steps: found 'many'"),
        ({"profile": "smok"}, r"^profile: found 'smok', expected one of smoke, laptop, paper, released; did you mean smoke\?"),
        ({"profile": "smoke", "direction": "c-to-c"}, r"^direction: found 'c-to-c', expected one of a-to-c, c-to-a"),
    ],
    ids=["unknown setting", "wrong value", "unknown profile", "unknown direction"],
)
def test_wrong_words_are_named_in_one_line(asked, told, tmp_path):
    with pytest.raises(UserError, match=told) as raised:
        demo_run(**asked, folder=tmp_path)
    assert "\n" not in str(raised.value)


def test_a_run_is_trained_once(smoke_demo, monkeypatch):
    def no_step(*args, **kwargs):
        raise AssertionError("trained again")

    kept = {name: (smoke_demo.run.folder / name).read_bytes() for name in ("best.safetensors", "last.ckpt", "history.csv", "settings.json")}
    monkeypatch.setattr("homelib.run.train.train_step", no_step)
    run = trained(smoke_demo, progress=False)
    assert run.state == "done"
    assert {name: (run.folder / name).read_bytes() for name in kept} == kept


def test_its_dice_on_the_training_patient_joins_the_history(smoke_demo):
    history = smoke_demo.run.history
    assert history["step"].tolist() == [0, 1, 2, 3]
    assert history["training_patient_dice"].notna().tolist() == [False, True, False, True]  # validate_every is 2
    predicted = predict_probabilities(trained_network(smoke_demo.run), smoke_demo.train_case, smoke_demo.settings).argmax(0)
    table = evaluate(
        predicted,
        smoke_demo.train_case.label,
        spacing_mm=(12, 12, 12),
        class_names=smoke_demo.class_names,
        case="",
        method="",
        label_origin="",
        metrics=("dice",),
    )
    assert history["training_patient_dice"].iloc[-1] == pytest.approx(table["value"].mean(), abs=1e-6)


def test_the_test_patient_takes_no_part_in_training(smoke_demo, tmp_path):
    blind = replace(smoke_demo, run=type(smoke_demo.run)(tmp_path / "blind"), test_case=None)
    run = trained(blind, progress=False)
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), smoke_demo.run.history.drop(columns="seconds"))
    assert (run.folder / "best.safetensors").read_bytes() == smoke_demo.run.weights_file.read_bytes()


# ---------------------------------------------------------------- side by side

ON_CPU = {"training.accelerator": "cpu"}


@pytest.fixture
def pair(tmp_path) -> dict[str, DemoRun]:
    return {direction: demo_run("smoke", direction, folder=tmp_path, changes=ON_CPU) for direction in ("a-to-c", "c-to-a")}


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two cores")
@pytest.mark.long
def test_side_by_side_each_run_is_what_it_is_alone_in_a_process_of_its_own_and_one_that_fails_is_named(pair, tmp_path, monkeypatch, capsys):
    bad = demo_run("smoke", "a-to-c", folder=tmp_path / "bad", changes=ON_CPU | {"model.out_channels": 3})
    monkeypatch.setattr(module, "fit", no_step_here)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(UserError, match=r"^model\.out_channels: found 3, expected 9"):
        trained_side_by_side({"bad": bad} | pair, progress=True)
    assert not bad.run.folder.exists()
    assert {demo.run.state for demo in pair.values()} == {"done"}
    monkeypatch.undo()
    told = capsys.readouterr().out
    assert "smoke-a-to-c, smoke-a-to-c, smoke-c-to-a: " in told
    assert "8/12" in told
    runs = trained_side_by_side(pair, progress=False)
    assert {name: run.state for name, run in runs.items()} == {"a-to-c": "done", "c-to-a": "done"}
    assert all(run.status["steps"] == 4 for run in runs.values())
    alone = trained(demo_run("smoke", "c-to-a", folder=tmp_path / "alone", changes=ON_CPU), progress=False)
    pd.testing.assert_series_equal(runs["c-to-a"].history["loss"], alone.history["loss"], rtol=1e-4)
    assert not runs["a-to-c"].history["loss"].equals(runs["c-to-a"].history["loss"])


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two cores")
@pytest.mark.long
def test_a_bar_is_not_left_behind_above_the_first_figure(pair, monkeypatch, capsys):
    monkeypatch.setattr(module, "WATCH_SECONDS", 0)
    trained_side_by_side(pair, watch=lambda histories: print("FIGURE"))
    above = capsys.readouterr().out.partition("FIGURE")[0]
    assert "smoke-a-to-c, smoke-c-to-a: " in above
    assert above.split("\r")[-1].strip() == ""
    assert above.split("\r")[-2].strip() == "", "what is written over it is blank"


def no_step_here(*args, **kwargs):
    raise AssertionError("trained in this process")


def test_on_one_core_or_with_a_gpu_one_comes_after_the_other(pair, monkeypatch):
    began = []
    monkeypatch.setattr(module, "trained", lambda demo, progress, also: began.append(demo.run.name))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    trained_side_by_side(pair, progress=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    anywhere = {name: replace(demo, settings=override(demo.settings, {"training.accelerator": "auto"})) for name, demo in pair.items()}
    trained_side_by_side(anywhere, progress=False)
    assert began == ["smoke-a-to-c", "smoke-c-to-a"] * 2


def test_one_after_the_other_curves_are_drawn_at_validations_too_but_not_at_each(pair, monkeypatch):
    """By a clock on which a validation comes every 20 seconds; of four of each training, every second one is drawn, and the end."""
    drawn, now = [], [0.0]

    def trained(demo, progress, also):
        for step in (10, 20, 30, 40):
            now[0] += 20
            before = len(drawn)
            assert also(step, None) == {}
            steps.append((demo.run.name, step, len(drawn) > before))

    steps: list = []
    monkeypatch.setattr(module, "trained", trained)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    trained_side_by_side(pair, progress=False, watch=lambda histories: drawn.append(tuple(histories)))
    assert [told for *_, told in steps] == [True, False] * 4
    assert drawn == [("a-to-c", "c-to-a")] * 6


def test_what_is_called_at_validations_too_is_called(smoke_demo, tmp_path):
    seen = []
    trained(demo_run("smoke", folder=tmp_path, changes=ON_CPU), progress=False, also=lambda step, network: seen.append(step) or {})
    assert seen == [2, 4]


# ---------------------------------------------------------------- profile paper


class Fitted(Exception):
    """In place of a training that would take days."""


@pytest.fixture
def paper(smoke_demo, tmp_path, monkeypatch) -> DemoRun:
    def fit(*args, **kwargs):
        raise Fitted

    monkeypatch.setattr(module, "fit", fit)
    return replace(smoke_demo, settings=preset("paper"), run=type(smoke_demo.run)(tmp_path / "paper"))


def test_paper_without_a_cuda_gpu_is_refused_in_one_line(paper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^profile: found 'paper' on a machine without a CUDA GPU.*training\.accelerator") as raised:
        trained(paper)
    assert "\n" not in str(raised.value)
    assert not paper.run.folder.exists()


def test_paper_is_trained_on_a_gpu_or_where_the_cpu_is_asked_for(paper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Fitted):
        trained(paper)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Fitted):
        trained(replace(paper, settings=override(paper.settings, {"training.accelerator": "cpu"})))


def test_a_paper_run_that_is_done_elsewhere_can_be_looked_at_without_a_gpu(paper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paper.run.set_state("done")
    with pytest.raises(Fitted):
        trained(paper)

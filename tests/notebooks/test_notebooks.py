"""The notebooks as they are committed, and as they run: every one of them, in order, in the smoke profile."""

import ast
import base64
import io
import json
import re
import sys

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from homelib import Settings, cli
from homelib.study import workbook
from homelib.study.workbook import notebooks, run_workbook

NOTEBOOKS = {path.stem: path for path in notebooks()}
ON_DATA = {f"on_data/{path.stem}": path for path in sorted((notebooks()[0].parent / "on_data").glob("*.ipynb"))}
MAY_IMPORT = {"homelib", "numpy", "pandas", "torch", "matplotlib", "IPython", "nibabel"}
FIGURES = {  # at least
    "00_start_here": 2,
    "01_data_preparation": 11,
    "02_model_walkthrough": 3,
    "03_training": 3,
    "04_prediction_and_evaluation": 10,
    "06_expert_routing": 11,
}

pytestmark = pytest.mark.timeout(1800)  # the first one to run waits for all notebooks
each = pytest.mark.parametrize("name", NOTEBOOKS)


def cells(name: str, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == kind]


def parsed(cell) -> ast.Module:
    """A cell as Python; lines for IPython alone (%, !) left out."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def nodes(name: str, *kinds) -> list:
    return [node for cell in cells(name) for node in ast.walk(parsed(cell)) if isinstance(node, kinds)]


# ---------------------------------------------------------------- as they are committed


def test_the_story_is_complete_and_in_order():
    assert list(NOTEBOOKS)[:5] == ["00_start_here", "01_data_preparation", "02_model_walkthrough", "03_training", "04_prediction_and_evaluation"]
    assert list(NOTEBOOKS)[-3:] == ["05_ablations", "06_expert_routing", "07_result_tables"]
    numbers = [name[:2] for name in NOTEBOOKS]
    assert sorted(set(numbers)) == numbers
    contents = "\n".join(cell.source for cell in cells("00_start_here", "markdown"))
    assert [name for name in NOTEBOOKS if name not in contents] == []


@each
def test_it_is_a_valid_notebook_for_python(name):
    notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["kernelspec"]["language"] == "python"  # papermill needs it to set parameters
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}


@each
def test_its_formulas_keep_their_commands(name):
    """A doubled backslash is a line break to LaTeX, and the command's name stands in the formula as letters."""
    told = "\n".join(cell.source for cell in cells(name, "markdown"))
    assert "\\\\" not in told


@each
def test_it_is_committed_without_outputs_or_traces_of_a_run(name):
    for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}
        assert cell.source.strip(), "an empty cell"


@each
def test_it_has_one_parameters_cell_before_all_other_code_that_holds_literals_alone(name):
    tagged = [number for number, cell in enumerate(cells(name)) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [0]
    values = {}
    for line in parsed(cells(name)[0]).body:
        assert isinstance(line, ast.Assign)
        (target,) = line.targets
        values[target.id] = ast.literal_eval(line.value)
    assert values["profile"] == "laptop"
    assert workbook.parameters_of(NOTEBOOKS[name]) == values


@pytest.mark.parametrize("name", ["03_training", "04_prediction_and_evaluation"])
def test_pictures_can_be_left_out_of_a_batch(name):
    assert workbook.parameters_of(NOTEBOOKS[name])["figures"] is True


@each
def test_it_begins_with_title_question_and_minutes_and_says_where_it_runs(name):
    first = nbformat.read(NOTEBOOKS[name], as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    assert re.search(r"^\*\*Question:\*\* \S.*\?$", first.source, re.MULTILINE)
    assert re.search(r"^Minutes: \S", first.source, re.MULTILINE)
    assert "print(environment_line())" in "\n".join(cell.source for cell in cells(name)[:3])


@each
def test_it_is_short(name):
    assert len(nbformat.read(NOTEBOOKS[name], as_version=4).cells) <= 40
    for function in nodes(name, ast.FunctionDef, ast.AsyncFunctionDef):
        assert function.end_lineno - function.lineno < 10, f"{function.name} belongs in the package"
    assert nodes(name, ast.ClassDef) == []


@each
def test_it_ends_with_a_check(name):
    assert any(isinstance(node, ast.Assert) for node in ast.walk(parsed(cells(name)[-1])))


@pytest.mark.parametrize("name", [*(name for name in NOTEBOOKS if name != "00_start_here"), *ON_DATA])
def test_its_last_words_are_an_exercise_and_where_to_go_next(name):
    last = nbformat.read((NOTEBOOKS | ON_DATA)[name], as_version=4).cells[-1]
    assert last.cell_type == "markdown"
    exercise, arrow, onward = last.source.partition("\n\n**Next:** ")
    assert re.match(r"## Exercise\n\n\S", exercise)
    assert re.search(r"`[^`]+`", exercise), "it names a parameter, a line or a command to change"
    assert "?" in exercise, "it says what to look at"
    assert arrow
    known = [*NOTEBOOKS, *ON_DATA, "`home "]
    assert any(place in onward for place in known), "a notebook or a command"
    assert all(place in known for place in re.findall(r"\b(?:on_data/)?\d\d_\w+", last.source))


def test_each_notebook_leads_to_the_one_after_it():
    story = [name for name in NOTEBOOKS if "01_" <= name < "08_"]
    for name, following in zip(story, story[1:], strict=False):
        assert f"**Next:** {following} " in cells(name, "markdown")[-1].source


@each
def test_it_imports_from_the_package_and_its_tools_alone(name):
    imported = {alias.name for node in nodes(name, ast.Import) for alias in node.names} | {node.module for node in nodes(name, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= MAY_IMPORT


@each
def test_every_name_that_it_imports_is_used(name):
    bound = {alias.asname or alias.name.split(".")[0] for node in nodes(name, ast.Import, ast.ImportFrom) for alias in node.names}
    used = {node.id for node in nodes(name, ast.Name)}
    assert bound - used == set()


# ---------------------------------------------------------------- as they run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole workbook in the smoke profile, each notebook in a process of its own: name -> how it ended."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_workbook(folder, {"profile": "smoke", "folder": str(folder)}, progress=False)
    return {ended.name: ended for ended in done}


def outputs(ended) -> list:
    return [output for cell in nbformat.read(ended.notebook, as_version=4).cells for output in cell.get("outputs", [])]


def printed(ended, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs(ended) if output.output_type == "stream" and output.name == stream)


@pytest.mark.slow
def test_every_notebook_runs_to_its_end(demo):
    assert {name: ended.error for name, ended in demo.items()} == dict.fromkeys(NOTEBOOKS)


@each
@pytest.mark.slow
def test_its_executed_copy_is_of_the_smoke_profile_and_without_warnings(demo, name):
    text = demo[name].notebook.read_text(encoding="utf-8")
    assert 'profile = \\"smoke\\"' in text
    assert "Warning" not in printed(demo[name], "stderr")
    assert "homelib" in printed(demo[name]).splitlines()[0], "the environment line"


@each
@pytest.mark.slow
def test_its_page_holds_its_figures_and_none_is_blank(demo, name):
    page = demo[name].html.read_text(encoding="utf-8")
    assert "<title>" in page
    pictures = [base64.b64decode(data) for data in re.findall(r'<img[^>]*src="data:image/png;base64,([A-Za-z0-9+/=\n]+)"', page)]
    assert len(pictures) >= FIGURES.get(name, 0)
    assert len(set(pictures)) == len(pictures), "a figure is shown twice"
    for picture in pictures:
        assert matplotlib.image.imread(io.BytesIO(picture))[..., :3].std() > 0.05


@pytest.mark.long
@pytest.mark.slow
def test_the_grid_that_it_ran_is_known_on_the_command_line_and_not_run_again(demo, home):
    folder = demo["05_ablations"].notebook.parent / "ablations" / "smoke"
    run = folder / "released_seed0_c-to-a"
    assert {"03_training.ipynb", "04_prediction_and_evaluation.ipynb", "log.txt", "metrics.csv", "status.json"} <= {path.name for path in run.iterdir()}
    written = (run / "metrics.csv").stat().st_mtime_ns
    for arguments, told in ((["resume"], "2 done"), (["status"], "2 done"), (["collect"], "2 of 2 runs")):
        status, out, err = home("ablate", *arguments, folder)
        assert status == 0, (out, err)
        assert told in out
    assert (run / "metrics.csv").stat().st_mtime_ns == written
    table = pd.read_csv(folder / "results.csv")
    assert set(table["fold"]) == {"c-to-a"}
    assert set(table.loc[table["role"] == "test", "case"]) == {"phantom-a"}
    assert pd.read_csv(folder / "runs.csv")["training_seconds"].notna().all()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["a-to-c", "c-to-a"])
def test_each_direction_leaves_a_complete_run(demo, direction):
    run = demo["03_training"].notebook.parent / "training" / f"smoke-{direction}"
    trained_on, tested_on = (f"phantom-{letter}" for letter in direction.split("-to-"))
    settings = Settings.load(run / "settings.json")
    assert (settings.data.train_cases, settings.data.test_cases) == ((trained_on,), (tested_on,))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    history = pd.read_csv(run / "history.csv")
    assert history["step"].tolist() == list(range(settings.training.steps))
    assert np.isfinite(history["loss"]).all()
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics.groupby("role")["case"].unique().map(list).to_dict() == {"test": [tested_on], "train": [trained_on]}
    assert set(metrics["label_origin"]) == {"SYNTHETIC"}
    for name in ("last.ckpt", "best.safetensors"):
        assert (run / name).stat().st_size > 1000
    predictions = {path.name for path in (run / "predictions").iterdir()}
    methods = ("MambaHoME", "untrained-network", "all-background", "HU-threshold-and-position")
    assert predictions == {f"{tested_on}_{method}.nii.gz" for method in methods} | {f"{trained_on}_MambaHoME.nii.gz"}


@pytest.mark.slow
def test_what_is_synthetic_is_called_so(demo):
    for name in ("00_start_here", "01_data_preparation", "03_training"):
        assert "SYNTHETIC" in printed(demo[name]), name
    for name in ("04_prediction_and_evaluation", "06_expert_routing", "07_result_tables"):
        assert "SYNTHETIC" in demo[name].html.read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_the_last_notebooks_means_are_those_of_the_rows(demo):
    for direction in ("a-to-c", "c-to-a"):
        metrics = pd.read_csv(demo["07_result_tables"].notebook.parent / "training" / f"smoke-{direction}" / "metrics.csv")
        rows = metrics[(metrics["role"] == "test") & (metrics["metric"] == "dice")]
        best, mean = max(((method, 100 * table["value"].mean()) for method, table in rows.groupby("method")), key=lambda pair: pair[1])
        assert f"{direction}: the highest mean Dice on the unseen patient has {best} ({mean:.1f} %)" in printed(demo["07_result_tables"])


@pytest.mark.slow
def test_the_ablations_two_runs_are_done_and_collected(demo):
    folder = demo["05_ablations"].notebook.parent / "ablations" / "smoke"
    results = pd.read_csv(folder / "results.csv")
    assert set(results["arm"]) == {"released", "no-home"}
    assert set(results.loc[results["role"] == "test", "case"]) == {"phantom-a"}
    for arm in ("released", "no-home"):
        run = folder / f"{arm}_seed0_c-to-a"
        assert json.loads((run / "status.json").read_text())["state"] == "done"
        assert Settings.load(run / "settings.json").network == {"released": "MambaHoME", "no-home": "SegMamba"}[arm]


@pytest.mark.slow
def test_nothing_but_runs_copies_pages_and_the_log_is_left(demo):
    folder = demo["00_start_here"].notebook.parent
    copies = {f"{name}.{kind}" for name in NOTEBOOKS for kind in ("ipynb", "html")}
    assert {path.name for path in folder.iterdir()} == {"log.txt", "training", "ablations"} | copies


@pytest.mark.parametrize(("source", "status"), [("assert profile == 'smoke'", 0), ("assert profile == 'paper', 'not [/this] one'", 1)], ids=["well", "failing"])
def test_home_demo_says_by_its_exit_status_whether_a_notebook_failed(tmp_path, monkeypatch, capsys, source, status):
    shelf = tmp_path / "notebooks"
    shelf.mkdir()
    parameters = new_code_cell('profile = "laptop"\nfolder = ""', metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(source)], metadata=metadata), shelf / "00_only.ipynb")
    monkeypatch.setattr(workbook, "shipped", lambda name: tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["home", "demo", "--profile", "smoke", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0) == status
    told = capsys.readouterr()
    assert str(tmp_path / "out" / "00_only.html") in told.out
    assert ("cell 2: AssertionError: not [/this] one" in told.out) is bool(status)
    assert ("00_only: cell 2: AssertionError: not [/this] one" in told.err) is bool(status)

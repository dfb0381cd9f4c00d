"""The workbook's runner: parameters are checked, a failure is named and stays a failure of one notebook, each has a process of its own."""

import os
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from rich.console import Console

from homelib import UserError
from homelib.study import workbook
from homelib.study.comparison import measure
from homelib.study.demo_report import report
from homelib.study.workbook import Executed, notebooks, parameters_of, run_notebook, run_workbook

PARAMETERS = 'profile = "laptop"  # a comment\nfolder = ""\n\nsteps = [1, -2.5]\nchanges = {"a.b": None}'
TELL = 'import os\nprint("process", os.getpid(), "profile", profile)'


def write(path, *cells, parameters: str | None = 'profile = "laptop"'):
    """A notebook: a title, its parameters, then the cells."""
    tagged = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters is not None else []
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(metadata=metadata, cells=[new_markdown_cell("# Title"), *tagged, *map(new_code_cell, cells)]), path)
    return path


def page(path) -> str:
    return path.read_text(encoding="utf-8")


def printed(path) -> str:
    return "".join(output.get("text", "") for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", []))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of the test's own in place of notebooks/."""
    monkeypatch.setattr(workbook, "shipped", lambda name: tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


# ---------------------------------------------------------------- parameters


def test_parameters_are_literals_by_name(tmp_path):
    assert parameters_of(write(tmp_path / "10.ipynb", "other = 1", parameters=PARAMETERS)) == {
        "profile": "laptop",
        "folder": "",
        "steps": [1, -2.5],
        "changes": {"a.b": None},
    }


@pytest.mark.parametrize("text", ["import os", "a = 1 + b", "a = int('3')", "a, b = 1, 2", "a =", "print(1)", "a: int = 1", "a += 1"])
def test_a_parameters_cell_with_more_than_literals_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"^10\.ipynb: its parameters cell holds more than `name = literal` lines"):
        parameters_of(write(tmp_path / "10.ipynb", parameters=f"profile = 'smoke'\n{text}"))


def test_a_notebook_without_parameters_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^10\.ipynb: no cell tagged 'parameters'"):
        parameters_of(write(tmp_path / "10.ipynb", "profile = 1", parameters=None))


def test_an_unknown_parameter_of_a_notebook_is_an_error(tmp_path):
    notebook = write(tmp_path / "10.ipynb")
    with pytest.raises(UserError, match=r"^10\.ipynb: no parameter profil, seed; it has profile"):
        run_notebook(notebook, tmp_path / "out" / "10.ipynb", {"profil": 1, "profile": 2, "seed": 3}, log=tmp_path / "log.txt")
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_no_notebook_knows_is_an_error(shelf, tmp_path):
    write(shelf / "10_a.ipynb", parameters=PARAMETERS)
    write(shelf / "20_b.ipynb")
    with pytest.raises(UserError, match=r"^parameters: no notebook knows profil; they have changes, folder, profile, steps"):
        run_workbook(tmp_path / "out", {"profil": "smoke", "folder": "x"}, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_notebook_is_never_its_own_executed_copy(tmp_path):
    notebook = write(tmp_path / "10.ipynb")
    before = notebook.read_bytes()
    with pytest.raises(UserError, match=r"10\.ipynb: found the notebook itself"):
        run_notebook(notebook, tmp_path / "." / "10.ipynb", {}, log=tmp_path / "log.txt")
    assert notebook.read_bytes() == before


# ---------------------------------------------------------------- which notebooks


def test_notebooks_come_in_order_and_others_do_not_count(shelf):
    for name in ("20_b", "00_a", "notes", "3_c"):
        write(shelf / f"{name}.ipynb")
    assert [n.stem for n in notebooks()] == ["00_a", "20_b"]


def test_an_empty_shelf_is_one_line(shelf):
    with pytest.raises(UserError, match="no notebooks there"):
        notebooks()


@pytest.fixture
def ran(monkeypatch):
    """Names and parameters of what run_workbook would execute."""
    seen = {}

    def run_notebook(notebook, out, parameters, *, log):
        seen[notebook.stem] = parameters
        return Executed(notebook.stem, out, None, 0.0)

    monkeypatch.setattr(workbook, "run_notebook", run_notebook)
    return seen


def test_each_notebook_is_given_the_parameters_that_it_knows(shelf, tmp_path, ran):
    write(shelf / "10_a.ipynb", parameters=PARAMETERS)
    write(shelf / "20_b.ipynb")
    run_workbook(tmp_path / "out", {"profile": "smoke", "folder": "x"}, progress=False)
    assert ran == {"10_a": {"profile": "smoke", "folder": "x"}, "20_b": {"profile": "smoke"}}


def test_one_notebook_alone_may_know_fewer_parameters(shelf, tmp_path, ran):
    write(shelf / "10_a.ipynb", parameters=PARAMETERS)
    write(shelf / "20_b.ipynb")
    run_workbook(tmp_path / "out", {"profile": "smoke", "folder": "x"}, only=["20"], progress=False)
    assert ran == {"20_b": {"profile": "smoke"}}


def test_a_beginning_that_no_notebook_has_is_an_error(shelf, tmp_path, ran):
    write(shelf / "10_a.ipynb")
    with pytest.raises(UserError, match=r"^notebooks: none begins with 99; there are 10_a"):
        run_workbook(tmp_path / "out", {}, only=["99"], progress=False)
    assert not ran


# ---------------------------------------------------------------- execution


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[str, Executed]:
    """Four notebooks run for real: one that is well, one whose third cell raises, one whose kernel dies, and one after them."""
    folder = tmp_path_factory.mktemp("workbook")
    shelf = folder / "notebooks"
    write(shelf / "10_well.ipynb", TELL, 'name = "of 10_well"', 'from IPython.display import Markdown\nMarkdown("*done*")', parameters=PARAMETERS)
    write(shelf / "20_raises.ipynb", 'print("before")\nraise ValueError("no [/such] thing µ\\nand more")', 'print("never")')
    write(shelf / "30_dies.ipynb", TELL, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 'print("never")')
    write(shelf / "40_after.ipynb", TELL, 'assert "name" not in globals()')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbook, "shipped", lambda name: folder / name)
        out = folder / "out"
        out.mkdir()
        for old in ("30_dies.html", "30_dies.ipynb"):
            (out / old).write_text("of an earlier run")
        done = run_workbook(out, {"profile": "smoke", "folder": "x"}, progress=False)
    assert [d.name for d in done] == ["10_well", "20_raises", "30_dies", "40_after"]
    return {d.name: d for d in done}


def test_a_notebook_that_is_well_has_its_values_outputs_and_page(executed):
    well = executed["10_well"]
    assert well.error is None
    assert well.seconds > 0
    assert "profile smoke" in printed(well.notebook)
    assert "<em>done</em>" in page(well.html)


def test_a_failure_names_the_cell_as_the_notebook_counts_the_error_and_its_first_line(executed):
    assert executed["20_raises"].error == "cell 3: ValueError: no [/such] thing µ"


def test_a_failing_notebook_leaves_its_outputs_and_its_page(executed):
    assert "before" in printed(executed["20_raises"].notebook)
    assert "never" not in printed(executed["20_raises"].notebook)
    assert "no [/such] thing µ" in page(executed["20_raises"].html)


def test_a_kernel_that_dies_is_named_with_its_cell(executed):
    dead = executed["30_dies"]
    assert re.fullmatch(r"cell 4: .*DeadKernelError: Kernel died", dead.error)
    assert "process" in printed(dead.notebook)
    assert "of an earlier run" not in page(dead.html)


def test_the_notebook_after_a_failure_still_runs(executed):
    assert executed["40_after"].error is None
    assert executed["40_after"].html.exists()


def test_each_notebook_has_a_process_of_its_own(executed):
    processes = [int(re.search(r"process (\d+)", printed(executed[name].notebook))[1]) for name in ("10_well", "30_dies", "40_after")]
    assert len({*processes, os.getpid()}) == 4


def test_nothing_but_copies_pages_and_the_log_is_left(executed):
    folder = executed["10_well"].notebook.parent
    assert {p.name for p in folder.iterdir()} == {"log.txt"} | {f"{name}.{kind}" for name in executed for kind in ("ipynb", "html")}
    assert "ValueError" in (folder / "log.txt").read_text(encoding="utf-8")


def test_the_notebooks_themselves_are_not_changed(executed):
    shelf = executed["10_well"].notebook.parent.parent / "notebooks"
    for path in shelf.iterdir():
        assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
        assert "injected-parameters" not in path.read_text(encoding="utf-8")


def test_a_notebook_that_cannot_be_started_shows_nothing_of_an_earlier_run(tmp_path):
    notebook = write(tmp_path / "10.ipynb")
    nbformat.write(new_notebook(cells=nbformat.read(notebook, as_version=4).cells), notebook)  # without a kernel's language
    out = tmp_path / "out" / "10.ipynb"
    out.parent.mkdir()
    for old in (out, out.with_suffix(".html")):
        old.write_text("of an earlier run")
    done = run_notebook(notebook, out, {"profile": "smoke"}, log=tmp_path / "log.txt")
    assert done.error.startswith("ValueError: No language found")
    assert done.html is None
    assert not out.exists()
    assert not out.with_suffix(".html").exists()


# ---------------------------------------------------------------- the report


def test_the_report_shows_errors_word_for_word_and_whole_paths_in_a_narrow_terminal(executed, capsys):
    report(executed["10_well"].notebook.parent, list(executed.values()), Console(width=72, soft_wrap=True))
    told = capsys.readouterr().out
    assert "no [/such] thing µ" in " ".join(told.split())
    assert [line.strip() for line in told.splitlines()[-4:]] == [str(notebook.html) for notebook in executed.values()]


def test_the_report_prints_every_runs_tables(smoke_demo, capsys):
    measure(smoke_demo.run, smoke_demo.data)
    report(smoke_demo.run.folder.parent.parent, [], Console(width=120, soft_wrap=True))
    told = " ".join(capsys.readouterr().out.split())
    assert "the patient that the network never saw (labels SYNTHETIC)" in told
    assert "the patient it was trained on (labels SYNTHETIC)" in told
    assert told.count("inferior vena cava") == 2
    assert "untrained" in told
    assert told.index("never saw") < told.index("trained on (")

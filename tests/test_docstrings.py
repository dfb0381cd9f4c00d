"""Public docstrings say shapes, units and errors (scripts/docstrings.py); and what looks at them finds each fault that is planted."""

import ast
import importlib.util
from pathlib import Path

import pytest

import homelib

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts/docstrings.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the clone: scripts/docstrings.py is not installed")


def _script():
    spec = importlib.util.spec_from_file_location("docstrings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECK = _script()


def found(source: str) -> list[str]:
    tree = ast.parse(source)
    return [fault for _, fault in CHECK.faults(tree, CHECK.error_classes([tree]))]


def test_the_package_has_no_fault(capsys):
    status = CHECK.main()
    told = capsys.readouterr().out
    assert status == 0, told
    assert told.endswith(" modules, faults: 0\n")


def test_all_public_names_are_looked_at():
    for name, module in homelib._HOMES.items():
        path = ROOT / "homelib" / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(file.read_text())
        if not any(isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names) for node in tree.body):
            assert name in {item.name for item in CHECK.public(tree)}


SOUND = '''
def smooth(image: np.ndarray, spacing_mm: float) -> Tensor:
    """An image (D, H, W), smoothed. Raises UserError: a spacing below zero."""
    if spacing_mm < 0:
        raise UserError("spacing_mm")

class Norm(nn.Module):
    """(..., d) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _private(self, x):
        raise UserError("no docstring is asked for")
'''


def test_what_is_sound_is_let_through():
    assert found(SOUND) == []


@pytest.mark.parametrize(
    ("there", "in_its_place", "told"),
    [
        ('"""An image (D, H, W), smoothed. Raises UserError: a spacing below zero."""', "pass", "smooth: no docstring"),
        ('    """(..., d) -> same."""\n', "", "Norm: no docstring"),
        ("(D, H, W)", "(of a CT, say)", "smooth: no shape of image, the result"),
        ("(..., d) -> same", "Its size stays", "Norm.forward: no shape of x, the result"),
        ("spacing_mm: float", "spacing: float", "smooth: no unit of spacing"),
        ("spacing_mm: float", "spacing_mm", "smooth: no type for spacing_mm"),
        (") -> Tensor:\n    \"\"\"An", "):\n    \"\"\"An", "smooth: no type for the result"),
        ("Raises UserError", "Not for", "smooth: raises UserError without the word Raises"),
    ],
)
def test_a_planted_fault_is_found(there, in_its_place, told):
    assert SOUND.count(there) == 1
    assert any(fault.startswith(told) for fault in found(SOUND.replace(there, in_its_place)))


def test_an_error_made_of_user_error_is_one_too():
    classes = 'class Fault(UserError):\n    """One."""\n\nclass Worse(Fault):\n    """Two."""\n\n'
    assert found(classes + 'def read(path: str) -> None:\n    """A file."""\n    raise Worse(path)\n') == ["read: raises Worse without the word Raises"]


def test_what_is_raised_within_a_function_of_its_own_is_not_its():
    source = 'def outer() -> None:\n    """Makes one."""\n    def inner():\n        raise UserError("x")\n'
    assert found(source) == []


SHAPES = ["(B, C, D, H, W)", "(n, 3)", "(..., d)", "(E S, D, H, W)", "(1, *patch)", "(classes,)", "(native D, H, W)", "of any shape", "(B, C / 2, L)"]


@pytest.mark.parametrize("text", SHAPES)
def test_a_shape_is_known(text):
    assert CHECK.has_shape(f"A tensor {text}, float32.")


@pytest.mark.parametrize("text", ["(in HU, of a scan)", "(Skilling, 2004)", "(flips, turns)", "(4)", "(say, of a CT)", "D, H, W", ""])
def test_words_in_brackets_are_no_shape(text):
    assert not CHECK.has_shape(f"A tensor {text}.")


def test_a_kernel_is_left_to_its_compiler():
    assert found("@njit(cache=True)\ndef add(a, b):\n    return a + b\n\n@triton.jit\ndef sub(a, b):\n    return a - b\n") == []


def test_a_fault_makes_the_command_fail(tmp_path, capsys):
    (tmp_path / "homelib").mkdir()
    (tmp_path / "homelib/new.py").write_text("def half(x: Tensor) -> Tensor:\n    return x / 2\n")
    assert CHECK.main(tmp_path / "homelib") == 1
    assert capsys.readouterr().out.splitlines() == ["homelib/new.py:1: half: no docstring", "docstrings: 1 modules, faults: 1"]

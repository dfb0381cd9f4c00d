"""scripts/mutants.py: the faults that it makes by hand, samples that come again, and a tiny package of which it is known what survives."""

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts/mutants.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the clone: scripts/mutants.py is not installed")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # a dataclass looks there for its types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


CODE = '''
def f(x: "a b -> b a", axis: int | None = None, flag=True):
    """A docstring, a b -> b a."""
    x = rearrange(x, "b (e p) d -> b e p d")
    y = np.moveaxis(x, axis, 0)
    if not flag and 0 < y <= min(x):
        raise ValueError("text")
    x += -2.5
    x |= y
    x %= y
    return y @ x, "bnm,bmd->bnd"
'''
EXPECTED = {
    2: [("truth", "True", "False")],
    4: [
        ("statement dropped", "x = rearrange(x, 'b (e p) d -> b e p d')", "pass"),
        ("axes", "'b (e p) d -> b e p d'", "'b (p e) d -> b e p d'"),
    ],
    5: [("axes", "np.moveaxis(x, axis, 0)", "np.moveaxis(x, 0, axis)"), ("constant", "0", "1")],
    6: [
        ("statement dropped", "if not flag and 0 < y <= min(x): ...", "pass"),
        ("operator", "not flag and 0 < y <= min(x)", "not flag or 0 < y <= min(x)"),
        ("sign dropped", "not flag", "flag"),
        ("comparison", "0 < y <= min(x)", "0 <= y <= min(x)"),
        ("comparison", "0 < y <= min(x)", "0 < y < min(x)"),
        ("constant", "0", "1"),
        ("name", "min", "max"),
    ],
    8: [
        ("statement dropped", "x += -2.5", "pass"),
        ("operator", "x += -2.5", "x -= -2.5"),
        ("sign dropped", "-2.5", "2.5"),
        ("constant", "2.5", "3.5"),
    ],
    9: [("statement dropped", "x |= y", "pass"), ("operator", "x |= y", "x &= y")],
    10: [("statement dropped", "x %= y", "pass")],  # a remainder is taken for nothing else
    11: [("return", "return (y @ x, 'bnm,bmd->bnd')", "return ('bnm,bmd->bnd', y @ x)"), ("axes", "'bnm,bmd->bnd'", "'bnm,bmd->nbd'")],
}


def test_every_fault_of_a_few_lines_by_hand(script):
    found = {}
    for mutant in script.mutants("f.py", CODE):
        found.setdefault(mutant.line, []).append((mutant.kind, mutant.before, mutant.after))
    assert {line: sorted(changes) for line, changes in found.items()} == {line: sorted(changes) for line, changes in EXPECTED.items()}


@pytest.mark.long
def test_a_fault_of_the_real_files_is_one_change_of_code_that_still_compiles(script):
    for file in (file for files, _ in script.GROUPS for file in files):
        source = (ROOT / file).read_text()
        lines = Counter(ast.unparse(ast.parse(source)).splitlines())
        every = script.mutants(file, source)
        assert len({mutant.text for mutant in every}) > 0.98 * len(every) > 20  # two on one line may be the same
        for mutant in every:
            compile(mutant.text, file, "exec")
            added = sum((Counter(mutant.text.splitlines()) - lines).values())
            assert added == 1 or mutant.kind == "statement dropped", mutant  # an `elif` in whose place nothing is reads as `else:` and `pass`


@pytest.mark.long
def test_a_sample_comes_again_with_its_seed_and_takes_alike_of_every_group(script):
    one, again, other = (script.sample(seed, 50, ROOT) for seed in (3, 3, 4))
    assert one == again != other
    assert sorted(Counter(tests for _, tests in one).values()) == [16, 17, 17]


PACKAGE = """
def at_least(x, low):
    if x < low:
        return low
    return x


def down(n=3):
    while n > 0:
        n -= 1
    return n
"""
TESTS = """
from homelib.small import at_least, down

def test_all():
    assert (at_least(1, 2), at_least(3, 2), at_least(2, 2), down()) == (2, 3, 2, 0)
"""
DRIVER = """
import json, sys
from pathlib import Path
import mutants
mutants.GROUPS, mutants.GRACE_SECONDS = ((("homelib/small.py",), ("tests/test_small.py",)),), 2
count = len(mutants.mutants("", Path("homelib/small.py").read_text()))
print(json.dumps(mutants.run_sample(0, count, Path.cwd())))
"""


@pytest.mark.long
def test_what_survives_of_a_tiny_package_is_what_no_test_can_see(tmp_path):
    for name, text in (("homelib/__init__.py", ""), ("homelib/small.py", PACKAGE), ("tests/test_small.py", TESTS)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{DRIVER}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    survivors = {(one["line"], one["before"], one["after"]) for one in told["survivors"]}
    assert survivors == {(3, "x < low", "x <= low"), (8, "3", "4")}  # the same for every x; as many rounds as it takes
    assert not list(tmp_path.rglob("*.pyc"))  # a mutant of the same length in the same second would run as the one before it
    assert told["by_timeout"] >= 1  # n -= 1 dropped, or n += 1 in its place; on a busy machine one of them may end otherwise
    assert told["files"] == {"homelib/small.py": {"mutants": told["mutants"], "killed": told["mutants"] - 2, "killed_share": told["killed_share"]}}
    assert (tmp_path / "homelib/small.py").read_text() == PACKAGE
    (tmp_path / "tests/test_small.py").write_text("def test_all():\n    assert False\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "tests/test_small.py: failed without a mutant, expected to pass." in done.stderr

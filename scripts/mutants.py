"""Would the tests notice? A seeded sample of small faults ("mutants"), one at a time, each against the tests that concern its file: `make mutants`.

    python scripts/mutants.py [--seeds 0] [--count 50] [--out benchmarks/results/mutants.json]

A mutant is one change of one file: `<` becomes `<=`, a number one more, an axis another, a statement nothing. It is *killed* where a test fails, or where the
tests take far more of a processor's time than they do without it (counted apart; the clock runs on while another program has the processor). What survives is
listed, and none is excused: some change nothing that anyone could see.

Every mutant runs in a process of its own, forked from one that has imported PyTorch and MONAI already and of homelib nothing, on one copy of the package.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("homelib", "tests", "data_manifests", "pyproject.toml")
GROUPS = (  # files, of which each group gives as many mutants as another, and their tests. Most of what evaluate.py and routing.py compute stands beside them
    (("homelib/network/home.py",), ("tests/network/test_home.py", "tests/network/test_parity.py", "tests/network/test_switches.py")),
    (("homelib/run/evaluate.py", "homelib/run/metrics.py", "homelib/run/surface.py"), ("tests/run/test_evaluate.py", "tests/run/test_surface.py")),
    (("homelib/study/routing.py", "homelib/study/expert_maps.py"), ("tests/study/test_routing.py", "tests/study/test_expert_maps.py")),
)
GRACE_SECONDS = 30  # of a processor, beside three times what the tests take without a mutant
STUCK_SECONDS = 3600  # of the clock, for tests that wait for what never comes: longer than any take on a busy machine
PYTEST = ("-x", "-q", "-n", "0", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not network")
WARM = ("torch", "monai.transforms", "monai.data", "monai.inferers", "monai.losses", "monai.metrics", "monai.networks.nets", "numba", "pandas", "scipy.stats",
        "matplotlib.pyplot", "lightning_fabric", "pydantic", "typer", "nibabel", "SimpleITK", "hypothesis", "pytest")  # fmt: skip

OPERATORS = {  # each by the one that it is taken for
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NAMES = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "clamp_min": "clamp_max"}
NAMES |= {other: one for one, other in NAMES.items()}
TWO_AXES = ("moveaxis", "transpose", "permute", "swapaxes", "repeat")  # whose last two arguments may be taken for each other


# ---------------------------------------------------------------- faults


@dataclass(frozen=True)
class Mutant:
    """One change of one file; text is the whole file with it."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.kind}: {self.before}  ->  {self.after}"


def mutants(file: str, source: str) -> list[Mutant]:
    """Every change of a file that the kinds below allow."""
    tree, found = ast.parse(source), []
    for holder, place, node, arguments in list(_places(tree)):
        for kind, changed in _changes(node, arguments):
            _put(holder, place, changed)
            found.append(Mutant(file, node.lineno, kind, _brief(node), _brief(changed), ast.unparse(ast.fix_missing_locations(tree)) + "\n"))
            _put(holder, place, node)
    return found


def _places(parent: ast.AST, arguments: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Every statement and expression that runs (no docstring, no type): what holds it and where, itself, and the arguments of the function that it is in."""
    if isinstance(parent, ast.FunctionDef):
        arguments = tuple(argument.arg for argument in (*parent.args.args, *parent.args.kwonlyargs) if argument.arg not in ("self", "cls"))
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "names"):
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(node, ast.AST) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                if isinstance(node, ast.stmt | ast.expr):
                    yield (value, index, node, arguments) if isinstance(value, list) else (parent, field, node, arguments)
                yield from _places(node, arguments)


def _put(holder: ast.AST | list, place: str | int, node: ast.AST) -> None:
    if isinstance(holder, list):
        holder[place] = node
    else:
        setattr(holder, place, node)


def _changes(node: ast.AST, arguments: Sequence[str]) -> Iterator[tuple[str, ast.AST]]:
    """What a statement or expression may become."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield "operator", _with(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                yield "comparison", _with(node, ops=[*ops[:place], OPERATORS[type(op)](), *ops[place + 1 :]])
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub(), operand=operand):
            yield "sign dropped", operand
        case ast.Constant(value=bool(value)):
            yield "truth", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if (other := _other_axes(value)) != value:
            yield "axes", ast.Constant(other)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=values) if name in TWO_AXES and len(values) > 1:
            yield "axes", _with(node, args=[*values[:-2], values[-1], values[-2]])
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield "name", ast.Name(NAMES[name], node.ctx)
        case ast.Attribute(attr=name) if name in NAMES:
            yield "name", _with(node, attr=NAMES[name])
        case ast.Return(value=ast.Tuple(elts=parts)):
            yield "return", ast.Return(ast.Tuple(parts[::-1], ast.Load()))
        case ast.Return(value=value) if value is not None:
            other = next((name for name in arguments if ast.unparse(value) != name), None)
            yield "return", ast.Return(ast.Name(other, ast.Load()) if other else ast.Constant(None))
        case ast.AugAssign(op=op):
            yield "statement dropped", ast.Pass()
            if type(op) in OPERATORS:
                yield "operator", _with(node, op=OPERATORS[type(op)]())
        case ast.Expr() | ast.If(orelse=[]):
            yield "statement dropped", ast.Pass()
        case ast.Assign(targets=[target]) if isinstance(target, ast.Subscript) or _names(target) & _names(node.value):  # else a later line finds no such name
            yield "statement dropped", ast.Pass()


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and part.id != "self"}


def _with(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _other_axes(pattern: str) -> str:
    """`b n (e p) -> ...` and `bgkm,bgmd->bgkd` with the first two axes of a bracket, or else of the result, in the other order; another text as it is."""
    if not re.fullmatch(r"[\w ,()]+->[\w ()]+", pattern):
        return pattern
    if re.search(r"\(\w+ \w+", pattern):
        return re.sub(r"\((\w+) (\w+)", r"(\2 \1", pattern, count=1)
    return re.sub(r"(->\s*)(\w)(\s*)(\w)", r"\1\4\3\2", pattern)


def _brief(node: ast.AST) -> str:
    first, *more = ast.unparse(node).splitlines()
    return first + " ..." if more else first


def sample(seed: int, count: int, root: Path) -> list[tuple[Mutant, tuple[str, ...]]]:
    """So many mutants, as many of each group as of another, each with its tests."""
    chosen, chance = [], random.Random(seed)
    for number, (files, tests) in enumerate(GROUPS):
        every = [mutant for file in files for mutant in mutants(file, (root / file).read_text())]
        wanted = count // len(GROUPS) + (number < count % len(GROUPS))
        chosen += [(mutant, tests) for mutant in sorted(chance.sample(every, wanted), key=lambda mutant: (mutant.file, mutant.line))]
    return chosen


# ---------------------------------------------------------------- runs


def outcome(folder: Path, arguments: Sequence[str], limit_seconds: float) -> tuple[str, str, float]:
    """pytest with these arguments, in a process of its own, on the copy in `folder`: "passed", "failed" or "timeout" (of a processor's time), what it printed,
    and a processor's seconds."""
    log = folder / "log.txt"
    child = os.fork()
    if not child:
        _run(folder, arguments, log, limit_seconds)
    began, done = time.monotonic(), 0
    while not done:
        done, left, used = os.wait4(child, os.WNOHANG)
        if not done:
            time.sleep(0.05)
            if time.monotonic() > began + STUCK_SECONDS:
                os.kill(child, signal.SIGPROF)
    how = {0: "passed", -signal.SIGPROF: "timeout"}.get(os.waitstatus_to_exitcode(left), "failed")
    if how == "timeout":
        with contextlib.suppress(ProcessLookupError):  # processes that a test started, if any
            os.killpg(child, signal.SIGKILL)
    return how, log.read_text(errors="replace"), used.ru_utime + used.ru_stime


def _run(folder: Path, arguments: Sequence[str], log: Path, limit_seconds: float) -> None:
    """In the child: never returns."""
    status = 70
    try:
        os.setsid()
        signal.setitimer(signal.ITIMER_PROF, limit_seconds)  # ends this process by SIGPROF
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if stream == 1 else os.O_WRONLY | os.O_APPEND), stream)
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}  # for processes that a test starts
        sys.dont_write_bytecode = True  # kept bytecode goes by length and second: it would stand for the next mutant too
        sys.path.insert(0, str(folder))
        import pytest

        status = int(pytest.main([*PYTEST, *arguments]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def run_sample(seed: int, count: int, folder: Path) -> dict:
    """Each mutant of a sample of the copy in `folder` against its tests. Raises SystemExit: the tests fail without any mutant."""
    chosen, limits = sample(seed, count, folder), {}
    for tests in dict.fromkeys(tests for _, tests in chosen):
        for _ in range(2):  # the first compiles what Numba keeps
            how, told, seconds = outcome(folder, tests, STUCK_SECONDS)
            if how != "passed":
                raise SystemExit(f"{' '.join(tests)}: {how} without a mutant, expected to pass.\n{told[-3000:]}")
        limits[tests] = 3 * seconds + GRACE_SECONDS
        print(f"{' '.join(tests)}: {seconds:.0f} s of a processor", flush=True)
    began, results = time.monotonic(), []
    for mutant, tests in chosen:
        path = folder / mutant.file
        whole, stamp = path.read_text(), path.stat()
        path.write_text(mutant.text)
        how, told, _ = outcome(folder, tests, limits[tests])
        path.write_text(whole)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        by = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", told, re.MULTILINE)
        results.append((mutant, how))
        print(f"{'SURVIVED' if how == 'passed' else how:9} {mutant}" + (f"  ({by[1]})" if by else ""), flush=True)
    return told_of(results) | {"seed": seed, "seconds": round(time.monotonic() - began)}


def told_of(results: Sequence[tuple[Mutant, str]]) -> dict:
    """What is kept of a sample: counts in all and by file, and the survivors."""
    of, survived = Counter(mutant.file for mutant, _ in results), [mutant for mutant, how in results if how == "passed"]
    left = Counter(mutant.file for mutant in survived)
    files = {file: {"mutants": n, "killed": n - left[file], "killed_share": round(1 - left[file] / n, 3)} for file, n in of.items()}
    counts = {"mutants": len(results), "killed": len(results) - len(survived), "by_timeout": sum(how == "timeout" for _, how in results)}
    survivors = [{name: value for name, value in asdict(mutant).items() if name != "text"} for mutant in survived]
    return counts | {"killed_share": round(counts["killed"] / counts["mutants"], 3), "files": files, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.json")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # threads would not live on in a forked process
    for name in WARM:
        importlib.import_module(name)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, Path(folder, name))
        for seed in asked.seeds:
            samples.append(run_sample(seed, asked.count, Path(folder)))
            asked.out.write_text(json.dumps({"samples": samples}, indent=1) + "\n")  # after each, for who stops the rest
    print(f"\n{'seed':4}  {'file':34}  killed")
    for told in samples:
        for file, of in [*told["files"].items(), ("all", told)]:
            print(f"{told['seed']:4}  {file:34}  {of['killed']} of {of['mutants']}, {of['killed_share']:.0%}")
    print(asked.out)


if __name__ == "__main__":
    main()

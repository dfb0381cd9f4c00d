"""What the docstrings of homelib's public functions and classes leave out that a type cannot say: shapes, units, errors.

    python scripts/docstrings.py        # a line a fault, exit status 1 where there is one

Public is what has no underscore before its name, in a module or in a public class of it; kernels, whose types a compiler gives, and the commands of
`home`, whose docstrings are their help, are not looked at. Asked of each:

    docstring   of every class and function, and of every method with arrays; `forward` and other special methods may leave it to their class
    types       of every argument and of the result
    shape       where an argument or the result is a Tensor or np.ndarray (but weights by name, dict[str, Tensor]): one in brackets, (B, C, D, H, W),
                (n, 3), (..., d), or the words "any shape"
    unit        of an argument that is a length: in its name (`spacing_mm`, `patch_voxels`), or mm or voxels in the docstring
    Raises      where the function itself raises UserError, or an error made of it

Only text is read; nothing of the package is imported.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "homelib"
ARRAYS = {"Tensor", "ndarray"}
KERNELS = {"njit", "jit"}
LENGTHS = {"spacing", "distance", "tolerance", "diagonal", "thickness", "radius", "margin", "extent"}
UNITS = {"mm", "voxels", "px"}
TERM = r"(?:\*?[A-Za-z_]\w*(?:\[\w+\])?|\d{1,3})"  # B, channels[i], *patch, 3; four digits are a year
DIMENSION = re.compile(rf"\.\.\.|{TERM}(?:\s*[-+*/^]\s*{TERM})*|[A-Z]\d?(?: [A-Z]\d?)+|native D")  # E S is a product
MARK = re.compile(r"\.\.\.|\*\w|\b(?:[A-Za-z]\d?|\d{1,3})\b")  # without one of these it is a list of words
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """A function or class by its dotted name, and the docstring that may tell what its own does not: its class's, for a special method."""

    name: str
    node: Function | ast.ClassDef
    beside: str = ""

    @property
    def told(self) -> str:
        return (ast.get_docstring(self.node) or "") + "\n" + self.beside


def public(tree: ast.Module) -> Iterator[Public]:
    """Of a module, in its order."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_") and not _is_kernel(node):
            yield Public(node.name, node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield Public(node.name, node)
            of_class = ast.get_docstring(node) or ""
            for inner in node.body:
                special = isinstance(inner, Function) and (inner.name == "forward" or re.fullmatch(r"__\w+__", inner.name) is not None)
                if isinstance(inner, Function) and (special or not inner.name.startswith("_")):
                    yield Public(f"{node.name}.{inner.name}", inner, of_class if special else "")


def faults(tree: ast.Module, errors: set[str]) -> Iterator[tuple[int, str]]:
    """Line and fault of each. errors: names of UserError and of the classes made of it."""
    aliases = {name for node in tree.body if isinstance(node, ast.Assign) and _is_type(node.value) and _has_array(node.value, set()) for name in _names(node)}
    for item in public(tree):
        for fault in _of_class(item) if isinstance(item.node, ast.ClassDef) else _of_function(item, item.node, aliases, errors):
            yield item.node.lineno, f"{item.name}: {fault}"


def _of_class(item: Public) -> Iterator[str]:
    if not ast.get_docstring(item.node):
        yield "no docstring"


def _of_function(item: Public, node: Function, aliases: set[str], errors: set[str]) -> Iterator[str]:
    method = "." in item.name
    arguments = [a for a in [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg] if a is not None]
    arguments = [a for a in arguments if not (method and a.arg in ("self", "cls"))]
    untyped = [a.arg for a in arguments if a.annotation is None]
    if node.returns is None and node.name not in ("__init__", "__post_init__"):
        untyped.append("the result")
    if untyped:
        yield f"no type for {', '.join(untyped)}"
    arrays = [a.arg for a in arguments if _has_array(a.annotation, aliases)] + ["the result"] * _has_array(node.returns, aliases)
    if not item.told.strip() and (arrays or not method):
        yield "no docstring"
    elif arrays and not has_shape(item.told):
        yield f"no shape of {', '.join(arrays)}: (D, H, W), say"
    for a in arguments:
        if _is_length(a.arg) and _has_number(a.annotation) and not re.search(r"\b(mm|voxels?)\b", item.told):
            yield f"no unit of {a.arg}: mm, say, in its name or here"
    if "Raises" not in item.told and (raised := sorted(_raised(node) & errors)):
        yield f"raises {' and '.join(raised)} without the word Raises"


def has_shape(text: str) -> bool:
    """Whether a shape stands in a text.

    >>> has_shape("Logits (B, classes, D, H, W)."), has_shape("The mean (in HU, of a scan).")
    (True, False)
    """
    if "any shape" in text:
        return True
    for inside in re.findall(r"\(([^()]+)\)", text):
        parts = [part.strip() for part in inside.removesuffix(",").split(",")]
        if "," in inside and all(map(DIMENSION.fullmatch, parts)) and (inside.endswith(",") or any(map(MARK.search, parts))):
            return True
    return False


def error_classes(trees: list[ast.Module]) -> set[str]:
    """UserError, and all that is made of it."""
    found, before = {"UserError"}, set()
    while found != before:
        before = set(found)
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in found for base in node.bases):
                    found.add(node.name)
    return found


def _is_kernel(node: Function) -> bool:
    calls = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list)
    return any((call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")) in KERNELS for call in calls)


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _is_type(value: ast.expr) -> bool:
    """Batch = tuple[Tensor, ...], say."""
    return isinstance(value, ast.Subscript) and getattr(value.value, "id", "") in ("tuple", "list", "dict")


def _has_array(annotation: ast.expr | None, aliases: set[str]) -> bool:
    """Not counted: weights by their names, and what a function takes or gives that is handed over."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _has_array(ast.parse(annotation.value, mode="eval").body, aliases)
    if isinstance(annotation, ast.Subscript) and (getattr(annotation.value, "id", "") == "Callable" or ast.unparse(annotation) == "dict[str, Tensor]"):
        return False
    if isinstance(annotation, ast.Name):
        return annotation.id in ARRAYS | aliases
    if isinstance(annotation, ast.Attribute):
        return annotation.attr in ARRAYS
    return isinstance(annotation, ast.AST) and any(_has_array(part, aliases) for part in ast.iter_child_nodes(annotation) if isinstance(part, ast.expr))


def _has_number(annotation: ast.expr | None) -> bool:
    names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(annotation)} if annotation else {"float"}
    return bool(names & (ARRAYS | {"float", "int"}))


def _is_length(name: str) -> bool:
    words = {word.removesuffix("s") for word in name.split("_")}
    return bool(words & LENGTHS) and not set(name.split("_")) & UNITS


def _raised(node: ast.AST) -> set[str]:
    """Names of the errors that a function raises by their name; those of the functions within it are theirs."""
    found = set()
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call) and isinstance(part.exc.func, ast.Name):
            found.add(part.exc.func.id)
        elif not isinstance(part, Function | ast.Lambda):
            found |= _raised(part)
    return found


def main(package: Path = PACKAGE) -> int:
    files = [file for file in sorted(package.rglob("*.py")) if not file.name.startswith("cli")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    errors, count = error_classes(trees), 0
    for file, tree in zip(files, trees, strict=True):
        for line, fault in faults(tree, errors):
            print(f"{file.relative_to(package.parent)}:{line}: {fault}")
            count += 1
    print(f"docstrings: {len(files)} modules, faults: {count}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())

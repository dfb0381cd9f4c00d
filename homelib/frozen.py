"""Frozen trees of settings whose every fault is one line: the field by its dotted name, what was found, what is expected, the nearest field."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
    from pydantic.fields import FieldInfo
else:
    ModelMetaclass = type(BaseModel)  # pydantic gives it no public name


class _OneLineErrors(ModelMetaclass):
    """Wraps the outermost call alone: an error in a nested model keeps its full dotted name (`training.steps`), which an `__init__` would cut."""

    def __call__(cls, **fields: Any) -> Any:
        try:
            return super().__call__(**fields)
        except ValidationError as error:
            raise UserError(describe(error, cls)) from None  # type: ignore[arg-type]  # a class of this kind is a model


class Frozen(BaseModel, metaclass=_OneLineErrors):
    """A settings model: no field changes, none is unknown. A wrong one raises UserError."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def describe(error: ValidationError, tree: type[BaseModel]) -> str:
    """A pydantic error as one line: each field by dotted name, what was found, what is expected, and the nearest field for an unknown one."""
    faults = []
    for fault in error.errors():
        name, message = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            faults.append(unknown_field(name, tree))
        elif fault["type"] == "value_error" and isinstance(fault["input"], (Mapping, BaseModel)):  # a rule over a tree names its fields itself
            faults.append(f"{name}.{message}" if name else message)
        else:
            faults.append(f"{name}: found {shortened(fault['input'])}; {message}")
    return ended("; ".join(faults))


def unknown_field(name: str, tree: type[BaseModel]) -> str:
    """What to say of a field that does not exist, with the nearest that does."""
    names = field_names(tree)
    near = [full for full in names if full.startswith(name)] or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    near = near or [full for full in names if full.rsplit(".")[-1] == name.rsplit(".")[-1]]
    return f"{name}: no such field" + (f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}")


def ended(sentence: str) -> str:
    """With a full stop, unless it ends as a question."""
    return sentence if sentence.endswith("?") else sentence + "."


def leaves(tree: type[BaseModel], prefix: str = "") -> "dict[str, FieldInfo]":
    """All leaves of a settings tree by their dotted names."""
    found: dict[str, FieldInfo] = {}
    for name, field in tree.model_fields.items():
        inner = field.annotation
        found |= leaves(inner, f"{prefix}{name}.") if isinstance(inner, type) and issubclass(inner, BaseModel) else {prefix + name: field}
    return found


def field_names(tree: type[BaseModel]) -> list[str]:
    """Dotted names of all leaves of a settings tree."""
    return list(leaves(tree))


def choices(leaf: "FieldInfo") -> tuple[str, ...]:
    """The values of a leaf that has a few, as they are written on the command line; none of another."""
    if leaf.annotation is bool:
        return ("true", "false")
    return tuple(map(str, get_args(leaf.annotation))) if get_origin(leaf.annotation) is Literal else ()


def shortened(value: Any) -> str:
    """A value for a line of text, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""A machine without a network that has torch and triton and little else: what is missing there comes as carried wheels, or is done without.

`make wheels-gpu` collects the wheels into build/wheels, all of pure Python, so that one set fits every machine. Here they are unpacked once, and looked
into after all that is installed. pydantic, whose core is compiled, cannot be carried so: without it a stand-in keeps the fields and defaults of the
settings and checks nothing, which is enough for benchmarks, whose sizes are their own.
"""

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
import types
import zipfile
from contextlib import suppress
from pathlib import Path

BUILD = Path(__file__).resolve().parent.parent / "build"


def ready(build: Path = BUILD) -> list[str]:
    """Make importable what was carried, and stand in for pydantic where it is lacking; a line for each thing done."""
    lines = carried(build)
    try:
        import pydantic  # noqa: F401
    except ImportError as error:
        sys.modules["pydantic"] = stand_in()
        lines.append(f"settings are not checked: pydantic cannot be imported ({error})")
    return lines


def carried(build: Path) -> list[str]:
    """Unpack build/wheels, once for one set of files, and put it at the end of the path."""
    wheels = sorted((build / "wheels").glob("*-none-any.whl"))
    if not wheels:
        return []
    names = ", ".join("-".join(wheel.name.split("-")[:2]) for wheel in wheels)
    folder = build / f"carried-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    if not folder.exists():
        part = tempfile.mkdtemp(dir=build)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(part)
        with suppress(OSError):  # another process was first
            os.rename(part, folder)
        shutil.rmtree(part, ignore_errors=True)
    sys.path.append(str(folder))
    return [f"carried, for what is not installed: {names}"]


class Field:
    """A field's default; bounds and descriptions are not kept."""

    def __init__(self, default, **about):
        self.default = default


class BaseModel:
    """Named fields with defaults, of this class and those above it."""

    model_fields: dict = {}

    def __init_subclass__(cls):
        own = {name: vars(cls)[name] for name in inspect.get_annotations(cls)}
        cls.model_fields = cls.model_fields | {name: value if isinstance(value, Field) else Field(value) for name, value in own.items()}

    def __init__(self, **given):
        if unknown := sorted(given.keys() - self.model_fields.keys()):
            raise TypeError(f"{type(self).__name__}: no field {unknown[0]}")
        vars(self).update({name: field.default for name, field in self.model_fields.items()} | given)

    def model_copy(self, *, update: dict):
        return type(self)(**vars(self) | update)


def stand_in() -> types.ModuleType:
    """A module with what `homelib.config` and `homelib.frozen` take from pydantic."""
    module = types.ModuleType("pydantic", "A stand-in of benchmarks/bare.py.")
    vars(module).update(
        BaseModel=BaseModel, Field=Field, ConfigDict=dict, PositiveInt=int, PositiveFloat=float,
        model_validator=lambda **_: lambda method: method, field_validator=lambda *_, **__: lambda method: method,
        ValidationError=type("ValidationError", (Exception,), {}),
    )  # fmt: skip
    return module

"""YAML files of names, numbers and lists: data manifests and grids are read here, so that what is wrong with one is always one line."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

LARGEST_BYTES = 2_000_000
_LONGEST_NUMBER = 40  # characters
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (they can blow a small file up to gigabytes), tags (whose readers raise anything), endless numbers, and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name); write the value out")
        if tag := getattr(self.peek_event(), "tag", None):
            raise yaml.YAMLError(f"a tag ({tag}); write the value alone")
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and (len(node.value) > _LONGEST_NUMBER or ":" in node.value):
            raise yaml.YAMLError(f"{short(node.value, 40)!r}, a number of many digits or of base 60; put a text into quotes")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, times in keys.items() if times > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} twice; keep one")
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, *, what: str, known: Sequence[str], fields: Sequence[str]) -> dict:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        what: what it should be ("data manifest", "grid"), for messages.
        known: names of those that ship with the workbook.
        fields: that the mapping may have.

    Raises:
        UserError: one line for a missing, oversized or unreadable file, or one that is no plain YAML mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a {what} (.yaml). Shipped ones: {', '.join(known)}.")
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes, expected a {what.split()[-1]} below {LARGEST_BYTES}; is this a data file?")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        found = getattr(error, "problem", None) or ("nested too deeply" if isinstance(error, RecursionError) else str(error))
        raise UserError(f"{path}{where}: found {short(found)}, expected plain YAML (names, numbers, lists); correct it.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected a mapping with the fields {', '.join(fields)}.")
    return tree


def short(text: object, limit: int = 160) -> str:
    """Text in one line, cut where it is too long for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

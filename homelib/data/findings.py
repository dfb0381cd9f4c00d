"""What is wrong with a data set, one finding a row: how bad, which file, what was found, what is expected, and the remedy."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..paths import written_whole
from .checks import CHECKS, Severity

if TYPE_CHECKING:
    from rich.table import Table

_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """`check` is a key of `checks.CHECKS`; `case` is empty where the whole data set is meant."""

    severity: Severity
    case: str
    file: str
    check: str
    found: str
    expected: str
    remedy: str
    fixable: bool = False

    def __str__(self) -> str:
        return f"{self.file or self.case}: {self.check}: found {self.found}, expected {self.expected}. {self.remedy}"


def finding(check: str, case: str, file: str | Path, found: str, **filled: object) -> Finding:
    """The finding of a check; `filled` goes into the text of what is expected. Raises KeyError for a check or a text that is not there."""
    kind = CHECKS[check]
    return Finding(kind.severity, case, str(file), check, found, kind.expected.format(**filled), kind.remedy, kind.fixable)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings and notes; within these by case and check."""
    return sorted(findings, key=lambda f: (_ORDER[f.severity], f.case, f.check, f.file))


def count(findings: Sequence[Finding]) -> str:
    """`"2 errors, 1 warning, 0 notes"`."""
    numbers = {kind: sum(f.severity == kind for f in findings) for kind in _ORDER}
    return ", ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in numbers.items())


def table(findings: Iterable[Finding], root: str | Path) -> "Table":
    """The findings as a `rich` table for the terminal, with files as paths below `root`."""
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "file", "check", "found", "expected", "remedy"):
        drawn.add_column(name, overflow="fold")
    for f in findings:
        file = os.path.relpath(f.file, root) if f.file else "all"
        drawn.add_row(Text(f.severity, colours[f.severity]), *(Text(printable(t)) for t in (file, f.check, f.found, f.expected, f.remedy)))
    return drawn


def printable(text: str) -> str:
    """A text that any terminal takes: bytes of a file name that are no UTF-8 are written out."""
    return text.encode(errors="backslashreplace").decode()


def write_findings(findings: Iterable[Finding], path: Path) -> None:
    """The findings as CSV, UTF-8, one row each, in order; the header alone where there is none."""
    write_rows((asdict(finding) for finding in in_order(findings)), [field.name for field in fields(Finding)], path)


def write_rows(rows: Iterable[dict], columns: Sequence[str], path: Path) -> None:
    """Rows as CSV under the given columns; the old file or the new one, whole."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

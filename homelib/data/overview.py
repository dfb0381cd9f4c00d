"""Ten thousand cases at a glance: which part each belongs to, and what is known of it. No image is opened."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError
from .check import compare, kept_reports
from .layouts import find_cases
from .manifest import Manifest
from .split import split

State = Literal["unchecked", "errors", "warnings", "good"]


@dataclass(frozen=True)
class Overview:
    """`rows`: case id, modality, part ("" where the split cannot be made yet, and `why` says why) and state, in order of the ids."""

    rows: tuple[tuple[str, str, str, State], ...]
    why: str

    def __str__(self) -> str:
        parts, states = (Counter(row[k] for row in self.rows) for k in (2, 3))
        told = [", ".join(f"{number} {name or 'in no part'}" for name, number in sorted(counts.items())) for counts in (parts, states)]
        return f"{len(self.rows)} cases: {told[0]}; {told[1]}."


def overview(manifest: Manifest, root: str | Path, *, kept: Path | None = None) -> Overview:
    """Part and state of every case below `root`; `kept` as in `check`. Files are looked up by name, size and time, none is opened.

    Raises UserError where `find_cases` does. That the cases cannot be split yet is no error here.
    """
    found = find_cases(manifest, root)
    cases = found.cases
    reports = kept_reports(manifest, root, cases, kept=kept)
    try:
        parts, why = split(manifest, cases, root=root, reports=reports), ""
    except UserError as error:
        parts, why = {}, str(error)

    worst: dict[str, set[str]] = defaultdict(set)
    known = [case for case in cases if case.id in reports]
    for finding in [*found.findings, *compare(known, reports, manifest), *(f for report in reports.values() for f in report.findings)]:
        worst[finding.case].add(finding.severity)

    def state(case_id: str) -> State:
        if "error" in worst[case_id]:
            return "errors"
        return "unchecked" if case_id not in reports else "warnings" if "warning" in worst[case_id] else "good"

    return Overview(tuple((case.id, case.modality, parts.get(case.id, ""), state(case.id)) for case in cases), why)

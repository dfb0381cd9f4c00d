"""Who is trained on, validated and tested on: the same cases for the same seed and ids, on any machine and in any version of NumPy.

Cases are put in an order of their own by a hash of seed and id, stratum by stratum, and dealt out one by one to the part that is
furthest behind its share. So every stratum and the whole have the shares asked for, to within one case, and one case more moves few others.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import UserError
from .check import kept_reports
from .examine import Report
from .manifest import Case, Manifest, SplitRule


def split(manifest: Manifest, cases: Iterable[Case], *, root: str | Path | None = None, reports: Mapping[str, Report] | None = None) -> dict[str, str]:
    """The part of each case, by its id: "train", "validation", "test", or "fold-0", "fold-1" and so on.

    What a layout says comes first, then the lists in the data set's folder, then shares or folds of the rest. A manifest without a
    split rule trains on all.

    Args:
        manifest: with its split rule.
        cases: of `find_cases`.
        root: the data set's folder; for lists, and for the results of its last check, where a class stratifies.
        reports: these results, where they are at hand already.

    Raises:
        UserError: a list is missing or names strangers; counts that are not the number of cases; cases not checked where a class stratifies.
    """
    cases = list(cases)
    rule = manifest.split or SplitRule()
    assigned = {case.id: case.part for case in cases if case.part}
    for part, name in rule.lists.items():
        assigned |= dict.fromkeys(_listed(manifest, root, part, name, {case.id for case in cases}), part)
    free = [case for case in cases if case.id not in assigned]
    shares = {f"fold-{k}": 1 / rule.folds for k in range(rule.folds)} if rule.folds else rule.parts or {"train": 1.0}
    total = sum(shares.values())
    if rule.counts and free and round(total) != len(free):
        told = ", ".join(f"{part} {count:g}" for part, count in shares.items())
        raise UserError(
            f"{manifest.name}: split.parts: found {told} for {len(free)} cases, expected counts that sum to them. Complete the data, or give shares."
        )
    strata = _strata(manifest, rule, free, root, reports)
    assigned |= deal({case.id: strata[case.id] for case in free}, {part: share / total for part, share in shares.items()}, seed=rule.seed)
    return {case.id: assigned[case.id] for case in cases}


def deal(strata: Mapping[str, str], shares: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Parts by id, from strata by id and the shares of the parts, which sum to 1.

    >>> sorted(deal({"a": "", "b": "", "c": "", "d": ""}, {"train": 0.5, "test": 0.5}, seed=0).values())
    ['test', 'test', 'train', 'train']
    """
    order = sorted(strata, key=lambda case_id: (strata[case_id], _rank(seed, case_id), case_id))
    dealt, given = {}, dict.fromkeys(shares, 0)
    for number, case_id in enumerate(order, start=1):
        part = max(shares, key=lambda p: shares[p] * number - given[p])
        dealt[case_id], given[part] = part, given[part] + 1
    return dealt


def _rank(seed: int, case_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{case_id}".encode("utf-8", "surrogateescape")).digest()


def _listed(manifest: Manifest, root: str | Path | None, part: str, name: str, known: set[str]) -> list[str]:
    if root is None:
        raise UserError(f"{manifest.name}: split.lists.{part}: the folder of {name} is not given; give the data set's folder.")
    path = Path(root).expanduser() / name
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the ids of the {part} cases, one a line. Write it (home data show {manifest.reference}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}); expected case ids, one a line.") from None
    strange = [case_id for case_id in ids if case_id not in known]
    if strange:
        raise UserError(f"{path}: found {strange[0]!r}, no case here ({len(strange)} such ids); expected ids of home data cases. Correct the list.")
    return ids


def _strata(manifest: Manifest, rule: SplitRule, cases: list[Case], root: str | Path | None, reports: Mapping[str, Report] | None) -> dict[str, str]:
    """A word for each case; cases with the same one share its parts alike."""
    if rule.stratify_by is None:
        return {case.id: "" for case in cases}
    if rule.stratify_by == "modality":
        return {case.id: case.modality for case in cases}
    if reports is None:
        if root is None:
            raise UserError(f"{manifest.name}: split.stratify_by: the checks of its cases are not given; give the data set's folder.")
        reports = kept_reports(manifest, root, cases)
    strata = {case_id: str(report.statistics["voxels"][rule.stratify_by] > 0) for case_id, report in reports.items() if "voxels" in report.statistics}
    unknown = [case.id for case in cases if case.id not in strata]
    if unknown:
        raise UserError(
            f"{manifest.name}: split.stratify_by: found {len(unknown)} cases that may have {rule.stratify_by} or not, {unknown[0]} first; "
            f"expected all checked. Run home data check {manifest.reference} {root or 'ROOT'}, and mend what it finds."
        )
    return strata

"""Who is trained on, validated and tested on: the same cases for the same seed and ids, on any machine and in any version of NumPy.

Cases are put in an order of their own by a hash of seed and id, stratum by stratum, and dealt out one by one to the part that is
furthest behind its share. So every stratum and the whole have the shares asked for, to within one case. Other cases are dealt anew: one that is
added moves those after it in that order, so compare runs on one set of cases alone.
"""

import hashlib
import re
from collections import Counter
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
        UserError: a list is missing or names strangers; a case or a patient in two parts; an id that names no patient; counts that are not the number of
            cases; cases not checked where a class stratifies.
    """
    cases = list(cases)
    rule = manifest.split or SplitRule()
    assigned = {case.id: case.part for case in cases if case.part}
    for part, name in rule.lists.items():
        for case_id in _listed(manifest, root, part, name, {case.id for case in cases}):
            if assigned.setdefault(case_id, part) != part:
                told = f"found {case_id!r} among the {part} cases, but its layout or another list has it in {assigned[case_id]}"
                raise UserError(f"{Path(root or '').expanduser() / name}: {told}; expected each case in one part. Correct the list, or the layout's part.")
    patients = {case.id: _patient(manifest, rule, case.id) for case in cases}
    assigned |= _with_their_patients(manifest, assigned, patients)
    free = [case for case in cases if case.id not in assigned]
    shares = {f"fold-{k}": 1 / rule.folds for k in range(rule.folds)} if rule.folds else rule.parts or {"train": 1.0}
    total = sum(shares.values())
    if rule.counts and free and round(total) != len(free):
        told = ", ".join(f"{part} {count:g}" for part, count in shares.items())
        raise UserError(
            f"{manifest.name}: split.parts: found {told} for {len(free)} cases, expected counts that sum to them. Complete the data, or give shares."
        )
    strata = _strata(manifest, rule, free, root, reports)
    sizes = Counter(patients[case.id] for case in free)
    of_patients: dict[str, str] = {}
    for case in free:  # a patient is of the last stratum that any of the cases is of: of those with a tumour, say
        of_patients[patients[case.id]] = max(strata[case.id], of_patients.get(patients[case.id], ""))
    dealt = deal(of_patients, {part: share / total for part, share in shares.items()}, seed=rule.seed, sizes=sizes)
    return {case.id: assigned.get(case.id) or dealt[patients[case.id]] for case in cases}


def deal(strata: Mapping[str, str], shares: Mapping[str, float], *, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, str]:
    """Parts by id, from strata by id and the shares of the parts, which sum to 1. `sizes`: how many cases an id stands for; None: one each.

    >>> sorted(deal({"a": "", "b": "", "c": "", "d": ""}, {"train": 0.5, "test": 0.5}, seed=0).values())
    ['test', 'test', 'train', 'train']
    """
    order = sorted(strata, key=lambda name: (strata[name], _rank(seed, name), name))
    dealt, given, number = {}, dict.fromkeys(shares, 0), 0
    for name in order:
        size = sizes[name] if sizes else 1
        number += size
        part = max(shares, key=lambda p: shares[p] * number - given[p])
        dealt[name], given[part] = part, given[part] + size
    return dealt


def _patient(manifest: Manifest, rule: SplitRule, case_id: str) -> str:
    if rule.patient is None:
        return case_id
    if not (found := re.match(rule.patient, case_id)) or not found[0]:
        raise UserError(f"{manifest.name}: split.patient: {rule.patient!r} finds no patient in the case id {case_id!r}; correct the pattern.")
    return found[0]


def _with_their_patients(manifest: Manifest, assigned: Mapping[str, str], patients: Mapping[str, str]) -> dict[str, str]:
    """The parts of all other cases of the patients of the assigned ones."""
    part_of: dict[str, str] = {}
    for case_id, part in assigned.items():
        if part_of.setdefault(patients[case_id], part) != part:
            raise UserError(
                f"{manifest.name}: split: found cases of the patient {patients[case_id]!r} in {part_of[patients[case_id]]} and in {part}, "
                "expected each patient in one part. Correct the lists, or split.patient."
            )
    return {case_id: part_of[patient] for case_id, patient in patients.items() if patient in part_of}


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

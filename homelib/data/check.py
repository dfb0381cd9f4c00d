"""A data set on disk against its manifest: cases found and paired, each examined, and then all compared with each other.

Cases are examined in processes, and each result is kept as soon as it is there: a check that is stopped goes on where it was, and an
unchanged case (files by size and time, the manifest's rules) is not read again. Nothing is written below the data set's folder.
"""

import hashlib
import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..paths import cache_dir, mark_of, written_whole
from ..progress import bar
from .checks import FILES
from .examine import SPACING_MM, VERSION, Report, Rules, examine
from .findings import Finding, finding, in_order, write_findings, write_rows
from .layouts import find_cases
from .manifest import Case, Manifest
from .parallel import default_workers, over
from .reading import files_of

FAR_SPACING = 3.0  # times the median, or a third of it
_FEW = 3  # cases with which a median means little


@dataclass(frozen=True)
class Checked:
    """The result: cases, their reports by id, all findings in order, and the folder that holds `findings.csv` and `cases.csv`."""

    cases: tuple[Case, ...]
    reports: dict[str, Report]
    findings: tuple[Finding, ...]
    folder: Path

    @property
    def errors(self) -> int:
        return sum(f.severity == "error" for f in self.findings)


def check(
    manifest: Manifest, root: str | Path, *, workers: int | None = None, kept: Path | None = None, again: bool = False, progress: bool = False
) -> Checked:
    """Check a data set's folder.

    Args:
        manifest: what is expected.
        root: the data set's folder; only read.
        workers: processes; None is one a core. 1 works in this process.
        kept: folder for results; None is one in the cache for this manifest and root.
        again: read every case again.
        progress: show a bar, where there is a terminal.

    Raises:
        UserError: `root` is no folder, or the manifest has no layouts.
    """
    found = find_cases(manifest, root)
    kept = kept or kept_folder(manifest, root)
    return check_cases(found.cases, manifest, kept=kept, workers=workers, again=again, progress=progress, findings=found.findings)


def check_cases(
    cases: Sequence[Case],
    manifest: Manifest,
    *,
    kept: Path,
    workers: int | None = None,
    again: bool = False,
    progress: bool = False,
    findings: Sequence[Finding] = (),
) -> Checked:
    """Check cases that are known already, the demo's say. `findings`: what was found on the way to them. The rest as in `check`."""
    rules = Rules.of(manifest)
    states = {case.id: state(case, rules) for case in cases}
    reports = {} if again else {case_id: r for case_id, r in _read_kept(kept, states).items() if not any(f.check in FILES for f in r.findings)}
    todo = [case for case in cases if case.id not in reports]
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n")  # after a line that a killed check cut short
        for report in _examined(todo, rules, workers, len(cases), progress):
            reports[report.case] = report
            stream.write(kept_line(states[report.case], report))
            stream.flush()
    with written_whole(kept / "results.jsonl") as part:
        part.write_text("".join(kept_line(states[case_id], report) for case_id, report in reports.items()), encoding="utf-8")
    findings = in_order([*findings, *(f for r in reports.values() for f in r.findings), *compare(cases, reports, manifest)])
    write_findings(findings, kept / "findings.csv")
    _write_cases(cases, reports, manifest, kept / "cases.csv")
    return Checked(tuple(cases), {case.id: reports[case.id] for case in cases}, tuple(findings), kept)


def kept_folder(manifest: Manifest, root: str | Path) -> Path:
    """Where the results of one manifest and one folder are kept."""
    return cache_dir() / "checks" / f"{manifest.name}-{mark_of(root)}"


def kept_reports(manifest: Manifest, root: str | Path, cases: Iterable[Case], *, kept: Path | None = None) -> dict[str, Report]:
    """The reports of earlier checks that still hold, by case id; a case without one has not been checked, or has changed."""
    rules = Rules.of(manifest)
    return _read_kept(kept or kept_folder(manifest, root), {case.id: state(case, rules) for case in cases})


def faults(manifest: Manifest, root: str | Path, cases: Sequence[Case]) -> tuple[dict[str, str], int]:
    """What the last check calls an error, by case id, and how many cases are not checked as they are now. No file is opened."""
    reports = kept_reports(manifest, root, cases)
    known = [case for case in cases if case.id in reports]
    found = [*(one for case in known for one in reports[case.id].findings), *compare(known, reports, manifest)]
    wrong: dict[str, str] = {}
    for one in found:
        if one.severity == "error" and one.case:
            wrong.setdefault(one.case, one.check)  # the first of several
    return wrong, len(cases) - len(known)


def unsound(manifest: Manifest, root: str | Path, cases: Sequence[Case]) -> str:
    """`faults` in one line; empty where there is nothing against training on these cases."""
    wrong, unknown = faults(manifest, root, cases)
    told = [f"{len(wrong)} with errors ({listed(wrong)})"] if wrong else []
    told += [f"{unknown} not checked as they are now"] if unknown else []
    return f"{' and '.join(told)}: look at them before training, home data check {manifest.reference} {root}." if told else ""


def listed(wrong: Mapping[str, str], most: int = 5) -> str:
    """The first cases and their faults, as `faults` has them, in a few words."""
    return ", ".join(f"{case_id}: {fault}" for case_id, fault in sorted(wrong.items())[:most]) + (" ..." if len(wrong) > most else "")


def state(case: Case, rules: Rules) -> str:
    """Of all that the result depends on: this code's version, the rules, and the case's files by name, size and time."""
    told = f"{VERSION}{rules.told}{case.modality}{[_stamp(file) for path in (case.image, case.label) if path for file in files_of(path)]}"
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _stamp(path: Path) -> tuple:
    try:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return str(path), found.st_size, found.st_mtime_ns
        with os.scandir(path) as listing:
            return str(path), sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in listing)
    except OSError as error:
        return str(path), error.errno


# ---------------------------------------------------------------- one case after the other


def _examined(cases: list[Case], rules: Rules, workers: int | None, total: int, progress: bool) -> Iterable[Report]:
    with bar(total=total, initial=total - len(cases), unit="case", desc="check", show=progress) as shown:
        for index, result in over(_work, [(case, rules) for case in cases], workers=default_workers() if workers is None else workers):
            if isinstance(result, Exception):
                case = cases[index]
                result = Report(case.id, [finding("reader died", case.id, case.image, f"{type(result).__name__}: {result}"[:200])])
            shown.update()
            yield result


def _work(work: tuple[Case, Rules]) -> Report:
    return examine(*work)


def kept_line(its_state: str, report: Report) -> str:
    """One result as a line of `results.jsonl`."""
    return json.dumps({"state": its_state, **asdict(report)}) + "\n"


def _read_kept(folder: Path, states: dict[str, str]) -> dict[str, Report]:
    """Results whose state is still that of the case; a line cut short by a killed check is passed over."""
    reports = {}
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            fields = json.loads(line)
            if states.get(fields["case"]) == fields.pop("state"):
                fields["findings"] = [Finding(**f) for f in fields["findings"]]
                reports[fields["case"]] = Report(**fields)
        except (ValueError, KeyError, TypeError):
            continue
    return reports


# ---------------------------------------------------------------- all cases beside each other


def compare(cases: Iterable[Case], reports: dict[str, Report], manifest: Manifest) -> list[Finding]:
    """What only shows beside the other cases: copies, odd spacings and orientations, classes that nobody has."""
    known = [(case, reports[case.id].statistics) for case in cases]
    return [*_copies(known, "image"), *_copies(known, "label"), *_odd_grids(known), *_unseen(known, manifest)]


def _copies(known: list[tuple[Case, dict]], role: str) -> list[Finding]:
    same = defaultdict(list)
    for case, statistics in known:
        empty = role == "label" and not any(statistics.get("voxels", {}).values())  # all empty labels are alike
        if f"{role}_hash" in statistics and not empty:
            same[statistics[f"{role}_hash"]].append((case, statistics))
    findings = []
    for (first, first_statistics), *others in same.values():
        for case, statistics in others:
            if role == "label" and statistics.get("image_hash") == first_statistics.get("image_hash"):
                continue  # a copy of the whole case: told of once
            findings.append(finding(f"duplicate {role}", case.id, getattr(case, role), f"the same values as in {first.id}"))
    return findings


def _odd_grids(known: list[tuple[Case, dict]]) -> list[Finding]:
    low, high = SPACING_MM  # what lies beyond is told of already
    with_grid = [(case, s) for case, s in known if "spacing_mm" in s and low <= min(s["spacing_mm"]) and max(s["spacing_mm"]) <= high]
    if len(with_grid) <= _FEW:
        return []
    findings = []
    sizes = np.sort([s["spacing_mm"] for _, s in with_grid], axis=1)
    median = np.median(sizes, axis=0)
    for (case, s), size in zip(with_grid, sizes, strict=True):
        ratio = size / median
        if (ratio > FAR_SPACING).any() or (ratio < 1 / FAR_SPACING).any():
            told = "x".join(f"{value:g}" for value in s["spacing_mm"])
            findings.append(finding("mixed spacing", case.id, case.image, f"{told} mm", median="x".join(f"{value:.3g}" for value in median)))
    (usual, _), *others = Counter(s["orientation"] for _, s in with_grid).most_common()
    if others:
        told = ", ".join(f"{number} of {letters}" for letters, number in others)
        findings.append(finding("mixed orientation", "", "", told, usual=usual))
    return findings


def _unseen(known: list[tuple[Case, dict]], manifest: Manifest) -> list[Finding]:
    seen = [s["voxels"] for _, s in known if "voxels" in s]
    if len(seen) <= _FEW:
        return []
    return [finding("class never seen", "", "", f"no voxel of {name} in {len(seen)} labels") for name in manifest.classes if not any(v[name] for v in seen)]


def _write_cases(cases: Iterable[Case], reports: dict[str, Report], manifest: Manifest, path: Path) -> None:
    """One row a case: where it lies, its grid, its intensities, and the volume of each class in ml."""
    plain = ["modality", "type", "orientation", "min", "p1", "median", "p99", "max", "mean", "image_hash", "label_hash"]
    columns = ["case", "part", "image", "label", "errors", "warnings", "shape", "spacing_mm", *plain, *(f"{name}_ml" for name in manifest.classes)]
    rows = []
    for case in cases:
        report = reports[case.id]
        s = report.statistics
        row = {"case": case.id, "part": case.part or "", "image": case.image, "label": case.label or ""} | {name: s[name] for name in plain if name in s}
        row |= {f"{kind}s": sum(f.severity == kind for f in report.findings) for kind in ("error", "warning")}
        row |= {name: "x".join(f"{value:g}" for value in s[name]) for name in ("shape", "spacing_mm") if name in s}
        row |= {f"{name}_ml": round(ml, 3) for name, ml in s.get("ml", {}).items()}
        rows.append(row)
    write_rows(rows, columns, path)

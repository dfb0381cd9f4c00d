"""From a folder to its cases: images and labels are paired by the case id that a layout's templates read out of their paths.

Folders are listed once each, files are not opened, and nothing is guessed from the order of names. The depth is that of the
template, so a loop of links ends.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .findings import Finding, finding
from .manifest import Case, Layout, Manifest
from .reading import has_suffix

LONGEST_ID = 100  # a prepared case is a file of this name and 40 characters more; most file systems end at 255


@dataclass(frozen=True)
class Found:
    """What a folder holds: the cases in order of their ids, and what is wrong with their names and pairs."""

    cases: tuple[Case, ...]
    findings: tuple[Finding, ...]


def find_cases(manifest: Manifest, root: str | Path) -> Found:
    """All cases of a data set below `root`, by the manifest's layouts.

    Where several layouts see an image, the first that has a label gives it. A label that is missing is told of, and the case has none then.

    Raises:
        UserError: `root` is no folder, or cannot be listed; the manifest has no layouts.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the folder of {manifest.name}. {_steps(manifest)}")
    if not manifest.layouts:
        raise UserError(f"{manifest.name}: it has no layouts, so its cases cannot be looked for in a folder. Write them, or let home data import.")
    tree = _Tree()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror}); check its permissions.") from None

    images: dict[str, dict[str, Layout]] = defaultdict(dict)  # case -> image path -> the first layout that has it
    labels: dict[str, dict[str, None]] = defaultdict(dict)  # case -> label paths, in order
    wanted: dict[str, str] = {}  # case -> where its label should be
    for layout in manifest.layouts:
        for case_id, path in tree.matches(str(root), layout.image, layout.case):
            images[case_id].setdefault(path, layout)
            if layout.label:
                wanted.setdefault(case_id, layout.label.replace("{case}", case_id))
        if layout.label:
            for case_id, path in tree.matches(str(root), layout.label, layout.case):
                labels[case_id].setdefault(path)

    origins = {entry.id: entry.label_origin for entry in manifest.cases}  # the demo's, which differ
    findings: list[Finding] = list(tree.findings)
    cases = []
    for case_id in sorted(images):
        image, *other = images[case_id]
        for path in other:
            findings.append(finding("image twice", case_id, path, f"a second one, beside {image}"))
        found = list(labels.get(case_id, ()))
        label = found[0] if found else None
        for path in found[1:]:
            findings.append(finding("label twice", case_id, path, f"a second one, beside {label}"))
        if label is None and case_id in wanted:
            findings.append(finding("label missing", case_id, image, "an image alone", where=wanted[case_id]))
        layout = images[case_id][image]
        cases.append(
            Case(
                case_id,
                Path(image),
                Path(label) if label else None,
                layout.modality or manifest.modality,
                origins.get(case_id, manifest.label_origin),
                manifest.reference,
                layout.part,
            )
        )
    for case_id in sorted(set(labels) - set(images)):
        where = " or ".join(dict.fromkeys(layout.image.replace("{case}", case_id) for layout in manifest.layouts if layout.label))
        findings += [finding("image missing", case_id, path, "a label alone", where=where) for path in labels[case_id]]
    findings += _names(cases) + _whole(manifest, root, cases, tree)
    return Found(tuple(cases), tuple(findings))


class _Tree:
    """Folders, each listed once; the paths that some template has matched."""

    def __init__(self) -> None:
        self.listed: dict[str, dict[str, bool]] = {}  # folder -> name -> is it a folder
        self.matched: set[str] = set()
        self.findings: list[Finding] = []

    def matches(self, root: str, template: str, pattern: str) -> Iterator[tuple[str, str]]:
        """(case id, path) of everything below `root` that fits the template."""
        as_folder = template.endswith("/")
        yield from self._descend(root, template.removesuffix("/").split("/"), as_folder, pattern, None)

    def _descend(self, folder: str, names: list[str], as_folder: bool, pattern: str, case_id: str | None) -> Iterator[tuple[str, str]]:
        name, rest = names[0], names[1:]
        if case_id is None and "{case}" in name or "*" in name:
            expression = _expression(name, pattern, case_id)
            found = ((hit, entry) for entry in self.entries(folder) if (hit := expression.fullmatch(entry)))
            hits = [(hit.groupdict().get("case", case_id), entry) for hit, entry in found]
        else:
            hits = [(case_id, name.replace("{case}", case_id or ""))]
        for its_id, entry in hits:
            path = f"{folder}/{entry}"
            if rest:
                if entry in (entries := self.listed.get(folder, {})) and not entries[entry]:
                    continue
                yield from self._descend(path, rest, as_folder, pattern, its_id)
            elif its_id is not None and (os.path.isdir(path) if as_folder else self._is_file(folder, entry, path)):
                self.matched.add(path)
                yield its_id, path

    def _is_file(self, folder: str, entry: str, path: str) -> bool:
        """Any name that is no folder: a broken link counts, for it is to be told of."""
        entries = self.listed.get(folder)
        if entries is not None:
            return entries.get(entry) is False
        return os.path.lexists(path) and not os.path.isdir(path)

    def entries(self, folder: str) -> dict[str, bool]:
        """Names in a folder, sorted, without hidden ones; empty where there is no such folder."""
        if folder not in self.listed:
            try:
                with os.scandir(folder) as listing:
                    names = {entry.name: _is_folder(entry) for entry in listing if not entry.name.startswith(".")}
                self.listed[folder] = dict(sorted(names.items()))
            except (FileNotFoundError, NotADirectoryError):
                self.listed[folder] = {}
            except OSError as error:
                self.listed[folder] = {}
                self.findings.append(finding("folder", "", folder, f"no way to list it ({error.strerror})"))
        return self.listed[folder]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _expression(name: str, pattern: str, case_id: str | None) -> re.Pattern:
    """One name of a template as a regular expression; the second `{case}` must repeat the first."""
    parts = []
    for index, text in enumerate(name.split("{case}")):
        if index:
            parts.append(re.escape(case_id) if case_id is not None else f"(?P<case>{pattern})" if index == 1 else "(?P=case)")
        parts.append("[^/]*".join(re.escape(piece) for piece in text.split("*")))
    return re.compile("".join(parts))


# ---------------------------------------------------------------- what names and pairs tell


def _names(cases: list[Case]) -> list[Finding]:
    findings = []
    folded: dict[str, str] = {}
    for case in cases:
        problem = None
        if not case.id.isascii() or not case.id.isprintable():
            problem = "characters beyond ASCII"
        elif len(case.id) > LONGEST_ID:
            problem = f"{len(case.id)} characters"
        elif (other := folded.setdefault(case.id.casefold(), case.id)) != case.id:
            problem = f"the same id as {other}, but for capitals"
        if problem:
            findings.append(finding("name", case.id, case.image, problem, longest=LONGEST_ID))
    return findings


def _whole(manifest: Manifest, root: Path, cases: list[Case], tree: _Tree) -> list[Finding]:
    """What can be said of the folder as a whole."""
    if not cases:
        return [finding("nothing found", "", root, "no image", where=", ".join(layout.image for layout in manifest.layouts))]
    findings = []
    if manifest.expected_cases and len(cases) != manifest.expected_cases:
        findings.append(finding("number of cases", "", root, str(len(cases)), expected=manifest.expected_cases))
    for folder, entries in tree.listed.items():
        others = [n for n, is_folder in entries.items() if not is_folder and has_suffix(n) and f"{folder}/{n}" not in tree.matched]
        if others:
            findings.append(finding("not used", "", folder, f"{len(others)} image files that fit no layout, {others[0]} first"))
    return findings


def _steps(manifest: Manifest) -> str:
    return f"How to get it: home data show {manifest.reference}." if manifest.access_steps else ""

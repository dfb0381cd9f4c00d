"""The layouts of a folder, read off its names: which files are images, which labels, and where the case id stands in them.

Every path becomes a template by taking its case id out; the few templates that most paths share are the layouts. The id is the subject's
folder in BIDS (`sub-01`), the folder where each case has one, and otherwise the file name less the words that say what it is. Of slices in
folders of patient, study and series it is the folder that a label is named after.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .reading import has_suffix, split_suffix

_LABEL_WORDS = {"label", "labels", "labelstr", "labelsts", "labelsva", "seg", "segs", "segmentation", "segmentations", "mask", "masks", "gt", "dseg"}
_LABEL_WORDS |= {"annotation", "annotations", "groundtruth", "truth", "contour", "roi", "msk"}
_IMAGE_WORDS = {
    "image",
    "images",
    "imagestr",
    "imagests",
    "imagesva",
    "img",
    "scan",
    "volume",
    "vol",
    "ct",
    "mr",
    "mri",
    "us",
    "t1",
    "t2",
    "t1w",
    "t2w",
    "flair",
    "0000",
}
_WORD = re.compile(r"[A-Za-z]+[0-9]*w?|[0-9]+")
_TRAILING = re.compile(rf"[-_. ]+(?:{'|'.join(sorted(_LABEL_WORDS | _IMAGE_WORDS, key=len, reverse=True))})$", re.IGNORECASE)
_LEADING = re.compile(rf"^(?:{'|'.join(sorted(_LABEL_WORDS | _IMAGE_WORDS, key=len, reverse=True))})[-_. ]*(?=.*[0-9])", re.IGNORECASE)
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")
_PARTS = {"imagests": "test", "test": "test", "val": "validation", "validation": "validation", "train": "train", "training": "train"}
_LONGEST_PATTERN = 100  # as in Layout.case
_MOST_LAYOUTS = 8
_DEPTH = 6


class Named(NamedTuple):
    """layouts: as a manifest has them, the most frequent first; empty where there is no image. images_left: templates of images beyond the first
    eight. labels_left: of labels that no layout takes, the most frequent first; those of a second rater, say."""

    layouts: list[dict]
    images_left: list[str]
    labels_left: list[str]


def find_layouts(root: Path) -> Named:
    """The layouts of a folder. Raises UserError: images of several channels."""
    images, labels = images_and_labels(root)
    _one_channel(root, images)
    label_templates = _templates(labels)
    image_templates = _templates(images, set().union(*label_templates.values()))
    layouts: list[dict[str, Any]] = []
    chosen = sorted(image_templates.items(), key=lambda item: (-len(item[1]), item[0]))
    for template, ids in chosen[:_MOST_LAYOUTS]:
        partner = max(label_templates, key=lambda t: (len(label_templates[t] & ids), _alike(t, template), t), default=None)
        if partner is not None and not label_templates[partner] & ids:
            partner = None
        layout = {"name": f"layout_{len(layouts) + 1}", "image": template, "case": _pattern(ids, template, partner)}
        part = next((_PARTS[folder.lower()] for folder in template.split("/")[:-1] if folder.lower() in _PARTS), None)
        layouts.append(layout | ({"label": partner} if partner else {}) | ({"part": part} if part else {}))
    taken = {layout.get("label") for layout in layouts}
    left = sorted(set(label_templates) - taken, key=lambda template: (-len(label_templates[template]), template))
    return Named(layouts, [template for template, _ in chosen[_MOST_LAYOUTS:]], left)


def _one_channel(root: Path, images: list[str]) -> None:
    """nnU-Net's `_0001` beside `_0000` is a second channel of the same image, and no case of its own."""
    known = set(images)
    for path in images:
        stem, suffix = split_suffix(path)
        if stem.endswith("_0001") and (first := f"{stem.removesuffix('1')}0{suffix}") in known:
            raise UserError(f"{root / path}: found a second channel beside {first}, expected one image a case; several are not supported. Keep one channel.")


def _pattern(ids: set[str], image: str, label: str | None) -> str:
    """A regular expression of these ids: digits stand for digits, the rest for itself. Where they are too different, any name that is no label's."""
    kinds = sorted({re.sub("[0-9]+", "[0-9]+", re.escape(case_id)) for case_id in ids})
    if len(joined := "|".join(kinds)) <= _LONGEST_PATTERN - 4:
        return joined if len(kinds) == 1 else f"(?:{joined})"
    if label is None or os.path.dirname(image) != os.path.dirname(label):
        return "[^/]+"
    own = re.escape(label.rsplit("{case}", 1)[-1].removesuffix(image.rsplit("{case}", 1)[-1]))  # _seg, say
    return f"[^/]+(?<!{own})" if own else "[^/]+"


def images_and_labels(root: Path, *, everywhere: bool = False) -> tuple[list[str], list[str]]:
    """Images and labels below `root`, as paths relative to it; a folder of slices or of masks is one path that ends in `/`.

    everywhere: below linked folders too, each looked into once, and however deep.
    """
    images: list[str] = []
    labels: list[str] = []
    volumes_in: dict[Path, set[str]] = {}
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=everywhere):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= _DEPTH and not everywhere:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if everywhere:  # a loop of links has no end
            places = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
            folders[:] = [name for name in folders if places[name] not in seen]
            seen |= set(places.values())
        volumes = sorted(name for name in names if has_suffix(name) and not name.startswith("."))
        volumes_in[relative] = set(volumes)
        here = "" if relative == Path(".") else f"{relative.as_posix()}/"
        in_label_folder = _labels_below(relative)
        if not volumes and relative.parts and any(name.lower().endswith((".dcm", ".ima")) or _is_dicom(Path(folder) / name) for name in sorted(names)[:3]):
            (labels if in_label_folder else images).append(here)
        elif in_label_folder and _masks_of_one(volumes_in.get(relative.parent, set()), volumes):
            labels.append(here)
        else:
            for name in volumes:
                (labels if in_label_folder or _is_label(name) else images).append(here + name)
    return images, labels


def _masks_of_one(beside: set[str], volumes: list[str]) -> bool:
    """Whether volumes in a folder of labels are a class each, of the one image above it, as in <case>/ct.nii.gz and <case>/segmentations/. Several images
    there, or one of the same id, are cases whose labels these are."""
    images = [name for name in beside if not _is_label(name)]
    ids = {_case_id(split_suffix(name)[0]) for name in volumes}
    return len(images) == 1 and not beside & set(volumes) and _case_id(split_suffix(images[0])[0]) not in ids


def _labels_below(folder: Path) -> bool:
    """What the nearest folder that says something says: images in `segmentation_task/imagesTr` are images."""
    told = (_is_label(name) for name in reversed(folder.parts) if name.lower().startswith(("image", "img")) or _is_label(name))
    return next(told, False)


def _is_label(name: str) -> bool:
    return any(word.lower() in _LABEL_WORDS for word in _WORD.findall(re.sub(r"(?<=[a-z])[0-9]+", "", name)))


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _templates(paths: list[str], label_ids: Set[str] = frozenset()) -> dict[str, set[str]]:
    """Template -> ids of the cases that fit it. `label_ids`: of the labels that these images may have."""
    shared = Counter(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
    series = _series_templates([path for path in paths if path.endswith("/")], label_ids) if label_ids else {}
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        template, case_id = series.get(path) or _template(path, shared)
        found[template].add(case_id)
    return dict(found)


def _series_templates(paths: list[str], label_ids: Set[str]) -> dict[str, tuple[str, str]]:
    """Template and id of folders of slices, by path: of patient, study and series that one is the case's whose names have most of the labels' ids.
    Folders below it may have any name. Nothing of a path without such a folder."""
    by_depth: dict[int, list[list[str]]] = defaultdict(list)
    for path in paths:
        by_depth[path.count("/")].append(path.rstrip("/").split("/"))
    found = {}
    for depth, these in by_depth.items():
        known = [[_id_within(names[level], label_ids) for names in these] for level in range(depth)]
        level = max(range(depth), key=lambda level: (len({case_id for _, case_id, _ in known[level]} - {""}), -level))
        below = [next(iter(kinds)) if len(kinds) == 1 else "*" for kinds in ({names[n] for names in these} for n in range(level + 1, depth))]
        for names, (before, case_id, after) in zip(these, known[level], strict=True):
            if case_id:
                found["/".join(names) + "/"] = "/".join([*names[:level], f"{before}{{case}}{after}", *below]) + "/", case_id
    return found


def _id_within(name: str, ids: Set[str]) -> tuple[str, str, str]:
    """The longest of some ids that stands in a name between its ends and what is neither letter nor digit, with what is before and after it; "" where
    there is none.

    >>> _id_within("PANCREAS1_1", {"1", "2"}), _id_within("PANCREAS0001", {"0001"})
    (('PANCREAS1_', '1', ''), ('', '', ''))
    """
    starts, ends = ([match.start() for match in re.finditer(edge, name)] for edge in (r"(?<![A-Za-z0-9])(?=.)", r"(?![A-Za-z0-9])"))
    found = ((name[:start], name[start:end], name[end:]) for start in starts for end in ends if name[start:end] in ids)
    return max(found, key=lambda parts: len(parts[1]), default=("", "", ""))


def _template(path: str, shared: Counter) -> tuple[str, str]:
    *folders, name = path.rstrip("/").split("/")
    end = "/" if path.endswith("/") else ""
    subject = next((part for part in folders if _SUBJECT.fullmatch(part)), None)
    if subject:  # BIDS: other entities (session, reconstruction, run) may differ from case to case
        stem, suffix = split_suffix(name)
        kind = stem.rsplit("_", 1)[-1]
        session = next((part for part in folders if _SESSION.fullmatch(part)), None)
        if session and stem.startswith(f"{subject}_{session}_"):  # each session is a case; the manifest keeps a subject's together
            parts = ["sub-*" if part == subject else "ses-*" if part == session else part for part in folders]
            return "/".join([*parts, f"{{case}}*_{kind}{suffix}"]), f"{subject}_{session}"
        parts = ["{case}" if part == subject else "*" if part == session else part for part in folders]
        return "/".join([*parts, f"{{case}}*_{kind}{suffix}"]), subject
    if folders and shared[name] > 1:  # one folder a case: the same name in each
        place = next((index for index in range(len(folders) - 1, -1, -1) if not _is_label(folders[index]) and folders[index].lower() not in _IMAGE_WORDS), None)
        if place is not None:
            return "/".join([*folders[:place], "{case}", *folders[place + 1 :], name]) + end, folders[place]
    stem, suffix = (name, "") if end else split_suffix(name)
    before, after = stem.split(case_id := _case_id(stem), 1)
    return "/".join([*folders, f"{before}{{case}}{after}{suffix}"]) + end, case_id


def _case_id(stem: str) -> str:
    """A file's name less the words that say what it is.

    >>> _case_id("volume-12"), _case_id("case_07_seg")
    ('12', 'case_07')
    """
    case_id = stem
    while (shorter := _TRAILING.sub("", case_id)) not in (case_id, ""):
        case_id = shorter
    return _LEADING.sub("", case_id) or case_id


def _alike(one: str, other: str) -> int:
    """Of two label templates, the one that shares more of its path with the image's is its partner."""
    return len(os.path.commonprefix([one, other])) + len(os.path.commonprefix([one[::-1], other[::-1]]))

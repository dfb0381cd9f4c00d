"""The parts of a manifest: where files come from, how a folder is laid out, and how cases are split.

Glossary: a *template* is a path below the data set's folder with `{case}` where the case id stands; `*` stands for any part of a
name, and a final `/` says that the path is a folder (of DICOM slices, or of one mask a class).
"""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Modality = Literal["CT", "MRI", "US"]
LabelOrigin = Literal["REF", "MODEL", "UNSTATED", "SYNTHETIC"]  # reference or manual, a network's output, not said, generated
Part = Literal["train", "validation", "test"]
Access = Literal["open", "registration", "private"]  # a plain download; an account or a form; nobody but its owner
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
Range = tuple[float, float]

LARGEST_RAW_LABEL = 65535  # bounds the lookup table
RawLabel = Annotated[int, Field(ge=1, le=LARGEST_RAW_LABEL, strict=True)]
_PLAIN_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")  # of a regular expression: an escaped one, or one of a set
_INNERMOST_GROUP = re.compile(r"\(([^()]*)\)([+*{]?)")


class Frozen(BaseModel):
    """What every part shares: no unknown field, no change after reading, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------- files of Python packages, and generated ones: the demo data


class Package(Frozen):
    """One released file of a Python package, pinned by version and full sha256."""

    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$")
    kind: Literal["sdist", "wheel"]
    sha256: Sha256
    megabytes: float = Field(gt=0)


class PackageFile(Frozen):
    """A file inside a package's archive: `member` is its full path there, `sha256` that of the file itself."""

    package: str
    member: str = Field(pattern=r"^[A-Za-z0-9_.+/-]+$")
    sha256: Sha256

    @field_validator("member")
    @classmethod
    def _safe_member(cls, member: str) -> str:
        if member.startswith("/") or any(part in ("", ".", "..") for part in member.split("/")):
            raise ValueError("a relative path without '.', '..' or '//'")
        return member

    @property
    def suffix(self) -> str:
        """`.nii.gz` for a compressed NIfTI, else the last suffix."""
        return ".nii.gz" if self.member.endswith(".nii.gz") else Path(self.member).suffix


class Phantom(Frozen):
    """A generated (synthetic) volume: `ct` or `us` of `homelib.data.phantom`, fixed by its seed."""

    phantom: Literal["ct", "us"]
    seed: int = Field(ge=0)


def _source_kind(value: object) -> str:
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, BaseModel) else ()
    return "phantom" if "phantom" in keys else "package"


Source = Annotated[Annotated[PackageFile, Tag("package")] | Annotated[Phantom, Tag("phantom")], Discriminator(_source_kind)]


class CaseEntry(Frozen):
    """One case of the demo data: where its image and its label come from, and who made the label.

    `contrast_ranges` replaces the manifest's for this case: offsets depend on the contrast phase that a scan starts in.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)  # names folders: nothing but plain characters
    image: Source
    label: Source | None = None
    label_origin: LabelOrigin
    contrast_ranges: dict[Name, Range] | None = None
    note: str = ""


class Archive(Frozen):
    """One archive of an open data set: its address, the checksum of its bytes, and the folder below the data set's to unpack it to. `md5` where the
    source publishes nothing better: it tells a damaged download, and is no proof against malice."""

    url: str = Field(pattern=r"^https?://\S+$")
    sha256: Sha256 | None = None
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")
    into: str = Field(".", pattern=r"^[A-Za-z0-9_.-]+$")

    @model_validator(mode="after")
    def _checked(self) -> "Archive":
        if (self.sha256 is None) == (self.md5 is None):
            raise ValueError("one checksum, sha256 or md5")
        if self.into == "..":
            raise ValueError("into: a folder below the data set's, not '..'")
        return self

    @property
    def checksum(self) -> str:
        """`sha256:...` or `md5:...`, as pooch has it."""
        return f"sha256:{self.sha256}" if self.sha256 else f"md5:{self.md5}"

    @property
    def name(self) -> str:
        return Path(unquote(urlsplit(self.url).path)).name or "archive"


# ---------------------------------------------------------------- a folder of the user's


class Layout(Frozen):
    """How cases lie in a folder: templates of the image and of the label, and the pattern of a case id.

    `label` None: these images have none. `modality` None: the manifest's. `part`: these cases belong to it, whatever the split says.

    >>> Layout(name="nnunet", image="imagesTr/{case}_0000.nii.gz", label="labelsTr/{case}.nii.gz", case="case_[0-9]+").part is None
    True
    """

    name: Name
    image: str = Field(max_length=300)
    label: str | None = Field(None, max_length=300)
    case: str = Field("[^/]+", max_length=100, description="regular expression of a case id")
    modality: Modality | None = None
    part: Part | None = None

    @field_validator("image", "label")
    @classmethod
    def _safe_template(cls, template: str | None) -> str | None:
        if template is None:
            return None
        names = template.removesuffix("/").split("/")
        if "{case}" not in template or "\\" in template or any(name in ("", ".", "..") for name in names):
            raise ValueError("a relative path with {case} in it, without '.', '..', '//' or a backslash: imagesTr/{case}.nii.gz, say")
        return template

    @field_validator("case")
    @classmethod
    def _sound_case(cls, pattern: str) -> str:
        return _sound_pattern(pattern)


def _sound_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
        re.compile(f"(?P<case>{pattern})")  # as it is used: a flag for all of it, (?i), may stand at the beginning alone
    except re.error as error:
        raise ValueError(f"a regular expression of a case id ({error})") from None
    if groups or _may_explode(pattern):
        raise ValueError("a regular expression without groups, (?:...) where one is needed, and without a repeat of a repeat or of a choice")
    return pattern


def _may_explode(pattern: str) -> bool:
    """Whether a repeat holds another, or a choice: to find out that a name does not fit such a pattern can take exponential time."""
    left = _PLAIN_CHARACTER.sub("x", pattern)
    while group := _INNERMOST_GROUP.search(left):
        inside, repeat = re.sub(r"\{[0-9]+\}", "", group[1]), group[2]  # {4} repeats, but in one way only
        many = bool(re.search(r"[+*{|]", inside))
        if many and repeat:
            return True
        left = f"{left[: group.start()]}{'x+' if many else 'x'}{repeat}{left[group.end() :]}"
    return False


class SplitRule(Frozen):
    """Who is trained on, validated and tested on; the same for the same seed and ids, whatever the machine.

    `parts` are shares (they sum to 1) or counts (they sum to the number of cases) of what neither a layout nor a list has assigned;
    `folds` deals these cases into so many folds instead. `stratify_by` is `modality` or a class: with and without it, the same share.
    `patient` is the regular expression of the beginning of a case id that names the patient, whose cases all come into one part; None: each case is a patient.
    `lists` gives the cases of a part by a text file in the data set's folder, one id a line.
    """

    seed: int = Field(0, ge=0)
    parts: dict[Part, Annotated[float, Field(gt=0)]] = {}
    folds: int | None = Field(None, ge=2, le=100)
    stratify_by: Name | None = None
    patient: str | None = Field(None, max_length=100)
    lists: dict[Part, str] = {}

    @field_validator("patient")
    @classmethod
    def _sound_patient(cls, pattern: str | None) -> str | None:
        return pattern if pattern is None else _sound_pattern(pattern)

    @model_validator(mode="after")
    def _one_way(self) -> "SplitRule":
        if self.parts and self.folds:
            raise ValueError("parts or folds, not both")
        total = sum(self.parts.values())
        whole = all(share == int(share) for share in self.parts.values())
        if self.parts and not whole and abs(total - 1) > 1e-6:
            raise ValueError(f"parts that sum to 1, or whole counts, not {total:g}")
        for name in self.lists.values():
            if Path(name).name != name:
                raise ValueError(f"a file in the data set's own folder, not {name!r}")
        return self

    @property
    def counts(self) -> bool:
        """Whether `parts` are numbers of cases: whole, and more than one in all."""
        return bool(self.parts) and abs(sum(self.parts.values()) - 1) > 1e-6

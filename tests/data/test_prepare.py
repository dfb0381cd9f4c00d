"""From files to arrays and back: bad files are one line each, orientation is undone, the grid comes back exactly, the cache is used and renewed."""

import tracemalloc
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from homelib import UserError
from homelib.data import prepare as module
from homelib.data.cache import CaseFile
from homelib.data.grid import Resampling
from homelib.data.manifest import Case, load_manifest
from homelib.data.phantom import ct_phantom
from homelib.data.prepare import MARGIN_VOXELS, Preparation, prepare, prepare_into
from homelib.run.predict import one_hot, to_native

MANIFEST = load_manifest("demo_ct")


class Files:
    """A phantom's arrays, to be spoilt and written as a case of their own."""

    def __init__(self, case: Case, folder):
        image, label = nib.load(case.image), nib.load(case.label)
        self.case, self.folder, self.affine = case, folder, image.affine
        self.image, self.label = np.asarray(image.dataobj), np.asarray(label.dataobj)

    def write(self, *, image=None, label=None, affine=None, label_affine=None) -> Case:
        """A case of the given arrays, the phantom's where none is given. Bytes are written as they are."""
        affine = self.affine if affine is None else affine
        wanted = {"image": (self.image if image is None else image, affine), "label": (self.label if label is None else label, label_affine)}
        paths = {}
        for role, (data, place) in wanted.items():
            paths[role] = self.folder / f"{role}.nii.gz"
            if isinstance(data, bytes):
                paths[role].write_bytes(data)
            else:
                nib.save(nib.Nifti1Image(data, affine if place is None else place), paths[role])
        return replace(self.case, **paths)


@pytest.fixture
def files(phantoms, tmp_path):
    return Files(phantoms["phantom-a"], tmp_path)


@pytest.fixture
def prepared_at(tmp_path):
    """prepare(), with a cache of this test's own."""
    return lambda case, spacing_mm: prepare(case, spacing_mm=(spacing_mm,) * 3 if isinstance(spacing_mm, float) else spacing_mm, cache=tmp_path / "cache")


@pytest.fixture(scope="module")
def finer(phantoms, tmp_path_factory):
    """phantom-a with voxels of 3 mm, 100 x 100 x 100 of them, gzipped."""
    image, label, affine = ct_phantom(1, shape=(100, 100, 100), spacing_mm=3.36)
    raw = np.array([0, *(values[0] for values in MANIFEST.classes.values())], np.uint8)[label]
    folder = tmp_path_factory.mktemp("finer")
    for name, volume in (("image", image), ("label", raw)):
        nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
    return replace(phantoms["phantom-a"], image=folder / "image.nii.gz", label=folder / "label.nii.gz")


# ---------------------------------------------------------------- bad input


def with_value(array, value):
    array = array.astype(np.float32)
    array[3, 4, 5] = value
    return array


def shifted(affine, mm):
    affine = affine.copy()
    affine[0, 3] += mm
    return affine


BAD = {
    "text in place of an image": (lambda f: {"image": b"no image"}, r"image\.nii\.gz: cannot be read as a 3D image"),
    "an empty image": (lambda f: {"image": b""}, r"image\.nii\.gz: cannot be read as a 3D image"),
    "a truncated image": (lambda f: {"image": f.case.image.read_bytes()[:20_000]}, r"image\.nii\.gz: cannot be read as a 3D image"),
    "a truncated label": (lambda f: {"label": f.case.label.read_bytes()[:1000]}, r"label\.nii\.gz: cannot be read as a 3D label"),
    "an image of four axes": (lambda f: {"image": np.stack([f.image, f.image], -1)}, r"image\.nii\.gz: found shape 48x48x48x2, expected one 3D volume"),
    "an image of two axes": (lambda f: {"image": f.image[:, :, 9]}, r"image\.nii\.gz: found shape 48x48, expected one 3D volume"),
    "an image with NaN": (lambda f: {"image": with_value(f.image, np.nan)}, r"image\.nii\.gz: .* 1 values that are not finite"),
    "an image with an infinity": (lambda f: {"image": with_value(f.image, -np.inf)}, r"image\.nii\.gz: .* 1 values that are not finite"),
    "an image of air alone": (lambda f: {"image": np.full_like(f.image, -1000)}, r"image\.nii\.gz: no voxel above -175"),
    "a label of another shape": (lambda f: {"label": f.label[:-1]}, r"label\.nii\.gz: found a label of 47x48x48 voxels, expected the image's 48x48x48"),
    "a label of halves": (lambda f: {"label": f.label + np.float32(0.5)}, r"label\.nii\.gz: .*whole numbers .*found 0\.5"),
    "a negative label": (lambda f: {"label": with_value(f.label, -1)}, r"label\.nii\.gz: .*found -1"),
    "a label with NaN": (lambda f: {"label": with_value(f.label, np.nan)}, r"label\.nii\.gz: .* 1 values that are not finite"),
    "a label without any class": (lambda f: {"label": np.zeros_like(f.label)}, r"label\.nii\.gz: no voxel of any class of demo_ct \(bone, "),
    "a shifted label": (lambda f: {"label_affine": shifted(f.affine, 5)}, r"label\.nii\.gz: its affine places it up to 5 mm from the image"),
    "a label of other spacing": (lambda f: {"label_affine": f.affine * [[1.01], [1], [1], [1]]}, r"label\.nii\.gz: its affine places it up to 1\.\d+ mm"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_line_that_names_it(fault, files, prepared_at, tmp_path):
    spoil, said = BAD[fault]
    with pytest.raises(UserError, match=said) as caught:
        prepared_at(files.write(**spoil(files)), 12.0)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("role", ["image", "label"])
def test_a_missing_file_is_one_line_that_names_it(role, files, prepared_at, tmp_path):
    case = replace(files.case, **{role: tmp_path / "nowhere.nii.gz"})
    with pytest.raises(UserError, match=rf"nowhere\.nii\.gz: no such file; expected the {role} of a case"):
        prepared_at(case, 12.0)


def test_a_label_may_hold_whole_floats_and_differ_in_place_by_rounding(files, prepared_at):
    expected = prepared_at(files.write(), 12.0)
    found = prepared_at(files.write(label=files.label.astype(np.float32), label_affine=shifted(files.affine, 0.01)), 12.0)
    np.testing.assert_array_equal(found.label, expected.label)


# ---------------------------------------------------------------- orientation, grid, contents


def turned(image: nib.Nifti1Image, axes: str, before: str = "RAS") -> nib.Nifti1Image:
    """The same volume with its axes stored in another order and direction."""
    codes = nib.orientations.axcodes2ornt
    return image.as_reoriented(nib.orientations.ornt_transform(codes(before), codes(axes)))


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "AIR"])
def test_the_order_and_direction_of_the_files_axes_do_not_matter(axes, files, prepared_at):
    affine, spacing_mm, part = files.affine @ np.diag([1.0, 1.1, 0.9, 1.0]), (12.0, 10.0, 11.0), np.s_[:44, 4:45, 2:48]  # no two axes alike
    straight = [nib.Nifti1Image(volume[part], affine) for volume in (files.image, files.label)]
    image, label = (turned(volume, axes) for volume in straight)
    expected = prepared_at(files.write(image=straight[0].dataobj, label=straight[1].dataobj, affine=affine), spacing_mm)
    found = prepared_at(files.write(image=image.dataobj, label=label.dataobj, affine=image.affine), spacing_mm)
    assert found.native_shape == image.shape
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_allclose(found.image, expected.image, atol=0.1)  # HU

    back = nib.Nifti1Image(to_native(one_hot(found.label, 9), found), found.native_affine)
    differ = np.asarray(turned(back, "RAS", axes).dataobj) != to_native(one_hot(expected.label, 9), expected)
    assert differ.mean() < 1e-3  # two classes of equal probability: rounding decides


def test_the_prepared_grid_has_the_asked_spacing_and_keeps_every_place(files, prepared_at):
    found = prepared_at(files.write(), (14.0, 7.0, 10.0))
    assert found.spacing_mm == (14.0, 7.0, 10.0)
    assert found.image.shape == found.label.shape
    assert (found.image.dtype, found.label.dtype) == (np.float32, np.uint8)
    merged = MANIFEST.merge(files.label)
    for name in ("liver", "spleen", "stomach", "muscle"):  # their centres, to less than half a voxel
        index = MANIFEST.class_names.index(name)
        native, ours = (np.argwhere(a == index).mean(0) @ A[:3, :3].T + A[:3, 3] for a, A in ((merged, files.affine), (found.label, found.affine)))
        assert np.abs(native - ours).max() < 3, name


def test_without_a_spacing_it_is_the_manifests(files, prepared_at):
    assert prepared_at(files.write(), None).spacing_mm == MANIFEST.spacing_mm


def test_at_the_files_own_spacing_nothing_is_changed_but_the_crop(files, prepared_at):
    found = prepared_at(files.write(), 7.0)
    start = np.round(np.linalg.solve(found.native_affine, found.affine[:, 3])[:3]).astype(int)
    part = tuple(slice(a, a + n) for a, n in zip(start, found.image.shape, strict=True))
    np.testing.assert_allclose(found.image, files.image[part], atol=0.01)
    np.testing.assert_array_equal(found.label, MANIFEST.merge(files.label)[part])


def test_the_crop_keeps_the_body_and_a_margin(files, prepared_at):
    found = prepared_at(files.write(), 7.0)
    assert found.image.size < 0.9 * files.image.size
    body = np.argwhere(found.image > MANIFEST.intensity_window[0])
    for axis, size in enumerate(found.image.shape):
        assert body[:, axis].min() <= MARGIN_VOXELS
        assert size - 1 - body[:, axis].max() <= MARGIN_VOXELS
    assert (files.image > MANIFEST.intensity_window[0]).sum() == len(body)
    assert np.bincount(found.label.ravel())[1:].tolist() == np.bincount(MANIFEST.merge(files.label).ravel())[1:].tolist()


@pytest.mark.parametrize("spacing_mm", [21.0, 10.0, 5.0])
def test_what_lies_beyond_the_body_need_not_be_resampled(spacing_mm, files, prepared_at):
    """Only the part that may be body is resampled: it is that of the whole scan resampled, and then cropped."""
    found = prepared_at(files.write(), spacing_mm)
    step = Resampling.to_spacing(files.image.shape, files.affine, (spacing_mm,) * 3)
    whole = step.image(files.image)
    body = np.argwhere(whole > MANIFEST.intensity_window[0])
    start, stop = np.maximum(body.min(0) - MARGIN_VOXELS, 0), np.minimum(body.max(0) + 1 + MARGIN_VOXELS, whole.shape)
    np.testing.assert_allclose(found.image, whole[tuple(map(slice, start, stop))], atol=1e-3)
    np.testing.assert_allclose(found.affine[:3, 3], (step.new_affine @ [*start, 1])[:3], atol=1e-6)


@pytest.mark.parametrize("spacing_mm", [(5.0, 5.0, 5.0), (3.0, 3.0, 3.0), (6.0, 6.0, 1.5)], ids=str)
@pytest.mark.parametrize("labels", ["nearest", "linear", "shares"])
def test_memory_is_that_of_four_volumes_at_most(labels, spacing_mm, finer, tmp_path):
    """All that Python and NumPy allocate, over the scan or the prepared volume (float32), whichever is larger."""
    settings = Preparation(spacing_mm=spacing_mm, labels=labels)
    prepare_into(tmp_path / "first.zip", finer, settings)  # what is imported and read once
    tracemalloc.start()
    try:
        prepare_into(tmp_path / "case.zip", finer, settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    prepared = CaseFile.open(tmp_path / "case.zip").image
    assert peak < 4 * 4 * max(np.prod(nib.load(finer.image).shape), prepared.size)


@pytest.mark.parametrize("spacing_mm", [(0.01, 0.01, 0.01), (0.001, 0.001, 0.001)], ids=str)
def test_a_grid_that_no_memory_holds_is_refused_before_it_is_made(files, prepared_at, spacing_mm):
    with pytest.raises(UserError, match=r"image.* spacing: found 0\.0\d+x.* mm, at which it has .* voxels, .* GiB, expected 16 GiB at most") as caught:
        prepared_at(files.write(), spacing_mm)
    assert "\n" not in str(caught.value)


def test_what_the_coarse_grid_cannot_hold_is_smoothed_away(files, prepared_at):
    noise = np.random.default_rng(0).normal(0, 100, files.image.shape).astype(np.float32)
    coarse, fine = (prepared_at(files.write(image=noise), spacing).image.std() for spacing in (21.0, 7.0))
    assert coarse < 0.35 * fine  # linear interpolation alone leaves 0.5 or more


def test_an_image_without_a_label_is_prepared_alike(files, prepared_at):
    case = files.write()
    alone, both = prepared_at(replace(case, label=None), 12.0), prepared_at(case, 12.0)
    assert alone.label is None
    np.testing.assert_array_equal(alone.image, both.image)


# ---------------------------------------------------------------- there and back


def dice(a, b, index):
    return 2 * ((a == index) & (b == index)).sum() / ((a == index).sum() + (b == index).sum())


@pytest.mark.parametrize(
    ("spacing_mm", "least", "classes"),
    [
        (7.0, 1.0, MANIFEST.class_names[1:]),
        (6.0, 0.96, MANIFEST.class_names[1:]),  # measured 0.97 (bone) to 0.99
        (10.0, 0.9, ("liver", "spleen", "stomach")),  # measured 0.95, 0.93, 0.94; bone is down to 0.72
    ],
    ids=str,
)
def test_labels_come_back_to_the_files_grid(spacing_mm, least, classes, files, prepared_at):
    """The file has voxels of 7 mm, so that 7 mm there and back is exact."""
    case = files.write()
    found = prepared_at(case, spacing_mm)
    native, reference = to_native(one_hot(found.label, 9), found), MANIFEST.merge(files.label)
    assert native.shape == nib.load(case.image).shape
    assert native.dtype == np.uint8
    assert np.array_equal(found.native_affine, nib.load(case.image).affine)
    for name in classes:
        assert dice(native, reference, MANIFEST.class_names.index(name)) >= least, name


def test_an_oblique_file_comes_back_to_its_grid(files, prepared_at):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    case = files.write(affine=turn @ files.affine)
    found = prepared_at(case, 7.0)
    assert np.array_equal(found.native_affine, nib.load(case.image).affine)
    assert np.array_equal(to_native(one_hot(found.label, 9), found), MANIFEST.merge(files.label))


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(monkeypatch):
    """Cases that were prepared anew."""
    done, original = [], module._prepare
    monkeypatch.setattr(module, "_prepare", lambda case, *rest: done.append(case.id) or original(case, *rest))
    return done


def test_an_unchanged_case_is_prepared_once(files, prepared_at, counted):
    case = files.write()
    first, again = prepared_at(case, 12.0), prepared_at(case, 12.0)
    assert counted == ["phantom-a"]
    for field in ("image", "label", "affine", "native_affine"):
        np.testing.assert_array_equal(getattr(again, field), getattr(first, field))
    assert again.native_shape == first.native_shape


def test_a_changed_image_or_label_is_prepared_anew(files, prepared_at, counted):
    prepared_at(files.write(), 12.0)
    brighter = prepared_at(files.write(image=files.image + 50), 12.0)
    assert len(counted) == 2
    fewer = prepared_at(files.write(image=files.image + 50, label=np.where(files.label == 5, 0, files.label)), 12.0)
    assert len(counted) == 3
    np.testing.assert_allclose(brighter.image, fewer.image)
    assert 3 in brighter.label
    assert 3 not in fewer.label


DAMAGES = {"empty": lambda whole: b"", "cut off": lambda whole: whole[: len(whole) // 2], "other": lambda whole: b"no archive at all"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_prepared_anew(damage, files, prepared_at, counted, tmp_path):
    case = files.write()
    first = prepared_at(case, 12.0)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    np.testing.assert_array_equal(prepared_at(case, 12.0).image, first.image)
    prepared_at(case, 12.0)
    assert len(counted) == 2


def test_another_version_of_the_preparation_prepares_anew(files, prepared_at, counted, monkeypatch):
    case = files.write()
    prepared_at(case, 12.0)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    prepared_at(case, 12.0)
    assert len(counted) == 2


def test_another_spacing_is_prepared_anew(files, prepared_at, counted):
    case = files.write()
    assert [prepared_at(case, spacing).spacing_mm for spacing in (12.0, 13.0, 12.0)] == [(12.0,) * 3, (13.0,) * 3, (12.0,) * 3]
    assert len(counted) == 2


def test_a_changed_manifest_is_prepared_anew(files, prepared_at, counted, monkeypatch):
    case = files.write()
    prepared_at(case, 12.0)
    merged = MANIFEST.model_copy(update={"classes": {"organ": (1, 2, 3, 5, 6)}})
    monkeypatch.setattr(module, "load_manifest", lambda _: merged)
    assert prepared_at(case, 12.0).label.max() == 1
    assert len(counted) == 2


def test_a_preparation_that_is_killed_leaves_nothing(files, prepared_at, monkeypatch, tmp_path):
    def killed(self, name, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared_at(files.write(), 12.0)
    assert not list((tmp_path / "cache").iterdir())

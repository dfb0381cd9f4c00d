"""Everything that `home data check` looks for: how bad it is, what is expected, and the remedy. What was found is said case by case.

An *error* is to be mended before a case is trained on (`home data prepare` names such cases, and prepares those that it can), a *warning* deserves
a look, a *note* is for knowing. A *fixable* one can be repaired without a judgement about the patient: `--fix` writes such copies. `{...}` in a text
is filled in where the check is made.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Check:
    """What is asked of a data set: how bad its fault is, what is expected (with places to be filled), the remedy, and whether `--fix` mends it."""

    severity: Severity
    expected: str
    remedy: str
    fixable: bool = False


NAMES_AND_PAIRS = {
    "nothing found": Check("error", "{where}", "Give the folder that holds these, or correct the layouts of the manifest."),
    "image missing": Check("error", "{where}", "Add the image, or take the label out of the folder."),
    "label missing": Check("error", "{where}", "Add the label, or take the image out of the folder."),
    "image twice": Check("error", "one image a case", "Keep one, or give the other an id of its own."),
    "label twice": Check("error", "one label a case", "Keep one, or give the other an id of its own."),
    "folder": Check("error", "a folder that can be listed", "Check its permissions (chmod u+rx)."),
    "name": Check("warning", "plain characters, at most {longest}, different in more than capitals", "Rename it: such names get lost between systems."),
    "number of cases": Check("warning", "{expected}", "Is the download whole, and is nothing else in the folder?"),
    "not used": Check("note", "nothing else", "If they are cases, correct the layouts or the case pattern."),
}

FILES = {
    "missing": Check("error", "a file that can be read", "Check the path, or fetch the data again."),
    "link": Check("error", "a file that can be read", "Remove the link, and copy the file in its place."),
    "permission": Check("error", "a file that can be read", "Check its permissions (chmod u+r)."),
    "empty file": Check("error", "an image", "Fetch or copy it again."),
    "damaged": Check("error", "a whole NIfTI, NRRD, MetaImage or DICOM file", "Fetch or copy it again."),
    "too large": Check("error", "at most {most}", "A damaged header, or a volume to be cut first."),
    "memory": Check("error", "room for one image and its label", "Close other programs, or use fewer workers."),
    "reader died": Check("error", "a file that its reader survives", "Open it with another program, and export it again; or use fewer workers."),
}

DICOM = {
    "no slices": Check("error", "a folder of DICOM slices", "Check the path, or copy the series again."),
    "several series": Check("error", "one series a folder", "Move each series to a folder of its own."),
    "slices differ": Check("error", "one grid for all slices", "Take scouts and other series out of the folder."),
    "slices twice": Check("error", "one slice a place", "Take phases or copies apart, a folder for each."),
    "slices missing": Check("error", "{whole}", "Copy the series again: slices are missing."),
    "many frames": Check("error", "one slice a file", "Convert it to NIfTI (dcm2niix) first."),
}

GRID = {
    "not 3D": Check("error", "one 3D volume, at least 2 voxels along each axis", "Take one volume or channel of it."),
    "extra axis": Check("warning", "three axes", "Drop the last axis.", fixable=True),
    "pixel type": Check("error", "one number a voxel", "Export it as a scalar image."),
    "affine": Check("error", "an affine that places voxels in space", "Export it again, with its geometry."),
    "unit": Check("error", "lengths in mm", "Scale the affine to mm and write it again."),
    "spacing": Check("error", "{low:g} to {high:g} mm", "Is it in mm? Correct the header, not the data."),
    "sheared": Check("warning", "axes at right angles", "Resample it onto a straight grid (gantry tilt?)."),
    "negative spacing": Check("warning", "positive voxel sizes; flips stand in the affine", "Write it again; its place is kept.", fixable=True),
    "no orientation": Check("warning", "sform or qform with a code above 0", "Export it again with its orientation, and compare with another case."),
    "two orientations": Check("warning", "the same place in sform and qform", "The sform is used; write both alike.", fixable=True),
    "mixed spacing": Check("warning", "near the median of the data set, {median} mm", "Is its header right? A case of another protocol?"),
    "mixed orientation": Check("note", "one orientation, {usual} in most", "None is needed: preparing turns all to RAS."),
}

VALUES = {
    "not finite": Check("error", "numbers", "Export it again, or fill them with the lowest value.", fixable=True),
    "constant": Check("error", "an image", "Export it again."),
    "not HU": Check("error", "HU: air near -1000, fat near -100", "Shifted by 1024? Subtract it. Windowed to grey values, or no CT? Get the original."),
    "wrong modality": Check("error", "{modality}", "Take it out, or correct the modality in the manifest."),
    "range": Check("error", "values that the window {low:g} to {high:g} can tell apart", "Was it scaled already? Get the original, or correct the window."),
    "negative values": Check("warning", "0 and more", "Interpolated, or normalised? The window cuts them off."),
    "duplicate image": Check("error", "each image once", "Keep one: a copy would stand in training and in test."),
}

LABELS = {
    "label grid": Check("error", "the grid of the other masks", "Export the masks again, on one grid."),
    "masks overlap": Check("warning", "each voxel in one mask", "The mask with the higher value has them; see that this is right."),
    "no masks": Check("error", "masks such as {example}.nii.gz", "Name the labels in the manifest as the files are named."),
    "label shape": Check("error", "the image's {shape} voxels", "Pair the right files, or resample the label onto the image."),
    "label place": Check("error", "the image's place, to {tolerance:g} mm", "Pair the right files, or resample the label onto the image; check by eye."),
    "label turned": Check("error", "the image's axes", "Turn the label's axes to the image's.", fixable=True),
    "label offset": Check("error", "the image's place, to {tolerance:g} mm", "Give the label the image's affine.", fixable=True),
    "label is the image": Check("error", "a label volume", "Put the label file in its place."),
    "label not finite": Check("error", "whole numbers", "Export the label again."),
    "label fractions": Check("error", "whole numbers", "Resample labels by the nearest voxel; export the label again."),
    "label negative": Check("error", "0 and more", "Is this the label file, and no image?"),
    "label values": Check("error", "0 and the manifest's {known}", "Correct the label, or the label map of the manifest."),
    "label empty": Check("error", "a voxel of {classes}", "Is it labelled at all? Take it out, or, where healthy cases have none, say may_be_empty: true."),
    "no class": Check("note", "a voxel of {classes}, or none (may_be_empty)", "None is needed, where the case is healthy."),
    "no background": Check("warning", "some voxels with value 0", "Check by eye that the label is whole."),
    "label type": Check("warning", "an integer type", "Store it as integers.", fixable=True),
    "duplicate label": Check("warning", "each label once", "Are they of two patients? Pair the right files."),
    "class never seen": Check("warning", "a voxel of it in some case", "Is its raw value right in the manifest?"),
}

CHECKS = NAMES_AND_PAIRS | FILES | DICOM | GRID | VALUES | LABELS

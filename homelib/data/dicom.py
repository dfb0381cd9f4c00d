"""A folder of DICOM slices: are they one whole series, and in which order do they lie?"""

from pathlib import Path

import numpy as np

from .reading import ReadFault

DICOM_MODALITIES = {"CT": "CT", "MR": "MRI", "US": "US"}  # DICOM's word -> a manifest's
_HEADER = ["Modality", "SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns"]
_HEADER += ["BitsAllocated", "SamplesPerPixel", "ImagesInAcquisition", "NumberOfFrames", "SOPClassUID"]
_UNEVEN = 0.1  # part of the usual step that a step may differ


def series_files(folder: Path) -> tuple[list[Path], str | None, np.ndarray]:
    """The slices of the one series in a folder, along their normal; what modality they say they are of; and the step from one to the next, (3,) mm, LPS+.

    Raises:
        ReadFault: no DICOM, damaged or cut-off files, several series, slices of different grids, slices missing or twice.
    """
    headers = _headers(folder)
    series = sorted({header.get("SeriesInstanceUID", "") for header in headers.values()})
    if len(series) > 1:
        raise ReadFault(folder, "several series", f"{len(series)} series")
    one = next(iter(headers.values()))
    for file, header in headers.items():
        if not header.get("ImageOrientationPatient") or not header.get("ImagePositionPatient"):
            raise ReadFault(file, "affine", "a slice without position or orientation")
        turned = np.abs(np.array(header.ImageOrientationPatient, float) - np.array(one.ImageOrientationPatient, float)).max()
        if (header.Rows, header.Columns) != (one.Rows, one.Columns) or turned > 1e-3:
            raise ReadFault(file, "slices differ", "a slice of another grid")
    rows, columns = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
    normal = np.cross(rows, columns)
    corners = {file: np.array(header.ImagePositionPatient, float) for file, header in headers.items()}
    places = {file: float(normal @ corner) for file, corner in corners.items()}
    files = sorted(places, key=places.__getitem__)
    _require_whole(folder, files, [places[file] for file in files], headers)
    return files, one.get("Modality"), (corners[files[-1]] - corners[files[0]]) / (len(files) - 1)


def told_modality(folder: Path) -> str | None:
    """What the first slice of a folder says it is of, in DICOM's words: CT, MR, US; None where none says it."""
    import pydicom

    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        try:
            if told := pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Modality"]).get("Modality"):
                return str(told)
        except Exception:  # noqa: S112  no slice; what is wrong with it is told when the scan is read
            continue
    return None


def _headers(folder: Path) -> dict:
    import pydicom

    headers = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if file.stat().st_size == 0:
            raise ReadFault(file, "empty file", "0 bytes")
        try:
            with file.open("rb") as stream:
                header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_HEADER)
                left = file.stat().st_size - stream.tell()
        except Exception as error:
            if file.suffix.lower() in (".dcm", ".ima"):
                reason = " ".join(str(error).split())[:100]
                raise ReadFault(file, "damaged", f"no DICOM header ({reason})") from None
            continue  # a licence, an index: not a slice
        if header.get("Rows") is None:
            if header.get("SOPClassUID") and "Image Storage" in header.SOPClassUID.name:
                raise ReadFault(file, "damaged", "a header that breaks off")
            continue  # DICOMDIR, a report
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise ReadFault(file, "many frames", f"{header.NumberOfFrames} frames in one file")
        transfer = getattr(header.file_meta, "TransferSyntaxUID", None)
        size = int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel", 1)) * int(header.get("BitsAllocated", 8)) // 8
        if (transfer is None or not transfer.is_compressed) and left < size:
            raise ReadFault(file, "damaged", f"{left} bytes of pixels where the header promises {size}")
        headers[file] = header
    if not headers:
        raise ReadFault(folder, "no slices", "none")
    return headers


def _require_whole(folder: Path, files: list[Path], places: list[float], headers: dict) -> None:
    """Even steps, no number left out, as many as the scanner says."""
    if len(files) < 2:
        raise ReadFault(folder, "slices missing", f"{len(files)} slice", whole="a volume of slices")
    steps = np.diff(places)
    usual = float(np.median(steps))
    if usual <= 1e-4 or (steps < 1e-4).any():
        raise ReadFault(folder, "slices twice", "two slices at the same place")
    if (np.abs(steps - usual) > max(_UNEVEN * usual, 0.01)).any():
        worst = int(np.argmax(np.abs(steps - usual)))
        found = f"{steps[worst]:.4g} mm between {files[worst].name} and {files[worst + 1].name}"
        raise ReadFault(folder, "slices missing", found, whole=f"{usual:.4g} mm as between the others")
    numbers = sorted(int(header.InstanceNumber) for header in headers.values() if header.get("InstanceNumber") is not None)
    if len(set(numbers)) == len(files) and numbers[-1] - numbers[0] + 1 > len(files) and np.gcd.reduce(np.diff(numbers)) == 1:
        raise ReadFault(folder, "slices missing", f"{len(files)} slices numbered {numbers[0]} to {numbers[-1]}", whole="each number once")
    told = headers[files[0]].get("ImagesInAcquisition")
    if told and int(told) > len(files):
        raise ReadFault(folder, "slices missing", f"{len(files)} slices", whole=f"{told}, as the scanner says")

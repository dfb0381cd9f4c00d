"""Fetch the archives of an open data set: a download that goes on where it was cut, checked by its checksum, then unpacked with care.

Pooch keeps the archives and checks them; what it lacks is a download that survives a cut connection, which is here.
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pooch
import requests
from tqdm import tqdm

from ..errors import UserError
from ..paths import written_whole
from ..progress import bar
from .manifest import Archive, Manifest
from .unpack import unpack

ATTEMPTS = 8  # in a row that bring nothing, before it gives up
PAUSE_SECONDS = 1.0  # after the first such attempt; twice as long after each further one
TIMEOUT_SECONDS = 30
PIECE_BYTES = 2**18


def archive_of(url: str, *, sha256: str | None = None, md5: str | None = None, into: str | None = None) -> Archive:
    """An archive that a user names, and the folder below the data set's to unpack it to. Raises UserError: no address, no folder, or not one checksum."""
    if not re.fullmatch(r"https?://\S+", url):
        raise UserError(f"url: found {url!r}, expected an address that begins with https://. Copy it from the data set's page.")
    if (sha256 is None) == (md5 is None):
        raise UserError("checksum: expected one, --sha256 or --md5, as the data set's page gives it; sha256sum tells that of a file.")
    for name, value, digits in (("sha256", sha256, 64), ("md5", md5, 32)):
        if value is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise UserError(f"{name}: found {value!r}, expected {digits} digits from 0 to f. Copy it from the data set's page.")
    if into is not None and (not re.fullmatch(r"[A-Za-z0-9_.-]+", into) or into == ".."):
        raise UserError(f"into: found {into!r}, expected the name of one folder below the data set's: images, say. Leave it out for that folder itself.")
    return Archive(url=url, sha256=sha256, md5=md5, into=into or ".")


def steps(manifest: Manifest) -> str:
    """How to get a data set whose archives are not pinned, for the user to follow."""
    access = {"open": "open", "registration": "after a registration", "private": "private"}[manifest.access]
    lines = [f"{manifest.title}: {access}, {manifest.licence}", *(f"{number}. {step}" for number, step in enumerate(manifest.access_steps, 1))]
    if manifest.page:
        lines.append(f"Page: {manifest.page}")
    if manifest.access == "open":
        lines.append(
            f"Nothing was fetched: no checksum of its archives is known here. With that of its page: home data fetch {manifest.reference} --url ADDRESS "
            "--sha256 SHA256 (or --md5 MD5), which goes on where it was cut, checks and unpacks it; "
            "--into FOLDER where the steps name one. Call it for each archive."
        )
    return "\n".join([*lines, f"Then: home data check {manifest.reference} ROOT, home data prepare {manifest.reference} ROOT"])


def root_of(files: Path, archives: Sequence[Archive] = ()) -> Path:
    """The data set's folder in what was unpacked: of one folder alone, that folder, unless it is one that an archive was to be unpacked into."""
    if any(archive.into != "." for archive in archives):
        return files
    inside = [path for path in files.iterdir() if not path.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else files


def fetch_archives(archives: Sequence[Archive], folder: str | Path, *, progress: bool = True, keep: bool = True) -> Path:
    """Download archives into `<folder>/archives` and unpack them into `<folder>/files`. What is there already is neither fetched nor unpacked again.

    Args:
        archives: what to fetch.
        folder: of the data set; made if need be.
        progress: show a bar, where there is a terminal.
        keep: the archives after they were unpacked. Without them, a second call fetches nothing either.

    Returns:
        `<folder>/files`.

    Raises:
        UserError: no connection, a wrong checksum (nothing of it is kept), an archive that is damaged or hostile, or one that is too large.
    """
    folder = Path(folder)
    files = folder / "files"
    for archive in archives:
        done = folder / "archives" / f"{_short(archive)}.unpacked"
        if done.exists():
            continue
        packed = download(archive, folder / "archives", progress=progress)
        unpack(packed, files / archive.into, progress=progress)
        with written_whole(done) as part:
            part.write_text(f"{archive.url}\n")
        if not keep:
            packed.unlink()
    return files


def download(archive: Archive, folder: str | Path, *, progress: bool = True) -> Path:
    """One archive in a folder, checked by its checksum. A file that is there and right is not fetched; one that was cut off is gone on with, in a later
    call or process too. Raises UserError as `fetch_archives`."""
    name = f"{_short(archive)[:8]}-{archive.name}"
    partial = Path(folder) / f".{name}.partial"
    try:
        return Path(pooch.retrieve(archive.url, archive.checksum, fname=name, path=folder, downloader=Resuming(partial, progress=progress)))
    except ValueError as error:  # pooch, of a wrong checksum
        if "hash" not in str(error).lower():
            raise
        raise UserError(
            f"{archive.url}: found another checksum than {archive.checksum}, the one expected; refused, nothing kept. "
            "Try again; if it stays, the file was changed at its source: see the data set's page, and correct the manifest."
        ) from None
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        why = f"HTTP status {status}" if status else _reason(error)
        raise UserError(f"{archive.url}: cannot be fetched ({why}). Check the connection and call again: it goes on where it stopped.") from None


def _short(archive: Archive) -> str:
    return archive.checksum.partition(":")[2][:16]


class Resuming:
    """A downloader for pooch that asks a server for what is missing of a file, again and again while that brings something.

    Args:
        partial: where the bytes are gathered; it stays when the download fails, and is moved onto pooch's file when it is whole.
        progress: show a bar.
    """

    def __init__(self, partial: Path, *, progress: bool):
        self.partial, self.progress = partial, progress
        self.tag = partial.with_name(partial.name + ".tag")  # which version of the file the bytes are of, as the server calls it
        self.began = 0  # byte that the last answer began with

    def __call__(self, url: str, output_file: str, pooch_: Any) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        fruitless, most = 0, 0
        with bar(unit="B", scaled=True, desc=self.partial.name.strip(".").removesuffix(".partial")[9:], show=self.progress) as shown:
            while True:
                self.began, most = self._size(), max(most, self._size())
                try:
                    if self._more(url, shown):
                        break
                    error: requests.RequestException = requests.ConnectionError("the connection was cut")
                except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as caught:
                    error = caught
                # A server that begins anew each time brings something only where it comes further than ever.
                fruitless = 0 if self._size() > (self.began or most) else fruitless + 1
                if fruitless >= ATTEMPTS:
                    raise error
                time.sleep(PAUSE_SECONDS * 2 ** min(fruitless, 5) if fruitless else 0)
        os.replace(self.partial, output_file)
        self.tag.unlink(missing_ok=True)

    def _more(self, url: str, shown: tqdm) -> bool:
        """Fetch what is missing; whether that was all. Raises a requests exception: a connection that is cut, or refused by a status."""
        start, headers = self._size(), {"Accept-Encoding": "identity"}
        tag = self.tag.read_text() if start and self.tag.exists() else ""
        if start and tag:
            headers |= {"Range": f"bytes={start}-", "If-Range": tag}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
            if answer.status_code == 416:  # nothing is missing, or it is another file than before: from the beginning, then
                self._forget()
                return False
            answer.raise_for_status()
            going_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if answer.status_code == 206 and not going_on:
                self._forget()
                return False
            start = self.began = start if going_on else 0
            missing = answer.headers.get("Content-Length")
            whole = start + int(missing) if missing else None
            self.tag.write_text(_version(answer))
            shown.total, shown.n = whole, start
            with self.partial.open("ab" if going_on else "wb") as out:
                for piece in answer.iter_content(PIECE_BYTES):
                    out.write(piece)
                    shown.update(len(piece))
        return whole is None or self._size() == whole

    def _size(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _forget(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)


def _version(answer: requests.Response) -> str:
    """A strong mark of a file's version, by which a server tells whether it may go on; empty where it gives none: then it begins anew."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "args", [error])[0] if error.args else error).split())
    return f"{type(error).__name__}: {text[:160]}"

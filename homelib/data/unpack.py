"""Unpack an archive from the network, which may be hostile: all or nothing, nothing outside the folder, nothing larger than told.

Zip and tar (plain, gzip, bzip2, xz). Everything is unpacked beside the folder first and moved in when all went well.
"""

import filecmp
import lzma
import os
import shutil
import stat
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from ..errors import UserError
from ..progress import bar

GROWTH = 20  # times the archive's size that its files may have, and
FLOOR_BYTES = 2**30  # as much in any case
MOST_MEMBERS = 2_000_000
MOST_PADDING = 2**24  # bytes after the last file of a tar
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class _Member:
    """What an archive says of one of its files: `kind` is "file", "folder", or what it is in its place."""

    name: str
    size: int
    kind: str
    link: str
    open: Callable[[], IO[bytes]]


def unpack(archive: str | Path, folder: str | Path, *, largest_bytes: int | None = None, progress: bool = False) -> list[Path]:
    """Unpack an archive into a folder, which may hold other files already. None of them is touched.

    Args:
        archive: .zip or .tar, .tar.gz, .tar.bz2, .tar.xz, told by its contents.
        folder: to unpack to; made if need be.
        largest_bytes: that all files may have together; None is 20 times the archive's size, and 1 GiB at least.
        progress: show a bar of the archive's bytes, where there is a terminal.

    Returns:
        The unpacked files.

    Raises:
        UserError: no archive, a damaged one, an absolute path or one with `..`, a link that leads out, a device, too many bytes, or a file that
            the folder has already with other contents. Nothing is unpacked then.
    """
    archive, folder = Path(archive), Path(folder)
    limit = largest_bytes if largest_bytes is not None else max(FLOOR_BYTES, GROWTH * archive.stat().st_size)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{uuid.uuid4().hex}.unpacking"
    part.mkdir()
    try:
        with archive.open("rb") as packed, bar(total=archive.stat().st_size, desc=f"unpack {archive.name}", unit="B", scaled=True, show=progress) as shown:
            found = _into(part, _members(archive, packed), archive, folder, limit, lambda: shown.update(max(0, packed.tell() - shown.n)))
        _moved_in(archive, part, folder)
    except _DAMAGED as error:
        raise _damaged(archive, error) from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{archive}: {error.filename}: two things of one name, expected each file once. Unpack it by hand, or ask its makers.") from None
    except OSError as error:
        if error.errno is None:  # so gzip and bzip2 tell of damage
            raise _damaged(archive, error) from None
        where = str(error.filename or folder)[-200:]
        raise UserError(f"{archive}: {where}: {error.strerror}; nothing unpacked. Make room, or unpack to another folder.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / path for path in found]


def _into(part: Path, members: Iterator[_Member], archive: Path, folder: Path, limit: int, on_piece: Callable[[], None]) -> list[PurePosixPath]:
    """Write the members below `part`; their paths there."""
    found, total, room = [], 0, shutil.disk_usage(part).free
    for number, member in enumerate(members):
        path = _safe(archive, member)
        total += member.size
        if total > limit or number >= MOST_MEMBERS:
            raise _refused(archive, member.name, f"more than {limit:,} bytes or {MOST_MEMBERS:,} files in all", "a smaller archive")
        if total > room:
            raise UserError(f"{archive}: more than {total:,} bytes unpacked, and not that much room on the disk of {folder}. Make room there.")
        if path == PurePosixPath("."):
            continue
        target = part / path
        if member.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if member.kind == "link":
            os.symlink(member.link, target)
        else:
            with member.open() as source, target.open("xb") as out:
                _copy(source, out, member.size, on_piece)
        found.append(path)
    return found


def _members(archive: Path, packed: IO[bytes]) -> Iterator[_Member]:
    """The members in the archive's order, each to be unpacked before the next is asked for."""
    if zipfile.is_zipfile(archive) and not tarfile.is_tarfile(archive):
        with zipfile.ZipFile(packed) as zipped:
            for info in zipped.infolist():
                mode = info.external_attr >> 16
                plain = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = ("folder" if info.is_dir() else "file") if plain else "a link or a device"
                yield _Member(info.filename, info.file_size, kind, "", partial(zipped.open, info))
        return
    if not tarfile.is_tarfile(archive):
        raise UserError(f"{archive}: no zip or tar archive; expected one of these. Fetch it again, or unpack it by hand.")
    with tarfile.open(fileobj=packed) as tar:
        for part in tar:
            kind = "folder" if part.isdir() else "file" if part.isreg() else "link" if part.issym() else "a hard link or a device"
            yield _Member(part.name, part.size if part.isreg() else 0, kind, part.linkname, partial(_stream, tar, part))
        if len(tar.fileobj.read(MOST_PADDING + 1)) > MOST_PADDING:  # to the end, where gzip compares its checksum
            raise tarfile.ReadError("something after the end of the archive")


def _stream(packed: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = packed.extractfile(info)
    assert stream is not None  # of a plain file
    return stream


def _safe(archive: Path, member: _Member) -> PurePosixPath:
    """A member's path below the folder. Raises UserError for one that would lie elsewhere, and for what is neither file nor folder."""
    name = member.name
    windows = PureWindowsPath(name)  # also splits at backslashes, and knows drives
    if not name or "\0" in name or name.startswith(("/", "\\")) or windows.drive or ".." in windows.parts:
        raise _refused(archive, name, "a path that leads out of the folder", "relative paths without '..'")
    if member.kind not in ("file", "folder", "link"):
        raise _refused(archive, name, member.kind, "files and folders")
    path = PurePosixPath(os.path.normpath(name))
    if member.kind == "link":
        link = PureWindowsPath(member.link)
        if member.link.startswith(("/", "\\")) or link.drive or ".." in link.parts:  # through another link, a way up may lead out
            raise _refused(archive, name, f"a link to {member.link!r}, which may lead out of the folder", "links downwards within it")
    return path


def _copy(source: IO[bytes], out: IO[bytes], size: int, on_piece: Callable[[], None]) -> None:
    """No more than the bytes that were told: a stream that goes on longer is cut, and found to be damaged."""
    written = 0
    while piece := source.read(2**20):
        written += len(piece)
        if written > size:
            raise zipfile.BadZipFile("a file longer than the archive says")
        out.write(piece)
        on_piece()
    if written < size:
        raise EOFError("a file shorter than the archive says")


def _moved_in(archive: Path, part: Path, folder: Path) -> None:
    """Move what was unpacked to its place: renames on one disk, folders merged with those that are there."""
    moves = [(source, folder / source.relative_to(part)) for source in sorted(part.rglob("*"))]
    fresh = []
    for source, target in moves:
        if source.is_dir() and not source.is_symlink():
            if target.is_symlink() or (target.exists() and not target.is_dir()):
                raise UserError(f"{archive}: {target} is there already and no folder, expected a folder or nothing. Unpack to another folder.")
        elif not (target.exists() or target.is_symlink()):
            fresh.append((source, target))
        elif source.is_symlink() or target.is_symlink() or not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            raise UserError(f"{archive}: {target} is there already and differs; it is left as it is, and nothing unpacked. Unpack to another folder.")
    for source, target in fresh:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def _damaged(archive: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{archive}: cannot be unpacked ({type(error).__name__}: {reason}). Is it whole? Fetch it again.")


def _refused(archive: Path, name: str, found: str, expected: str) -> UserError:
    return UserError(f"{archive}: {name[:200]!r}: found {found}, expected {expected}; refused, nothing unpacked. Do not use this archive.")

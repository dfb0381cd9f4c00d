"""Downloads against a server that cuts, changes and lies; archives that try to get out of their folder."""

import hashlib
import io
import os
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from homelib import UserError
from homelib.data import fetch
from homelib.data.fetch import archive_of, download, fetch_archives, root_of, steps
from homelib.data.manifest import list_manifests, load_manifest
from homelib.data.unpack import unpack

BODY = np.random.default_rng(0).bytes(400_000)


class Server:
    """Serves one body at every path. cut: bytes after which an answer ends too early, for as many answers as it lists; asked: (start, If-Range) of each."""

    def __init__(self):
        self.body, self.tag, self.cut, self.asked, self.ranges, self.status = BODY, '"one"', [], [], True, None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data.tar"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, to):
        asked = to.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.asked.append((start, to.headers.get("If-Range")))
        to.close_connection = True
        if self.status:
            to.send_error(self.status)
            return
        if not self.ranges or (asked and to.headers.get("If-Range") != self.tag):
            start = 0
        to.send_response(206 if start else 200)
        if start:
            to.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        to.send_header("Content-Length", str(len(self.body) - start))
        if self.tag:
            to.send_header("ETag", self.tag)
        to.end_headers()
        rest = self.body[start:]
        to.wfile.write(rest[: self.cut.pop(0)] if self.cut else rest)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(fetch, "PIECE_BYTES", 10_000)
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def archive(server, body=BODY):
    return archive_of(server.url, sha256=hashlib.sha256(body).hexdigest())


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cut = [100_000, 50_000, 130_000]
    path = download(archive(server), tmp_path, progress=False)
    assert path.read_bytes() == BODY
    assert server.asked == [(0, None), (100_000, '"one"'), (150_000, '"one"'), (280_000, '"one"')]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    first = download(archive(server), tmp_path, progress=False)
    assert download(archive(server), tmp_path, progress=False) == first
    assert len(server.asked) == 1


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    server.cut = [70_000, 0, 0]
    with pytest.raises(UserError, match=r"data\.tar: cannot be fetched \(.*\)\. Check the connection and call again: it goes on where it stopped"):
        download(archive(server), tmp_path, progress=False)
    assert download(archive(server), tmp_path, progress=False).read_bytes() == BODY
    assert server.asked[-1] == (70_000, '"one"')


@pytest.mark.parametrize("how", ["another version", "no ranges", "no tag"])
def test_what_cannot_be_gone_on_with_is_fetched_from_the_beginning(how, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    if how == "no tag":
        server.tag = ""
    server.cut = [70_000, 0]
    with pytest.raises(UserError):
        download(archive(server), tmp_path, progress=False)
    server.body = BODY[::-1] if how == "another version" else BODY
    server.tag = {"another version": '"two"', "no ranges": '"one"', "no tag": ""}[how]
    server.ranges = how != "no ranges"
    assert download(archive(server, server.body), tmp_path, progress=False).read_bytes() == server.body


def test_a_wrong_sha256_is_refused_and_nothing_kept(server, tmp_path):
    wanted = archive_of(server.url, sha256="0" * 64)
    with pytest.raises(UserError, match=rf"found another checksum than sha256:{'0' * 64}, the one expected; refused, nothing kept"):
        download(wanted, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="refused"):
        download(wanted, tmp_path, progress=False)
    assert server.asked == [(0, None)] * 2  # from the beginning again


@pytest.mark.parametrize(("status", "said"), [(404, "HTTP status 404"), (500, "HTTP status 500")])
def test_a_refusal_is_one_line_at_once(status, said, server, tmp_path):
    server.status = status
    with pytest.raises(UserError, match=said) as caught:
        download(archive(server), tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_a_server_that_always_begins_anew_and_always_cuts_is_given_up(server, tmp_path, monkeypatch):
    """Now more comes, now less: that is no progress."""
    monkeypatch.setattr(fetch, "ATTEMPTS", 4)
    server.tag, server.cut = "", [100_000, 50_000] * 10
    with pytest.raises(UserError, match="cannot be fetched"):
        download(archive(server), tmp_path, progress=False)
    assert len(server.asked) == 5


def test_nobody_there_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    nowhere = archive_of("http://127.0.0.1:9/data.tar", sha256="0" * 64)
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        download(nowhere, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("url", "sha256", "said"), [("ftp://x/y", "0" * 64, "^url: found"), ("https://x/y", "abc", "^sha256: found 'abc'")])
def test_an_address_or_checksum_that_is_none_is_refused(url, sha256, said):
    with pytest.raises(UserError, match=said):
        archive_of(url, sha256=sha256)


@pytest.mark.parametrize("sums", [{}, {"sha256": "0" * 64, "md5": "0" * 32}], ids=["none", "two"])
def test_an_archive_has_one_checksum(sums):
    with pytest.raises(UserError, match="^checksum: expected one, --sha256 or --md5"):
        archive_of("https://x/y", **sums)


def test_a_source_that_publishes_an_md5_alone_is_checked_by_it(server, tmp_path):
    assert download(archive_of(server.url, md5=hashlib.md5(BODY).hexdigest()), tmp_path, progress=False).read_bytes() == BODY
    with pytest.raises(UserError, match=rf"found another checksum than md5:{'0' * 32}"):
        download(archive_of(server.url, md5="0" * 32), tmp_path, progress=False)


def test_the_folder_of_a_data_set_is_the_one_in_its_archive(tmp_path):
    (tmp_path / "set" / "imagesTr").mkdir(parents=True)
    assert root_of(tmp_path) == tmp_path / "set"
    assert root_of(tmp_path, [archive_of("https://x/y.zip", sha256="0" * 64, into="set")]) == tmp_path
    (tmp_path / "set2").mkdir()
    assert root_of(tmp_path) == tmp_path


@pytest.mark.parametrize("name", [name for name in list_manifests() if not load_manifest(name).cases])
def test_every_data_set_says_how_it_is_had(name):
    """Archives to download, or steps with an address, and in the end what to do with the folder."""
    manifest = load_manifest(name)
    told = steps(manifest)
    assert manifest.archives or "1. " in told
    assert f"home data check {name} ROOT" in told
    assert manifest.licence in told
    if manifest.access != "private":
        assert "https://" in told or "http://" in told
        assert ("after a registration" in told) == (manifest.access == "registration")
    for archive in manifest.archives:
        assert manifest.access == "open"
        assert archive.checksum.split(":")[0] in ("sha256", "md5")


def test_a_data_set_is_fetched_and_unpacked_once(server, tmp_path):
    server.body = tar([plain("set/imagesTr/a.nii.gz", b"image"), plain("set/labelsTr/a.nii.gz", b"label")])
    wanted = [archive(server, server.body)]
    files = fetch_archives(wanted, tmp_path, progress=False, keep=False)
    assert (files / "set" / "labelsTr" / "a.nii.gz").read_bytes() == b"label"
    (files / "set" / "imagesTr" / "a.nii.gz").write_bytes(b"mended by the user")
    assert fetch_archives(wanted, tmp_path, progress=False) == files
    assert (files / "set" / "imagesTr" / "a.nii.gz").read_bytes() == b"mended by the user"
    assert len(server.asked) == 1


# ---------------------------------------------------------------- archives


def plain(name, content=b"x", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content) if kind == tarfile.REGTYPE else 0, kind, link
    return info, content


def tar(members, mode="w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as packed:
        for info, content in members:
            packed.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def linked(name, target) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def spoilt(content: bytes) -> bytes:
    """One byte in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


GOOD = plain("good.txt", b"good")
HOSTILE = {
    "a tar with an absolute path": (tar([GOOD, plain("/evil")]), "out of the folder"),
    "a tar with a way up": (tar([GOOD, plain("a/../../evil")]), "out of the folder"),
    "a tar with a way up for Windows": (tar([GOOD, plain("..\\evil")]), "out of the folder"),
    "a tar with a drive": (tar([GOOD, plain("C:/evil")]), "out of the folder"),
    "a tar with a link up": (tar([GOOD, plain("l", kind=tarfile.SYMTYPE, link="../..")]), "a link to"),
    "a tar with an absolute link": (tar([GOOD, plain("l", kind=tarfile.SYMTYPE, link="/etc")]), "a link to"),
    "a tar with a way up through two links": (
        tar([plain("d", kind=tarfile.SYMTYPE, link="."), plain("e", kind=tarfile.SYMTYPE, link="d/.."), plain("e/evil")]),
        "a link to",
    ),
    "a tar with a hard link": (tar([GOOD, plain("l", kind=tarfile.LNKTYPE, link="/etc/passwd")]), "a hard link or a device"),
    "a tar with a device": (tar([GOOD, plain("l", kind=tarfile.CHRTYPE)]), "a hard link or a device"),
    "a tar with a pipe": (tar([GOOD, plain("l", kind=tarfile.FIFOTYPE)]), "a hard link or a device"),
    "a tar that is too large": (tar([GOOD, plain("big", bytes(3_000_000))], "w:gz"), "more than 1,000,000 bytes"),
    "a zip with an absolute path": (zipped({"good.txt": b"good", "/evil": b"x"}), "out of the folder"),
    "a zip with a way up": (zipped({"good.txt": b"good", "../evil": b"x"}), "out of the folder"),
    "a zip with a way up for Windows": (zipped({"good.txt": b"good", "..\\evil": b"x"}), "out of the folder"),
    "a zip with a link": (zipped({"good.txt": b"good", linked("l", "/etc"): b"/etc"}), "a link or a device"),
    "a zip that is too large": (zipped({"good.txt": b"good", "big": bytes(3_000_000)}), "more than 1,000,000 bytes"),
    "a file twice": (tar([GOOD, plain("good.txt", b"other")]), "two things of one name"),
    "a file that is a folder too": (tar([GOOD, plain("good.txt/inside")]), "two things of one name"),
    "a truncated tar.gz": (tar([GOOD, plain("noise", BODY)], "w:gz")[:200_000], "cannot be unpacked"),
    "a truncated tar.xz": (tar([GOOD, plain("noise", BODY)], "w:xz")[:200_000], "cannot be unpacked"),
    **{f"a damaged tar.{kind}": (spoilt(tar([GOOD, plain("noise", BODY)], f"w:{kind}")), "cannot be unpacked") for kind in ("gz", "xz")},
    "a damaged tar.bz2": (spoilt(tar([GOOD, plain("noise", BODY)], "w:bz2")), "no zip or tar archive"),
    "a tar with a tail": (tar([GOOD]) + bytes(2**24), "cannot be unpacked"),
    "a name that no disk takes": (tar([GOOD, plain("x" * 300)]), "nothing unpacked"),
    "a truncated zip": (zipped({"good.txt": b"good", "noise": BODY})[:200_000], "no zip or tar archive"),
    "no archive": (b"<html>not found</html>", "no zip or tar archive"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_whole(what, tmp_path):
    content, said = HOSTILE[what]
    packed, folder = tmp_path / "in" / "archive", tmp_path / "in" / "out"
    packed.parent.mkdir()
    packed.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        unpack(packed, folder, largest_bytes=1_000_000)
    assert "\n" not in str(caught.value)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/archive", "in/out"]


def test_a_zip_whose_file_is_longer_than_it_says_is_refused(tmp_path):
    content = bytearray(zipped({"bomb": bytes(2_000_000)}))
    real, told = (2_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert content.count(real) == 2
    (tmp_path / "archive").write_bytes(bytes(content).replace(real, told))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "archive", tmp_path / "out", largest_bytes=1_000_000)
    assert not list((tmp_path / "out").iterdir())


def test_there_must_be_room_for_the_files_once(tmp_path, monkeypatch):
    """What is unpacked already has taken its room: it is not asked for a second time."""
    (tmp_path / "archive").write_bytes(tar([plain(f"{number}.bin", BODY) for number in range(4)]))
    room = 5 * len(BODY)

    def left(path):
        taken = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
        return shutil._ntuple_diskusage(room, taken, room - taken)

    monkeypatch.setattr(shutil, "disk_usage", left)
    assert len(unpack(tmp_path / "archive", tmp_path / "out")) == 4
    room = 3 * len(BODY)
    with pytest.raises(UserError, match="not that much room on the disk"):
        unpack(tmp_path / "archive", tmp_path / "other")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_an_honest_archive_is_unpacked(mode, tmp_path):
    files = {"a/b.txt": b"b", "a/c/d.bin": BODY, "e": b""}
    content = zipped(files) if mode == "zip" else tar([plain(name, body) for name, body in files.items()], mode)
    (tmp_path / "archive").write_bytes(content)
    found = unpack(tmp_path / "archive", tmp_path / "out")
    assert {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in found} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


def test_links_within_the_folder_stay_links(tmp_path):
    (tmp_path / "archive").write_bytes(tar([plain("a/b.txt", b"b"), plain("c", kind=tarfile.SYMTYPE, link="a/b.txt")]))
    unpack(tmp_path / "archive", tmp_path / "out")
    assert os.readlink(tmp_path / "out" / "c") == "a/b.txt"
    assert (tmp_path / "out" / "c").read_bytes() == b"b"


def test_files_that_are_there_already_are_never_changed(tmp_path):
    (tmp_path / "archive").write_bytes(tar([plain("a/b.txt", b"b"), plain("a/new.txt", b"new")]))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "mine.txt").write_bytes(b"mine")
    (tmp_path / "out" / "a" / "b.txt").write_bytes(b"changed by me")
    with pytest.raises(UserError, match=r"b\.txt is there already and differs; it is left as it is"):
        unpack(tmp_path / "archive", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "a").iterdir()) == ["b.txt", "mine.txt"]
    (tmp_path / "out" / "a" / "b.txt").write_bytes(b"b")
    unpack(tmp_path / "archive", tmp_path / "out")
    assert (tmp_path / "out" / "a" / "new.txt").read_bytes() == b"new"
    assert (tmp_path / "out" / "a" / "mine.txt").read_bytes() == b"mine"


def test_a_link_in_the_folder_leads_nothing_out_of_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "archive").write_bytes(tar([plain("a", kind=tarfile.DIRTYPE), plain("a/b.txt", b"b")]))
    with pytest.raises(UserError, match="is there already and no folder"):
        unpack(tmp_path / "archive", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())

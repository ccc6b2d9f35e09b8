"""A server that misbehaves: the right file appears at its place, or none does, and what was there stays."""

import hashlib
import io
import random
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from reliability.archives import made_up, refused, write_zip
from reliability.server import Server, serving
from tinylab.data import archive
from tinylab.data.archive import download, find, open_archive

pytestmark = pytest.mark.promise("downloads")

BODY = b"PK" + random.Random(1).randbytes(699_998)
HALF = len(BODY) // 2
BLOCK = 1 << 18  # what is read, and written, at once
EXPECTED = {
    "size": len(BODY),
    "md5": hashlib.md5(BODY).hexdigest(),
    "sha256": hashlib.sha256(BODY).hexdigest(),
}
PAGE = b"<!doctype html><title>Sorry</title><p>Too many people want this file.</p>"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        running.files |= {
            "/good": BODY,
            "/bad": BODY[:-1] + b"x",
            "/short": BODY[:-1],
            "/long": BODY + b"x",
        }
        running.files["/page"] = PAGE
        yield running


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "data" / "x.zip"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that the download wanted to wait, and did not have to."""
    seconds = []
    monkeypatch.setattr(archive.time, "sleep", seconds.append)
    return seconds


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"x.zip.lock"}


# --- One address: the path asked for, what the server does, and the requests that follow ------------------------------

GIVES_THE_FILE = {
    "well": ("/good", [], [None]),
    "without a length": ("/good", ["no length"], [None]),
    "cut once": ("/good", ["cut"], [None, f"bytes={HALF}-"]),
    "cut twice": ("/good", ["cut", "cut"], [None, f"bytes={HALF}-", f"bytes={HALF}-"]),
    "cut, without a length": ("/good", ["cut, no length"], [None, f"bytes={HALF}-"]),
    "cut, then all of it again": ("/good", ["cut", "ignore range"], [None, f"bytes={HALF}-"]),
    "cut, then another part": ("/good", ["cut", "wrong range"], [None, f"bytes={HALF}-", None]),
    "cut, then 416": ("/good", ["cut", 416], [None, f"bytes={HALF}-", None]),
    "500": ("/good", [500], [None, None]),
    "503, 429": ("/good", [503, 429], [None, None, None]),
    "silence": ("/good", ["stall"], [None, f"bytes={BLOCK}-"]),
    "redirect": ("/moved", ["to /good"], [None, None]),
}

GIVES_NOTHING = {
    "404": ("/missing", [], [None], "HTTP 404"),
    "500 for ever": ("/good", [500] * 9, [None] * 3, "HTTP 500"),
    "wrong bytes": ("/bad", [], [None], "the file has the wrong md5"),
    "too short": ("/short", [], [None], "offers 699,999 bytes instead of 700,000"),
    "too long": ("/long", [], [None], "offers 700,001 bytes instead of 700,000"),
    "too long, without a length": ("/long", ["no length"], [None], "sends more than 700,000 bytes"),
    "a page": ("/page", [], [None], f"offers {len(PAGE)} bytes instead of 700,000"),
    "a page without a length": ("/page", ["no length"], [None], "sends a page"),
    "redirect to itself": ("/loop", ["to /loop"] * 99, None, "HTTP 302"),
    "redirect to a file": ("/moved", ["to file:///etc/passwd"], [None], "file:///etc/passwd"),
    "redirect to ftp": ("/moved", ["to ftp://127.0.0.1/x"], [None], "ftp://127.0.0.1/x"),
    "redirect to data": ("/moved", ["to data:,x"], [None], "data:,x"),
    "silence for ever": ("/good", ["stall"] * 9, [None, *[f"bytes={BLOCK}-"] * 2], "timed out"),
}


def asked(server: Server) -> list[str | None]:
    return [wanted for _, wanted in server.requests]


@pytest.mark.parametrize("case", GIVES_THE_FILE)
def test_the_right_file_in_the_end(server, target, waits, tally, monkeypatch, case):
    path, behaviours, requests = GIVES_THE_FILE[case]
    monkeypatch.setattr(archive, "_SILENCE", 0.3)
    server.behaviours[path] = list(behaviours)
    assert download([server.url(path)], target, **EXPECTED) == target
    assert target.read_bytes() == BODY
    assert names(target.parent) == {"x.zip"}
    assert asked(server) == requests
    assert waits == [1.0, 2.0][: len(requests) - 1 - (case == "redirect")]
    tally(behaviours=1, right=1)


@pytest.mark.parametrize("before", ["nothing", "another file"])
@pytest.mark.parametrize("case", GIVES_NOTHING)
def test_no_file_rather_than_a_wrong_one(server, target, waits, tally, monkeypatch, case, before):
    path, behaviours, requests, expected = GIVES_NOTHING[case]
    monkeypatch.setattr(archive, "_SILENCE", 0.3)
    server.behaviours[path] = list(behaviours)
    target.parent.mkdir()
    if before == "another file":
        target.write_bytes(b"mine")
    message = refused(download, [server.url(path)], target, **EXPECTED)
    assert expected in message
    assert f"put it at {target}, or set TINY_IMAGENET" in message
    assert names(target.parent) - {"x.zip.partial"} == (
        {"x.zip"} if before == "another file" else set()
    )
    assert not target.exists() or target.read_bytes() == b"mine"
    if requests is None:
        assert len(server.requests) <= 10 + 1  # as many redirects as urllib follows
    else:
        assert asked(server) == requests
    assert waits == [1.0, 2.0][: len(requests or [None]) - 1]
    tally(behaviours=1, none=1)


@pytest.mark.parametrize("check", ["size", "md5", "sha256"])
def test_each_check_is_enough(server, target, waits, check):
    wrong = EXPECTED | {check: 700_001 if check == "size" else "0" * 64}
    target.parent.mkdir()
    target.write_bytes(BODY)
    alone = dict.fromkeys(EXPECTED) | {check: wrong[check]}
    assert archive._difference(target, **alone | {"sha256": alone["sha256"] or EXPECTED["sha256"]})
    refused(download, [server.url("/good")], target, **wrong)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("first", ["/missing", "/bad", "/short", "/long", "/page", "/good"])
def test_the_next_mirror_takes_over(server, target, waits, tally, first):
    server.behaviours[first] = [500] * 3 if first == "/good" else ["no length"] * 3
    server.files["/mirror"] = BODY
    download([server.url(first), server.url("/mirror")], target, **EXPECTED)
    assert target.read_bytes() == BODY
    assert names(target.parent) == {"x.zip"}
    assert len(server.requests) <= 4
    tally(behaviours=1, right=1)


# --- What was there before --------------------------------------------------------------------------------------------


def test_a_file_that_is_right_needs_no_server(server, target, tally):
    download([server.url("/good")], target, **EXPECTED)
    download([server.url("/good")], target, **EXPECTED)
    assert len(server.requests) == 1
    tally(behaviours=1, right=1)


@pytest.mark.parametrize("behaviour", ["serve", "ignore range"])
def test_a_partial_file_is_continued_or_begun_anew(server, target, tally, behaviour):
    target.parent.mkdir()
    target.with_name("x.zip.partial").write_bytes(BODY[:300_000])
    server.behaviours["/good"] = [behaviour]
    download([server.url("/good")], target, **EXPECTED)
    assert target.read_bytes() == BODY
    assert server.requests == [("/good", "bytes=300000-")]
    tally(behaviours=1, right=1)


def test_a_partial_file_of_something_else_does_not_spoil_the_download(server, target, waits, tally):
    target.parent.mkdir()
    for junk in (b"x" * 300_000, b"x" * len(BODY), b"x" * 800_000):
        target.with_name("x.zip.partial").write_bytes(junk)
        download([server.url("/good")], target, **EXPECTED)
        assert target.read_bytes() == BODY
        target.unlink()
        tally(behaviours=1, right=1)


# --- Without a hash ---------------------------------------------------------------------------------------------------


def test_without_a_hash_only_a_whole_zip_is_taken(server, target, waits, tally, tmp_path):
    """An address of the user's own: an error page, or half a file, would else count as the archive for ever."""
    whole = server.files["/own.zip"] = write_zip(tmp_path / "a.zip", made_up()).read_bytes()
    assert "sends a page" in refused(download, [server.url("/page")], target)
    server.behaviours["/own.zip"] = ["cut, no length"]
    assert "not a zip, or it is cut short" in refused(download, [server.url("/own.zip")], target)
    server.behaviours["/own.zip"] = ["cut"] * 3
    length = len(whole) // 2
    assert f"connection ended after {length:,} bytes" in refused(
        download, [server.url("/own.zip")], target
    )
    assert names(target.parent) <= {"x.zip.partial"}
    server.requests.clear()
    server.behaviours["/own.zip"] = ["no length"]
    assert download([server.url("/own.zip")], target).read_bytes() == whole
    assert asked(server) == [None]  # nothing is continued of which nobody knows whether it fits
    open_archive(target).members.close()
    tally(behaviours=4, right=1, none=3)


def test_a_page_that_lies_where_the_archive_belongs_is_replaced(server, tmp_path, tally):
    whole = server.files["/own.zip"] = write_zip(tmp_path / "a.zip", made_up()).read_bytes()
    (tmp_path / "own.zip").write_bytes(PAGE)
    assert find(server.url("/own.zip"), tmp_path).read_bytes() == whole
    tally(behaviours=1, right=1)


def test_an_endless_file_is_given_up(server, target, monkeypatch, tally):
    monkeypatch.setattr(archive, "_DOWNLOAD_LIMIT", 100_000)
    assert "offers 700,000 bytes" in refused(download, [server.url("/good")], target)
    server.behaviours["/good"] = ["no length"]
    assert "sends more than 100,000 bytes" in refused(download, [server.url("/good")], target)
    assert names(target.parent) == set()
    tally(behaviours=2, none=2)


# --- Never from https to http -----------------------------------------------------------------------------------------


def test_a_redirect_from_https_to_http_is_refused(tally):
    request = archive.urllib.request.Request("https://example.org/a")
    for address in ("http://example.org/a", "HTTP://example.org/a", "file:///a", "//example.org/a"):
        with pytest.raises(archive._NextMirror):
            archive._SafeRedirects().redirect_request(request, None, 302, "", {}, address)
    assert archive._SafeRedirects().redirect_request(
        request, None, 302, "", {}, "https://example.org/b"
    )
    tally(behaviours=1, none=1)


def test_an_https_address_that_fails_is_never_asked_by_http(server, target, waits, tally):
    address = server.url("/good").replace("http:", "https:")
    assert "cannot download" in refused(download, [address], target, **EXPECTED)
    assert "cannot download" in refused(find, address, target.parent)
    assert server.requests == []
    assert waits == [1.0, 2.0] * 2
    assert names(target.parent) == {"good.lock"}
    tally(behaviours=1, none=1)


def test_every_built_in_address_comes_with_a_hash(tmp_path, monkeypatch):
    seen = []
    monkeypatch.delenv("TINY_IMAGENET", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        archive, "download", lambda urls, target, **expected: seen.append((urls, expected))
    )
    for source in ("auto", *archive.URLS):
        find(source, tmp_path)
    assert len(seen) == 5
    assert all(expected.keys() == {"size", "md5", "sha256"} for _, expected in seen)
    assert seen[0][1]["size"] == 248_100_043
    assert seen[0][1]["md5"].startswith("90528d7c")
    assert seen[0][1]["sha256"].startswith("6198c8ae")


# --- Around it --------------------------------------------------------------------------------------------------------


def test_without_a_network_one_line_says_what_to_do(target, waits):
    with Server() as gone:
        address = gone.url("/good")
    message = refused(download, [address], target, **EXPECTED)
    assert "Connection refused" in message
    assert "TINY_IMAGENET" in message
    assert waits == [1.0, 2.0]
    assert "no-such-host.invalid" in refused(
        download, ["https://no-such-host.invalid/x.zip"], target, tries=1
    )


def test_the_back_off_is_real(server, target):
    server.behaviours["/good"] = [500, 500]
    start = time.monotonic()
    download([server.url("/good")], target, **EXPECTED, wait=0.1)
    assert time.monotonic() - start > 0.3


def test_a_disk_without_room_is_noticed_before_the_download(server, target, monkeypatch):
    usage = archive.shutil.disk_usage("/")._replace(free=500_000)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: usage)
    message = refused(download, [server.url("/good")], target, **EXPECTED)
    assert "500,000 bytes free" in message
    assert names(target.parent) == set()


def test_an_unwritable_place_is_one_line(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in refused(
        download, [server.url("/good")], tmp_path / "file" / "x.zip", **EXPECTED
    )
    assert (tmp_path / "file").read_bytes() == b""


def test_two_downloads_at_once_are_one(server, target, tally):
    threads = [
        threading.Thread(target=download, args=([server.url("/good")], target), kwargs=EXPECTED)
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1
    tally(behaviours=1, right=1)


def test_the_file_appears_by_renaming(server, target, monkeypatch):
    """Whoever looks while it arrives sees no file, or all of it."""
    seen = []
    difference = archive._difference

    def look(*arguments: object) -> str | None:
        seen.append(target.exists())
        return difference(*arguments)

    monkeypatch.setattr(archive, "_difference", look)
    download([server.url("/good")], target, **EXPECTED)
    assert seen == [False]
    assert zipfile.is_zipfile(io.BytesIO(target.read_bytes())) is False  # a hash is all it takes

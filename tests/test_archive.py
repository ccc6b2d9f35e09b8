"""The archive: canonical order, every refusal, and where it is found. The archives are made up here."""

import errno
import hashlib
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.archives import ROOT, made_up, real_archive, refused, write_folder, write_zip
from reliability.server import Server, serving

from tinylab.data import archive
from tinylab.data.archive import LabelledFile, download, find, open_archive, verify_archive

# --- What a sound archive gives ---------------------------------------------------------------------------------------


def test_files_come_in_canonical_order_whatever_the_order_in_the_zip(tmp_path):
    files = list(made_up().items())
    random.Random(0).shuffle(files)
    with open_archive(write_zip(tmp_path / "a.zip", dict(files))) as opened:
        assert opened.wnids == ("n01", "n02", "n03")
        assert opened.train_count == 12
        train = [
            f"train/{w}/images/{w}_{i}.JPEG"
            for w in ("n01", "n02", "n03")
            for i in ("0", "1", "10", "2")
        ]
        assert [file.path for file in opened.files] == train + [
            f"val/images/val_{i}.JPEG" for i in range(5, -1, -1)
        ]
        assert [file.label for file in opened.files] == [0] * 4 + [1] * 4 + [2] * 4 + [
            1,
            0,
            2,
            2,
            1,
            0,
        ]


def test_boxes_and_bytes_belong_to_their_files(tmp_path):
    files = made_up()
    with open_archive(write_zip(tmp_path / "a.zip", files)) as opened:
        boxes = {file.path: file.box for file in opened.files}
        assert boxes["train/n01/images/n01_10.JPEG"] == (10, 1, 43, 63)
        assert boxes["val/images/val_5.JPEG"] == (0, 0, 44, 62)
        assert boxes["val/images/val_0.JPEG"] == (0, 5, 44, 62)
        assert all(opened.read(file) == files[file.path] for file in opened.files)


def test_names_are_first_synonyms_without_control_characters_or_the_wnid(tmp_path):
    with open_archive(write_zip(tmp_path / "a.zip", made_up())) as opened:
        assert opened.names == ("goldfish", "fire [31msalamander", "n03")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", [ROOT, ""])
def test_folder_and_zip_with_and_without_root_give_the_same(tmp_path, root, method):
    files = made_up()
    zipped = open_archive(write_zip(tmp_path / "a.zip", files, root, method))
    folder = open_archive(
        write_folder(tmp_path / "out" / root, files) if not root else _parent(tmp_path, files)
    )
    with zipped, folder:
        assert folder.files == zipped.files
        assert (folder.wnids, folder.names, folder.train_count) == (
            zipped.wnids,
            zipped.names,
            zipped.train_count,
        )
        assert [folder.read(file) for file in folder.files] == [
            zipped.read(file) for file in zipped.files
        ]


def _parent(tmp_path: Path, files: dict[str, bytes]) -> Path:
    write_folder(tmp_path / "out" / ROOT, files)
    return tmp_path / "out"


def test_test_images_may_be_missing_and_desktop_litter_is_ignored(tmp_path):
    files = made_up()
    plain = {name: content for name, content in files.items() if not name.startswith("test/")}
    litter = (
        "__MACOSX/._x",
        "train/.DS_Store",
        "train/n01/images/._n01_0.JPEG",
        "val/images/Thumbs.db",
        "readme",
    )
    with (
        open_archive(write_zip(tmp_path / "plain.zip", plain)) as first,
        open_archive(
            write_zip(tmp_path / "litter.zip", files | dict.fromkeys(litter, b"?"))
        ) as second,
        open_archive(
            write_folder(tmp_path / "folder", files | dict.fromkeys(litter, b"?"))
        ) as third,
    ):
        assert first.files == second.files == third.files


def test_windows_line_ends_are_read(tmp_path):
    files = made_up()
    crlf = {
        name: text.replace(b"\n", b"\r\n") if name.endswith(".txt") else text
        for name, text in files.items()
    }
    with (
        open_archive(write_zip(tmp_path / "a.zip", files)) as lf,
        open_archive(write_zip(tmp_path / "b.zip", crlf)) as cr,
    ):
        assert lf.files == cr.files
        assert lf.wnids == cr.wnids


def test_content_sha256_is_the_documented_one():
    files = [
        LabelledFile("train/b/images/x.JPEG", 1, (0, 0, 1, 1)),
        LabelledFile("val/images/y.JPEG", 0, (0, 0, 1, 1)),
    ]
    digests = [hashlib.sha256(content).hexdigest() for content in (b"x", b"y")]
    lines = f"train/b/images/x.JPEG b {digests[0]}\nval/images/y.JPEG a {digests[1]}\n"
    assert (
        archive.content_sha256(files, ("a", "b"), digests)
        == hashlib.sha256(lines.encode()).hexdigest()
    )
    with pytest.raises(ValueError, match="shorter"):
        archive.content_sha256(files, ("a", "b"), digests[:1])


# --- Refusals ---------------------------------------------------------------------------------------------------------


def _replaced(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


def _without(*parts: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        doomed = [name for name in files if any(part in name for part in parts)]
        assert doomed
        for name in doomed:
            del files[name]

    return change


def _with(name: str, content: bytes = b"?") -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: content})


BOXES, ANNOTATIONS = "train/n01/n01_boxes.txt", "val/val_annotations.txt"
BROKEN_LAYOUTS = {
    "no wnids": (_without("wnids.txt"), "not Tiny ImageNet: it has no wnids.txt"),
    "other zip": (lambda files: (files.clear(), files.update(a=b"")), "not Tiny ImageNet"),
    "no classes": (_with("wnids.txt", b"\n"), "names no class"),
    "class without folder": (_with("wnids.txt", b"n01\nn02\nn03\nn04\n"), "class n04"),
    "class with a path": (_with("wnids.txt", b"n01\nn02\nn03\n../n04\n"), "class ../n04"),
    "extra folder": (_with("train/n09/images/n09_0.JPEG"), "class n09"),
    "class twice": (_with("wnids.txt", b"n01\nn02\nn03\nn02\n"), "n02 more than once"),
    "control characters": (_with("wnids.txt", b"n01\nn02\nn03\nn\x1b4\n"), "control characters"),
    "wnids not text": (_with("wnids.txt", b"\xff\xfe"), "wnids.txt is not UTF-8"),
    "words not text": (_with("words.txt", b"n01\t\xff"), "words.txt is not UTF-8"),
    "fewer training images": (_without("n02_1.JPEG"), "train/ has 3 images of n02"),
    "no image of a class": (_without("n02/images"), "train/ has 0 images of n02"),
    "no training image": (_without("/images/n0"), "train/ has 0 images"),
    "no words": (_without("words.txt"), "words.txt is missing"),
    "no boxes": (_without("n01_boxes"), "train/n01/n01_boxes.txt is missing"),
    "box missing": (_replaced(BOXES, b"n01_2.JPEG\t2\t1\t42\t63\n", b""), "no box for n01_2.JPEG"),
    "box of no image": (
        _replaced(BOXES, b"n01_2.JPEG", b"n01_3.JPEG"),
        "n01_3.JPEG, which is missing",
    ),
    "box too large": (_replaced(BOXES, b"\t63\n", b"\t64\n"), "outside the image"),
    "box negative": (_replaced(ANNOTATIONS, b"\t0\t3\t", b"\t-1\t3\t"), "outside the image"),
    "box of three": (_replaced(BOXES, b"\t63\n", b"\n"), "line without a box"),
    "box of words": (_replaced(ANNOTATIONS, b"\t44\t", b"\tbig\t"), "line without a box"),
    "no annotations": (_without("val_annotations"), "val/val_annotations.txt is missing"),
    "unannotated": (_with("val/images/val_9.JPEG"), "val/images/val_9.JPEG is not listed"),
    "annotated, not there": (
        _without("val_3.JPEG"),
        "lists val_3.JPEG, which is not in val/images/",
    ),
    "annotated twice": (
        _replaced(ANNOTATIONS, b"val_3", b"val_4"),
        "lists val_4.JPEG more than once",
    ),
    "annotated elsewhere": (
        _replaced(ANNOTATIONS, b"val_3", b"../../test/images/test_0"),
        "not in val/images/",
    ),
    "unknown class": (
        _replaced(ANNOTATIONS, b"val_4.JPEG\tn01", b"val_4.JPEG\tn07"),
        "unknown class 'n07'",
    ),
    "line of one word": (_with(ANNOTATIONS, b"val_0.JPEG\n"), "unknown class ''"),
    "uneven validation": (
        _replaced(ANNOTATIONS, b"val_4.JPEG\tn01", b"val_4.JPEG\tn02"),
        "val/ has",
    ),
    "huge image": (
        _with("val/images/val_0.JPEG", bytes(range(256)) * 300),
        "more than 65,536 bytes",
    ),
    "huge text": (
        _with("words.txt", random.Random(0).randbytes(9_000_000)),
        "more than 8,388,608 bytes",
    ),
}


@pytest.mark.parametrize("packed", ["zip", "folder"])
@pytest.mark.parametrize("case", BROKEN_LAYOUTS)
def test_broken_layout_is_refused_naming_the_culprit(tmp_path, case, packed):
    change, expected = BROKEN_LAYOUTS[case]
    files = made_up()
    change(files)
    path = (
        write_zip(tmp_path / "a.zip", files)
        if packed == "zip"
        else write_folder(tmp_path / "a", files)
    )

    def use() -> None:
        with open_archive(path) as opened:
            for file in opened.files:
                opened.read(file)

    message = refused(use)
    assert expected in message
    assert str(path) in message


def test_too_many_or_too_large_members_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", made_up())
    monkeypatch.setattr(archive, "_MEMBER_LIMIT", 20)
    assert "more than 20 members" in refused(open_archive, path)
    monkeypatch.undo()
    monkeypatch.setattr(archive, "_TOTAL_LIMIT", 10_000)
    assert "more than 10,000 bytes" in refused(open_archive, path)
    monkeypatch.setattr(archive, "_MEMBER_LIMIT", 20)
    assert "more than 20 files" in refused(open_archive, write_folder(tmp_path / "a", made_up()))
    monkeypatch.undo()
    monkeypatch.setattr(archive, "_DIRECTORY_LIMIT", 1000)
    assert "directory would take" in refused(open_archive, path)
    monkeypatch.undo()
    monkeypatch.setattr(archive, "_CLASS_LIMIT", 2)
    assert "more than 2 classes" in refused(open_archive, path)


def test_damaged_image_is_named(tmp_path):
    files = made_up()
    path = write_zip(tmp_path / "a.zip", files)
    content = files["val/images/val_2.JPEG"]
    path.write_bytes(path.read_bytes().replace(content, content[:-5] + b"?" + content[-4:]))
    with open_archive(path) as opened:
        file = next(file for file in opened.files if file.path.endswith("val_2.JPEG"))
        assert "val/images/val_2.JPEG is damaged" in refused(opened.read, file)


@pytest.mark.parametrize(
    "linked", ["train/n01/images/n01_0.JPEG", "train/n01/images", "val", "wnids.txt"]
)
def test_links_that_leave_the_folder_are_refused(tmp_path, linked):
    folder = write_folder(tmp_path / "a", made_up())
    (tmp_path / "elsewhere").mkdir()
    (folder / linked).rename(tmp_path / "elsewhere" / "moved")
    (folder / linked).symlink_to(tmp_path / "elsewhere" / "moved")
    assert "link that leaves the folder" in refused(open_archive, folder)


def test_links_inside_the_folder_are_followed_and_loops_end(tmp_path):
    folder = write_folder(tmp_path / "a", made_up())
    (folder / "val/images/val_0.JPEG").rename(folder / "kept.JPEG")
    (folder / "val/images/val_0.JPEG").symlink_to("../../kept.JPEG")
    (folder / "val/loop").symlink_to("..")
    with open_archive(folder) as opened:
        assert len(opened.files) == 18


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(open_archive, tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(verify_archive, tmp_path / "pipe")


# --- Verifying --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A made-up archive that counts as the published one."""
    path = write_zip(tmp_path / "a.zip", made_up())
    whole = path.read_bytes()
    monkeypatch.setattr(archive, "ZIP_BYTES", len(whole))
    monkeypatch.setattr(archive, "ZIP_MD5", hashlib.md5(whole).hexdigest())
    monkeypatch.setattr(archive, "ZIP_SHA256", hashlib.sha256(whole).hexdigest())
    with open_archive(path) as opened:
        digests = [hashlib.sha256(opened.read(file)).hexdigest() for file in opened.files]
        content = archive.content_sha256(opened.files, opened.wnids, digests)
        monkeypatch.setattr(archive, "CONTENT_SHA256", content)
        monkeypatch.setattr(archive, "LISTS_SHA256", archive._lists_sha256(opened))
    monkeypatch.setattr(archive, "WNIDS_SHA256", hashlib.sha256(b"n01\nn02\nn03\n").hexdigest())
    return path


def test_the_published_archive_is_known_by_its_bytes_or_by_its_content(published, tmp_path):
    assert "is the published archive" in verify_archive(published)
    packed_anew = write_zip(tmp_path / "b.zip", made_up(), method=zipfile.ZIP_DEFLATED)
    for path in (packed_anew, write_folder(tmp_path / "folder", made_up())):
        assert "holds the published files, packed anew" in verify_archive(path)


def test_what_is_no_published_archive_is_told_apart(published, tmp_path, monkeypatch):
    whole = published.read_bytes()
    published.write_bytes(
        whole.replace(b"never read", b"never seen")
    )  # its CRC is wrong now, but nobody reads it
    assert "is damaged: the file has the wrong md5, though the labelled files" in refused(
        verify_archive, published
    )
    boxes = write_folder(tmp_path / "boxes", made_up())
    path = boxes / "train/n01/n01_boxes.txt"
    path.write_bytes(path.read_bytes().replace(b"\t63\n", b"\t62\n"))
    assert "not the published class names and boxes" in refused(verify_archive, boxes)
    image = write_folder(tmp_path / "image", made_up())
    path = image / "val/images/val_0.JPEG"
    path.write_bytes(path.read_bytes() + b"?")
    assert "Tiny ImageNet's classes, but not its published files" in refused(verify_archive, image)
    monkeypatch.setattr(archive, "WNIDS_SHA256", "0" * 64)
    assert "whole, but not Tiny ImageNet: 3 classes, 18 labelled images" in verify_archive(image)


def test_a_missing_archive_is_one_line(tmp_path):
    assert "cannot read" in refused(verify_archive, tmp_path / "missing.zip")


# --- Locking ----------------------------------------------------------------------------------------------------------


def test_the_lock_lies_beside_the_path(tmp_path):
    with archive.locked(tmp_path / "x"):
        assert (tmp_path / "x.lock").exists()
        assert archive._lock_file(tmp_path / "x") == tmp_path / "x.lock"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_the_temporary_folder_holds_the_lock(
    tmp_path, monkeypatch, code
):
    (tmp_path / "drive").mkdir()
    flock = archive.fcntl.flock

    def flock_but_not_on_the_drive(file: int, operation: int) -> None:
        if "/drive/" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(code, os.strerror(code))
        flock(file, operation)

    monkeypatch.setattr(archive.fcntl, "flock", flock_but_not_on_the_drive)
    monkeypatch.setattr(archive.tempfile, "gettempdir", lambda: str(tmp_path))
    compute = archive._lock_file(tmp_path / "drive" / "x")
    assert compute.parent == tmp_path
    assert compute != archive._lock_file(tmp_path / "drive" / "y")
    with archive.locked(tmp_path / "drive" / "x"):
        assert compute.exists()
        with pytest.raises(archive.Timeout):
            archive.FileLock(compute).acquire(timeout=0)


def test_other_faults_of_a_lock_are_not_passed_over(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(archive.fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        archive._lock_file(tmp_path / "x.zip")
    assert "Input/output error" in refused(
        download, ["http://127.0.0.1:9/x.zip"], tmp_path / "x.zip", tries=1
    )


# --- Finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """An empty current folder, and no TINY_IMAGENET."""
    monkeypatch.delenv("TINY_IMAGENET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_auto_takes_the_first_of_its_places(desk, monkeypatch, server):
    body = write_zip(desk / "made.zip", made_up()).read_bytes()
    monkeypatch.setattr(archive, "ZIP_BYTES", len(body))
    monkeypatch.setattr(archive, "ZIP_MD5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(archive, "ZIP_SHA256", hashlib.sha256(body).hexdigest())
    server.files["/tiny-imagenet-200.zip"] = body
    root = desk / "root"

    downloaded = find("auto", root, [server.url("/tiny-imagenet-200.zip")])
    assert downloaded == root / "tiny-imagenet-200.zip"
    assert downloaded.read_bytes() == body
    downloaded.unlink()
    extracted = write_folder(desk / "data" / "tiny-imagenet-200", made_up())
    assert find("auto", root, []).resolve() == extracted
    extracted = write_folder(root / "tiny-imagenet-200", made_up())
    assert find("auto", root, []) == extracted
    write_zip(root / "tiny-imagenet-200.zip", made_up())
    assert find("auto", root, []) == root / "tiny-imagenet-200.zip"
    monkeypatch.setenv("TINY_IMAGENET", str(desk / "made.zip"))
    assert find("auto", root, []) == desk / "made.zip"
    assert len(server.requests) == 1


def test_named_sources_must_exist(desk, monkeypatch):
    assert "the source is missing.zip" in refused(find, "missing.zip")
    os.mkfifo(desk / "pipe")
    assert "no zip file and no folder" in refused(find, desk / "pipe")
    monkeypatch.setenv("TINY_IMAGENET", "nowhere.zip")
    assert "TINY_IMAGENET is set to nowhere.zip" in refused(find)


def test_a_url_is_saved_under_a_safe_name(desk, server):
    content = server.files["/a/..%2f..%2fevil%20name.zip"] = write_zip(
        desk / "a.zip", made_up()
    ).read_bytes()
    path = find(server.url("/a/..%2f..%2fevil%20name.zip?download=1"), desk / "root")
    assert path == desk / "root" / "evil_name.zip"
    assert path.read_bytes() == content
    assert "is not an address" in refused(find, "http://[broken/x.zip", desk)
    assert "only http and https" in refused(find, "file:///etc/passwd", desk / "root")
    assert "only http and https" in refused(find, "ftp://127.0.0.1/a.zip", desk / "root")


def test_built_in_addresses_must_give_the_published_bytes(desk, server):
    server.files["/a.zip"] = b"something else"
    address = server.url("/a.zip")
    assert "14 bytes instead of 248,100,043" in refused(find, address, desk, urls=[address])
    assert not (desk / "a.zip").exists()


# --- The published archive --------------------------------------------------------------------------------------------


@pytest.mark.archive
@pytest.mark.skipif(
    real_archive() is None, reason="no TINY_IMAGENET and no data/tiny-imagenet-200.zip"
)
def test_published_archive():
    with open_archive(real_archive()) as opened:
        assert len(opened.files) == 110_000
        assert opened.train_count == 100_000
        assert archive.has_published_classes(opened.wnids)
        assert opened.wnids[0] == "n01443537"
        assert opened.names[0] == "goldfish"
        assert opened.files[0] == LabelledFile(
            "train/n01443537/images/n01443537_0.JPEG", 0, (0, 10, 63, 58)
        )
        first = opened.files[100_000]
        assert (first.path, opened.wnids[first.label]) == ("val/images/val_0.JPEG", "n03444034")
        assert first.box == (0, 32, 44, 62)
        assert opened.read(first)[:3] == b"\xff\xd8\xff"

"""The archive: canonical order, every refusal, identity. The archives are made up here."""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from reliability.archives import ROOT, made_up, real_archive, refused, write_folder, write_zip

from tinylab.data import archive
from tinylab.data.archive import Archive, verify_archive


def test_files_come_in_canonical_order_whatever_the_order_in_the_zip(tmp_path: Path) -> None:
    files = list(made_up().items())
    random.Random(0).shuffle(files)
    opened = Archive(write_zip(tmp_path / "a.zip", dict(files)))
    assert opened.wnids == ("n01", "n02", "n03")
    assert opened.names == ("goldfish", "fire [31msalamander", "n03")
    assert opened.train_count == 12
    train = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in opened.wnids for i in (0, 1, 10, 2)]
    val = [f"val/images/val_{i}.JPEG" for i in range(5, -1, -1)]
    assert [file.path for file in opened.files] == train + val
    assert [file.label for file in opened.files[12:]] == [1, 0, 2, 2, 1, 0]
    boxes = {file.path: file.box for file in opened.files}
    assert boxes["train/n01/images/n01_10.JPEG"] == (10, 1, 43, 63)
    assert boxes["val/images/val_5.JPEG"] == (0, 0, 44, 62)
    assert all(opened.read(file.path) == dict(files)[file.path] for file in opened.files)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", ["", ROOT])
def test_folder_and_zip_with_and_without_root_give_the_same(
    tmp_path: Path, root: str, method: int
) -> None:
    files = made_up()
    litter = {"train/n01/images/._n01_0.JPEG": b"", "train/.DS_Store": b"", "val/Thumbs.db": b""}
    windows = {name: files[name].replace(b"\n", b"\r\n") for name in files if name.endswith(".txt")}
    wanted = Archive(write_zip(tmp_path / "wanted.zip", files))
    write_folder(tmp_path / "folder" / root, files | litter | windows)
    for path in (write_zip(tmp_path / "a.zip", files | litter, root, method), tmp_path / "folder"):
        opened = Archive(path)
        assert (opened.files, opened.wnids) == (wanted.files, wanted.wnids)
        assert opened.names == wanted.names


def without(name: str) -> Callable[[dict], None]:
    return lambda files: files.pop(name)


def changed(name: str, old: bytes, new: bytes) -> Callable[[dict], None]:
    def change(files: dict) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)

    return change


BOXES, VAL = "train/n01/n01_boxes.txt", "val/val_annotations.txt"
BROKEN = {
    "some boxes": (without(BOXES), "n01_boxes.txt is missing"),
    "no annotations": (without(VAL), "val_annotations.txt is missing"),
    "no class": (lambda files: files.update({"wnids.txt": b""}), "disagree about n01"),
    "a class twice": (changed("wnids.txt", b"n02", b"n01"), "disagree about n02"),
    "another class": (changed("wnids.txt", b"n02", b"n04"), "disagree about n0"),
    "not UTF-8": (changed("wnids.txt", b"n02", b"n\xff2"), "disagree about n02"),
    "an image less": (without("train/n01/images/n01_0.JPEG"), "disagree about n01_0.JPEG"),
    "a box less": (changed(BOXES, b"n01_0.JPEG", b"n01_9.JPEG"), "disagree about n01_0.JPEG"),
    "no box": (changed(BOXES, b"\t63\n", b"\n"), "has an impossible line: 'n01_0.JPEG"),
    "a box outside": (changed(BOXES, b"\t63\n", b"\t64\n"), "has an impossible line"),
    "unknown class": (changed(VAL, b"n02", b"n09"), "has an impossible line"),
    "a file twice": (changed(VAL, b"val_4", b"val_5"), "has an impossible line: 'val_5.JPEG"),
    "a file less": (without("val/images/val_3.JPEG"), "disagree about val_3.JPEG"),
    "too large": (
        lambda files: files.update({"val/images/val_0.JPEG": bytes(7_000)}),
        "val_0.JPEG has more than 5,000 bytes",
    ),
}


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_layout_is_refused_naming_the_culprit(
    tmp_path: Path, case: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 5000)
    files = made_up()
    change, expected = BROKEN[case]
    change(files)
    path = (write_zip if packed else write_folder)(tmp_path / "a", files)

    def read_all() -> None:
        opened = Archive(path)
        for file in opened.files:
            opened.read(file.path)

    assert expected in refused(read_all)


def test_a_member_twice_and_what_is_no_zip_are_refused(tmp_path: Path) -> None:
    twice = write_zip(tmp_path / "twice.zip", made_up())
    with zipfile.ZipFile(twice, "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr(f"{ROOT}wnids.txt", b"n01\n")
    assert "two files of one name" in refused(Archive, twice)
    (tmp_path / "page.zip").write_text("<html>")
    assert "it is no zip, tar or folder, or it is cut short" in refused(
        Archive, tmp_path / "page.zip"
    )
    assert "No such file" in refused(Archive, tmp_path / "missing.zip")


def test_members_outside_the_layout_are_never_read(tmp_path: Path) -> None:
    strange = {"../../etc/passwd": b"x", "train/n01/../../x.JPEG": b"x", "test/bomb": bytes(10**6)}
    opened = Archive(write_zip(tmp_path / "a.zip", made_up() | strange))
    assert len(opened.files) == 18


def test_the_published_files_are_known_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "a.zip", made_up())
    said = verify_archive(path)
    assert "is whole: not Tiny ImageNet, 3 classes, 18 labelled images" in said
    monkeypatch.setattr(archive, "WNIDS_SHA256", archive.class_order_sha256(("n01", "n02", "n03")))
    assert "Tiny ImageNet's classes, but other files" in refused(verify_archive, path)
    monkeypatch.setattr(archive, "CONTENT_SHA256", said.split()[-1])
    assert "other class names or boxes" in refused(verify_archive, path)


@pytest.mark.archive
@pytest.mark.skipif(real_archive() is None, reason="needs the real archive")
def test_the_real_archive() -> None:
    opened = Archive(real_archive())
    assert len(opened.files) == 110_000
    assert opened.train_count == 100_000
    assert archive.class_order_sha256(opened.wnids) == archive.WNIDS_SHA256
    assert opened.names[0] == "goldfish"

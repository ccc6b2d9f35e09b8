"""The data set: pixels, identity, damage, and that it is whole or absent."""

import errno
import hashlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reliability.archives import (
    change_meta,
    jpeg,
    leftovers,
    made_up,
    real_archive,
    refused,
    write_folder,
    write_zip,
)  # fmt: skip

from tinylab.data import dataset as module
from tinylab.data.archive import CONTENT_SHA256, Archive
from tinylab.data.dataset import Dataset, open_dataset, prepare, verify


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "made.zip", made_up())


@pytest.fixture
def prepared(tmp_path: Path, zipped: Path) -> Dataset:
    return prepare(zipped, tmp_path / "ds", progress=False)


def test_arrays_hold_the_decoded_images_in_canonical_order(prepared: Dataset, zipped: Path) -> None:
    files = made_up()
    archive = Archive(zipped)
    for row, file in enumerate(archive.files):
        decoded = Image.open(io.BytesIO(files[file.path])).convert("RGB")
        np.testing.assert_array_equal(prepared.images[row], np.asarray(decoded))
        assert prepared.labels[row] == file.label
        assert tuple(prepared.boxes[row]) == file.box
    assert (prepared.images.dtype, prepared.labels.dtype) == (np.uint8, np.int16)
    assert prepared.names == ("goldfish", "fire [31msalamander", "n03")
    assert (len(prepared), prepared.train_count, prepared.is_tiny_imagenet) == (18, 12, False)
    assert not prepared.images.flags.writeable
    grey = prepared.images[8]  # n03_0.JPEG
    assert (grey[..., 0] == grey[..., 1]).all()


def test_content_hash_is_of_the_files(prepared: Dataset) -> None:
    files = made_up()
    wnids = ("n01", "n02", "n03")
    lines = [
        (f"train/{wnid}/images/{wnid}_{i}.JPEG", wnid) for wnid in wnids for i in (0, 1, 10, 2)
    ]
    order = ("n02", "n01", "n03", "n03", "n02", "n01")
    lines += [(f"val/images/val_{5 - i}.JPEG", wnid) for i, wnid in enumerate(order)]
    text = "".join(
        f"{path} {wnid} {hashlib.sha256(files[path]).hexdigest()}\n" for path, wnid in lines
    )
    assert prepared.content_sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder_and_other_numbers_of_threads_give_the_same_files(
    tmp_path: Path, prepared: Dataset, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    source = write_folder(tmp_path / "folder", made_up())
    prepare(source, tmp_path / "other", workers=workers, progress=False)
    for name in ("images.npy", "labels.npy", "boxes.npy", "meta.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "ds" / name).read_bytes()


def test_a_second_call_opens_without_the_archive(prepared: Dataset, zipped: Path) -> None:
    zipped.unlink()
    assert len(prepare("nowhere", prepared.folder)) == 18
    pickled = pickle.dumps(prepared)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).images, prepared.images)


def test_verify_finds_a_single_flipped_bit(prepared: Dataset) -> None:
    verify(prepared)
    for name in ("images.npy", "labels.npy", "boxes.npy"):
        path = prepared.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert f"{name} has changed since it was prepared" in refused(verify, prepared)
        path.write_bytes(whole)
    meta = prepared.folder / "meta.json"
    meta.write_bytes(meta.read_bytes().replace(b"goldfish", b"goldfisk"))
    assert "meta.json has changed" in refused(verify, prepared)


def test_other_files_with_the_published_classes_are_noted(
    tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    order = module.class_order_sha256(("n01", "n02", "n03"))
    monkeypatch.setattr(module, "WNIDS_SHA256", order)
    prepare(zipped, tmp_path / "ds", progress=False)
    assert "note: " in capsys.readouterr().err


def test_other_files_with_the_published_classes_are_refused_for_auto_and_noted_when_named(
    tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "WNIDS_SHA256", module.class_order_sha256(Archive(zipped).wnids))
    monkeypatch.setenv("TINY_IMAGENET", str(zipped))
    assert "but other files" in refused(prepare, "auto", tmp_path / "ds", progress=False)
    assert leftovers(tmp_path) == set()
    prepare(zipped, tmp_path / "ds", progress=False)
    assert "note: " in capsys.readouterr().err


DAMAGE = {
    "no meta.json": (lambda ds: (ds / "meta.json").unlink(), "no data set in"),
    "no images": (lambda ds: (ds / "images.npy").unlink(), "is damaged"),
    "cut short": (lambda ds: os.truncate(ds / "images.npy", 5000), "is damaged"),
    "another shape": (lambda ds: np.save(ds / "boxes.npy", np.zeros((9, 4), "u1")), "boxes.npy is"),
    "another type": (lambda ds: np.save(ds / "labels.npy", np.zeros(18)), "labels.npy is float64"),
    "a pickle": (
        lambda ds: np.save(ds / "labels.npy", np.array([{}] * 18), allow_pickle=True), "is damaged"
    ),
    "labels": (lambda ds: np.save(ds / "labels.npy", np.full(18, 3, np.int16)), "do not fit"),
    "boxes": (lambda ds: np.save(ds / "boxes.npy", np.full((18, 4), 64, np.uint8)), "do not fit"),
    "not JSON": (lambda ds: (ds / "meta.json").write_text("{"), "meta.json is not JSON"),
    "unsorted": (lambda ds: change_meta(ds, wnids=["n02", "n01", "n03"]), "do not fit"),
    "counts": (lambda ds: change_meta(ds, val_count=7), "images.npy is"),
    "version": (lambda ds: change_meta(ds, format_version=2), "another format"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_says_what_to_do(prepared: Dataset, case: str) -> None:
    damage, expected = DAMAGE[case]
    damage(prepared.folder)
    problem = refused(open_dataset, prepared.folder)
    assert expected in problem
    assert "tinylab prepare" in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"no image", "is not a picture"), (jpeg(1)[:-300], "is a damaged picture, or cut short")],
)
def test_a_bad_image_is_named_and_nothing_is_left(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    zipped = write_zip(tmp_path / "made.zip", made_up() | {"val/images/val_0.JPEG": content})
    assert f"val_0.JPEG {expected}" in refused(prepare, zipped, tmp_path / "ds", progress=False)
    assert leftovers(tmp_path) == set()


def test_other_things_are_not_replaced_but_an_empty_folder_is_filled(
    tmp_path: Path, zipped: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "is not empty" in refused(prepare, zipped, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    assert len(prepare(zipped, tmp_path / "empty", progress=False)) == 18


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "stack", full)
    problem = refused(prepare, zipped, tmp_path / "ds", progress=False)
    assert "No space left on device; choose another place" in problem
    assert leftovers(tmp_path) == set()


@pytest.mark.archive
@pytest.mark.skipif(real_archive() is None, reason="needs the real archive")
def test_the_real_archive(tmp_path: Path) -> None:
    made = prepare(real_archive(), tmp_path / "ds", progress=False)
    assert made.content_sha256 == CONTENT_SHA256
    assert (len(made), made.train_count, len(made.wnids)) == (110_000, 100_000, 200)
    assert np.bincount(made.labels[:100_000]).tolist() == [500] * 200
    mean = made.images[:100_000:100].mean(axis=(0, 1, 2)) / 255
    assert mean == pytest.approx([0.4802, 0.4481, 0.3975], abs=0.01)

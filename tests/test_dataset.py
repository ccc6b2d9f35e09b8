"""The data set folder: right pixels, complete or absent, and one clear line for whatever goes wrong."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
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
)

from tinylab.data import archive, dataset
from tinylab.data.dataset import Dataset, open_dataset, prepare, verify


@pytest.fixture
def zipped(tmp_path) -> Path:
    return write_zip(tmp_path / "made.zip", made_up())


@pytest.fixture
def prepared(tmp_path, zipped) -> Dataset:
    return prepare(zipped, tmp_path / "ds", progress=False)


# --- What is prepared -------------------------------------------------------------------------------------------------


def test_arrays_hold_the_decoded_images_in_canonical_order(prepared):
    files = made_up()
    train = [
        f"train/{w}/images/{w}_{i}.JPEG"
        for w in ("n01", "n02", "n03")
        for i in ("0", "1", "10", "2")
    ]
    names = train + [f"val/images/val_{i}.JPEG" for i in range(5, -1, -1)]
    images = [np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names]
    assert prepared.images.dtype == np.uint8
    assert prepared.images.shape == (18, 64, 64, 3)
    np.testing.assert_array_equal(prepared.images, np.stack(images))
    assert prepared.labels.dtype == np.int16
    assert prepared.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [1, 0, 2, 2, 1, 0]
    assert prepared.boxes.dtype == np.uint8
    assert prepared.boxes[2].tolist() == [10, 1, 43, 63]
    assert prepared.boxes[17].tolist() == [0, 5, 44, 62]
    assert (len(prepared), prepared.train_count) == (18, 12)
    assert prepared.wnids == ("n01", "n02", "n03")
    assert prepared.names == ("goldfish", "fire [31msalamander", "n03")


def test_grey_images_have_three_equal_channels_and_cmyk_becomes_rgb(prepared):
    grey, cmyk = prepared.images[8], prepared.images[1]  # n03_0 and n01_1
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 1] == grey[..., 2]).all()
    expected = np.asarray(
        Image.open(io.BytesIO(jpeg(101))), dtype=int
    )  # the same picture stored as RGB
    assert np.abs(cmyk - expected).mean() < 3


def test_content_sha256_and_meta(prepared, zipped):
    meta = json.loads((prepared.folder / "meta.json").read_text(encoding="utf-8"))
    with archive.open_archive(zipped) as opened:
        digests = [archive.hashlib.sha256(opened.read(file)).hexdigest() for file in opened.files]
        expected = archive.content_sha256(opened.files, opened.wnids, digests)
    assert prepared.content_sha256 == meta["content_sha256"] == expected
    assert not prepared.is_tiny_imagenet
    assert meta["is_tiny_imagenet"] is False
    assert (meta["format_version"], meta["train_count"], meta["val_count"]) == (1, 12, 6)


def test_a_folder_gives_the_same_data_set_as_the_zip(tmp_path, prepared):
    other = prepare(
        write_folder(tmp_path / "extracted", made_up()), tmp_path / "ds2", progress=False
    )
    assert other.content_sha256 == prepared.content_sha256
    for name in ("images.npy", "labels.npy", "boxes.npy", "meta.json"):
        assert (other.folder / name).read_bytes() == (prepared.folder / name).read_bytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_write_the_same_as_one(tmp_path, zipped, prepared, monkeypatch, method):
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing, "get_context", lambda wanted: context)
    monkeypatch.setattr(dataset, "_CHUNK_IMAGES", 4)
    other = prepare(zipped, tmp_path / "ds2", workers=2)
    assert (other.folder / "images.npy").read_bytes() == (
        prepared.folder / "images.npy"
    ).read_bytes()
    assert other.content_sha256 == prepared.content_sha256


def test_arrays_are_read_only(prepared):
    for array in (prepared.images, prepared.labels, prepared.boxes):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_second_call_opens_without_the_archive_and_quickly(prepared, zipped):
    zipped.unlink()
    start = time.perf_counter()
    again = prepare("nowhere.zip", prepared.folder)
    assert time.perf_counter() - start < 1
    np.testing.assert_array_equal(again.images, prepared.images)


def test_a_pickled_data_set_is_small_and_opens_again(prepared):
    pickled = pickle.dumps(prepared)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).images, prepared.images)


def test_verify_finds_a_single_flipped_bit(prepared):
    verify(prepared)
    with open(prepared.folder / "images.npy", "r+b") as file:
        file.seek(20_000)
        byte = file.read(1)[0]
        file.seek(20_000)
        file.write(bytes([byte ^ 4]))
    assert "images.npy has changed" in refused(verify, open_dataset(prepared.folder))


def test_altered_tiny_imagenet_is_refused_for_auto_and_noted_when_named(
    tmp_path, zipped, monkeypatch, capsys
):
    monkeypatch.setenv("TINY_IMAGENET", str(zipped))
    prepare("auto", tmp_path / "other", progress=False)
    assert "is not Tiny ImageNet, it has 3 other classes" in capsys.readouterr().err
    monkeypatch.setattr(
        archive, "WNIDS_SHA256", archive.hashlib.sha256(b"n01\nn02\nn03\n").hexdigest()
    )
    assert "not its published files" in refused(prepare, "auto", tmp_path / "ds", progress=False)
    assert leftovers(tmp_path) == {"other", "other.lock"}
    prepare(zipped, tmp_path / "ds", progress=False)
    assert capsys.readouterr().err.count("not its published files") == 1


# --- Opening what is not right ----------------------------------------------------------------------------------------


DAMAGES = {
    "no meta": (lambda d: (d / "meta.json").unlink(), "run `tinylab prepare --data"),
    "no folder": (shutil.rmtree, "run `tinylab prepare --data"),
    "version": (lambda d: change_meta(d, format_version=2), "format version 2"),
    "no version": (lambda d: (d / "meta.json").write_text("[]"), "format version None"),
    "not JSON": (lambda d: (d / "meta.json").write_text("{"), "meta.json is not JSON"),
    "not text": (lambda d: (d / "meta.json").write_bytes(b"\xff"), "meta.json is not JSON"),
    "no classes": (lambda d: change_meta(d, wnids=None), "meta.json is incomplete"),
    "counts": (
        lambda d: change_meta(d, val_count=7),
        "images.npy is no uint8(19, 64, 64, 3) array, it has the header",
    ),
    "negative": (
        lambda d: change_meta(d, train_count=-1, val_count=19),
        "labels that stand for no class",
    ),
    "unsorted": (lambda d: change_meta(d, wnids=["n02", "n01", "n03"]), "not sorted"),
    "repeated": (lambda d: change_meta(d, wnids=["n01", "n01", "n03"]), "not sorted"),
    "names": (lambda d: change_meta(d, names=["a"]), "names do not match"),
    "no images": (lambda d: (d / "images.npy").unlink(), "images.npy is missing"),
    "cut images": (
        lambda d: os.truncate(d / "images.npy", 100_000),
        "images.npy has the wrong size",
    ),
    "empty labels": (lambda d: os.truncate(d / "labels.npy", 0), "labels.npy is cut short"),
    "more images": (
        lambda d: os.truncate(d / "images.npy", 10**6),
        "images.npy has the wrong size",
    ),
    "pickle": (
        lambda d: np.save(d / "labels.npy", np.array([{}]), allow_pickle=True),
        "labels.npy is no int16(18,) array",
    ),
    "dtype": (
        lambda d: np.save(d / "labels.npy", np.zeros(18, np.int64)),
        "labels.npy is no int16(18,) array, it has",
    ),
    "shape": (
        lambda d: np.save(d / "boxes.npy", np.zeros((18, 3), np.uint8)),
        "boxes.npy is no uint8(18, 4) array",
    ),
    "label": (
        lambda d: np.save(d / "labels.npy", np.full(18, 3, np.int16)),
        "labels that stand for no class",
    ),
    "negative label": (
        lambda d: np.save(d / "labels.npy", np.full(18, -1, np.int16)),
        "labels that stand for no class",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_line_that_says_what_to_do(prepared, case):
    damage, expected = DAMAGES[case]
    damage(prepared.folder)
    message = refused(open_dataset, prepared.folder)
    assert expected in message
    assert f"tinylab prepare --data {prepared.folder}" in message


# --- Preparing what is not right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_is_named_and_nothing_is_left(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(dataset, "_CHUNK_IMAGES", 5)
    files = made_up() | {"train/n02/images/n02_1.JPEG": jpeg(0)[:-200]}
    message = refused(
        prepare, write_zip(tmp_path / "made.zip", files), tmp_path / "ds", workers, progress=False
    )
    assert "train/n02/images/n02_1.JPEG is not a sound JPEG" in message
    assert leftovers(tmp_path) == set()


def test_a_broken_archive_leaves_nothing(tmp_path, zipped):
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[:-100])
    assert "cut short" in refused(prepare, zipped, tmp_path / "ds")
    zipped.write_bytes(whole.replace(made_up()["val/images/val_0.JPEG"][-50:], bytes(50)))
    assert "val/images/val_0.JPEG is damaged" in refused(
        prepare, zipped, tmp_path / "ds", progress=False
    )
    assert leftovers(tmp_path) == set()


def test_other_things_are_not_replaced_but_an_empty_folder_is_filled(tmp_path, zipped):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "thesis.txt").write_text("mine")
    assert "exists, but is no data set" in refused(prepare, zipped, tmp_path / "ds")
    assert (tmp_path / "ds" / "thesis.txt").read_text() == "mine"
    (tmp_path / "ds" / "thesis.txt").unlink()
    assert len(prepare(zipped, tmp_path / "ds", progress=False)) == 18
    (tmp_path / "file").write_text("")
    assert "exists, but is no data set" in refused(prepare, zipped, tmp_path / "file")
    assert "cannot write" in refused(prepare, zipped, tmp_path / "file" / "ds")


def test_workers_must_be_positive(tmp_path, zipped):
    assert "at least 1, not 0" in refused(prepare, zipped, tmp_path / "ds", workers=0)


def test_too_little_space_is_noticed_before_writing(tmp_path, zipped, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(prepare, zipped, tmp_path / "ds")
    assert "has 1,000,000 free" in message
    assert str(tmp_path / "ds") in message
    assert leftovers(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_one_line(tmp_path, zipped):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "cannot write" in refused(prepare, zipped, tmp_path / "locked" / "ds")


# --- The published archive --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Dataset]:
    source = real_archive()
    if source is None:
        pytest.skip("no TINY_IMAGENET and no data/tiny-imagenet-200.zip")
    folder = tmp_path_factory.mktemp("published")
    yield prepare(source, folder / "tiny-imagenet", progress=False)
    shutil.rmtree(folder)  # 1.35 GB


@pytest.mark.archive
def test_published_content(published):
    assert published.is_tiny_imagenet
    assert (
        published.content_sha256
        == "64bbbec8d50fdc7e7606fa6d82e82a07b000c2b97e23d9d6121434e711dc6b8f"
    )
    assert json.loads((published.folder / "meta.json").read_text())["is_tiny_imagenet"] is True


@pytest.mark.archive
def test_published_counts(published):
    assert len(published) == 110_000
    assert published.train_count == 100_000
    assert (np.bincount(published.labels[:100_000], minlength=200) == 500).all()
    assert (np.bincount(published.labels[100_000:], minlength=200) == 50).all()
    assert len(published.wnids) == len(published.names) == 200
    assert published.boxes.max() == 63


@pytest.mark.archive
def test_published_pixels(published):
    sample = published.images[:100_000:10]
    np.testing.assert_allclose(
        sample.mean(axis=(0, 1, 2)) / 255, (0.4802, 0.4481, 0.3975), atol=0.004
    )
    with archive.open_archive(real_archive()) as opened:
        for row in (0, 501, 99_999, 100_000, 109_999):
            file = opened.files[row]
            pixels = np.asarray(Image.open(io.BytesIO(opened.read(file))).convert("RGB"))
            np.testing.assert_array_equal(published.images[row], pixels)
            assert published.labels[row] == file.label
            assert tuple(published.boxes[row]) == file.box


@pytest.mark.archive
def test_published_opens_in_under_a_second(published):
    start = time.perf_counter()
    open_dataset(published.folder)
    assert time.perf_counter() - start < 1

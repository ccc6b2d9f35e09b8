"""Tiny ImageNet as it lies on people's disks, and their own images in class folders."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from reliability.archives import leftovers, refused, write_folder, write_zip
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from tinylab.cli import main
from tinylab.data import TinyImageNet, archive
from tinylab.data.archive import verify_archive
from tinylab.data.dataset import Dataset, prepare
from tinylab.data.picture import read_image
from tinylab.data.split import make_split
from tinylab.data.synthetic import write_sample
from tinylab.run.folder import Run

Files = dict[str, bytes]
VAL = "val/val_annotations.txt"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Dataset]:
    """The files of a made-up archive of three classes, below its root, and what comes of it."""
    folder = tmp_path_factory.mktemp("published")
    path = write_sample(folder / "sample.zip", classes=3, per_class=72)  # val_0 to val_35
    with zipfile.ZipFile(path) as packed:
        files = {name.partition("/")[2]: packed.read(name) for name in packed.namelist()}
    return files, prepare(path, folder / "data", progress=False)


def below(*roots: str) -> Callable[[Files], Files]:
    return lambda files: {f"{root}{name}": files[name] for root in roots for name in files}


def sorted_val(pattern: str, *without: str) -> Callable[[Files], Files]:
    """Move validation images into class folders; leave out files whose names end like this."""

    def change(files: Files) -> Files:
        lines = [line.split("\t") for line in files[VAL].decode().splitlines()]
        moved = {f"val/images/{file}": pattern.format(wnid, file) for file, wnid, *_ in lines}
        kept = {name: files[name] for name in files if not name.endswith(without or "/")}
        return {moved.get(name, name): content for name, content in kept.items()}

    return change


def notepad(files: Files) -> Files:
    text = files["wnids.txt"].decode().replace("\n", " \t\r\n") + "\r\n \r\n"
    return files | {"wnids.txt": b"\xef\xbb\xbf" + text.encode()}


LITTER = {
    "__MACOSX/x/._wnids.txt": b"", "x/._wnids.txt": b"\0", "x/.DS_Store": b"", "x/Thumbs.db": b"",
    "x/train/n90000001/images/._n90000001_0.JPEG": b"\0", "x/val/images/desktop.ini": b"",
}  # fmt: skip
LAYOUTS = {
    "as published": below("tiny-imagenet-200/"),
    "another root": below("my data (1)/"),
    "nested": below("a/tiny-imagenet-200/tiny-imagenet-200/"),
    "no root": below(""),
    "val in class folders": sorted_val("val/{}/{}"),
    "val in class folders' images": sorted_val("val/{}/images/{}"),
    "class folders in val's images": sorted_val("val/images/{}/{}"),
    "val copied into class folders": lambda files: sorted_val("val/{}/{}")(files) | files,
    "val in class folders, no list": sorted_val("val/{}/{}", VAL),
    "no lists at all": sorted_val("val/{}/{}", VAL, "_boxes.txt"),
    "train without images/": lambda files: {
        name.replace("/images/", "/") if "train" in name else name: files[name] for name in files
    },
    "a desktop's files": lambda files: below("x/")(files) | LITTER,
    "Notepad": notepad,
    "no words": lambda files: {name: files[name] for name in files if name != "words.txt"},
}


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


WRITERS = {
    "folder": write_folder, "x.zip": lambda path, files: write_zip(path, files, root=""),
    "x.tar.gz": write_tar,
}  # fmt: skip


@pytest.mark.parametrize("packed", WRITERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_the_archive_gives(
    tmp_path: Path, published: tuple[Files, Dataset], layout: str, packed: str
) -> None:
    files, expected = published
    source = WRITERS[packed](tmp_path / packed, LAYOUTS[layout](files))
    dataset = prepare(source, tmp_path / "ds", progress=False)
    np.testing.assert_array_equal(dataset.images, expected.images)
    np.testing.assert_array_equal(dataset.labels, expected.labels)
    boxes, count = expected.boxes.copy(), expected.train_count
    assert boxes.any(axis=1).all()
    if "no list" in layout:
        boxes[0 if layout == "no lists at all" else count :] = 0
    np.testing.assert_array_equal(dataset.boxes, boxes)
    assert dataset.content_sha256 == expected.content_sha256
    assert (dataset.wnids, dataset.train_count, dataset.title) == (expected.wnids, count, "")
    assert dataset.names == (expected.wnids if layout == "no words" else expected.names)
    assert set(tmp_path.iterdir()) == {source, tmp_path / "ds"}, "something was extracted"


def test_a_damaged_or_a_huge_tar_is_refused(
    tmp_path: Path, published: tuple[Files, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_tar(tmp_path / "made.zip", published[0]).read_bytes()
    for place in (500, 1000, len(whole) // 2, len(whole) - 6):
        (tmp_path / "made.zip").write_bytes(
            whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :]
        )
        refused(prepare, tmp_path / "made.zip", tmp_path / "ds")
    (tmp_path / "made.zip").write_bytes(whole[:-2000])
    assert "cut short" in refused(prepare, tmp_path / "made.zip", tmp_path / "ds")
    (tmp_path / "made.zip").write_bytes(whole)
    monkeypatch.setattr(archive, "TAR_LIMIT", 10_000)
    assert "unpack it" in refused(prepare, tmp_path / "made.zip", tmp_path / "ds")
    assert leftovers(tmp_path) == set()


# --- Somebody's own images ------------------------------------------------------------------------

OWN = ("red roses", "Ünïcödé 花", "=$\\frac{1}{0}$ <b>")
SUFFIXES = ("jpg", "JPEG", "png", "webp", "bmp")


def write_pictures(folder: Path, count: int, first: int = 0) -> None:
    """Pictures of odd sizes, kinds and orientations."""
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        noise = np.random.default_rng(i).integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        Image.fromarray(noise).save(folder / f"img {i}.{SUFFIXES[i % 5]}", exif=exif)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Twelve pictures in each of three class folders, and what else lies about."""
    root = tmp_path / "My <flowers>"
    for i, name in enumerate(OWN):
        write_pictures(root / name, 12, 100 * i)
    for litter in ("Thumbs.db", ".DS_Store", "._img 0.jpg", "notes.txt"):
        (root / OWN[0] / litter).write_bytes(b"?")
    write_pictures(root / "__MACOSX" / OWN[0], 1)
    write_pictures(root / ".hidden", 1)
    shutil.copy(root / OWN[0] / "img 0.jpg", root / "cover.jpg")
    return root


def test_own_images_are_read_as_predict_reads_them(
    tmp_path: Path, flowers: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset = prepare(flowers, tmp_path / "ds", progress=False)
    assert "left out 2 files that are no picture of a class, cover.jpg" in capsys.readouterr().err
    assert dataset.wnids == dataset.names == tuple(sorted(OWN))
    assert (len(dataset), dataset.train_count, dataset.title) == (36, 36, "My <flowers>")
    paths = [path for name in sorted(OWN) for path in sorted((flowers / name).glob("img*"))]
    for row, path in enumerate(paths):
        np.testing.assert_array_equal(dataset.images[row], read_image(path))
        assert dataset.names[dataset.labels[row]] == path.parent.name
    assert not dataset.boxes.any()
    assert len(make_split(dataset, "merged").train) == 3 * 8
    assert "without validation images" in refused(make_split, dataset, "official")
    packed = shutil.make_archive(str(tmp_path / "roses"), "gztar", flowers.parent, flowers.name)
    again = prepare(packed, tmp_path / "again", progress=False)
    assert (again.content_sha256, again.title) == (dataset.content_sha256, "roses")
    assert "is whole: not Tiny ImageNet, 3 classes, 36 labelled" in verify_archive(flowers)


def test_train_and_val_above_the_class_folders_are_the_official_split(tmp_path: Path) -> None:
    root = tmp_path / "Tiny ImageNet"
    for i, part in enumerate(("train/a", "train/b", "Validation/a", "Validation/b", "test/a")):
        write_pictures(root / part, 3 - i // 2, 10 * i)
    write_pictures(root / "train" / "b" / "deeper", 1, 60)
    dataset = prepare(root, tmp_path / "ds", progress=False)
    split = make_split(dataset, "official")
    assert np.bincount(dataset.labels[split.train]).tolist() == [3, 4]
    assert np.bincount(dataset.labels[split.test]).tolist() == [2, 2]
    assert dataset.title == "other images", "nothing but the published files has that name"
    write_pictures(root / "train" / "one", 1)
    dataset = prepare(root, tmp_path / "one", progress=False)
    assert "class one has 1 images" in refused(make_split, dataset, "merged")


def test_what_cannot_be_read_is_named(tmp_path: Path, flowers: Path) -> None:
    (flowers / OWN[0] / "img 3.webp").write_bytes(b"broken")
    assert "red roses/img 3.webp is not a picture" in refused(prepare, flowers, tmp_path / "ds")
    assert "neither Tiny ImageNet nor class folders" in refused(
        prepare, flowers / OWN[1], tmp_path / "ds"
    )
    write_pictures(flowers / "red\u200b roses", 1)
    assert "another one looks alike" in refused(prepare, flowers, tmp_path / "ds")
    assert not (tmp_path / "ds").exists()


def test_every_command_works_on_own_images(
    tmp_path: Path, flowers: Path, capsys: pytest.CaptureFixture
) -> None:
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    small = ["--epochs", "1", "--width", "8", "--batch-size", "8", "--device", "cpu"]
    for line in (
        ["prepare", "--source", str(flowers), "--data", data],
        ["train", "smoke", *small, "--precision", "fp32", "--data", data, "--run", run],
        ["explain", run, "--count", "2"],
        ["report", run],
        ["predict", run, str(flowers / OWN[0] / "img 0.jpg")],
        ["export", run],
        ["verify", data],
    ):
        assert main(line) == 0, line
    said = capsys.readouterr().out
    assert "data: My <flowers>\n" in said
    assert "no boxes: maps are not compared" in said
    assert Run(tmp_path / "run").title.startswith("smoke: 3 classes of My <flowers>, merged split")
    assert not (tmp_path / "run" / "localisation.csv").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "have no boxes" in page
    assert "--sample 2000" not in page
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "have no boxes" in card
    assert "My &#60;flowers&#62;" in card
    dataset = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == ("My <flowers>", "other")


# --- For other people's code ----------------------------------------------------------------------


def test_a_dataset_for_any_loader(published: tuple[Files, Dataset]) -> None:
    _, expected = published
    train, val = (TinyImageNet(expected.folder, part) for part in ("train", "val"))
    assert (len(train), len(val)) == (180, 36)
    for part, first in ((train, 0), (val, 180)):
        rows = slice(first, first + len(part))
        images, labels = zip(*part, strict=True)
        np.testing.assert_array_equal(np.stack(images), expected.images[rows])
        np.testing.assert_array_equal(labels, expected.labels[rows])
        np.testing.assert_array_equal(part.boxes, expected.boxes[rows])
    assert images[0].size == (64, 64)
    assert part[-1][1] == labels[-1]
    assert part.classes == expected.names
    mean = TinyImageNet(expected.folder, "val", transform=lambda image: np.asarray(image).mean())
    means, labels = next(iter(DataLoader(mean, batch_size=36)))
    assert means.tolist() == pytest.approx(expected.images[180:].mean(axis=(1, 2, 3)))
    assert labels.tolist() == expected.labels[180:].tolist()
    assert "'test'" in refused(TinyImageNet, expected.folder, "test")
    assert "no data set" in refused(TinyImageNet, expected.folder / "x")


def test_folders_for_others_hold_the_same_pixels(
    tmp_path: Path, published: tuple[Files, Dataset], capsys: pytest.CaptureFixture
) -> None:
    _, expected = published
    target = tmp_path / "folders"
    command = ["prepare", "--data", str(expected.folder), "--to-folders", str(target)]
    assert main(command) == 0
    first = 0
    for part in ("train", "val"):
        folder = ImageFolder(target / part)
        assert tuple(folder.classes) == expected.wnids
        for path, label in folder.samples:
            row = int(Path(path).stem)
            np.testing.assert_array_equal(Image.open(path), expected.images[row])
            assert label == expected.labels[row]
            assert (row >= expected.train_count) == (part == "val")
        first += len(folder)
    assert first == len(expected)
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err

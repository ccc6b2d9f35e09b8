"""The made-up data set: the public archive's layout, true boxes, the same bytes for the same seed,
plain refusals."""

import errno
import io
import itertools
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinylab.data.synthetic import KINDS, Drawing, draw_numbered, write_sample
from tinylab.exceptions import UserError

ROOT = "tiny-imagenet-200/"


@pytest.fixture(scope="module")
def archive(sample_zip: Path):
    with zipfile.ZipFile(sample_zip) as opened:
        yield opened


@pytest.fixture(scope="module")
def real_archive(repository: Path):
    path = Path(os.environ.get("TINY_IMAGENET") or repository / "data" / "tiny-imagenet-200.zip")
    if not zipfile.is_zipfile(path):
        pytest.skip(
            "no Tiny ImageNet zip here: set TINY_IMAGENET or put data/tiny-imagenet-200.zip in "
            "place"
        )
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawings() -> list[list[Drawing]]:
    """Every labelled image of the default sample: [class][number]."""
    return [[draw_numbered(index, number) for number in range(60)] for index in range(len(KINDS))]


def lines(archive: zipfile.ZipFile, name: str) -> list[str]:
    return archive.read(ROOT + name).decode().splitlines()


def boxes(rows: list[str], skip: int) -> list[tuple[int, ...]]:
    """The four last columns; `skip` columns stand before them."""
    return [tuple(map(int, row.split("\t")[skip:])) for row in rows]


def picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(ROOT + name)))


def labelled(archive: zipfile.ZipFile) -> list[str]:
    """The members that are training or validation images, without the first folder."""
    return [
        name[len(ROOT) :]
        for name in archive.namelist()
        if name.endswith(".JPEG") and "/test/" not in name
    ]


def forms(names: list[str]) -> Counter:
    """How often each form of a text occurs when wnids and other numbers are blotted out."""
    return Counter(re.sub(r"\d+", "#", re.sub(r"n\d{8}", "WNID", name)) for name in names)


def test_members_and_their_counts(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert len(set(names)) == len(names)
    assert all(name.startswith(ROOT) for name in names)
    assert forms([name[len(ROOT) :] for name in names]) == {
        "wnids.txt": 1,
        "words.txt": 1,
        "train/WNID/WNID_boxes.txt": 10,
        "train/WNID/images/WNID_#.JPEG": 500,
        "val/val_annotations.txt": 1,
        "val/images/val_#.JPEG": 100,
        "test/images/test_#.JPEG": 10,
    }


@pytest.mark.archive
def test_layout_is_that_of_the_real_archive(
    archive: zipfile.ZipFile, real_archive: zipfile.ZipFile
) -> None:
    # test/ may be missing from the real one, and the public zip also lists its folders.
    def members(opened: zipfile.ZipFile) -> set[str]:
        return {
            name
            for name in forms(opened.namelist())
            if "/test/" not in name and not name.endswith("/")
        }

    assert members(archive) == members(real_archive)
    for name in ("wnids.txt", "val/val_annotations.txt"):
        assert set(forms(lines(archive, name))) == set(forms(lines(real_archive, name)))
    first, real_first = (min(lines(opened, "wnids.txt")) for opened in (archive, real_archive))
    box_files = f"train/{first}/{first}_boxes.txt", f"train/{real_first}/{real_first}_boxes.txt"
    assert set(forms(lines(archive, box_files[0]))) == set(forms(lines(real_archive, box_files[1])))
    word = re.compile(r"n\d{8}\t[^\t]+")
    assert all(
        word.fullmatch(row) for name in (archive, real_archive) for row in lines(name, "words.txt")
    )
    real_wnids = {row.split("\t")[0] for row in lines(real_archive, "words.txt")}
    assert real_wnids.isdisjoint(lines(archive, "wnids.txt")), "a made-up wnid exists in WordNet"


def test_images_are_64_pixel_jpegs_and_a_few_are_grey(archive: zipfile.ZipFile) -> None:
    pictures = [picture(archive, name) for name in labelled(archive)]
    assert {(p.format, p.size) for p in pictures} == {("JPEG", (64, 64))}
    assert Counter(p.mode for p in pictures) == {"RGB": 588, "L": 12}


def test_classes_are_unsorted_named_and_not_all_there_is_in_words(archive: zipfile.ZipFile) -> None:
    wnids = lines(archive, "wnids.txt")
    names = dict(row.split("\t") for row in lines(archive, "words.txt"))
    assert wnids != sorted(wnids)
    assert [names[wnid] for wnid in sorted(wnids)] == [kind.name for kind in KINDS]
    assert any(", " in names[wnid] for wnid in wnids)
    assert set(names) > set(wnids)


def test_every_image_is_annotated_once_and_validation_mixes_the_classes(
    archive: zipfile.ZipFile,
) -> None:
    wnids = sorted(lines(archive, "wnids.txt"))
    rows = [row.split("\t") for row in lines(archive, "val/val_annotations.txt")]
    annotated = {f"val/images/{row[0]}" for row in rows}
    for wnid in wnids:
        box_rows = lines(archive, f"train/{wnid}/{wnid}_boxes.txt")
        annotated |= {f"train/{wnid}/images/{row.split()[0]}" for row in box_rows}
        assert len(box_rows) == 50
    assert annotated == set(labelled(archive))
    order = [row[1] for row in rows]
    assert Counter(order) == dict.fromkeys(wnids, 10)
    assert sum(a == b for a, b in itertools.pairwise(order)) < 30, (
        "validation images stand class by class"
    )


def test_archive_holds_the_drawings_with_their_boxes(
    archive: zipfile.ZipFile, drawings: list[list[Drawing]]
) -> None:
    for wnid, drawn in zip(sorted(lines(archive, "wnids.txt")), drawings, strict=True):
        stored = boxes(lines(archive, f"train/{wnid}/{wnid}_boxes.txt"), skip=1)
        assert stored == [drawing.box for drawing in drawn[:50]]
        validation = [row for row in lines(archive, "val/val_annotations.txt") if wnid in row]
        assert sorted(boxes(validation, skip=2)) == sorted(drawing.box for drawing in drawn[50:])
        decoded = np.asarray(
            picture(archive, f"train/{wnid}/images/{wnid}_7.JPEG").convert("L"), np.float32
        )
        original = np.asarray(Image.fromarray(drawn[7].image).convert("L"), np.float32)
        assert np.abs(decoded - original).mean() < 8


@pytest.mark.parametrize("index", range(len(KINDS)), ids=[kind.name for kind in KINDS])
def test_box_is_the_extent_of_the_figure(drawings: list[list[Drawing]], index: int) -> None:
    for image, mask, (x0, y0, x1, y1) in drawings[index]:
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert mask.shape == (64, 64)
        assert mask.dtype == bool
        assert 0 <= x0 < x1 <= 63
        assert 0 <= y0 < y1 <= 63
        assert 0.1 <= (x1 - x0 + 1) * (y1 - y0 + 1) / 64**2 <= 0.6
        inside = np.zeros_like(mask)
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
        assert not mask[~inside].any()
        assert mask[y0].any()
        assert mask[y1].any()
        assert mask[:, x0].any()
        assert mask[:, x1].any()


def test_mask_covers_the_pixels_of_the_figure(drawings: list[list[Drawing]]) -> None:
    plain = [
        index for index, kind in enumerate(KINDS) if kind.name in ("ball, disc", "ring, annulus")
    ]
    for image, mask, _ in itertools.chain(*(drawings[index] for index in plain)):
        # Plain figures have one colour, up to noise and shading; a transposed mask would miss most
        # of those pixels.
        alike = np.abs(image - np.median(image[mask], axis=0)).max(axis=-1) < 40
        assert (alike & mask).sum() > 0.85 * mask.sum()
        assert image[mask].max(axis=-1).mean() > 1.2 * image[~mask].max(axis=-1).mean()


def test_figures_vary_in_place_and_size(drawings: list[list[Drawing]]) -> None:
    found = np.array([drawing.box for drawing in itertools.chain(*drawings)])
    centres = (found[:, :2] + found[:, 2:]) / 2
    areas = np.prod(found[:, 2:] - found[:, :2] + 1, axis=1) / 64**2
    assert (centres.std(axis=0) > 4).all()
    assert areas.min() < 0.15
    assert areas.max() > 0.5
    assert len(np.unique(found, axis=0)) > 550


@pytest.mark.parametrize("part", ["background", "figure"])
def test_colour_does_not_tell_the_class(drawings: list[list[Drawing]], part: str) -> None:
    colours = np.empty((len(KINDS), 60, 3))
    for index, number in np.ndindex(colours.shape[:2]):
        image, mask, _ = drawings[index][number]
        # A pattern's dark half belongs to the shape; the light colour is what could give a class
        # away.
        pixels = image[~mask] if part == "background" else image[mask]
        brightness = pixels.max(axis=-1)
        colours[index, number] = pixels[brightness >= np.percentile(brightness, 75)].mean(axis=0)
    means = colours[:, :30].mean(axis=1)
    nearest = np.linalg.norm(colours[:, 30:, None] - means, axis=-1).argmin(axis=-1)
    assert (nearest == np.arange(len(KINDS))[:, None]).mean() < 0.2


def test_no_class_is_the_mirror_image_of_another() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]

    def looks(kind, x: np.ndarray) -> np.ndarray:
        return np.where(kind.distance(x, y) < 0, 1 + kind.pattern(x, y), 0)

    for one, other in itertools.combinations(KINDS, 2):
        for mirrored in (x, -x):
            differing = (looks(one, x) != looks(other, mirrored)).mean()
            assert differing > 0.1, f"{one.name} and {other.name} look alike"


def test_one_seed_gives_one_archive(tmp_path: Path) -> None:
    first, again, other = (
        write_sample(tmp_path / f"{name}.zip", classes=3, per_class=12, seed=seed)
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_smaller_sample(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "small.zip", classes=2, per_class=2)
    with zipfile.ZipFile(path) as archive:
        assert lines(archive, "wnids.txt") == ["n90000002", "n90000001"]
        assert forms(labelled(archive)) == {
            "train/WNID/images/WNID_#.JPEG": 2,
            "val/images/val_#.JPEG": 2,
        }


def test_a_target_is_replaced_and_folders_above_it_are_made(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "deeper" / "sample.zip"
    assert write_sample(target, classes=2, per_class=6) == target
    first = target.read_bytes()
    write_sample(target, classes=2, per_class=6, seed=1)
    assert target.read_bytes() != first
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "sample.zip"
    target.write_bytes(b"old")
    members = itertools.count()
    write = zipfile.ZipFile.writestr

    def full(*arguments) -> None:
        if next(members) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match=r"cannot write .*sample\.zip: No space left"):
        write_sample(target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name the zip file"):
        write_sample(tmp_path)
    with pytest.raises(UserError, match="is a folder; name the zip file"):
        write_sample(Path("/"))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_sample(blocked / "sample.zip")
    with pytest.raises(UserError, match="cannot write"):
        write_sample(tmp_path / ("x" * 300))
    assert blocked.read_text() == "not a folder"
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"classes": 1}, "from 2 to 10 classes, not 1"),
        ({"classes": len(KINDS) + 1}, "from 2 to 10 classes, not 11"),
        ({"per_class": 1}, "at least 2 images"),
        ({"per_class": -3}, "at least 2 images"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_sample(tmp_path / "sample.zip", **sizes)
    assert not any(tmp_path.iterdir())

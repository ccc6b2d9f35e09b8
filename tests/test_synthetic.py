"""The made-up data set: the public archive's layout, true boxes, the same bytes for one seed."""

import hashlib
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

from tinylab.data import synthetic
from tinylab.data.synthetic import KINDS, PATTERNS, SHAPES, draw_numbered, write_sample
from tinylab.exceptions import UserError

ROOT = "tiny-imagenet-200/"


@pytest.fixture(scope="module")
def archive(sample_zip: Path):
    with zipfile.ZipFile(sample_zip) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawings() -> list[list[tuple]]:
    """Every labelled image of the default sample: [class][number]."""
    return [[draw_numbered(index, number) for number in range(60)] for index in range(len(KINDS))]


def lines(archive: zipfile.ZipFile, name: str) -> list[str]:
    return archive.read(ROOT + name).decode().splitlines()


def picture(archive: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(name)))


def forms(names: list[str]) -> Counter:
    """How often each form of a text occurs when wnids and other numbers are blotted out."""
    return Counter(re.sub(r"\d+", "#", re.sub(r"n\d{8}", "WNID", name)) for name in names)


def test_members_and_images(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert all(name.startswith(ROOT) for name in names)
    assert forms([name.removeprefix(ROOT) for name in names]) == {
        "wnids.txt": 1,
        "words.txt": 1,
        "train/WNID/WNID_boxes.txt": 10,
        "train/WNID/images/WNID_#.JPEG": 500,
        "val/val_annotations.txt": 1,
        "val/images/val_#.JPEG": 100,
        "test/images/test_#.JPEG": 10,
    }
    labelled = [name for name in names if name.endswith(".JPEG") and "/test/" not in name]
    pictures = [picture(archive, name) for name in labelled]
    assert {(p.format, p.size) for p in pictures} == {("JPEG", (64, 64))}
    assert Counter(p.mode for p in pictures) == {"RGB": 588, "L": 12}


@pytest.mark.archive
def test_layout_is_that_of_the_real_archive(archive: zipfile.ZipFile, repository: Path) -> None:
    path = Path(os.environ.get("TINY_IMAGENET") or repository / "data" / "tiny-imagenet-200.zip")
    if not zipfile.is_zipfile(path):
        pytest.skip("no Tiny ImageNet zip here")
    with zipfile.ZipFile(path) as real:
        # test/ may be missing from the real one, and the public zip also lists its folders.
        members = [
            {name for name in forms(each.namelist()) if "/test/" not in name and name[-1] != "/"}
            for each in (archive, real)
        ]
        assert members[0] == members[1]
        for name in ("wnids.txt", "val/val_annotations.txt"):
            assert set(forms(lines(archive, name))) == set(forms(lines(real, name)))
        first, other = (min(lines(each, "wnids.txt")) for each in (archive, real))
        boxes = lines(real, f"train/{other}/{other}_boxes.txt")
        assert set(forms(lines(archive, f"train/{first}/{first}_boxes.txt"))) == set(forms(boxes))
        real_wnids = {row.split("\t")[0] for row in lines(real, "words.txt")}
        assert real_wnids.isdisjoint(lines(archive, "wnids.txt")), "a made-up wnid is WordNet's"


def test_classes_are_unsorted_named_and_not_all_there_is_in_words(archive: zipfile.ZipFile) -> None:
    wnids = lines(archive, "wnids.txt")
    names = dict(row.split("\t") for row in lines(archive, "words.txt"))
    assert wnids != sorted(wnids)
    assert [names[wnid] for wnid in sorted(wnids)] == [name for name, _, _ in KINDS]
    assert set(names) > set(wnids)
    order = [row.split("\t")[1] for row in lines(archive, "val/val_annotations.txt")]
    assert Counter(order) == dict.fromkeys(wnids, 10)
    assert sum(a == b for a, b in itertools.pairwise(order)) < 30, "val/ stands class by class"


def test_archive_holds_the_drawings_with_their_boxes(
    archive: zipfile.ZipFile, drawings: list[list[tuple]]
) -> None:
    def boxes(rows: list[str]) -> list[tuple[int, ...]]:
        return [tuple(map(int, row.split("\t")[-4:])) for row in rows]

    for wnid, drawn in zip(sorted(lines(archive, "wnids.txt")), drawings, strict=True):
        rows = lines(archive, f"train/{wnid}/{wnid}_boxes.txt")
        assert boxes(rows) == [box for _, _, box in drawn[:50]]
        rows = [row for row in lines(archive, "val/val_annotations.txt") if wnid in row]
        assert sorted(boxes(rows)) == sorted(box for _, _, box in drawn[50:])
        stored = picture(archive, f"{ROOT}train/{wnid}/images/{wnid}_7.JPEG").convert("L")
        drawn_in_grey = Image.fromarray(drawn[7][0]).convert("L")
        difference = np.asarray(stored, np.float32) - np.asarray(drawn_in_grey, np.float32)
        assert np.abs(difference).mean() < 8


def test_box_is_the_extent_of_the_figure(drawings: list[list[tuple]]) -> None:
    for image, mask, (x0, y0, x1, y1) in itertools.chain(*drawings):
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((64, 64), bool)
        assert 0.1 <= (x1 - x0 + 1) * (y1 - y0 + 1) / 64**2 <= 0.6
        inside = mask[y0 : y1 + 1, x0 : x1 + 1]
        assert inside.sum() == mask.sum()
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_mask_covers_the_pixels_of_the_figure(drawings: list[list[tuple]]) -> None:
    for image, mask, _ in drawings[0] + drawings[3]:  # discs and rings
        # Plain figures have one colour, up to noise and shading; a transposed mask would miss most
        # of those pixels.
        alike = np.abs(image - np.median(image[mask], axis=0)).max(axis=-1) < 40
        assert (alike & mask).sum() > 0.85 * mask.sum()
        assert image[mask].max(axis=-1).mean() > 1.2 * image[~mask].max(axis=-1).mean()


def test_figures_vary_in_place_and_size(drawings: list[list[tuple]]) -> None:
    boxes = np.array([box for _, _, box in itertools.chain(*drawings)])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1) / 64**2
    assert ((boxes[:, :2] + boxes[:, 2:]).std(axis=0) > 8).all()
    assert areas.min() < 0.15
    assert areas.max() > 0.5
    assert len(np.unique(boxes, axis=0)) > 550


@pytest.mark.parametrize("part", ["background", "figure"])
def test_colour_does_not_tell_the_class(drawings: list[list[tuple]], part: str) -> None:
    colours = np.empty((len(KINDS), 60, 3))
    for index, number in np.ndindex(colours.shape[:2]):
        image, mask, _ = drawings[index][number]
        # A pattern's dark half belongs to the shape; the light colour could give a class away.
        pixels = image[~mask] if part == "background" else image[mask]
        brightness = pixels.max(axis=-1)
        colours[index, number] = pixels[brightness >= np.percentile(brightness, 75)].mean(axis=0)
    means = colours[:, :30].mean(axis=1)
    nearest = np.linalg.norm(colours[:, 30:, None] - means, axis=-1).argmin(axis=-1)
    assert (nearest == np.arange(len(KINDS))[:, None]).mean() < 0.2


def test_no_class_is_the_mirror_image_of_another() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]

    def looks(kind: tuple, x: np.ndarray) -> np.ndarray:
        _, shape, pattern = kind
        return np.where(SHAPES[shape](x, y) < 0, 1 + PATTERNS[pattern](x, y), 0)

    for one, other in itertools.combinations(KINDS, 2):
        for mirrored in (x, -x):
            assert (looks(one, x) != looks(other, mirrored)).mean() > 0.1, (one, other)


def test_one_seed_gives_one_archive(tmp_path: Path, sample_zip: Path) -> None:
    small = {"classes": 2, "per_class": 2}
    target = tmp_path / "new folder" / "deeper" / "sample.zip"
    hashes = []
    for seed in (5, 5, 6):
        assert write_sample(target, **small, seed=seed) == target
        hashes.append(hashlib.sha256(target.read_bytes()).hexdigest())
        assert list(target.parent.iterdir()) == [target]
    assert hashes[0] == hashes[1] != hashes[2]
    with zipfile.ZipFile(target) as archive:
        assert lines(archive, "wnids.txt") == ["n90000002", "n90000001"]
        assert forms(archive.namelist())[f"{forms([ROOT]).popitem()[0]}val/images/val_#.JPEG"] == 2


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, file = tmp_path / "sample.zip", tmp_path / "file"
    target.write_bytes(b"old")
    file.touch()
    for impossible, problem in (
        (tmp_path, "cannot write"),
        (Path("/"), "cannot write"),
        (file / "sample.zip", "cannot write"),
        (tmp_path / ("x" * 300), "cannot write"),
    ):
        with pytest.raises(UserError, match=problem):
            write_sample(impossible, classes=2, per_class=2)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        write_sample(target, seed=-1)
    monkeypatch.setattr(synthetic, "draw_numbered", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_sample(target)
    assert target.read_bytes() == b"old"
    assert set(tmp_path.iterdir()) == {target, file}

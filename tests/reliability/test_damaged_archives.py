"""Damaged archives are refused, or give the very same data set: never one that differs in
silence."""

import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from reliability.archives import damaged, jpeg, leftovers, made_up, readable, refused, write_zip
from tinylab.data.archive import Archive
from tinylab.data.dataset import prepare
from tinylab.exceptions import UserError

pytestmark = pytest.mark.promise("damaged-archives")

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
KINDS = (
    *("flip", "truncate", "flip near the end", "truncate"),  # near the end lies the directory
    *("flip", "truncate", "flip near the end", "truncate"),
    *("zero page", "swap pages"),
)


def ten_classes() -> dict[str, bytes]:
    """Ten classes of 15 training and 5 validation images."""
    wnids = [f"n{number:02}" for number in (3, 1, 2, 0, 9, 8, 5, 6, 7, 4)]
    words = [f"{wnid}\tname {i}, synonym {i}\n" for i, wnid in enumerate(wnids)]
    files = {"wnids.txt": "\n".join(wnids).encode(), "words.txt": "".join(words).encode()}
    annotations = []
    for c, wnid in enumerate(wnids):
        boxes = []
        for i in range(15):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(20 * c + i)
            boxes.append(f"{wnid}_{i}.JPEG\t{i}\t{c}\t{40 + i}\t63\n")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(boxes).encode()
        for i in range(5):
            files[f"val/images/val_{5 * c + i}.JPEG"] = jpeg(20 * c + 15 + i)
            annotations.append(f"val_{5 * c + i}.JPEG\t{wnid}\t{c}\t{i}\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    return files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The archive's bytes, by the method with which it is packed."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        method: write_zip(folder / f"{method}.zip", ten_classes(), method=method).read_bytes()
        for method in METHODS
    }


def prepared(zipped: Path, folder: Path) -> dict[str, bytes]:
    """The data set's files, which are then deleted: pixels, labels, boxes, and all the rest in
    meta.json."""
    prepare(zipped, folder, workers=1, progress=False)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


def test_without_a_hash_damage_is_refused_or_harmless(tmp_path, sound, full, tally):
    zipped, chance = tmp_path / "made.zip", random.Random(0)
    zipped.write_bytes(sound[zipfile.ZIP_STORED])
    undamaged = prepared(zipped, tmp_path / "ds")
    messages, different = [], 0
    faults = 1200 if full else 120
    for fault in range(faults):
        zipped.write_bytes(damaged(sound[METHODS[fault // 10 % 2]], KINDS[fault % 10], chance))
        try:
            different += prepared(zipped, tmp_path / "ds") != undamaged
        except UserError as error:
            messages.append(str(error))
        assert leftovers(tmp_path) == set()
    refusals = len(messages)
    tally(
        faults=faults,
        refused=refusals,
        harmless=faults - refusals - different,
        silently_wrong=different,
    )
    assert different == 0
    assert refusals > 0.8 * faults
    assert all(map(readable, messages))


def test_truncated_zip_is_refused_at_any_length(tmp_path: Path, tally: Callable) -> None:
    whole = write_zip(tmp_path / "whole.zip", made_up()).read_bytes()
    lengths = range(0, len(whole), max(1, len(whole) // 60))
    for length in lengths:
        (tmp_path / "made.zip").write_bytes(whole[:length])
        assert "cut short" in refused(Archive, tmp_path / "made.zip")
    tally(faults=len(lengths), refused=len(lengths))

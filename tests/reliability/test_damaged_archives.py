"""Damaged archives are refused, or give the very same data set: never one that differs in silence."""

import hashlib
import random
import shutil
import zipfile
from pathlib import Path

import pytest

from reliability.archives import ROOT, damaged, jpeg, leftovers, made_up, readable, write_zip
from tinylab.data import archive
from tinylab.data.archive import LabelledFile, open_archive, verify_archive
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
    """The data set's files, which are then deleted: pixels, labels, boxes, and all the rest in meta.json."""
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


def test_with_the_hash_every_damage_is_refused(tmp_path, sound, full, tally, monkeypatch):
    """The size and the hashes of the download, and `verify_archive` of what counts as the published archive."""
    zipped, chance, whole = tmp_path / "made.zip", random.Random(1), sound[zipfile.ZIP_DEFLATED]
    md5, sha256 = hashlib.md5(whole).hexdigest(), hashlib.sha256(whole).hexdigest()
    for name, value in {"ZIP_BYTES": len(whole), "ZIP_MD5": md5, "ZIP_SHA256": sha256}.items():
        monkeypatch.setattr(archive, name, value)
    zipped.write_bytes(whole)
    assert "is the published archive" in verify_archive(zipped)
    assert archive._difference(zipped, len(whole), md5, sha256) is None
    refused_by_hash = refused_by_verify = 0
    faults = 1200 if full else 120
    for fault in range(faults):
        zipped.write_bytes(damaged(whole, KINDS[fault % 10], chance))
        refused_by_hash += archive._difference(zipped, len(whole), md5, sha256) is not None
        try:
            verify_archive(zipped)
        except UserError:
            refused_by_verify += 1
    tally(faults_against_the_hash=faults, missed=faults - refused_by_hash)
    assert refused_by_hash == faults
    assert refused_by_verify == faults


def test_bits_of_the_directory(tmp_path, full, tally):
    """A flipped bit where the zip tells what is in it: the one place without a checksum."""
    path = write_zip(tmp_path / "a.zip", made_up(), method=zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()

    def contents() -> tuple[tuple[str, ...], list[tuple[LabelledFile, bytes]]]:
        with open_archive(path) as opened:
            return opened.names, [(file, opened.read(file)) for file in opened.files]

    undamaged, start, refusals = contents(), whole.index(b"PK\1\2"), 0
    bits = range(8 * start, 8 * len(whole), 3 if full else 61)
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert contents() == undamaged
        except UserError:
            refusals += 1
    tally(faults=len(bits), refused=refusals, harmless=len(bits) - refusals)
    assert refusals > len(bits) // 2


def test_truncated_zip_is_refused_at_any_length(tmp_path, tally):
    whole = write_zip(tmp_path / "a.zip", made_up()).read_bytes()
    lengths = [0, 1, 22, 100, *range(1000, len(whole), 997), len(whole) - 1]
    for length in lengths:
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short"):
            open_archive(tmp_path / "cut.zip")
    tally(faults=len(lengths), refused=len(lengths))


def test_a_member_without_bytes_does_not_pass_for_one(tmp_path, tally):
    """zipfile checks no CRC-32 of a member that claims to be empty: names would be lost."""
    path = write_zip(tmp_path / "a.zip", made_up())
    whole = bytearray(path.read_bytes())
    entry = whole.index(f"{ROOT}words.txt".encode(), whole.index(b"PK\1\2")) - 46
    whole[entry + 24 : entry + 28] = bytes(4)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"words\.txt is shorter"):
        open_archive(path)
    tally(faults=1, refused=1)

"""A data set folder in which one byte has changed: opening or verifying it says so."""

import json
import random
from pathlib import Path

import pytest

from reliability.archives import damaged, made_up, readable, refused, write_zip
from tinylab.data.dataset import Dataset, open_dataset, prepare, verify
from tinylab.exceptions import UserError

pytestmark = pytest.mark.promise("damaged-files")

KINDS = ("flip", "truncate", "zero tail", "append", "swap pages")
FILES = ("images.npy", "labels.npy", "boxes.npy", "meta.json")


@pytest.fixture
def prepared(tmp_path) -> Dataset:
    return prepare(
        write_zip(tmp_path / "made.zip", made_up()), tmp_path / "ds", workers=1, progress=False
    )


def found(folder: Path) -> str | None:
    """What opening and verifying the data set say about it, or None if they find nothing."""
    try:
        verify(open_dataset(folder))
    except UserError as error:
        return str(error)
    return None


def test_every_damage_of_a_data_set_is_found(prepared, full, tally):
    folder = prepared.folder
    whole = {name: (folder / name).read_bytes() for name in FILES}
    assert found(folder) is None
    chance, faults, missed = random.Random(0), 1500 if full else 160, []
    for fault in range(faults):
        name, kind = FILES[fault % 4], KINDS[fault // 4 % 5]
        # Written beside and renamed: a mapped file that shrinks would end this process.
        (folder / "new").write_bytes(damaged(whole[name], kind, chance))
        (folder / "new").rename(folder / name)
        if not readable(found(folder) or "\n"):
            missed.append(f"{name}: {kind}")
        (folder / "new").write_bytes(whole[name])
        (folder / "new").rename(folder / name)
    tally(data_set_faults=faults, missed=len(missed))
    assert not missed
    assert found(folder) is None


def test_every_bit_of_meta_json_counts(prepared, full, tally):
    path = prepared.folder / "meta.json"
    whole = path.read_bytes()
    bits, missed = range(0, 8 * len(whole), 1 if full else 29), []
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if found(prepared.folder) is None:
            missed.append(bit)
    tally(data_set_faults=len(bits), missed=len(missed))
    assert not missed


def test_a_meta_json_that_was_edited_is_found_when_it_is_opened(prepared, tally):
    path = prepared.folder / "meta.json"
    whole = path.read_text()
    meta = json.loads(whole)
    edited = (
        whole.replace("goldfish", "goldfisk"),
        whole.replace('"train_count": 12', '"train_count": 13'),
        json.dumps(meta),  # the same content in other bytes: nothing of ours wrote it
        whole + "\n",
        json.dumps(meta, indent=1, sort_keys=True) + "\n",
    )
    for text in edited:
        assert text != whole
        path.write_text(text)
        assert "meta.json has changed since it was prepared" in refused(
            open_dataset, prepared.folder
        )
    tally(data_set_faults=len(edited))


def test_folders_from_before_meta_json_had_a_hash_are_read_and_verified(prepared, tally):
    path = prepared.folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]["meta.json"]
    older = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    path.write_text(older, encoding="utf-8")
    assert found(prepared.folder) is None
    path.write_text(older.replace("labels.npy", "labels.npz"), encoding="utf-8")
    assert "meta.json has changed" in found(prepared.folder)
    path.write_text(older.replace('"labels.npy": "', '"labels.npy": "0'), encoding="utf-8")
    assert "labels.npy has changed" in found(prepared.folder)
    tally(data_set_faults=2)

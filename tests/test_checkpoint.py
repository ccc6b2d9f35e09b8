"""Whatever happens to a process or to a file, one whole checkpoint is left, and a damaged one is never used."""

import hashlib
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.files import write_atomically
from tinylab.run import checkpoint
from tinylab.run.checkpoint import MAGIC, NEWEST, PREVIOUS, clean, load, save


def state(number: int) -> dict:
    return {
        "epoch": number,
        "step": 0,
        "model": {"weight": torch.full((300,), float(number))},
        "history": [{"loss": 0.5}],
    }


def epoch_of(folder: Path) -> int:
    """The epoch that a run which starts here would continue from."""
    clean(folder)
    loaded, _ = load(folder)
    assert loaded is not None
    assert torch.equal(loaded["model"]["weight"], state(loaded["epoch"])["model"]["weight"])
    return loaded["epoch"]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One of the things that disks, networks and killed processes do to a file."""
    kind = rng.choice(["bit", "cut", "longer", "zeros", "empty"])
    compute = rng.randrange(len(data))
    if kind == "bit":
        return data[:compute] + bytes([data[compute] ^ 1 << rng.randrange(8)]) + data[compute + 1 :]
    if kind == "cut":
        return data[:compute]
    if kind == "longer":
        return data + bytes(rng.randrange(1, 100))
    if kind == "zeros":  # from somewhere before the last bytes, which are zeros in a zip file
        compute = rng.randrange(len(data) - 100)
        return data[:compute] + bytes(len(data) - compute)
    return b""


def test_a_state_survives(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", state(1))
    loaded, notice = load(tmp_path / "checkpoints")
    assert notice is None
    assert (loaded["epoch"], loaded["history"]) == (1, [{"loss": 0.5}])
    assert torch.equal(loaded["model"]["weight"], torch.full((300,), 1.0))


def test_without_a_checkpoint_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert load(tmp_path) == (None, None)
    assert load(tmp_path / "missing") == (None, None)


def test_two_generations_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, state(number))
    assert epoch_of(tmp_path) == 3
    (tmp_path / NEWEST).unlink()
    assert epoch_of(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        NEWEST
    }  # moved up: the next save keeps it


def test_every_damage_is_noticed_and_the_previous_one_used(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    whole, rng = (
        {name: (tmp_path / name).read_bytes() for name in (NEWEST, PREVIOUS)},
        random.Random(0),
    )
    for _ in range(60):
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / NEWEST).write_bytes(damaged(whole[NEWEST], rng))
        loaded, notice = load(tmp_path)
        assert loaded["epoch"] == 1
        assert "last.ckpt is damaged" in notice
        assert "previous.ckpt" in notice


def test_after_a_damage_the_next_save_does_not_risk_the_only_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    (tmp_path / NEWEST).write_bytes(b"damaged")
    assert epoch_of(tmp_path) == 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_with(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, state(2))
    assert epoch_of(tmp_path) == 1


def test_two_damaged_ones_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"every checkpoint is damaged.*last\.ckpt, .*previous\.ckpt.*delete them"
    ):
        load(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "was run",)

    buffer = io.BytesIO()
    torch.save({"epoch": Evil()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps({"epoch": Evil()}, protocol=2)):
        (tmp_path / NEWEST).write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)
        with pytest.raises(UserError, match="damaged"):
            load(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_leftovers_of_a_killed_process_are_swept_up(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    (tmp_path / f"{NEWEST}.123.tmp").write_bytes(b"half")
    assert epoch_of(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {NEWEST}


def fail_with(error: BaseException) -> Callable:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first")

    class FullDisk(io.FileIO):
        def write(self, data: bytes) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "open", lambda name, mode: FullDisk(name, mode), raising=False)
        with pytest.raises(
            UserError, match=r"cannot write .*file \(6 bytes\): No space left on device"
        ):
            write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"


def test_writing_where_no_folder_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*missing/file"):
        write_atomically(tmp_path / "missing" / "file", b"")

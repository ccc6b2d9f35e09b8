"""Checkpoints: whole or absent, two generations, a mirror, nobody's code."""

import pickle
from pathlib import Path

import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.run import checkpoint
from tinylab.run.checkpoint import NEWEST, PREVIOUS


class Evil:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def state(epoch: int, step: int = 0) -> dict:
    return {"epoch": epoch, "step": step, "model": {"w": torch.arange(50.0) * epoch}, "run": {}}


def test_two_generations_and_the_newest_whole_one_counts(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none") == (None, None)
    for epoch in (1, 2, 3):
        checkpoint.save(tmp_path, state(epoch))
    saved, note = checkpoint.load(tmp_path)
    assert (saved["epoch"], note) == (3, None)
    assert torch.equal(saved["model"]["w"], state(3)["model"]["w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [NEWEST, PREVIOUS]
    (tmp_path / NEWEST).write_bytes((tmp_path / NEWEST).read_bytes()[:-1])
    saved, note = checkpoint.load(tmp_path)
    assert saved["epoch"] == 2
    assert f"{tmp_path / NEWEST} is damaged; continuing from {tmp_path / PREVIOUS}" in note
    checkpoint.clean(tmp_path)  # or the next save would move the damaged one over the whole one
    checkpoint.save(tmp_path, state(4))
    assert checkpoint.read(tmp_path / PREVIOUS)["epoch"] == 2
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, state(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path)[0]["epoch"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "x", state(1))


def test_a_mirror_gets_each_checkpoint_and_the_newest_of_both_counts(tmp_path: Path) -> None:
    home, mirror = tmp_path / "home", tmp_path / "mirror"
    checkpoint.save(home, state(1), mirror)
    checkpoint.save(home, state(2), mirror)
    assert (home / NEWEST).read_bytes() == (mirror / NEWEST).read_bytes()
    checkpoint.save(mirror, state(2, step=5))
    saved, note = checkpoint.load(home, mirror)
    assert saved["step"] == 5
    assert "continuing from the mirror's" in note
    (mirror / NEWEST).write_bytes(b"x")
    assert checkpoint.load(home, mirror)[0]["epoch"] == 2


def test_a_mirror_that_fails_warns_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mirror, lines = tmp_path / "file" / "mirror", []
    for epoch in (1, 2):
        checkpoint.save(tmp_path / "home", state(epoch), mirror, lines.append)
    assert len(lines) == 1
    assert "the mirror fails, training goes on" in lines[0]
    assert checkpoint.load(tmp_path / "home", mirror)[0]["epoch"] == 2


def test_nobodys_code_runs(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    for content in (pickle.dumps(evil), b"tinylab checkpoint 9\nx"):
        (tmp_path / NEWEST).write_bytes(content)
        with pytest.raises(UserError):
            checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, {"epoch": 1, "step": 0, "evil": evil})
    assert checkpoint.read(tmp_path / NEWEST) is None
    assert not (tmp_path / "ran").exists()

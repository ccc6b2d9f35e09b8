"""What TensorBoard itself reads from the files: every epoch once, whatever happened meanwhile."""

import itertools
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinylab.exceptions import UserError
from tinylab.training.track import TAGS, Tracker


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> None:
    """No two starts within one second: TensorBoard goes by the time in the files' names."""
    seconds = itertools.count(2_000_000_000)
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))


def history(epochs: int, shift: float = 0.0) -> list[dict]:
    """Rows as in metrics.jsonl; every value differs from every other."""
    fields = list(enumerate(TAGS.values()))
    return [
        {"epoch": epoch} | {field: 10.0 * epoch + number / 8 + shift for number, field in fields}
        for epoch in range(1, epochs + 1)
    ]


def assert_shown(folder: Path, rows: list[dict]) -> None:
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    for tag, field in TAGS.items() if rows else ():
        expected = [(row["epoch"], row[field]) for row in rows if field in row]
        assert [(event.step, event.value) for event in reader.Scalars(tag)] == expected, tag


def track(folder: Path, before: list[dict], new: list[dict]) -> None:
    """Start once: continue from the epochs `before`, train those in `new`."""
    with closing(Tracker(folder)) as tracker:
        tracker.up_to(before)
        assert_shown(folder, before)
        for number, row in enumerate(new, start=1):
            tracker.epoch(row)
            assert_shown(folder, before + new[:number])


def test_an_epoch_without_a_test_has_no_numbers_of_one(tmp_path, finished_run) -> None:
    assert {*TAGS.values()} <= {*finished_run.history[-1]}
    rows = history(3)
    del rows[1]["test_loss"], rows[1]["test_top1"], rows[1]["test_top5"]
    track(tmp_path, [], rows)


@pytest.mark.parametrize(("kept", "cut"), [(0, 0), (1, 0), (3, 0), (4, 1), (4, 150)])
def test_what_was_lost_with_the_process_or_the_file_is_replaced(tmp_path, kept, cut) -> None:
    """The checkpoint is older than TensorBoard's file, or that file is torn."""
    track(tmp_path, [], history(4))
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    track(tmp_path, history(kept), history(5, shift=0.25)[kept:])


def test_what_fails_is_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard for TensorBoard: "):
        Tracker(tmp_path).up_to(history(1))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import fails
    with pytest.raises(UserError, match="pip install tensorboard"):
        Tracker(tmp_path)

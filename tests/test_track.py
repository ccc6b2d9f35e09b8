"""What TensorBoard itself reads from the files: every epoch once, whatever happened between two starts."""

import builtins
import errno
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tinylab.exceptions import UserError
from tinylab.training.track import TAGS, Tracker

try:
    import tensorboard  # noqa: F401
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    EventAccumulator = None

needs_tensorboard = pytest.mark.skipif(
    EventAccumulator is None, reason='needs the extra: pip install "tinylab[track]"'
)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two starts within one second, as for processes: TensorBoard goes by the time in the files' names."""
    seconds = itertools.count(2_000_000_000)
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))


def history(epochs: int, shift: float = 0.0) -> list[dict]:
    """Rows as in metrics.jsonl; every value differs from every other."""
    return [
        {
            "epoch": epoch,
            "test_correct": 7,
            "test_total": 9,
            "train_seconds": 1.5,
            "eval_seconds": 0.5,
        }
        | {field: 10.0 * epoch + compute / 8 + shift for compute, field in enumerate(TAGS.values())}
        for epoch in range(1, epochs + 1)
    ]


def shown(folder: Path) -> list[dict[str, float]]:
    """What TensorBoard shows, per epoch; its steps must be 1, 2, ... for every tag."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == set(TAGS)
    columns = {tag: reader.Scalars(tag) for tag in TAGS}
    epochs = len(columns["loss/test"])
    for tag, events in columns.items():
        assert [event.step for event in events] == list(range(1, epochs + 1)), tag
    return [{tag: events[i].value for tag, events in columns.items()} for i in range(epochs)]


def expected(rows: list[dict]) -> list[dict[str, float]]:
    return [{tag: row[field] for tag, field in TAGS.items()} for row in rows]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tensorboard").iterdir())}


def tracked(folder: Path, before: list[dict], new: list[dict]) -> None:
    """One start: continue from the epochs `before`, train those in `new`."""
    tracker = Tracker(folder)
    tracker.up_to(before)
    for row in new:
        tracker.epoch(row)
    tracker.close()


@needs_tensorboard
def test_every_number_of_every_epoch_is_there(tmp_path: Path) -> None:
    rows = history(3)
    tracked(tmp_path, [], rows)
    assert shown(tmp_path) == expected(rows)
    assert len(files(tmp_path)) == 1


@needs_tensorboard
def test_an_epoch_without_a_test_has_no_test_s_numbers(tmp_path: Path) -> None:
    rows = history(3)
    rows[1] = {name: value for name, value in rows[1].items() if not name.startswith("test_")}
    tracker = Tracker(tmp_path)
    tracker.up_to(rows)
    tracker.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("top1/test")] == [1, 3]
    assert [event.step for event in reader.Scalars("top1/train")] == [1, 2, 3]


def test_tags_are_those_of_the_records(tmp_path: Path, finished_run) -> None:
    tracked(tmp_path, [], finished_run.history)
    last = shown(tmp_path)[-1]
    for tag, value in expected(finished_run.history)[-1].items():
        assert last[tag] == pytest.approx(value, rel=1e-6), tag
    assert finished_run.history[-1]["test_loss"] == pytest.approx(last["loss/test"])
    assert finished_run.history[-1]["train_top1"] == pytest.approx(last["top1/train"])


@needs_tensorboard
def test_an_epoch_is_on_the_disk_when_it_has_been_told(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.up_to([])
    for epoch, row in enumerate(history(2), 1):
        tracker.epoch(row)
        assert len(shown(tmp_path)) == epoch


@needs_tensorboard
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_epochs_that_were_lost_with_the_process_are_replaced(tmp_path: Path, kept: int) -> None:
    """The checkpoint is older than what TensorBoard was told; the epochs come out differently the second time."""
    rows = history(4)
    tracked(tmp_path, [], rows)
    again = rows[:kept] + history(5, shift=0.25)[kept:]
    tracked(tmp_path, again[:kept], again[kept:])
    assert shown(tmp_path) == expected(again)


@needs_tensorboard
def test_lost_epochs_vanish_at_once(tmp_path: Path) -> None:
    tracked(tmp_path, [], history(4))
    tracked(tmp_path, history(2), [])
    assert shown(tmp_path) == expected(history(2))


@needs_tensorboard
def test_tracking_may_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    rows = history(5)
    tracked(tmp_path, rows[:3], rows[3:])
    assert shown(tmp_path) == expected(rows)


@needs_tensorboard
def test_an_epoch_between_the_record_and_tensorboard_is_made_up_for(tmp_path: Path) -> None:
    rows = history(5)
    tracked(tmp_path, [], rows[:2])  # killed after epoch 3 was recorded and before it was told
    tracked(tmp_path, rows[:3], rows[3:])
    assert shown(tmp_path) == expected(rows)


@needs_tensorboard
@pytest.mark.parametrize("cut", [1, 5, 40, 150])
def test_a_torn_file_is_made_up_for(tmp_path: Path, cut: int) -> None:
    rows = history(5)
    tracked(tmp_path, [], rows[:3])
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    tracked(tmp_path, rows[:3], rows[3:])
    assert shown(tmp_path) == expected(rows)


@needs_tensorboard
def test_epochs_trained_anew_without_tracking_replace_those_of_before(tmp_path: Path) -> None:
    tracked(tmp_path, [], history(4))
    rows = history(2) + history(5, shift=0.25)[2:]
    tracked(tmp_path, rows[:4], rows[4:])
    assert shown(tmp_path) == expected(rows)


@needs_tensorboard
def test_files_of_torch_s_own_writer_are_understood(tmp_path: Path) -> None:
    """Somebody may have written into the folder with `SummaryWriter`."""
    from torch.utils.tensorboard import SummaryWriter

    rows = history(4)
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for row in rows[:2]:
            for tag, field in TAGS.items():
                writer.add_scalar(tag, row[field], row["epoch"])
    tracked(tmp_path, rows[:2], rows[2:])
    assert shown(tmp_path) == expected(rows)


@needs_tensorboard
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path)
    tracker.up_to(history(1))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker._writer, "flush", full)
    with pytest.raises(UserError, match=r"tensorboard.* No space left on device"):
        tracker.epoch(history(2)[-1])


@needs_tensorboard
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    tracker = Tracker(tmp_path)
    with pytest.raises(UserError, match="tensorboard"):
        tracker.up_to(history(1))


def test_without_tensorboard_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError("No module named 'tensorboard'", name="tensorboard")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "tinylab\[track\]"'):
        Tracker(tmp_path)


def test_the_module_itself_needs_nothing_heavy(subprocess_environment: dict[str, str]) -> None:
    """`train` imports it, tracking or not."""
    code = "import sys, tinylab.training.track; print([m for m in ('torch', 'tensorboard', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=subprocess_environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr

"""What the trackers' own libraries read back: every epoch once, whatever happened meanwhile."""

import itertools
import json
import struct
import sys
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinylab.exceptions import UserError
from tinylab.run.folder import Run
from tinylab.training.track import TAGS, log_figures, start


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
    with closing(start("tensorboard", Run(folder))) as tracker:
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


def wandb_records(folder: Path) -> list:
    """Return the records of wandb's offline files: LevelDB's log format after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, content = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:  # the rest of a block is empty
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            content += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or its last part
                records.append(Record.FromString(content))
                content = b""
    return records


def test_wandb_gets_every_epoch_once_and_the_figures(
    train_tiny, narrow, at_each, tmp_path, monkeypatch
) -> None:
    monkeypatch.undo()  # wandb needs the real clock
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "run"

    class Killed(Exception):
        pass

    def kill(title: str) -> None:
        if title == "step" and (folder / "wandb/tinylab.json").exists():
            raise Killed

    with monkeypatch.context() as patched:
        module = sys.modules["tinylab.training.train"]
        step = module.train_step
        patched.setattr(module, "train_step", lambda *a, **k: (step(*a, **k), kill("step")))
        with pytest.raises(Killed):
            train_tiny(folder, track="wandb")
    run = train_tiny(folder, track="wandb")
    figure = tmp_path / "curve.png"
    Image.new("RGB", (8, 4), "red").save(figure)
    log_figures(run, [figure])

    seen, ids, pictures = {}, set(), 0
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join(each.nested_key) or each.key: each.value_json
                for each in record.history.item
            }
            pictures += any("image-file" in value for value in values.values())
            if "loss/train" in values:
                step = record.history.step.num
                assert step not in seen, "an epoch twice"
                seen[step] = json.loads(values["loss/train"])
    assert seen == {row["epoch"]: row["train_loss"] for row in run.history}
    assert len(ids) == 1
    assert pictures == 1


def test_tensorboard_gets_the_figures(tmp_path, train_tiny) -> None:
    run = train_tiny(tmp_path / "run", track="tensorboard")
    figure = tmp_path / "curve.png"
    Image.new("RGB", (8, 4), "red").save(figure)
    log_figures(run, [figure])
    reader = EventAccumulator(str(run.folder / "tensorboard"))
    reader.Reload()
    assert [(each.step, each.width) for each in reader.Images("curve")] == [(2, 8)]
    assert [each.step for each in reader.Scalars("loss/train")] == [1, 2]


def test_what_fails_is_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard for TensorBoard: "):
        start("tensorboard", Run(tmp_path)).up_to(history(1))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import fails
    with pytest.raises(UserError, match="pip install tensorboard"):
        start("tensorboard", Run(tmp_path))

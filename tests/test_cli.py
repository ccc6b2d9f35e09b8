"""Commands from outside: what they print, what they refuse in one line, and that a refusal leaves nothing behind."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.cli import COMMANDS, main
from tinylab.dataset import Dataset
from tinylab.device import choose
from tinylab.recipe import Recipe
from tinylab.record import Run, describe_environment, enter_run
from tinylab.train import train

PARSING = {
    "frobnicate": "unknown command 'frobnicate'.*train",
    "--version": "unknown command",
    "train": "which recipe.*published, accurate, speedrun, official, smoke",
    "train nope": "unknown recipe 'nope'.*published, accurate, speedrun, official, smoke",
    "train --epochs 3": "which recipe",
    "train smoke --epocs 3": "epocs.*--epochs",
    "train smoke 17": "17",
    "train smoke --epochs": "epochs",
    "train smoke --epochs 0": "epochs must be at least 1, not 0",
    "train smoke --epochs -3": "epochs",
    "train smoke --epochs 2.5": "epochs",
    "train smoke --epochs many": "epochs",
    "train smoke --max-learning-rate nan": "max_learning_rate",
    "train smoke --max-learning-rate inf": "max_learning_rate",
    "train smoke --max-learning-rate 0": "max_learning_rate must be above 0",
    "train smoke --batch-size 0": "batch_size",
    "train smoke --width 0": "width",
    "train smoke --weight-decay -1": "weight_decay",
    "train smoke --flip-probability 1.5": "flip_probability",
    "train smoke --mean 0.4 0.4": "mean",
    "train smoke --std 0.2 0 0.2": "std",
    "train smoke --anneal cubic": "anneal",
    "train smoke --name ../x": "name",
    "train smoke --resolution 60": "resolution must be a multiple of 8 from 16 to 256, not 60",
    "train smoke --test-resolution 0": "test_resolution must be a multiple of 8",
    "train speedrun --ramp 42 0.5": "ramp must be of resolutions that are multiples of 8",
    "train speedrun --ramp 40 0.6 48 0.6": "ramp must be of shares that leave some",
    "train accurate --ema-decay 0": "ema_decay must be between 0 and 1",
    "train accurate --ema-decay 1": "ema_decay must be between 0 and 1",
    "train accurate --ema-decay -0.5": "ema_decay must be between 0 and 1",
    "train accurate --ema-decay 1.5": "ema_decay must be between 0 and 1",
    "train accurate --mixup-probability 1.5": "mixup_probability must be between 0 and 1",
    "train accurate --mixup-probability 0.9 --cutmix-probability 0.9": "resizemix_probability must add up to 1 or less",
    "train accurate --label-smoothing 1": "label_smoothing must be at least 0 and below 1",
    "train accurate --optimizer adam": "optimizer",
    "train published --mixup-probability 0.3": "mixup_probability must be left alone unless augmentation is 'batched'",
    "train accurate --augmentation albumentations": "must be left alone unless augmentation is 'batched'",
    "train smoke --micro-batch many": "micro-batch",
    "train smoke --split random": "split",
    "train smoke --device tpu": "device",
    "train smoke --precision fp8": "precision",
    "schedule": "which recipe",
    "schedule nope": "unknown recipe 'nope'",
    "schedule published --images 0": "images must be from 1",
    "schedule published --images 10000000000000000000000": "images must be from 1",
    "schedule published --epochs 99999999999999999999": "epochs must be at most",
    "train smoke --width 1000000": "width must be at most",
    "summary --classes 99999999999999": "classes must be from 1",
    "prepare --source ~nobody-of-that-name/x.zip --data new/d": "no zip file and no folder",
    "sample /dev/null": "no regular file",
    "table": "run this in the repository's folder",
    "schedule published --images 1e5": "images",
    "schedule published --epochs 0": "epochs",
    "summary --classes 0": "classes",
    "summary --width -1": "width",
    "summary --classes two": "classes",
    "sample": "zip file to write",
    "evaluate": "run",
    "explain": "run",
    "evaluate missing": "missing.*no run",
    "explain missing": "missing.*no run",
    "publish missing": "missing.*no run",
    "verify missing": "no data set in missing",
    "evaluate missing --tta rotate": "tta",
    "explain missing --method telepathy": "method",
    "train smoke --data missing": "no data set in missing.*tinylab prepare",
    "train smoke --data file": "no data set in file",
    "evaluate file": "file",
    "prepare --source missing.zip --data new/data": "missing.zip",
    "prepare --source file --data new/data": "file",
    "prepare --source file --data file": "file",
    "prepare --source file --data new/data --workers 0": "workers",
    "sample file/inside.zip": "file",
}
"""Command lines in a folder that holds nothing but an empty `file`, and what the refusal must name."""

TRAINING = {
    "--seed -1": "seed",
    "--seed 9223372036854775808": "seed",
    "--limit-classes 1": "limit-classes must be from 2 to 10",
    "--limit-classes 11": "limit-classes must be from 2 to 10",
    "--workers -1": "workers",
    "--precision fp16 --device cpu": "fp16 needs a CUDA GPU",
    "--batch-size 421": "batch-size 421 is more than the 420 training images",
    "--micro-batch 0": "micro-batch must be auto or at least 1",
    "--augmentation batched --mixup-probability 0.5 --limit-classes 1": "limit-classes must be from 2",
    "--augmentation batched --workers 2": "workers run albumentations",
    "--compile --device cpu": "--compile needs a compiler",
    "--run file": "file",
    "--run file/run": "file",
    "--run foreign": "foreign is not empty and no run",
}
"""Options of `tinylab train smoke` on sample data, in a folder with an empty `file` and a `foreign` folder."""

TRAIN = "train smoke --epochs 1 --width 16 --limit-classes 2 --split official"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its content, and every folder; locks beside data folders aside."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix != ".lock"
    }


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable:
    """A function that runs a command in `tmp_path`: exit status 2, one line on stderr that matches, nothing changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")

    def call(arguments: list[str], pattern: str) -> None:
        before = tree(tmp_path)
        capfd.readouterr()
        status = main(arguments)
        out, err = capfd.readouterr()
        assert status == 2, (out, err)
        assert len(err.splitlines()) == 1, err
        assert err.startswith("tinylab: ")
        assert len(err) > len("tinylab: ") + 20
        assert re.search(pattern, err), err
        assert "Traceback" not in out + err
        after = tree(tmp_path)
        assert {name: content for name, content in after.items() if name.split("/")[0] != "new"} == before

    return call


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a user ran sample, prepare and train, with default places; two classes, one epoch."""
    folder = tmp_path_factory.mktemp("chain with a space")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.delenv("TINY_IMAGENET", raising=False)  # it would come before the archive made here
        assert main(["sample", "data/tiny-imagenet-200.zip"]) == 0
        assert main(["prepare", "--workers", "1"]) == 0
        assert main(TRAIN.split()) == 0
    return folder


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", PARSING)
def test_a_bad_command_is_refused_in_one_line(refused: Callable, line: str) -> None:
    refused(line.split(), f"(?i){PARSING[line]}")


@pytest.mark.parametrize("line", TRAINING)
def test_an_impossible_training_is_refused_in_one_line(
    refused: Callable, sample_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    refused(["train", "smoke", "--data", str(sample_dataset.folder), *line.split()], TRAINING[line])


def test_an_unfinished_run_is_refused(refused: Callable, narrow: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "begun")
    run.folder.mkdir(parents=True)
    identity = {"protocol": "merged", "classes": 3, "content_sha256": "c", "split_sha256": "s", "data_folder": "data"}
    enter_run(run, narrow, identity, describe_environment(choose("cpu", "fp32")))
    for command in ("evaluate", "explain"):
        refused([command, "runs/begun"], "not finished.*continues it")
    run.write("summary.json", {})
    refused(["evaluate", "runs/begun"], "summary.json lacks model_sha256, test_top1")
    run.write("run.json", {})
    refused(["evaluate", "runs/begun"], "run.json lacks content_sha256")


def test_a_data_folder_of_another_format_is_refused(refused: Callable, sample_dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(sample_dataset.folder, tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    refused(["train", "smoke", "--data", "data"], "format version 99.*tinylab prepare")
    refused(["prepare", "--source", "file", "--data", "data"], "format version 99")


def test_the_folder_of_another_run_is_refused(
    refused: Callable, narrow: Recipe, sample_dataset: Dataset, tmp_path: Path
) -> None:
    recipe = replace(narrow, name="smoke", epochs=1, batch_size=64)
    options = {"limit_classes": 2, "device": "cpu", "precision": "fp32", "quiet": True}
    run = train(recipe, sample_dataset, folder=tmp_path / "run", **options)
    line = ["train", "smoke", "--data", str(sample_dataset.folder), "--run", "run", "--limit-classes", "2"]
    line += ["--precision", "fp32", "--width", "16", "--batch-size", "64"]
    refused([*line, "--epochs", "7"], "epochs 1 -> 7")
    refused([*line, "--epochs", "1", "--seed", "3"], "seed 0 -> 3")

    refused(["explain", str(run.folder), "--count", "-1"], "count must be 0 or more")
    for name, command in (
        ("predictions.npz", "explain"),
        ("metrics.jsonl", "explain"),
        ("model.safetensors", "evaluate"),
    ):
        whole = (run.folder / name).read_bytes()
        (run.folder / name).write_bytes(whole[:-20])
        refused([command, "run"], rf"{re.escape(name)}.*damaged")
        (run.folder / name).write_bytes(whole)


def test_a_run_on_other_data_is_refused(
    refused: Callable, chain: Path, sample_dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(chain / "runs" / "smoke-official-s0", tmp_path / "run")
    refused(["evaluate", "run"], "no data set in data/tiny-imagenet")
    shutil.copytree(sample_dataset.folder, tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta | {"content_sha256": "d" * 64}))
    refused(["evaluate", "run", "--data", "other"], "other data.*--data")
    run = Run(tmp_path / "run")
    run.write("run.json", run.identity | {"split_sha256": "d" * 64})
    refused(["evaluate", "run", "--data", str(chain / "data" / "tiny-imagenet")], "another split")


def test_a_full_disk_is_one_line(
    refused: Callable, sample_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    line = ["train", "smoke", "--data", str(sample_dataset.folder), "--run", "new", "--limit-classes", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(line, "cannot write .*No space left on device")
    assert not tree(tmp_path / "new")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_self: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(COMMANDS["summary"], "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["summary"])


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails, too
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["schedule", "published", "--epochs", "1"]) == 2
    assert capsys.readouterr().err == "tinylab: output: No space left on device\n"


# --- What commands print ----------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name}" in out
    assert "published" in out
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (None, 0)
    out, err = capsys.readouterr()
    assert f"tinylab {name}" in out
    assert err == ""


def test_every_recipe_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "smoke", "--help"])
    out = capsys.readouterr().out
    for field in Recipe.__dataclass_fields__:
        assert re.search(rf"--{field.replace('_', '-')}\b", out), field


def test_the_schedule_is_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "published", "--epochs", "2", "--images", "1000"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["step", "learning_rate", "momentum"]
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert float(rows[0]["learning_rate"]) == pytest.approx(0.002)
    assert float(rows[0]["momentum"]) == pytest.approx(0.95)
    assert err == ""


def test_the_published_schedule_prints_the_logged_learning_rates(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 30 * 301
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    assert [float(line.split(",")[1]) for line in lines[1::301]] == logged


def test_the_summary_is_the_table_and_nothing_else(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["summary"]) == 0
    out, err = capfd.readouterr()
    assert out == (repository / "results" / "reference" / "model_summary.txt").read_text()
    assert err == ""


def test_a_reader_that_has_seen_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["schedule", "published"]) == 0
    assert capsys.readouterr().err == ""


# --- The chain, as a user runs it -------------------------------------------------------------------------------------


@pytest.fixture
def in_chain(chain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable:
    """A function that runs a command line in the folder of `chain` and returns the lines it prints."""
    monkeypatch.chdir(chain)
    monkeypatch.delenv("TINY_IMAGENET", raising=False)

    def call(line: str) -> list[str]:
        capfd.readouterr()
        assert main(line.split()) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out.splitlines()

    return call


def test_a_run_lands_in_its_default_folder(chain: Path) -> None:
    run = Run(chain / "runs" / "smoke-official-s0")
    assert run.finished
    assert (run.recipe.epochs, run.recipe.width, run.recipe.name) == (1, 16, "smoke")
    assert (run.summary["train_images"], run.summary["test_images"]) == (100, 20)
    assert run.identity["data_folder"] == "data/tiny-imagenet"


def test_the_same_command_shows_the_finished_run(in_chain: Callable) -> None:
    lines = in_chain(TRAIN)
    assert "is finished" in lines[0]
    assert lines[-1].startswith("runs/smoke-official-s0: ")


def test_preparing_again_only_opens(in_chain: Callable) -> None:
    lines = in_chain("prepare --source nowhere.zip")
    assert lines[0] == "data/tiny-imagenet: 600 images (500 training, 100 validation)"


def test_verifying_tells_whether_anything_changed(in_chain: Callable, chain: Path, tmp_path: Path) -> None:
    assert "every file is as it was prepared" in in_chain("verify")[0]
    shutil.copytree(chain / "data" / "tiny-imagenet", tmp_path / "copy")
    images = bytearray((tmp_path / "copy" / "images.npy").read_bytes())
    images[5000] ^= 1
    (tmp_path / "copy" / "images.npy").write_bytes(images)
    assert main(["verify", str(tmp_path / "copy")]) == 2


def test_evaluating_again_gives_the_run_s_numbers(in_chain: Callable, chain: Path) -> None:
    summary = Run(chain / "runs" / "smoke-official-s0").summary
    result = json.loads(in_chain("evaluate runs/smoke-official-s0")[-1])
    assert (result["tta"], result["protocol"], result["classes"], result["test_total"]) == ("none", "official", 2, 20)
    for name in ("test_top1", "test_top5", "test_correct"):
        assert result[name] == summary[name]
    assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)


def test_evaluating_with_mirror_images_says_so(in_chain: Callable) -> None:
    plain, flip = (json.loads(in_chain(f"evaluate runs/smoke-official-s0 --tta {tta}")[-1]) for tta in ("none", "flip"))
    assert flip["tta"] == "flip"
    assert flip["test_total"] == plain["test_total"]
    assert flip["test_loss"] != plain["test_loss"]


def test_explaining_draws_every_figure(in_chain: Callable, chain: Path) -> None:
    lines = in_chain("explain runs/smoke-official-s0 --count 2")
    run = Run(chain / "runs" / "smoke-official-s0")
    names = {"samples", "augmentation", "learning_rate", "curves", "classes", "misclassified", "gradcam"}
    assert {path.stem for path in run.figures.iterdir()} >= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.figures.glob("*.png"))
    explained = json.loads((run.folder / "explain.json").read_text())
    wrong = run.summary["test_images"] - run.summary["test_correct"]
    assert (explained["tested"], explained["wrong"]) == (20, wrong)
    assert len(explained["images"]) == min(2, wrong)
    assert lines[-1].startswith(f"{wrong} of 20 test images are wrong")


def test_ctrl_c_in_a_command_without_a_run_is_one_line(
    sample_zip: Path, subprocess_environment: dict[str, str], tmp_path: Path
) -> None:
    """Interrupted while decoding: 130, and no half-made data folder."""
    code = (
        "import os, signal, sys\n"
        "from tinylab import dataset\n"
        "from tinylab.cli import main\n"
        "dataset._decode = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "prepare", "--source", str(sample_zip), "--workers", "1", "--data", "data"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=subprocess_environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1] == "tinylab: stopped"
    assert "Traceback" not in done.stderr
    assert not tree(tmp_path)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_terminating_preparation_leaves_nothing(
    sample_zip: Path, tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    slow = (
        "import sys, time; from tinylab import dataset; from tinylab.cli import main\n"
        "def write(*arguments):\n    open('writing', 'w').close(); time.sleep(30)\n"
        "dataset._write_images = write; sys.exit(main(['prepare', '--source', sys.argv[1], '--data', 'data']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(sample_zip)], cwd=tmp_path, env=subprocess_environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "writing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert len(err.decode().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.lock", "writing"]


@pytest.mark.parametrize(
    ("environment", "tells"),
    [
        ({}, True),
        ({"RANK": "some batch system's", "LOCAL_RANK": "3"}, True),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}, True),  # the first on the second machine
    ],
)
def test_of_torchruns_processes_one_on_each_machine_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict, tells: bool
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "nope"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == tells

"""Bad input by the command line: exit status 2, one line on stderr, no traceback, no hang, and nothing changed.

What is bad: command lines, options, paths, archives, data folders, run folders with files of others in place of their
own, the environment. Lists of cases, and cases that hypothesis makes up.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reliability.archives import change_meta
from reliability.places import (
    KINDS,
    TRAIN,
    assert_one_line,
    endless,
    folder,
    garbage,
    impatient,
    loop,
    make_template,
    pipe,
    tree,
)
from tinylab.cli import COMMANDS, MOST_EXPLAINED, main
from tinylab.data.dataset import Dataset
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES
from tinylab.run.environment import choose
from tinylab.run.folder import Run, describe_environment, enter_run

pytestmark = pytest.mark.promise("bad-input")


PARSING = {
    "frobnicate": "unknown command 'frobnicate'.*train",
    "--version": "unknown command",
    "train": "which recipe.*published, accurate, speedrun, cpu, official, smoke",
    "train nope": "unknown recipe 'nope'.*published, accurate, speedrun, cpu, official, smoke",
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
    "report": "run",
    "report missing": "missing.*no run",
    "report file": "file",
    "export": "run",
    "export missing": "missing.*no run",
    "export file --onnx new.onnx": "file",
    "predict": "run",
    "predict missing": "images",
    "predict missing file": "missing",
    "predict file file": "file",
    "find-lr": "which recipe",
    "find-lr nope": "unknown recipe 'nope'",
    "find-lr smoke": "no data set in data/tiny-imagenet",
    "find-lr smoke --figure file/x.png": "file is no folder",
    "find-lr smoke --steps 0": "steps",
    "find-lr smoke --lowest 0": "lowest",
    "find-lr smoke --lowest 2 --highest 1": "lowest",
    "find-lr smoke --highest nan": "highest",
    "explain missing --layer layer9": "layer9",
    "train smoke --track wandb": "track",
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
    "--micro-batch 0": "micro_batch must be at least 1, or none",
    "--augmentation batched --mixup-probability 0.5 --limit-classes 1": "limit-classes must be from 2",
    "--augmentation batched --workers 2": "workers run albumentations",
    "--compile --device cpu": "--compile needs a compiler",
    "--run file": "file",
    "--run file/run": "file",
    "--run foreign": "foreign is not empty and no run",
}
"""Options of `tinylab train smoke` on sample data, in a folder with an empty `file` and a `foreign` folder."""


LONG = "x" * 5000
NAMES = {
    "evaluate {}": [
        "",
        LONG,
        "a/" * 2000,
        "\0",
        "\ud800",
        "\x1b[31mred",
        "two\nlines",
        "no run",
        "../" * 50,
        "file/run",
    ],
    "explain {}": ["", LONG, "\0", "\ud800", "\x1b]0;title\x07"],
    "publish {}": ["", LONG, "\0", "\ud800", "two\nlines"],
    "verify {}": ["", LONG, "\0", "\ud800", "\x1b[2J", "file"],
    "sample {}": [LONG, "\0", "\ud800.zip", "file/x.zip", "run"],
    "train smoke --data {}": ["", LONG, "\0", "\ud800", "run", "file"],
    "train smoke --data data --run {}": [LONG, "\0", "\ud800", "file", "file/run", "data"],
    "train {}": [
        "",
        LONG,
        "\0",
        "\ud800",
        "smoke\n",
        "Smoke",
        "smoke.json",
        "../smoke",
        "__class__",
    ],
    "train smoke --name {}": [
        "",
        LONG,
        "a/b",
        "..",
        ".hidden",
        "-x",
        "a b",
        "ä",
        "a\n",
        "\0",
        "\ud800",
        "$(id)",
    ],
    "train smoke --epochs {}": [
        "",
        LONG,
        "9" * 5000,
        "1e3",
        "0x10",
        "\ud800",
        "nan",
        "None",
        "true",
        "[1]",
    ],
    "train smoke --epochs={}": ["", "--seed", "1_0_", "-0", "1000000000000"],
    "train smoke --max-learning-rate {}": ["", "1e999", "-inf", "1_", "0x1p4", "-1", "nan", LONG],
    "train smoke --batch-size {}": ["1000000000", "-1", "0", "abc", "2.0"],
    "train smoke --split {}": [LONG, "", "0.7", "-0.1", "nan", "Merged"],
    "train smoke --{}": [
        LONG,
        "x=",
        "\ud800",
        "epochs.x",
        "__class__",
        "recipe.epochs",
        "recipe",
        "-epochs",
    ],
    "{}": [LONG, "\0", "\ud800", "Train", "train ", "--", "-", "-x", "\x1b[31m"],
    "explain run --count {}": [
        "-1",
        "1000000000",
        str(MOST_EXPLAINED + 1),
        "abc",
        "9" * 5000,
        "",
        "1.5",
    ],
    "explain run --figures {}": ["file", "file/x", "data", "data/figures", "/dev/null", LONG, "\0"],
    "explain run --method {}": ["", "GradCAM", LONG, "none"],
    "explain run --layer {}": ["", "layer5", "fc", "Layer4", LONG, "\ud800", "layer4.0.conv1"],
    "explain run --sample {}": ["-1", "many", "9" * 5000, "1.5"],
    "explain run --faithfulness {}": ["-1", "few", "9" * 5000],
    "report run --out {}": ["data", "file/x", "data/x.html", LONG, "\0"],
    "report {}": ["", LONG, "\0", "\ud800", "file", "data"],
    "predict run {}": [
        "",
        "missing.png",
        "file",
        "data",
        "run",
        "/dev/zero",
        LONG,
        "\0",
        "\ud800",
        "data/images.npy",
    ],
    "predict run file --top {}": ["0", "-1", "1001", "many"],
    "predict run data/images.npy --gradcam {}": ["file", "file/x", LONG],
    "predict {} file": [
        "",
        LONG,
        "\0",
        "file",
        "data",
        "data/images.npy",
        "run/recipe.json",
        "run/predictions.npz",
    ],
    "export run --onnx {}": ["data", "file/x.onnx", LONG, "\0"],
    "export run --to {}": ["file", "file/x", "data", LONG, "\0"],
    "export {}": ["", LONG, "file", "data", "run/model.safetensors"],
    "find-lr smoke --data data --steps {}": ["0", "1", "-3", "9" * 5000, "1e2"],
    "find-lr smoke --data data --lowest {}": ["0", "-1", "nan", "inf", "100"],
    "find-lr smoke --data data --figure {}": ["file/x.png", "data", "data/x.png", LONG, "\0"],
    "evaluate run --data {}": ["missing", "file", "run", LONG, "\0", ""],
    "evaluate run --device {}": ["tpu", "cuda:99", "", "CPU", LONG],
    "evaluate run --precision {}": ["fp16", "fp8", ""],
    "evaluate run {}": ["again", "--count", LONG, "--tta"],
    "summary --classes {}": ["0", "-1", "100001", "nan", LONG],
    "summary --width {}": ["0", "1025", "1e3", "9" * 5000],
    "schedule smoke --images {}": ["0", "-5", "1000000001", "1e5", "9" * 5000, ""],
    "table {}": ["now", "--force"],
}
"""Command lines with a place for one argument, and what goes there; in a folder with a data set, a run and a file."""


def hole(line: str, filling: str) -> list[str]:
    return [part.replace("{}", filling) for part in line.split(" ")]


DAMAGES = {
    "empty": b"",
    "text": b"garbage",
    "binary": garbage(1000),
    "cut": b'{"a": 1',
    "list": b"[1, 2]",
    "null": b"null",
    "an empty object": b"{}",
    "an object in a list": b"[{}]",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b"1" * 5000,
    "not UTF-8": b"\xff\xfe\x00",
    "two objects": b"{}{}",
    "a pickle": pickle.dumps({"classes": 2}),
}
"""What may stand in a file of a run folder in place of what tinylab wrote."""

OBJECTS = ("recipe.json", "run.json", "summary.json")
"""Files without which nothing is done with a run."""


@pytest.fixture
def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tally: Callable,
) -> Callable:
    """A function that runs a command in `tmp_path`: exit status 2, one line on stderr that matches, nothing changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINY_IMAGENET", "nowhere.zip")  # nothing is downloaded
    (tmp_path / "file").write_text("")

    def call(arguments: list[str], pattern: str = "") -> None:
        before = tree(tmp_path)
        capfd.readouterr()
        with impatient():
            status = main(arguments)
        out, err = capfd.readouterr()
        assert status == 2, (arguments, out, err)
        assert_one_line(out, err)
        assert re.search(pattern, err), err
        after = tree(tmp_path)
        assert {
            name: content for name, content in after.items() if name.split("/")[0] != "new"
        } == before
        tally(cases=1)

    return call


@pytest.fixture(scope="module")
def template(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a finished run on it, and what `tinylab publish` wants."""
    return make_template(tmp_path_factory.mktemp("template"), small_dataset)


@pytest.fixture
def compute(template: Path, tmp_path: Path, refused: Callable) -> Path:
    """A copy of the template, in the folder in which `refused` runs."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- Command lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", PARSING)
def test_a_bad_command_is_refused_in_one_line(refused: Callable, line: str) -> None:
    refused(line.split(), f"(?i){PARSING[line]}")


@pytest.mark.parametrize("line", TRAINING)
def test_an_impossible_training_is_refused_in_one_line(
    refused: Callable,
    sample_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
) -> None:
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    refused(["train", "smoke", "--data", str(sample_dataset.folder), *line.split()], TRAINING[line])


@pytest.mark.parametrize("line", NAMES)
def test_any_text_in_any_place_is_refused(refused: Callable, compute: Path, line: str) -> None:
    for filling in NAMES[line]:
        refused(
            hole(line, filling), "^(?!.*no data set in data/tiny-imagenet)"
        )  # not for want of data


def test_the_terminal_s_letters_change_the_frame_not_the_line(
    refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the terminal has ASCII only, tyro draws its frame with other characters."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    refused(
        ["summary", "--classes", "many"],
        "^tinylab: Error parsing --classes: .*`tinylab summary --help`",
    )
    refused(["summary", "--clases", "3"], "^tinylab: Unrecognized options: --clases")


def test_a_name_that_the_terminal_cannot_show_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    )
    assert main(["sample", "雪.zip"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["雪.zip"]
    assert capsys.readouterr().err == ""


# --- Archives and data folders ----------------------------------------------------------------------------------------


def make_zip(path: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)


CLASS = "tiny-imagenet-200/train/n90000001"
SOURCES = {
    "text as zip": lambda path: path.write_text("not a zip"),
    "empty": lambda path: path.write_bytes(b""),
    "without members": lambda path: make_zip(path, {}),
    "without train": lambda path: make_zip(path, {"tiny-imagenet-200/wnids.txt": "n90000001\n"}),
    "no classes": lambda path: make_zip(
        path, {"tiny-imagenet-200/wnids.txt": "", "tiny-imagenet-200/train/": ""}
    ),
    "a class without images": lambda path: make_zip(
        path,
        {
            "tiny-imagenet-200/wnids.txt": "n90000001\n",
            "tiny-imagenet-200/words.txt": "n90000001\tx\n",
            f"{CLASS}/n90000001_boxes.txt": "",
            "tiny-imagenet-200/val/val_annotations.txt": "",
        },
    ),
    "an image that is none": lambda path: make_zip(
        path,
        {
            "tiny-imagenet-200/wnids.txt": "n90000001\n",
            "tiny-imagenet-200/words.txt": "n90000001\tx\n",
            f"{CLASS}/n90000001_boxes.txt": "n90000001_0.JPEG\t0\t0\t63\t63\n",
            f"{CLASS}/images/n90000001_0.JPEG": "text",
            "tiny-imagenet-200/val/val_annotations.txt": "",
        },
    ),
    "binary": lambda path: path.write_bytes(garbage(5000)),
    "pipe": pipe,
    "folder": folder,
    "loop": loop,
    "endless": endless,
}
"""What may be named as the archive."""


@pytest.mark.parametrize("kind", SOURCES)
def test_no_archive_is_refused(refused: Callable, tmp_path: Path, kind: str) -> None:
    SOURCES[kind](tmp_path / "a.zip")
    refused(["prepare", "--source", "a.zip", "--data", "new/data", "--workers", "1"])
    assert not (tmp_path / "new" / "data").exists()


@pytest.mark.parametrize("name", ["meta.json", "images.npy", "labels.npy", "boxes.npy"])
def test_a_data_folder_with_a_foreign_file_is_refused(
    refused: Callable, compute: Path, name: str
) -> None:
    path = compute / "data" / name
    damages = (
        list(DAMAGES.items())
        if name == "meta.json"
        else [("text", b"text"), ("a pickle", DAMAGES["a pickle"])]
    )
    for _, content in damages:
        path.write_bytes(content)
        for line in ("evaluate run", TRAIN, "verify data"):
            refused(line.split(), "data")
    for make in KINDS:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        for line in ("evaluate run", TRAIN, "verify data"):
            refused(line.split(), "data")


def test_classes_too_few_or_without_images_are_refused(
    refused: Callable, compute: Path, small_dataset: Dataset
) -> None:
    meta = json.loads((compute / "data" / "meta.json").read_text())
    changes = {
        "one class": {"wnids": meta["wnids"][:1], "names": meta["names"][:1]},
        "another class without images": {
            "wnids": [*meta["wnids"], "n99999999"],
            "names": [*meta["names"], "none"],
        },
        "no classes": {"wnids": [], "names": []},
        "a class twice": {"wnids": [meta["wnids"][0]] * 2},
        "another order": {"wnids": meta["wnids"][::-1]},
        "names that are no text": {"names": [1, 2]},
        "a newer version": {"format_version": 99},
        "other counts": {"train_count": 10**9},
        "negative counts": {"train_count": -5, "val_count": 45},
        "counts that are no numbers": {"train_count": [1]},
        "infinite counts": {"train_count": float("inf")},
        "a content hash that is none": {"content_sha256": {"a": 1}},
    }
    for name, change in changes.items():
        change_meta(compute / "data", **meta | change)
        if "without images" not in name:  # a run on the first two classes does not mind a third
            refused(["evaluate", "run"])
        if name != "a content hash that is none":
            refused(["train", "smoke", "--data", "data", "--run", "new", "--epochs", "1"])


def test_a_data_folder_of_another_format_is_refused(
    refused: Callable, sample_dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(sample_dataset.folder, tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    refused(["train", "smoke", "--data", "data"], "format version 99.*tinylab prepare")
    refused(["prepare", "--source", "file", "--data", "data"], "format version 99")


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read and write everything"
)
def test_what_may_not_be_read_or_written_is_refused(refused: Callable, compute: Path) -> None:
    for path, line in (
        ("run/run.json", "evaluate run"),
        ("run/model.safetensors", "evaluate run"),
        ("data/images.npy", "evaluate run"),
        ("data/meta.json", TRAIN),
    ):
        (compute / path).chmod(0)
        refused(line.split())
        (compute / path).chmod(0o600)
    (compute / "locked").mkdir(mode=0o500)
    for line in (
        "sample locked/x.zip",
        "train smoke --data data --run locked/run",
        "explain run --figures locked/f",
    ):
        refused(line.split())


# --- Run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTS)
def test_a_run_folder_with_a_foreign_record_is_refused(
    refused: Callable, compute: Path, name: str
) -> None:
    path = compute / "run" / name
    for content in DAMAGES.values():
        path.write_bytes(content)
        for line in ("evaluate run", "explain run", "publish run", TRAIN):
            refused(line.split())
    for make in KINDS:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        for line in (
            "evaluate run",
            "explain run",
            "publish run",
            *([] if make is loop else [TRAIN]),
        ):
            refused(line.split())


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl"])
def test_records_that_only_some_commands_need(refused: Callable, compute: Path, name: str) -> None:
    path = compute / "run" / name
    harmless = {"empty", "an empty object"}
    for kind in DAMAGES.keys() - harmless:
        path.write_bytes(DAMAGES[kind])
        refused(["publish", "run"], name)
    for make in (pipe, folder, endless):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        refused(["publish", "run"], name)
        refused(TRAIN.split(), name)


def test_an_epoch_s_record_without_its_numbers_is_refused(refused: Callable, compute: Path) -> None:
    path = compute / "run" / "metrics.jsonl"
    (row,) = (json.loads(line) for line in path.read_text().splitlines())
    for name in ("epoch", "learning_rate", "train_loss", "test_top1", "train_seconds"):
        for value in (None, "3", [1], {}, True):
            path.write_text(json.dumps(row | {name: value}) + "\n")
            refused(["publish", "run"], r"metrics\.jsonl")
        path.write_text(
            json.dumps({key: value for key, value in row.items() if key != name}) + "\n"
        )
        refused(TRAIN.split(), r"metrics\.jsonl")


FIELDS = {
    "run.json": {
        "classes": ["two", 2.0, True, None, [], -1, 0, 1, 3, 10**30, float("nan")],
        "protocol": ["random", 1, None, [], {}, "Merged", "\ud800"],
        "content_sha256": [None, 1, [], {}, "0" * 64],
        "split_sha256": [None, 1, [], {}, "0" * 64],
        "data_folder": [None, 3, [], {}, "\0", "missing", "x" * 5000, "\ud800"],
    },
    "summary.json": {"model_sha256": [None, 1, [], {}, "0" * 64]},
    "recipe.json": {
        "width": ["4", 4.0, None, [], 0, 10**30, 8],
        "mean": [None, 0.4, [0.4], [0.4, 0.4, float("nan")], [[0.4]] * 3, {}, [10**400] * 3],
        "epochs": [None, "1", 1e999, -1],
        "unknown": [1],
        "name": [None, "../x", "a" * 5000, "\x1b[31m"],
        "ramp": [None, [1], [[1]], [[64, 2]], [[64, "x"]]],
        "max_learning_rate": [10**400, float("inf"), None],
    },
}
"""Values in place of a record's own."""


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, values in FIELDS.items() for field in values]
)
def test_a_record_with_a_foreign_value_is_refused(
    refused: Callable, compute: Path, name: str, field: str
) -> None:
    record = json.loads((compute / "run" / name).read_text())
    for value in FIELDS[name][field]:
        (compute / "run" / name).write_text(json.dumps(record | {field: value}))
        refused(["evaluate", "run"])
        refused(["explain", "run"])


def headed(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def lying(whole: bytes, about: dict) -> bytes:
    """A safetensors file whose metadata have other values."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"] |= about
    return headed(header, whole[8 + length :])


METADATA = {
    "wnids": [
        '["n1"]',
        "3",
        "{}",
        "null",
        '"n1n2"',
        "[" * 100_000,
        "[1, 2]",
        '["n90000002", "n90000001"]',
    ],
    "names": ["3", "[]", "null", "[[], []]"],
    "recipe": [
        "{}",
        "[]",
        "null",
        '{"width": 1000000000}',
        '{"width": "4"}',
        '{"width": 8}',
        '{"width": true}',
    ],
    "metrics": ["", "NaN,"],
}
"""What a weights file may claim of itself."""


def test_a_weights_file_that_lies_is_refused(refused: Callable, compute: Path) -> None:
    run, path = Run(compute / "run"), compute / "run" / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    nan = bytearray(whole)
    nan[-4:] = b"\x00\x00\xc0\x7f"
    shifted = {
        key: value | ({"shape": [1, 1]} if "shape" in value else {})
        for key, value in header.items()
    }
    contents = [
        *DAMAGES.values(),
        (10**18).to_bytes(8, "little") + whole[8:],
        (2**63).to_bytes(8, "little"),
        headed({}),
        headed({"fc.bias": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}, b"\0" * 8),
        headed({"fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        headed(shifted, whole[8 + length :]),
        headed(
            {key: value for key, value in header.items() if key != "__metadata__"},
            whole[8 + length :],
        ),
        headed(
            {key: value for key, value in header.items() if key != "fc.bias"}, whole[8 + length :]
        ),
        bytes(nan),
        whole[:-1],
        *(lying(whole, {key: value}) for key, values in METADATA.items() for value in values),
    ]
    for content in contents:
        path.write_bytes(content)
        import hashlib

        run.write(
            "summary.json", run.summary | {"model_sha256": hashlib.sha256(content).hexdigest()}
        )
        for line in ("evaluate run", "explain run"):
            refused(line.split(), r"model\.safetensors")
    for make in KINDS:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        refused(["evaluate", "run"], r"model\.safetensors")


def test_weights_that_are_not_the_summary_s_are_refused(refused: Callable, compute: Path) -> None:
    path = compute / "run" / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-4] ^= 1  # the last bit of a weight
    path.write_bytes(whole)
    for line in ("evaluate run", "explain run"):
        refused(line.split(), r"model\.safetensors is missing or damaged")


def test_predictions_of_another_kind_are_refused(refused: Callable, compute: Path) -> None:
    path = compute / "run" / "predictions.npz"
    own = Run(compute / "run").predictions
    nan = own["logits"].copy()
    nan[0, 0] = np.nan
    changes = [
        {"logits": own["logits"][:-1]},
        {"logits": own["logits"][:, :1]},
        {"logits": own["logits"].astype(np.float64)},
        {"logits": own["logits"].astype(str)},
        {"logits": np.float16(0)},
        {"logits": nan},
        {"labels": own["labels"][:-1]},
        {"labels": own["labels"] + 1000},
        {"labels": own["labels"] - 1},
        {"rows": own["rows"] + 1000},
        {"rows": own["rows"][::-1]},
        {"logits": np.array([{}] * len(own["rows"]), dtype=object)},
    ]
    for change in changes:
        np.savez(path, **(own | change), allow_pickle=True)
        refused(["explain", "run"], r"predictions\.npz")
    for kept in (["logits", "labels"], ["rows"], []):
        np.savez(path, **{name: own[name] for name in kept})
        refused(["explain", "run"], r"predictions\.npz")
    np.savez(path, **own)
    for content in [*DAMAGES.values(), b"PK\x05\x06" + b"\0" * 18, path.read_bytes()[:-20]]:
        path.write_bytes(content)
        refused(["explain", "run"], r"predictions\.npz")
    np.save(
        path.with_suffix(".npy"), own["logits"]
    )  # an array where an archive of arrays is expected
    path.with_suffix(".npy").rename(path)
    refused(["explain", "run"], r"predictions\.npz")
    for make in KINDS:
        path.unlink() if not path.is_dir() else path.rmdir()
        make(path)
        refused(["explain", "run"], r"predictions\.npz")


def test_a_bomb_of_predictions_is_refused(refused: Callable, compute: Path) -> None:
    """An archive of a few kilobytes that claims an array of two terabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f2", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    with zipfile.ZipFile(compute / "run" / "predictions.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", header.getvalue() + bytes(100_000))
    refused(["explain", "run"], r"predictions\.npz")


def test_an_unfinished_run_is_refused(refused: Callable, narrow: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "begun")
    run.folder.mkdir(parents=True)
    identity = {
        "protocol": "merged",
        "classes": 3,
        "content_sha256": "c",
        "split_sha256": "s",
        "data_folder": "data",
    }
    enter_run(run, narrow, identity, describe_environment(choose("cpu", "fp32")))
    for command in ("evaluate", "explain", "publish"):
        refused([command, "runs/begun"], "not finished.*continues it")
    run.write("summary.json", {})
    refused(["evaluate", "runs/begun"], "summary.json lacks model_sha256, ")
    run.write("run.json", {})
    refused(["evaluate", "runs/begun"], "run.json lacks content_sha256")


def test_another_run_s_folder_is_not_continued(refused: Callable, compute: Path) -> None:
    for finished in (True, False):
        if not finished:
            (compute / "run" / "summary.json").unlink()
        for option, pattern in (
            ("--width 8", "width 4 -> 8"),
            ("--epochs 7", "epochs 1 -> 7"),
            ("--seed 3", "seed 0 -> 3"),
            ("--batch-size 7", "batch_size 14 -> 7"),
            ("--max-learning-rate 0.5", "max_learning_rate"),
            ("--split official", "protocol merged -> official"),
        ):
            refused([*TRAIN.split(), *option.split()], pattern)
    change_meta(compute / "data", content_sha256="d" * 64)
    refused(TRAIN.split(), "content_sha256")


def test_checkpoints_that_are_none_are_refused(refused: Callable, compute: Path) -> None:
    (compute / "run" / "summary.json").unlink()
    paths = sorted((compute / "run" / "checkpoints").iterdir())
    newer = re.sub(rb"checkpoint \d+", b"checkpoint 99", paths[0].read_bytes(), count=1)
    for content, pattern in (
        (b"", "damaged"),
        (garbage(1000), "damaged"),
        (pickle.dumps({"epoch": 1}), "damaged"),
        (paths[0].read_bytes()[:-1], "damaged"),
        (newer, "(?i)version|damaged"),
    ):
        for path in paths:
            path.write_bytes(content)
        refused(TRAIN.split(), pattern)
    for make in (pipe, folder, loop, endless):
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            make(path)
        refused(TRAIN.split(), "checkpoint")


def test_a_run_on_other_data_is_refused(
    refused: Callable, compute: Path, sample_dataset: Dataset
) -> None:
    (compute / "data").rename(compute / "elsewhere")
    refused(["evaluate", "run"], "no data set in data")
    refused(["evaluate", "run", "--data", str(sample_dataset.folder)], "other data.*--data")
    run = Run(compute / "run")
    run.write("run.json", run.identity | {"split_sha256": "d" * 64})
    refused(["evaluate", "run", "--data", "elsewhere"], "another split")


def test_nothing_is_put_into_the_data_folder(refused: Callable, compute: Path) -> None:
    refused(["explain", "run", "--figures", "data"], "inside the data folder")
    refused(["explain", "run", "--figures", "data/../data/figures"], "inside the data folder")
    refused(["train", "smoke", "--data", "data", "--run", "data"])
    refused(["train", "smoke", "--data", "data", "--run", "data/run"], "inside the data folder")


def test_a_place_for_figures_is_refused_before_anything_is_computed(
    refused: Callable, compute: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinylab.explain.gradcam.explain", lambda *_, **__: pytest.fail("computed"))
    refused(["explain", "run", "--figures", "file/x"], "file is no folder")
    (compute / "run" / "figures").write_text("mine")
    refused(["explain", "run"], "figures is no folder")


def test_publishing_wants_a_checkout(refused: Callable, compute: Path) -> None:
    whole = (compute / "README.md").read_text()
    for text in ("", whole.replace("<!-- /results -->", ""), whole + whole):
        (compute / "README.md").write_text(text)
        refused(["publish", "run"], r"README\.md must hold")
        refused(["table"], r"README\.md must hold")
    (compute / "README.md").unlink()
    for command in ("publish run", "table"):
        refused(command.split(), "run this in the repository's folder")
    (compute / "README.md").mkdir()
    for command in ("publish run", "table"):
        refused(command.split(), "run this in the repository's folder")


def test_figures_json_of_another_kind_is_refused(refused: Callable, compute: Path) -> None:
    (compute / "images-A").mkdir()
    path = compute / "images-A" / "figures.json"
    for content in DAMAGES.values():
        path.write_bytes(content)
        refused(["table"], r"figures\.json")
    pipe_at = path
    path.unlink()
    pipe(pipe_at)
    refused(["table"], r"figures\.json")


@pytest.mark.skipif(not hasattr(os, "fsync"), reason="needs fsync")
def test_a_full_disk_is_one_line(
    refused: Callable, sample_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    line = [
        "train",
        "smoke",
        "--data",
        str(sample_dataset.folder),
        "--run",
        "new",
        "--limit-classes",
        "2",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(line, "cannot write .*No space left on device")
    assert not tree(tmp_path / "new")


# --- The environment, and other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "1e9"},
        {"WORLD_SIZE": "２"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "abc", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_is_not_torchrun_s_is_refused(
    refused: Callable, compute: Path, monkeypatch: pytest.MonkeyPatch, environment: dict
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(["train", "smoke", "--data", "data", "--run", "new"], "environment variable")


SHELL = [
    (["train", "smoke", "--epochs", "many"], {}),
    (["evaluate", b"not UTF-8 \xff"], {}),
    (["summary", "--classes", "0"], {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "20"}),
    (["train", "smoke", "--data", "data", "--run", "new"], {"WORLD_SIZE": "abc"}),
    (["evaluate", "run"], {"FIFO": "yes"}),
]
"""Arguments and environment of a process of its own."""


@pytest.mark.parametrize("case", range(len(SHELL)))
def test_a_process_of_its_own_says_the_same(
    template: Path,
    tmp_path: Path,
    subprocess_environment: dict[str, str],
    tally: Callable,
    case: int,
) -> None:
    arguments, environment = SHELL[case]
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    if "FIFO" in environment:
        (tmp_path / "run" / "model.safetensors").unlink()
        pipe(tmp_path / "run" / "model.safetensors")
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tinylab", *arguments],
        capture_output=True,
        env=subprocess_environment | environment,
        cwd=tmp_path,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stdout.decode(), done.stderr.decode())
    assert tree(tmp_path) == before
    tally(cases=1, processes=1)


# --- Made up by hypothesis --------------------------------------------------------------------------------------------


class Playground:
    """A copy of the template in which commands are run, put back in order when one has changed something."""

    def __init__(self, template: Path, folder: Path) -> None:
        self.template, self.folder, self.runs, self.refusals = template, folder, 0, 0
        self.fresh()

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def run(self, arguments: list[str]) -> None:
        """Status 0, or 2 with one line and nothing changed; or help."""
        before = tree(self.folder)
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), impatient():
            try:
                status = main(arguments)
            except SystemExit as stop:
                status = (
                    stop.code or 0 if {"-h", "--help"} & set(arguments) else f"exit {stop.code}"
                )
        out, err = (stream.buffer.getvalue().decode(errors="replace") for stream in (out, err))
        after = tree(self.folder)
        self.runs += 1
        if arguments:
            assert status in (0, 2), (arguments, status)
        if status == 2 and arguments:
            self.refusals += 1
            assert_one_line(out, err)
            assert after == before, (arguments, err)
        elif after != before:
            self.fresh()


@pytest.fixture(scope="module")
def playground(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    folder = tmp_path_factory.mktemp("playground") / "here"
    made = Playground(template, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder.parent)
        patched.setenv("TINY_IMAGENET", "nowhere.zip")
        original = os.getcwd()
        yield made
        os.chdir(original)


def examples(
    full: bool, quick: int, soak: int, check: Callable, *strategies: st.SearchStrategy
) -> None:
    """Calls `check` with so many made-up examples, the same ones every time."""
    silent = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    decorate = settings(
        max_examples=soak if full else quick,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=silent,
    )
    decorate(given(*strategies)(check))()


TEXT = st.text(
    st.characters(exclude_characters="/~"), max_size=30
)  # no place but the folder itself
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 1e308, 5e-324]),
).map(str)
VALUES = st.one_of(
    TEXT,
    NUMBERS,
    st.sampled_from(["none", "None", "true", "auto", "--help", "-h", "=", "[]", "{}"]),
)
FLOATS = [field.name.replace("_", "-") for field in fields(Recipe) if field.type is float]
OTHERS = [field.name.replace("_", "-") for field in fields(Recipe) if field.type is not float]


def test_any_value_of_any_recipe_field(playground: Playground, full: bool, tally: Callable) -> None:
    def check(recipe: str, field: str, value: str) -> None:
        if (
            field == "epochs"
            and value.strip().lstrip("+").isdecimal()
            and 100 < int(value) <= 100_000
        ):
            value = value[:2]  # not a schedule of a million lines
        with contextlib.chdir(playground.folder):
            playground.run(
                ["schedule", recipe, "--images", "20", "--epochs", "3", f"--{field}", value]
            )

    before = playground.runs
    examples(
        full,
        60,
        2000,
        check,
        st.sampled_from(list(RECIPES)),
        st.sampled_from(FLOATS + OTHERS),
        VALUES,
    )
    tally(made_up_cases=playground.runs - before)


OPTIONS = {
    "sample": ["", "--seed"],
    "prepare": ["--source", "--workers"],
    "train": [
        "--seed",
        "--split",
        "--limit-classes",
        "--device",
        "--precision",
        "--micro-batch",
        "--data",
    ],
    "evaluate": ["", "--tta", "--data", "--device", "--precision"],
    "explain": ["", "--count", "--method", "--data", "--stage", "--sample", "--faithfulness"],
    "report": ["", "--out", "--data"],
    "predict": ["", "--top", "--method", "--gradcam"],
    "export": ["", "--to"],
    "find-lr": ["", "--steps", "--lowest", "--highest", "--seed"],
    "schedule": ["", "--images"],
    "summary": ["--classes", "--width"],
    "verify": [""],
    "publish": [""],
    "table": [""],
}
REQUIRED = {
    "sample": ["out.zip"],
    "prepare": ["--data", "data2"],
    "train": [*TRAIN.split()[1:], "--run", "run"],
    "evaluate": ["run"],
    "explain": ["missing"],
    "report": ["missing"],
    "predict": ["missing"],
    "export": ["missing"],
    "find-lr": ["smoke", "--data", "missing"],
    "schedule": ["smoke", "--epochs", "1"],
    "publish": ["missing"],
}


def test_any_value_of_any_option(playground: Playground, full: bool, tally: Callable) -> None:
    def check(compute: tuple[str, str], value: str) -> None:
        command, option = compute
        required = REQUIRED.get(command, [])
        if value.strip().lstrip("+").isdecimal() and int(value) > 1000:
            value += "0" * 12  # a long wait is no fault: either few or too many
        if option == "--width" and value.strip().lstrip("+").isdecimal() and len(value) < 8:
            value = value[:2]  # the widest networks that are allowed take gigabytes and minutes
        line = [command, *required, *([option, value] if option else [value])]
        with contextlib.chdir(playground.folder):
            playground.run(line)

    places = [(command, option) for command, options in OPTIONS.items() for option in options]
    before = playground.runs
    examples(full, 60, 2000, check, st.sampled_from(places), VALUES)
    assert set(OPTIONS) == set(COMMANDS)
    tally(made_up_cases=playground.runs - before)


WORDS = [
    *COMMANDS, "smoke", "published", "run", "data", "README.md", "--help", "--", "-", "--epochs", "--data", "--run",
    "--seed", "--tta", "flip", "--count", "0", "1", "-1", "--images", "--classes", "--width", "--device", "cpu", "=",
    "--epochs=1", "--nesterov", "--no-nesterov", "--mean", "0.5", "--ramp", "none", "--compile", "--source", "",
]  # fmt: skip


def test_random_command_lines(playground: Playground, full: bool, tally: Callable) -> None:
    def check(words: list[str]) -> None:
        if words[:1] == ["train"]:
            words = [*words, "--run", "README.md"]  # to be refused after all
        with contextlib.chdir(playground.folder):
            playground.run(words)

    before = playground.runs
    lists = st.lists(st.sampled_from(WORDS), max_size=7)
    started = st.tuples(st.sampled_from(list(COMMANDS)), lists).map(
        lambda pair: [pair[0], *pair[1]]
    )
    examples(full, 60, 2000, check, started | lists | st.lists(TEXT, max_size=4))
    tally(made_up_cases=playground.runs - before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def test_run_folders_with_any_json(playground: Playground, full: bool, tally: Callable) -> None:
    names = [*OBJECTS, "environment.json", "metrics.jsonl"]

    def check(name: str, which: int, value: object, whole: bool, command: str) -> None:
        path = playground.folder / "run" / name
        own = json.loads(path.read_text())
        field = sorted(own)[which % len(own)]
        path.write_text(json.dumps(value if whole else own | {field: value}) + "\n")
        try:
            with contextlib.chdir(playground.folder):
                playground.run(command.split())
        finally:
            playground.fresh()

    before = playground.runs
    commands = st.sampled_from(
        ["evaluate run", "publish run", TRAIN, "explain run --count 0"][: None if full else 3]
    )
    whole = st.integers(0, 9).map(lambda number: number == 0)
    examples(
        full, 80, 1500, check, st.sampled_from(names), st.integers(0, 99), JSON, whole, commands
    )
    tally(made_up_cases=playground.runs - before)

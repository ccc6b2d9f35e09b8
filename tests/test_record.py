"""A run folder belongs to one run and one process, says what is missing, and names no folder and no host."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import published
from tinylab.run import folder as record
from tinylab.run.environment import choose
from tinylab.run.folder import (
    Run,
    compile_cache,
    copy_run,
    default_folder,
    describe_environment,
    enter_run,
    relative_to_here,
)
from tinylab.training import train as train_module

IDENTITY = {
    "protocol": "merged",
    "classes": 3,
    "seed": 0,
    "content_sha256": "c0",
    "split_sha256": "s0",
    "data_folder": "data/x",
}
ENVIRONMENT = {
    "device": "a GPU",
    "torch": "2.6",
    "threads": 1,
    "platform": "Linux x86_64",
    "content_sha256": "c0",
    "split_sha256": "s0",
}


@pytest.fixture
def entered(tmp_path: Path, narrow: Recipe) -> Run:
    """A run that has begun."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    assert enter_run(run, narrow, IDENTITY, ENVIRONMENT) == []
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_folder_remembers_what_the_run_is(entered: Run, narrow: Recipe) -> None:
    assert entered.recipe == narrow
    assert entered.identity == IDENTITY
    assert entered.environment == ENVIRONMENT
    assert not entered.finished
    assert entered.history == []


def test_the_same_run_may_enter_again(entered: Run, narrow: Recipe) -> None:
    before = files(entered.folder)
    assert enter_run(entered, narrow, dict(IDENTITY), dict(ENVIRONMENT)) == []
    assert files(entered.folder) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("protocol", "official"), ("classes", 2), ("seed", 1), ("content_sha256", "d")],
)
def test_another_run_is_refused_naming_what_differs(
    entered: Run, narrow: Recipe, name: str, value: object
) -> None:
    before = files(entered.folder)
    with pytest.raises(
        UserError, match=rf"another run \({name} {IDENTITY[name]} -> {value}\).*--run"
    ):
        enter_run(entered, narrow, IDENTITY | {name: value}, ENVIRONMENT)
    assert files(entered.folder) == before


def test_another_recipe_is_refused_naming_every_field(entered: Run, narrow: Recipe) -> None:
    with pytest.raises(UserError, match=r"\(epochs 2 -> 3, weight_decay 0\.0001 -> 0\.1\)"):
        enter_run(entered, replace(narrow, epochs=3, weight_decay=0.1), IDENTITY, ENVIRONMENT)


def test_the_place_may_change_once_a_run_is_finished(entered: Run, narrow: Recipe) -> None:
    """Another machine shows it then; to continue it there would be another run."""
    entered.write("run.json", IDENTITY | {"precision": "fp32", "device": "cpu"})
    elsewhere = IDENTITY | {"precision": "bf16", "device": "cuda"}
    with pytest.raises(UserError, match="device cpu -> cuda, precision fp32 -> bf16"):
        enter_run(entered, narrow, elsewhere, ENVIRONMENT)
    entered.write("summary.json", {})
    before = files(entered.folder)
    assert enter_run(entered, narrow, elsewhere, ENVIRONMENT | {"torch": "3.0"}) == []
    assert files(entered.folder) == before
    with pytest.raises(UserError, match="seed 0 -> 1"):
        enter_run(entered, narrow, elsewhere | {"seed": 1}, ENVIRONMENT)


def test_data_may_move(entered: Run, narrow: Recipe) -> None:
    assert enter_run(entered, narrow, IDENTITY | {"data_folder": "elsewhere"}, ENVIRONMENT) == []
    assert entered.identity["data_folder"] == "elsewhere"


def test_another_environment_is_allowed_but_told(entered: Run, narrow: Recipe) -> None:
    later = ENVIRONMENT | {"torch": "2.7", "threads": 4}
    (notice,) = enter_run(entered, narrow, IDENTITY, later)
    assert "torch 2.6 -> 2.7" in notice
    assert "threads 1 -> 4" in notice
    assert "platform" not in notice
    assert entered.environment == later | {"earlier": [ENVIRONMENT]}
    assert enter_run(entered, narrow, IDENTITY, later) == []
    latest = later | {"torch": "2.8"}
    assert len(enter_run(entered, narrow, IDENTITY, latest)) == 1
    assert entered.environment == latest | {"earlier": [ENVIRONMENT, later]}


def test_somebody_elses_folder_is_refused_and_left_alone(tmp_path: Path, narrow: Recipe) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    run = Run(tmp_path)
    with pytest.raises(UserError, match="not empty and no run"), run.lock():
        enter_run(run, narrow, IDENTITY, ENVIRONMENT)
    assert files(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("written", [1, 2])
def test_a_start_that_was_cut_short_can_be_repeated(
    tmp_path: Path, narrow: Recipe, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """A full disk or a kill between the first files must not leave a folder that is refused for ever."""
    run, real, calls = Run(tmp_path / "run"), record.write_atomically, []

    def killed(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > written:
            path.with_name(f"{path.name}.1.tmp").write_bytes(data[:3])
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(record, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt), run.lock():
            enter_run(run, narrow, IDENTITY, ENVIRONMENT)
    with run.lock():
        assert enter_run(run, narrow, IDENTITY, ENVIRONMENT) == []
    assert run.identity == IDENTITY


def test_an_unfinished_run_says_so(entered: Run) -> None:
    for name in ("summary", "predictions"):
        with pytest.raises(
            UserError, match="not finished: `tinylab train` with the same arguments continues it"
        ):
            getattr(entered, name)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    for name in ("recipe", "identity", "environment"):
        with pytest.raises(UserError, match="no run"):
            getattr(Run(tmp_path / "missing"), name)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_record_is_named(entered: Run, text: str) -> None:
    for name in ("recipe.json", "run.json", "summary.json"):
        (entered.folder / name).write_text(text)
    for name in ("recipe", "identity", "summary"):
        with pytest.raises(UserError, match=r"\.json"):
            getattr(entered, name)


@pytest.mark.parametrize("change", [{"unknown": 1}, {"epochs": None}])
def test_a_recipe_of_another_version_is_refused(entered: Run, narrow: Recipe, change: dict) -> None:
    fields = dataclasses.asdict(narrow) | change
    entered.write(
        "recipe.json", {name: value for name, value in fields.items() if value is not None}
    )
    with pytest.raises(UserError, match=r"recipe\.json is not a recipe of this version"):
        _ = entered.recipe


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is a fork of this one")
def test_one_process_writes_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run")
    locked, lock = os.pipe()
    other = os.fork()
    if other == 0:
        with run.lock():
            os.write(lock, b"!")
            time.sleep(60)
            os._exit(1)
    try:
        assert os.read(locked, 1) == b"!"
        with pytest.raises(UserError, match=r"another process is writing .*run"), run.lock():
            pass
    finally:
        os.kill(other, signal.SIGKILL)  # however it ends, its lock ends with it
        os.waitpid(other, 0)
    for _ in range(2):
        with run.lock():
            pass


def test_a_lock_ends_with_an_error_inside(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(ValueError, match="inside"), run.lock():
        raise ValueError("inside")
    with run.lock():
        pass


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write the run folder"), Run(folder).lock():
            pass


def test_the_environment_names_versions_but_no_folder_and_no_host() -> None:
    described = describe_environment(choose("cpu", "fp32"))
    assert described["torch"]
    assert described["threads"] == 1
    assert described["precision"] == "fp32"
    assert described["device"].startswith("CPU (")
    assert re.fullmatch(r"[0-9a-f]{12}\+?", described["commit"] or "0" * 12)
    text = json.dumps(described)
    assert not re.search(r"(^|[\s\"'(])(/|~|[A-Z]:\\)\w", text), text
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


def test_the_default_folder_says_recipe_split_and_seed() -> None:
    assert default_folder(published(), "merged", 0) == Path("runs/published-merged-s0")
    assert default_folder(published(), "select", 3) == Path("runs/published-select-s3")


def test_paths_below_here_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert relative_to_here(tmp_path / "data" / "x") == "data/x"
    assert relative_to_here(Path("data/../data/x")) == "data/x"
    assert relative_to_here(tmp_path.parent / "x") == str(tmp_path.parent / "x")


def test_the_environment_names_data_and_split(finished_run: Run) -> None:
    for name in ("content_sha256", "split_sha256"):
        assert finished_run.environment[name] == finished_run.identity[name]


def test_a_copy_of_a_run_is_whole_or_no_finished_run(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to Drive and back: the summary comes last, and all is read again."""
    copied = copy_run(finished_run, tmp_path / "drive" / "run")
    assert copied.finished
    assert copied.summary == finished_run.summary
    assert not copied.trained
    assert copy_run(copied, tmp_path / "back").summary == finished_run.summary

    real = record.write_atomically

    def fails_at(name: str) -> None:
        def write(path: Path, data: bytes) -> None:
            if path.name == name:
                raise UserError(f"cannot write {path}")
            real(path, data)

        monkeypatch.setattr(record, "write_atomically", write)

    for name in (*record.FINAL_FILES, record.CHECKSUMS, "summary.json"):
        fails_at(name)
        with pytest.raises(UserError, match="cannot write"):
            copy_run(finished_run, tmp_path / name)
        assert not Run(tmp_path / name).finished
    monkeypatch.setattr(record, "write_atomically", lambda path, data: real(path, data[:-1] + b"x"))
    with pytest.raises(UserError, match="damaged"):
        copy_run(finished_run, tmp_path / "lying")
    (copied.folder / "predictions.npz").unlink()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot copy .*predictions\.npz: No such file"):
        copy_run(copied, tmp_path / "another")


def test_a_finished_run_comes_back_and_what_is_of_no_use_is_told(
    finished_run: Run, tmp_path: Path
) -> None:
    kept = copy_run(finished_run, tmp_path / "drive")
    assert record.restore_run(Run(tmp_path / "run"), kept.folder) is None
    assert Run(tmp_path / "run").summary == finished_run.summary
    (kept.folder / record.CHECKSUMS).unlink()  # a run of before there was this file
    assert record.restore_run(Run(tmp_path / "run"), kept.folder) is None  # it is here already
    assert "is of no use: " in record.restore_run(Run(tmp_path / "another"), kept.folder)
    assert not Run(tmp_path / "another").finished
    assert record.restore_run(Run(tmp_path / "third"), tmp_path / "nothing") is None


def test_a_run_of_before_the_class_order_was_noted_is_still_shown(
    train_tiny: Callable[..., Run], finished_run: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.write(
        "run.json",
        {name: value for name, value in run.identity.items() if name != "class_order_sha256"},
    )
    assert train_tiny(tmp_path / "run").finished


def test_a_compiled_run_that_is_finished_is_shown_by_whoever_asks(
    entered: Run, narrow: Recipe
) -> None:
    compiled = Run(entered.folder.with_name("compiled"))
    compiled.folder.mkdir()
    enter_run(compiled, narrow, IDENTITY | {"compiled": True}, dict(ENVIRONMENT))
    with pytest.raises(UserError, match="compiled True -> None"):
        enter_run(compiled, narrow, IDENTITY, dict(ENVIRONMENT))
    compiled.write("summary.json", {})
    assert enter_run(compiled, narrow, IDENTITY, dict(ENVIRONMENT)) == []


def test_compiled_code_that_is_there_already_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert compile_cache() == "empty"
    (tmp_path / "cache" / "aa").mkdir(parents=True)
    assert compile_cache() == "filled"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compile_cache() == "empty"
    (tmp_path / "torchinductor_somebody" / "aa").mkdir(parents=True)
    assert compile_cache() == "filled"


def test_code_without_its_history_may_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setenv("TINYLAB_COMMIT", "0123456789ab")
    told = describe_environment(choose("cpu", "fp32"))["commit"]
    assert told != "0123456789ab" or not (Path(record.__file__).parents[2] / ".git").exists()
    monkeypatch.setattr("tinylab.run.folder.subprocess.run", no_git)
    assert describe_environment(choose("cpu", "fp32"))["commit"] == "0123456789ab"
    monkeypatch.delenv("TINYLAB_COMMIT")
    assert describe_environment(choose("cpu", "fp32"))["commit"] is None


def test_an_unsaved_run_may_begin_anew_in_smaller_pieces(
    train_tiny: Callable[..., Run], narrow: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try ran out of memory before it saved anything; the second is the one that is recorded."""

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", exhausted)
        with pytest.raises(UserError, match="out of memory"):
            train_tiny(tmp_path / "run")
    recipe = replace(narrow, micro_batch=2)
    assert train_tiny(tmp_path / "run", recipe).recipe == recipe
    assert train_tiny(tmp_path / "run", recipe).finished


@pytest.mark.parametrize(
    "damage", [{"muon_learning_rate": 0}, {"muon_learning_rate": "1"}, {"base_momentum": 1.0}]
)
def test_an_older_muon_recipe_that_is_damaged_is_refused(
    train_tiny: Callable[..., Run], narrow: Recipe, tmp_path: Path, damage: dict
) -> None:
    run = train_tiny(tmp_path / "run", replace(narrow, epochs=1))
    fields = json.loads((run.folder / "recipe.json").read_text()) | {"optimizer": "muon"} | damage
    del fields["muon_weight_decay"]
    run.write("recipe.json", fields)
    with pytest.raises(UserError, match=r"recipe\.json|must be"):
        _ = run.recipe

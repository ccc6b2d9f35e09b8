"""The run folder: what is recorded, whose it is, and that damage is found."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tinylab.exceptions import UserError
from tinylab.files import as_csv, lock, plain_text, printable, write_atomically
from tinylab.recipes import RECIPES, published
from tinylab.run.folder import (
    Run,
    default_folder,
    enter_run,
    in_todays_terms,
    read_recipe,
    refuse_another,
    refuse_foreign,
)  # fmt: skip
from tinylab.run.verify import copy_run, restore_run, verify_run

IDENTITY = {
    "protocol": "merged", "classes": 3, "seed": 0, "precision": "fp32", "device": "cpu",
    "content_sha256": "c" * 64, "split_sha256": "5" * 64, "data_folder": "data",
}  # fmt: skip
ENVIRONMENT = {"device": "CPU", "precision": "fp32", "torch": "2.14"}


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be changed."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path)
    run.write("recipe.json", asdict(RECIPES[name]()))
    assert run.recipe == RECIPES[name]()


def test_recipes_of_older_versions_are_read_in_todays_terms(tmp_path: Path) -> None:
    recipe = replace(published(), optimizer="muon")
    fields = asdict(recipe)
    del fields["muon_weight_decay"], fields["micro_batch"]
    run = Run(tmp_path)
    run.write("recipe.json", fields)
    run.write("run.json", IDENTITY | {"micro_batch": 8})
    decay = recipe.weight_decay * recipe.max_learning_rate / recipe.muon_learning_rate
    decay /= 1 - recipe.base_momentum
    assert run.recipe == replace(recipe, muon_weight_decay=decay, micro_batch=8)
    assert in_todays_terms({"optimizer": "sgd"})["muon_weight_decay"] == 0.075
    run.write("recipe.json", fields | {"unheard_of": 1})
    with pytest.raises(UserError, match="not a recipe of this version"):
        _ = run.recipe


def test_a_folder_is_entered_and_entered_again(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), published()
    assert not run.begun
    assert enter_run(run, recipe, dict(IDENTITY), dict(ENVIRONMENT)) == []
    assert run.begun
    assert (run.identity, run.recipe) == (IDENTITY, recipe)
    assert enter_run(run, recipe, IDENTITY | {"data_folder": "moved"}, dict(ENVIRONMENT)) == []
    assert run.identity["data_folder"] == "moved"
    notice, changed = enter_run(run, recipe, dict(IDENTITY), ENVIRONMENT | {"torch": "2.15"})
    assert notice == "note: the environment has changed: the last bits may differ"
    assert changed == "  torch: 2.14 -> 2.15"
    assert run.environment["earlier"][0]["torch"] == "2.14"
    assert (
        enter_run(run, recipe, dict(IDENTITY), ENVIRONMENT | {"torch": "2.15", "date": "x"}) == []
    )


def test_another_runs_folder_and_checkpoint_are_refused(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), published()
    enter_run(run, recipe, dict(IDENTITY), dict(ENVIRONMENT))
    now = asdict(recipe) | IDENTITY
    refuse_another(run, now)
    refuse_another(run, now, now)
    with pytest.raises(UserError, match=r"another run \(epochs 30 -> 5\): choose another --run"):
        refuse_another(run, now | {"epochs": 5})
    with pytest.raises(UserError, match=rf"content_sha256 {'c' * 12} -> {'d' * 12}\)"):
        refuse_another(run, now | {"content_sha256": "d" * 64})
    with pytest.raises(UserError, match=r"the checkpoint is of another run \(seed 1 -> 0\)"):
        refuse_another(run, now, now | {"seed": 1})
    refuse_another(run, now | {"micro_batch": 8})  # nothing is trained yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="micro_batch None -> 8"):
        refuse_another(run, now | {"micro_batch": 8})
    run.write("summary.json", {})  # finished: it is only shown
    refuse_another(run, now | {"device": "cuda", "precision": "fp16", "compiled": True})


def test_a_folder_with_somebodys_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty and no run"):
        refuse_foreign(Run(tmp_path))


DAMAGED = {
    "run.json": ("{", "run.json is damaged .*: bring back a copy, or delete"),
    "recipe.json": ("[]", "recipe.json is damaged"),
    "environment.json": ('{"device": 3}', "it has no device of type str"),
    "summary.json": ('{"test_top1": NaN}', "it has no"),
    "metrics.jsonl": ('{"epoch": 1}\n', "it has no learning_rate"),
    "predictions.npz": ("PK", "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_missing_records_are_one_line(run: Run, name: str) -> None:
    content, expected = DAMAGED[name]
    (run.folder / name).write_text(content)

    def read_all() -> None:
        _ = run.identity, run.recipe, run.environment, run.summary, run.history, run.predictions

    with pytest.raises(UserError, match=expected) as caught:
        read_all()
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=name):
        verify_run(run)


def test_no_pickle_is_loaded(run: Run) -> None:
    content = {"rows": np.array([{}], dtype=object), "labels": np.zeros(1), "logits": np.zeros(1)}
    np.savez(run.folder / "predictions.npz", **content)
    with pytest.raises(UserError, match="is damaged"):
        _ = run.predictions


def test_a_run_is_copied_whole_and_comes_back(run: Run, tmp_path: Path) -> None:
    kept = copy_run(run, tmp_path / "kept")
    assert kept.summary == run.summary
    assert not kept.checkpoints.exists()
    fresh = Run(tmp_path / "fresh")
    assert restore_run(fresh, kept.folder) is None
    assert fresh.predictions["rows"].tolist() == run.predictions["rows"].tolist()
    (kept.folder / "metrics.jsonl").write_text("")
    assert "is of no use" in restore_run(Run(tmp_path / "other"), kept.folder)


def test_default_folder_and_explanation(run: Run) -> None:
    assert default_folder(published(), 3) == Path("runs/published-merged-s3")
    assert run.explanation is None
    record = {"model_sha256": "x", "tested": 1, "wrong": 1, "method": "gradcam", "images": []}
    record |= {"figures": [], "errors": {}, "label_conflicts": {}}
    run.write("explain.json", record)
    assert run.explanation is None  # of other weights
    run.write("explain.json", record | {"model_sha256": run.summary["model_sha256"]})
    assert run.explanation["tested"] == 1


# --- Files ----------------------------------------------------------------------------------------


def test_an_atomic_write_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"one")
    write_atomically(path, b"tw", b"o", keep_as=tmp_path / "before")
    assert (path.read_bytes(), (tmp_path / "before").read_bytes()) == (b"two", b"one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x \(5 bytes\): No space left"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["before", "x"]


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path, refused = tmp_path / "x", pytest.raises(UserError, match="another process is writing")
    with lock(path), refused, lock(path):
        pass
    with lock(tmp_path / "x"):
        pass


def test_text_is_made_harmless() -> None:
    assert as_csv([["a", "=1+1", " @x", -1, "ü"]]).decode() == "a,'=1+1,' @x,-1,ü\n"
    assert printable("a\x1b[31m\u202eb\ud800\n") == "a[31mb"
    assert plain_text("<b>|[x](http://y) www.z") == (
        "&#60;b&#62;&#124;&#91;x&#93;(http&#58;//y) www&#46;z"
    )
    assert json.loads(json.dumps(printable("x" * 500))) == "x" * 200


def test_a_recipe_comes_from_a_file(finished_run: Run, tmp_path: Path) -> None:
    path, fields = tmp_path / "mine.json", asdict(finished_run.recipe)
    assert read_recipe(finished_run.folder / "recipe.json") == finished_run.recipe
    wrong = {
        "epochs must be a valid integer": fields | {"epochs": 1.5},
        "unknown field epoch: did you mean epochs": fields | {"epoch": 3},
        "epochs is missing": {name: fields[name] for name in fields if name != "epochs"},
        "base_momentum must be at most max_momentum": fields | {"base_momentum": 0.99},
        "'list' object": [],
    }
    for said, content in wrong.items():
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"mine.json is no recipe: {said}"):
            read_recipe(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"mine\.json is no recipe: Expecting"):
        read_recipe(path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.json")

"""The run folder.

recipe.json        every field of the recipe
run.json           what else decides the result: protocol, seed, classes, hashes, number format
environment.json   GPU or CPU, versions, commit
metrics.jsonl      one object per epoch
checkpoints/       what a stopped run continues from
model.safetensors  the final weights, with class list, normalisation, recipe and metrics
predictions.npz    test rows, labels, logits (float16)
summary.json       the final numbers; its presence says that the run is finished
SHA256SUMS         of the files above, as sha256sum writes and checks it
explain.json, classes.csv, confusion.csv, localisation.csv, figures/     by `tinylab explain`
report.html        by `tinylab report`
tensorboard/, wandb/     by `tinylab train --track`
"""

import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylab.data.archive import DATA_NAMES
from tinylab.exceptions import UserError
from tinylab.files import lock, printable, sweep, write_atomically
from tinylab.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[3]
FINAL_FILES = (
    "recipe.json", "run.json", "environment.json", "metrics.jsonl", "predictions.npz",
    "model.safetensors",
)  # fmt: skip
"""Files of a finished run that never change again, summary.json apart."""
EXPLAINED = ("explain.json", "classes.csv", "confusion.csv", "localisation.csv")
CHECKSUMS = "SHA256SUMS"
NO_RUN = "this folder is no run"
UNFINISHED = "the run is not finished: `tinylab train` with the same arguments continues it"

# Fields that a record must have, and their types. A whole number serves as a float.
IDENTITY = {"content_sha256": str, "protocol": str, "classes": int, "split_sha256": str}
ENVIRONMENT = {"device": str, "precision": str, "torch": str}
SUMMARY = {
    "model_sha256": str, "recipe": str, "protocol": str, "classes": int, "seed": int,
    "epochs": int, "train_images": int, "test_images": int, "test_top1": float,
    "test_top5": float, "train_seconds": float,
}  # fmt: skip
EPOCH = {
    "epoch": int, "learning_rate": float, "train_loss": float, "train_top1": float,
    "train_top5": float, "train_seconds": float, "eval_seconds": float, "images_per_second": float,
}  # fmt: skip
TEST = {
    "test_loss": float, "test_top1": float, "test_top5": float, "test_correct": int,
    "test_total": int,
}  # fmt: skip
EXPLANATION = {
    "model_sha256": str, "tested": int, "wrong": int, "method": str, "images": list,
    "figures": list, "errors": dict, "label_conflicts": dict,
}  # fmt: skip
TIMING = ("date", "precision_reason", "power_limit_watts", "compile_cache", "earlier_runs")
"""Fields of the environment that affect timing only."""


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not. Reading raises `UserError` if a file is missing or damaged."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def begun(self) -> bool:
        """Whether the folder is a run's."""
        return (self.folder / "run.json").exists()

    @property
    def trained(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return any(self.checkpoints.glob("*.ckpt"))

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def recipe(self) -> Recipe:
        identity = self.identity if self.begun else {}
        fields = read_object(self.folder / "recipe.json", NO_RUN)
        try:
            whole, other = in_todays_terms(identity | fields), identity.keys() - {"micro_batch"}
            return Recipe(**{n: as_tuple(value) for n, value in whole.items() if n not in other})
        except (KeyError, TypeError, ZeroDivisionError) as error:
            reason = f"is not a recipe of this version of tinylab: {error}"
            raise UserError(f"{self.folder}/recipe.json {reason}") from error

    @property
    def identity(self) -> dict:
        """What decides the result besides the recipe."""
        return read_object(self.folder / "run.json", NO_RUN, IDENTITY)

    @property
    def environment(self) -> dict:
        return read_object(self.folder / "environment.json", NO_RUN, ENVIRONMENT)

    @property
    def summary(self) -> dict:
        return read_object(self.folder / "summary.json", UNFINISHED, SUMMARY)

    @property
    def explanation(self) -> dict | None:
        """What `explain.json` holds; None if this version has not yet explained these weights."""
        with contextlib.suppress(UserError):
            record = read_object(self.folder / "explain.json", "not yet explained", EXPLANATION)
            return record if record["model_sha256"] == self.summary["model_sha256"] else None

    @property
    def title(self) -> str:
        """The run in a few words, for figures and tables."""
        recipe, identity = self.recipe, self.identity
        of = "" if self.data == "Tiny ImageNet" else f" of {self.data}"
        images = f"{identity['classes']} classes{of}, {identity['protocol']} split"
        return f"{recipe.name}: {images}, {recipe.epochs} epochs"

    @property
    def data(self) -> str:
        """What it was trained on: "Tiny ImageNet", "made-up shapes", or the name of own images."""
        other = self.identity.get("data_title", "other images")
        return DATA_NAMES.get(self.identity["content_sha256"], printable(other))

    @property
    def course_run(self) -> list[dict]:
        """The course run's log, strings by epoch, for a run on all 200 classes; else nothing."""
        comparable = self.data == "Tiny ImageNet" and self.identity["classes"] == 200
        return published_history() if comparable else []

    @property
    def history(self) -> list[dict]:
        """A dictionary per epoch, as in metrics.jsonl: percent, nats per image, seconds.

        An epoch without a test lacks the fields that begin with `test_`.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        with reading(path):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                require_fields(row, EPOCH if TEST.keys().isdisjoint(row) else EPOCH | TEST)
        return rows

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """rows int64 (N,), labels int64 (N,), logits float16 (N, classes) of the test images."""
        path = self.folder / "predictions.npz"
        with reading(path, UNFINISHED), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("rows", "labels", "logits")}

    def write_predictions(self, **arrays: np.ndarray) -> None:
        """Write what `predictions` reads."""
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_atomically(self.folder / "predictions.npz", content.getvalue())

    def write(self, name: str, value: dict) -> None:
        write_atomically(self.folder / name, as_json(value))

    def write_history(self, history: list[dict]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_atomically(self.folder / "metrics.jsonl", lines.encode())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and hold it: one writer at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        with lock(self.folder):
            yield

    def sweep(self) -> None:
        """Remove what a killed process was writing; only the holder of the lock may call this."""
        sweep(self.folder)


# --- Records --------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path, missing: str = NO_RUN) -> Iterator[None]:
    """Turn all that reading a record may raise into a `UserError`.

    missing: what it means if there is no such file.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {missing}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (
        ValueError, TypeError, KeyError, EOFError, RecursionError, MemoryError, zipfile.BadZipFile,
        zlib.error, NotImplementedError,
    ) as error:  # fmt: skip
        way_out = f"bring back a copy, or delete {path.parent} and train again"
        raise UserError(f"{path} is damaged ({printable(error)}): {way_out}") from error


def read_object(path: Path, missing: str, fields: dict[str, type] | None = None) -> dict:
    """Return the JSON object in a file with fields of those types."""
    with reading(path, missing):
        value = json.loads(path.read_text(encoding="utf-8"))
        require_fields(value, fields or {})
        return value


def require_fields(record: dict, fields: dict[str, type]) -> None:
    """Raise `TypeError` unless the record has fields of those types."""
    if not isinstance(record, dict):
        raise TypeError("a JSON object is expected")
    for name, kind in fields.items():
        value = record.get(name)
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is float and not math.isfinite(value)):
            raise TypeError(f"it has no {name} of type {kind.__name__}")


def as_json(value: dict) -> bytes:
    """Return indented JSON; a lone surrogate, which UTF-8 does not know, becomes its escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def as_tuple(value: object) -> object:
    """Return JSON's lists as the tuples that they were."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def in_todays_terms(fields: dict) -> dict:
    """Return a recipe's fields as recorded, and those that an older version did not know."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    added = {name: defaults[name] for name in ("micro_batch", "muon_weight_decay")}
    added["split"] = fields.get("protocol", defaults["split"])
    if fields.get("optimizer") == "muon" and "muon_weight_decay" not in fields:
        # It divided Muon's decay by Muon's learning rate.
        peaks = fields["max_learning_rate"] / fields["muon_learning_rate"]
        added["muon_weight_decay"] = fields["weight_decay"] * peaks / (1 - fields["base_momentum"])
    return added | fields


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a file like a run's recipe.json; `UserError` names what does not fit."""
    known = {field.name: field.default for field in dataclasses.fields(Recipe)}
    try:
        values = in_todays_terms(json.loads(path.read_text(encoding="utf-8")))
        for name in values.keys() - known.keys():
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"unknown field {name}" + "".join(f": did you mean {x}?" for x in near))
        for name in known:
            if name not in values and known[name] is dataclasses.MISSING:
                raise UserError(f"{name} is missing")
        return Recipe(**{name: as_tuple(value) for name, value in values.items()})
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (UserError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is no recipe: {printable(error)}") from error


def hashes(identity: dict) -> dict:
    """Return the hashes of data and split."""
    return {name: value for name, value in identity.items() if name.endswith("sha256")}


def default_folder(recipe: Recipe, seed: int) -> Path:
    """Return runs/<recipe>-<split>-s<seed>."""
    return Path("runs") / f"{recipe.name}-{recipe.split}-s{seed}"


def relative_to_here(path: Path) -> str:
    """Return the path as seen from the working folder if it lies below it, else absolute."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def published_history(results: Path = REPOSITORY / "results") -> list[dict]:
    """Return the course run's log, strings by epoch; nothing outside a checkout."""
    path = results / "reference" / "published_run.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- Whose folder it is ---------------------------------------------------------------------------


def enter_run(
    run: Run, recipe: Recipe, identity: dict, environment: dict, elsewhere: dict | None = None
) -> list[str]:
    """Make a locked folder, which is nobody else's, this run's; return what to say of changes.

    elsewhere: the environment in which the run has begun in another folder.
    """
    environment |= hashes(identity)
    if not run.begun:
        run.write("environment.json", elsewhere or environment)
    if not run.begun or not (run.finished or (run.identity, run.recipe) == (identity, recipe)):
        run.write("recipe.json", dataclasses.asdict(recipe))
        run.write("run.json", identity)  # last: a folder that has it is complete
    before = run.environment
    same_code = before.get("source_sha256") == environment.get("source_sha256")
    changed = [
        f"  {key}: {short(before.get(key))} -> {short(value)}"
        for key, value in environment.items()
        if key not in TIMING and before.get(key) != value and not (key == "commit" and same_code)
    ]
    if not changed or run.finished:
        return []
    run.write("environment.json", environment | {"earlier": [*before.pop("earlier", []), before]})
    what = "the last bits" if same_code else "results"
    return [f"note: the environment has changed: {what} may differ", *changed]


def short(value: object) -> object:
    """Return the first digits of a hash, or of a source text's, and any other value as it is."""
    if isinstance(value, str) and "\n" in value:
        value = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return value[:12] if digest else value


def refuse_foreign(run: Run) -> None:
    """Raise `UserError` if the folder, in which no run has begun, holds somebody's files."""
    own = {"recipe.json", "environment.json", "figures"}  # of a run cut off in its first second
    if any(path.name not in own and path.suffix != ".tmp" for path in run.folder.iterdir()):
        raise UserError(f"{run.folder} is not empty and no run; choose another --run")


def require_writable(path: Path, run: Run | None = None) -> None:
    """Raise `UserError` for a path that cannot be made, before anything is computed for it.

    run: none of its records may be replaced.
    """
    above = [path.parent, *path.absolute().parents]
    nearest = next(each for each in above if each.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {path}: {nearest} is no folder")
    for folder in (path, *above):
        if (folder / "meta.json").exists() and (folder / "images.npy").exists():
            raise UserError(f"cannot write {path}: {folder} is a data folder")
    records = (*FINAL_FILES, *EXPLAINED, CHECKSUMS, "summary.json") if run else ()
    if path.resolve() in {(run.folder / name).resolve() for name in records}:
        raise UserError(f"{path} is a record of the run: choose another name")


def refuse_another(run: Run, now: dict, saved: dict | None = None) -> None:
    """Raise `UserError`, naming what differs, if the folder or the checkpoint is another run's.

    now, saved: recipe and identity together.
    """
    recorded = dataclasses.asdict(run.recipe) | run.identity if saved is None else saved
    before = json.loads(json.dumps(in_todays_terms(recorded)))
    now = json.loads(json.dumps(now))
    may_differ = {"data_folder", "data_title"}  # the content hash says whether it is the same data
    if saved is None:
        if "class_order_sha256" not in before:  # of an older version; the content hash covers it
            may_differ.add("class_order_sha256")
        if run.finished:  # it is only shown
            may_differ |= {"device", "precision", "compiled"}
        elif not run.trained:  # the first try may have shown that memory is short
            may_differ |= {"micro_batch", "transform", "model", "loss", "init_sha256"}

    changes = [
        f"{key} {short(before.get(key))} -> {short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if key not in may_differ and before.get(key) != now.get(key)
    ]
    if changes:
        changes[5:] = [f"{len(changes) - 5} more"] if len(changes) > 5 else []
        changes = ", ".join(changes)
        if saved is not None:
            ways = f"the checkpoint is of another run ({changes}): choose another --run or --mirror"
        else:
            ways = f"{run.folder} holds another run ({changes}): choose another --run (in the"
            ways += " notebook: RUN)"
        raise UserError(f"{ways}, or delete it")


def note_figures(run: Run, figures: Path) -> None:
    """Leave in the folder `figures` which run they show."""
    numbers = ("test_top1", "test_top5", "test_images", "train_images", "classes")
    where = ("device", "precision", "torch", "commit", "date")
    record = {"run": run.folder.name, "title": run.title}
    record |= {name: run.summary[name] for name in numbers}
    record |= {name: run.environment.get(name) for name in where}
    write_atomically(figures / "figures.json", as_json(record))

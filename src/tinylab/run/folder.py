"""The run folder, and the environment a number was measured in.

recipe.json        every field of the recipe
run.json           what else decides the result: protocol, seed, classes, hashes of data and split, number format
environment.json   GPU or CPU, versions, commit
metrics.jsonl      one object per epoch
checkpoints/       what a stopped run continues from
model.safetensors  the final weights, with class list, normalisation, recipe and metrics in its metadata
predictions.npz    test rows, labels, logits (float16)
summary.json       the final numbers; its presence says that the run is finished
SHA256SUMS         of the files above, as sha256sum writes and checks it
explain.json, classes.csv, confusion.csv, localisation.csv, figures/     what `tinylab explain` found out
report.html        what `tinylab report` made of all this
tensorboard/       what `tinylab train --track tensorboard` left
"""

import contextlib
import csv
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from tinylab.exceptions import UserError
from tinylab.files import lock, write_atomically
from tinylab.recipe import Recipe
from tinylab.run.checkpoint import NEWEST, PREVIOUS, read, sweep
from tinylab.run.environment import Compute, device_name

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not."""

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
        """Raises `UserError` if the folder is no run, or was written by another version of the recipe."""
        older = {"micro_batch": self._read("run.json").get("micro_batch")} if self.begun else {}
        fields = older | self._read("recipe.json")
        try:
            return Recipe(
                **{name: as_tuple(value) for name, value in in_todays_terms(fields).items()}
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(
                f"{self.folder}/recipe.json is not a recipe of this version of tinylab: {error}"
            ) from error

    @property
    def identity(self) -> dict:
        """What decides the result besides the recipe. Raises `UserError` if the folder is no run."""
        needs = {"content_sha256": str, "protocol": str, "classes": int, "split_sha256": str}
        return self._read("run.json", needs=needs)

    @property
    def environment(self) -> dict:
        return self._read("environment.json")

    @property
    def summary(self) -> dict:
        unfinished = "the run is not finished: `tinylab train` with the same arguments continues it"
        return self._read("summary.json", unfinished, needs=SUMMARY)

    @property
    def explanation(self) -> dict | None:
        """What `explain.json` holds; None if this version of tinylab has not yet explained these weights."""
        try:
            found = read_object(self.folder / "explain.json", "not yet explained", EXPLANATION)
        except UserError:
            return None
        return found if found["model_sha256"] == self.summary["model_sha256"] else None

    @property
    def title(self) -> str:
        """The run in a few words, for figures and tables."""
        identity, recipe = self.identity, self.recipe
        return f"{recipe.name}: {identity['classes']} classes, {identity['protocol']} split, {recipe.epochs} epochs"

    @property
    def history(self) -> list[dict]:
        """One dictionary per finished epoch, as in metrics.jsonl: accuracies in percent, losses in nats, seconds. An
        epoch that was not tested lacks the fields that begin with `test_`."""
        path = self.folder / "metrics.jsonl"
        if not os.path.lexists(path):
            return []
        try:
            rows = [_parse(line) for line in _content(path).splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read: {_reason(error)}; delete {self.folder} and train again"
            ) from error
        for row in rows:
            tested = TEST if isinstance(row, dict) and not TEST.keys().isdisjoint(row) else {}
            if not isinstance(row, dict) or (wrong := _of_other_types(row, EPOCH | tested)):
                lacks = wrong if isinstance(row, dict) else "its fields"
                raise UserError(
                    f"{path} lacks {lacks}, or has them of another type: tinylab did not write it"
                )
        return rows

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """rows int64 (N,) into the data set, labels int64 (N,), logits float16 (N, classes) of the test images."""
        path = self.folder / "predictions.npz"
        if not os.path.lexists(path):
            raise UserError(
                f"{path} is missing: the run is not finished: `tinylab train` with the same arguments continues it"
            )
        broken = (
            OSError,
            ValueError,
            EOFError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
        )
        try:
            _require_file(path)
            with zipfile.ZipFile(path) as members:
                if sum(member.file_size for member in members.infolist()) > LARGEST:
                    raise ValueError("it is too large")
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise ValueError("it holds something else than arrays")
        except broken as error:
            raise UserError(f"{path} is damaged: delete {self.folder} and train again") from error
        return found

    def write(self, name: str, value: dict) -> None:
        write_atomically(self.folder / name, _as_json(value))

    def write_history(self, history: list[dict]) -> None:
        write_atomically(
            self.folder / "metrics.jsonl",
            "".join(json.dumps(row) + "\n" for row in history).encode(),
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and holds it: one writer at a time. Raises `UserError` if that is impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.folder}: {error.strerror}"
            ) from error
        with lock(self.folder):
            yield

    def sweep(self) -> None:
        """Removes what a killed process was writing here; only the holder of the lock may call this."""
        sweep(self.folder)

    def _read(
        self,
        name: str,
        otherwise: str = "this folder is no run",
        needs: dict[str, type] | None = None,
    ) -> dict:
        return read_object(self.folder / name, otherwise, needs)


# --- Reading what may be anybody's ------------------------------------------------------------------------------------

LARGEST = 1 << 30
"""Bytes that no record comes near: predictions of all test images have 14 MB."""

SUMMARY = {
    "model_sha256": str, "recipe": str, "protocol": str, "classes": int, "seed": int, "epochs": int,
    "train_images": int, "test_images": int, "test_top1": float, "test_top5": float, "train_seconds": float,
}  # fmt: skip
EPOCH = {
    "epoch": int, "learning_rate": float, "train_loss": float, "train_top1": float, "train_top5": float,
    "train_seconds": float, "eval_seconds": float, "images_per_second": float,
}  # fmt: skip
TEST = {
    "test_loss": float,
    "test_top1": float,
    "test_top5": float,
    "test_correct": int,
    "test_total": int,
}
ENVIRONMENT = {"device": str, "precision": str, "torch": str}
EXPLANATION = {
    "model_sha256": str, "tested": int, "wrong": int, "method": str, "images": list, "figures": list,
    "errors": dict, "label_conflicts": dict,
}  # fmt: skip
"""Fields that a record must have, and their types."""


def read_object(path: Path, otherwise: str, needs: dict[str, type] | None = None) -> dict:
    """The JSON object in the file at `path`. Raises `UserError` if the file is missing (`otherwise` says what that
    means), is no such file, or lacks one of the fields of those types; numbers must be finite."""
    try:
        value = _parse(_content(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {otherwise}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not what tinylab writes: a JSON object is expected")
    if wrong := _of_other_types(value, needs or {}):
        raise UserError(
            f"{path} lacks {wrong}, or has them of another type: this version of tinylab did not write it"
        )
    return value


def read_text(path: Path) -> str:
    """The text in the file at `path`. Raises `UserError` if it cannot be read."""
    try:
        return _content(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _content(path: Path) -> str:
    _require_file(path)
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError("it is too large")
    return data.decode("utf-8")


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # a pipe would be waited for, a device might never end


def _parse(text: str) -> object:
    """JSON as tinylab writes it: without NaN, which is no JSON. Raises `ValueError`."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _of_other_types(value: dict, needs: dict[str, type]) -> str:
    """The fields that are missing or of another type, separated by commas. A whole number serves as a float."""

    def fits(field: object, wanted: type) -> bool:
        if wanted is float:
            return type(field) is int or (type(field) is float and math.isfinite(field))
        return type(field) is wanted

    return ", ".join(name for name, wanted in needs.items() if not fits(value.get(name), wanted))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def as_tuple(value: object) -> object:
    """JSON's lists as the tuples that they were."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def in_todays_terms(fields: dict) -> dict:
    """A recipe's fields as recorded, and those that an older version did not know, as it acted."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    added = {name: defaults[name] for name in ("micro_batch", "muon_weight_decay")}
    if (
        fields.get("optimizer") == "muon" and "muon_weight_decay" not in fields
    ):  # it derived Muon's decay
        peaks = fields["max_learning_rate"] / fields["muon_learning_rate"]
        added["muon_weight_decay"] = fields["weight_decay"] * peaks / (1 - fields["base_momentum"])
    return added | fields


def default_folder(recipe: Recipe, protocol: str, seed: int) -> Path:
    """runs/<recipe>-<protocol>-s<seed>."""
    return Path("runs") / f"{recipe.name}-{protocol}-s{seed}"


def refuse_foreign(run: Run) -> None:
    """Raises `UserError` if the folder, in which no run has begun, holds somebody's files."""
    own = {
        "recipe.json",
        "environment.json",
        "figures",
    }  # what a run that was cut off in its first second left
    if any(path.name not in own and path.suffix != ".tmp" for path in run.folder.iterdir()):
        raise UserError(f"{run.folder} is not empty and no run; choose another --run")


def enter_run(
    run: Run, recipe: Recipe, identity: dict, environment: dict, elsewhere: dict | None = None
) -> list[str]:
    """Makes the locked folder this run's, or finds that it is already; returns lines for the user about what changed.
    elsewhere: the environment in which the run has begun in another folder, if it has.

    Raises `UserError` if the folder belongs to a run that differs in anything that decides the result, naming what.
    """
    environment |= hashes(identity)
    if not run.begun:
        refuse_foreign(run)
        run.write("recipe.json", dataclasses.asdict(recipe))
        run.write("environment.json", elsewhere or environment)
        run.write("run.json", identity)  # last: a folder that has it is complete
        return _environment_notice(run, environment)
    refuse_another(run, dataclasses.asdict(recipe) | identity)
    if not run.finished and (run.identity != identity or run.recipe != recipe):
        run.write("recipe.json", dataclasses.asdict(recipe))
        run.write("run.json", identity)
    return _environment_notice(run, environment)


def refuse_another(run: Run, now: dict, before: dict | None = None) -> None:
    """Raises `UserError`, naming what differs, if `now`, the recipe's fields and the identity, is not what the run in
    the folder is, or what a checkpoint says that it is of (`before`)."""
    checkpoint = before is not None
    before = _plain(
        in_todays_terms(before) if checkpoint else dataclasses.asdict(run.recipe) | run.identity
    )
    now = _plain(now)
    where = {"data_folder"}  # may move; the content hash says whether it is the same data
    if "class_order_sha256" not in before and not checkpoint:
        where |= {
            "class_order_sha256"
        }  # of before there was this field; the content hash covers it
    if run.finished:
        where |= {"device", "precision", "compiled"}  # it is only shown
    elif not run.trained and not checkpoint:
        where |= {"micro_batch"}  # the first try may have told that memory is short
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in where and before.get(key) != now.get(key)
    ]
    if not differing:
        return
    changes = ", ".join(
        f"{key} {_short(before.get(key))} -> {_short(now.get(key))}" for key in differing
    )
    if checkpoint:
        raise UserError(
            f"the checkpoint is of another run ({changes}): choose another --run or --mirror, or delete it"
        )
    raise UserError(
        f"{run.folder} holds another run ({changes}): choose another --run (in the notebook: RUN), or delete it"
    )


def _plain(fields: dict) -> dict:
    """The fields as JSON gives them back."""
    return json.loads(json.dumps(fields))


def _short(value: object) -> object:
    """A value for a message: of a hash its first twelve digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _as_json(value: dict) -> bytes:
    # A lone surrogate, which UTF-8 does not know, becomes the very escape that JSON has for it.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def hashes(identity: dict) -> dict:
    """The hashes of data and split stand in environment.json, too: a number is worth nothing without them."""
    return {name: value for name, value in identity.items() if name.endswith("sha256")}


CIRCUMSTANCES = ("date", "precision_reason", "power_limit_watts", "compile_cache", "earlier_runs")
"""Fields of the environment that no bit of the result depends on."""


def _environment_notice(run: Run, environment: dict) -> list[str]:
    before = run.environment
    keys = [key for key in environment if key not in CIRCUMSTANCES]
    changed = [
        f"{key} {before.get(key)} -> {environment[key]}"
        for key in keys
        if before.get(key) != environment[key]
    ]
    if not changed or run.finished:
        return []
    run.write("environment.json", environment | {"earlier": [*before.pop("earlier", []), before]})
    return [
        f"the environment has changed ({', '.join(changed)}): the last bits may differ from an uninterrupted run"
    ]


def describe_environment(compute: Compute) -> dict:
    """What a number depends on besides the recipe: device, power limit, versions, threads, commit. No paths."""
    packages = ("torchvision", "albumentations", "numpy", "opencv-python-headless", "grad-cam")
    cuda = compute.device.type == "cuda"
    return {
        "device": device_name(compute.device),
        "power_limit_watts": _power_limit() if cuda else None,
        "precision": compute.precision,
        "precision_reason": compute.reason,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(
            torch.__version__
        ),  # else it is of a type of its own, which no checkpoint may hold
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32
        if cuda
        else None,  # fp32 is not all of fp32 then
        **{name: _version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def published_history(results: Path = REPOSITORY / "results") -> list[dict]:
    """The published run's log, a dictionary of strings per epoch; empty outside a checkout of the repository."""
    path = results / "reference" / "published_run.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


CHECKSUMS = "SHA256SUMS"
EXPLAINED = ("explain.json", "classes.csv", "confusion.csv", "localisation.csv")
"""What `tinylab explain` leaves beside the figures."""
FINAL_FILES = (
    "recipe.json",
    "run.json",
    "environment.json",
    "metrics.jsonl",
    "predictions.npz",
    "model.safetensors",
)
"""Files of a finished run that never change again, summary.json apart."""


def write_checksums(run: Run, summary: dict) -> None:
    """Writes the sha256 of all final files and of the summary, which is written after this, as it says that all is
    there."""
    sums = {
        name: hashlib.sha256((run.folder / name).read_bytes()).hexdigest() for name in FINAL_FILES
    }
    sums["summary.json"] = hashlib.sha256(_as_json(summary)).hexdigest()
    write_atomically(
        run.folder / CHECKSUMS, "".join(f"{each}  {name}\n" for name, each in sums.items()).encode()
    )


def verify_run(run: Run) -> str:
    """Reads every file of a run, finished or not, and compares it with its hash; a line that says what was found.

    Raises `UserError` naming what is damaged or missing.
    """
    if not run.finished:
        _ = run.identity, run.recipe, run.environment
        return f"{run.folder}: not finished, {len(run.history)} epochs done, {verify_checkpoints(run.checkpoints)}"
    files = _verify_files(run)
    return f"{run.folder}: finished, {files} files as they were written, {verify_checkpoints(run.checkpoints)}"


def _verify_files(run: Run) -> int:
    """How many files of a finished run are as they were written: all. Raises `UserError` naming those that are not."""
    sums = _read_checksums(run)
    bad = [name for name, expected in sums.items() if _sha256(run.folder / name) != expected]
    if bad:
        raise UserError(f"{run.folder} is damaged: not as written or missing: {', '.join(bad)}")
    return len(sums)


def verify_checkpoints(folder: Path) -> str:
    """Reads the checkpoints in `folder` and compares each with its own hash; some words that say what was found.

    Raises `UserError` naming those that are not whole.
    """
    there = [path for path in (folder / NEWEST, folder / PREVIOUS) if path.exists()]
    try:
        states = [read(path) for path in there]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from error
    if None in states:
        bad = ", ".join(
            path.name for path, state in zip(there, states, strict=True) if state is None
        )
        good = ", ".join(
            path.name for path, state in zip(there, states, strict=True) if state is not None
        )
        hint = f"; {good} is whole, and training continues from it" if good else ""
        raise UserError(f"{folder} is damaged: {bad}: not as written{hint}")
    newest = (
        f", the newest of epoch {states[0]['epoch']}, step {states[0]['step']}" if states else ""
    )
    return f"{len(there)} whole checkpoint{'s' * (len(there) != 1)}{newest}"


def copy_run(run: Run, target: Path) -> Run:
    """Copies a finished run, its checkpoints apart, to the folder `target`, and reads it again there; returns that run.

    The summary comes last, so that a copy that was cut short does not pass for a finished run. Raises `UserError` if
    the run is damaged or not finished, or if the copy fails or reads back differently.
    """
    _ = run.summary
    figures = [path.relative_to(run.folder) for path in sorted(run.figures.glob("*.png"))]
    others = [Path(name) for name in EXPLAINED if (run.folder / name).exists()]
    try:
        (target / "figures").mkdir(parents=True, exist_ok=True)
        for name in (*FINAL_FILES, *others, *figures, CHECKSUMS, "summary.json"):
            write_atomically(target / name, (run.folder / name).read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot copy {run.folder} to {target}: {error.filename}: {error.strerror}"
        ) from error
    _verify_files(Run(target))
    return Run(target)


def restore_run(run: Run, kept: Path) -> str | None:
    """Copies a run that is finished in the folder `kept`, and not here, from there; a line if that is not possible."""
    if run.finished or not Run(kept).finished:
        return None
    try:
        with run.lock():
            copy_run(Run(kept), run.folder)
    except UserError as error:
        return f"note: {kept} is of no use: {error}"
    return None


def _read_checksums(run: Run) -> dict[str, str]:
    """File names and their hashes as SHA256SUMS has them. Raises `UserError` if it is missing or names other files."""
    path = run.folder / CHECKSUMS
    try:
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        sums = {name: digest for digest, name in lines}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: nothing to compare the files with") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if sums.keys() != {*FINAL_FILES, "summary.json"}:
        raise UserError(f"{path} is damaged: it does not name the files of a finished run")
    return sums


def _sha256(path: Path) -> str | None:
    """The file's sha256, or None if there is no such file, or it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


def plain_text(value: object) -> str:
    """`value` as Markdown and HTML that show it as it is: no markup, no link, one line, at most 200 characters."""
    shown = "".join(
        c for c in " ".join(str(value).split()) if not unicodedata.category(c).startswith("C")
    )[:200]
    escaped = "".join(c if c.isalnum() or c in " .,:;+-()%/" else f"&#{ord(c)};" for c in shown)
    return escaped.replace("://", "&#58;//").replace(
        "www.", "www&#46;"
    )  # which sites turn into links by themselves


def note_figures(run: Run, figures: Path) -> None:
    """Leaves in the folder `figures` which run they show, so that their captions can be generated."""
    summary, environment = run.summary, run.environment
    said = {
        name: summary[name]
        for name in ("test_top1", "test_top5", "test_images", "train_images", "classes")
    }
    said |= {name: environment[name] for name in ("device", "precision", "torch", "commit", "date")}
    text = json.dumps({"run": run.folder.name, "title": run.title, **said}, indent=2) + "\n"
    write_atomically(figures / "figures.json", text.encode())


METHOD_NAMES = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "Eigen-CAM",
}
"""How figures and pages call the methods that make maps."""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _power_limit() -> float | None:
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return float(
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def compile_cache() -> str:
    """Whether torch.compile finds code that it compiled before, "filled" or "empty": a cold clock is one that began
    with nothing."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = (
        [Path(named)] if named else Path(tempfile.gettempdir()).glob("torchinductor_*")
    )  # the latter: any user's
    return (
        "filled"
        if any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
        else "empty"
    )


def _commit() -> str | None:
    """The commit of the code that runs, with "+" if source files differ from it; outside a checkout what the variable
    TINYLAB_COMMIT says, for code that was copied without its history, else None."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(source))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TINYLAB_COMMIT") or None


def relative_to_here(path: Path) -> str:
    """`path` as seen from the working folder where it lies below it, else absolute."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)

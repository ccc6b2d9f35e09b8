"""The run folder, and the environment a number was measured in.

recipe.json        every field of the recipe
run.json           what else decides the result: protocol, seed, classes, hashes of data and split, number format
environment.json   GPU or CPU, versions, commit
metrics.jsonl      one object per epoch
checkpoints/       what a stopped run continues from
model.safetensors  the final weights, with class list, normalisation, recipe and metrics in its metadata
predictions.npz    test rows, labels, logits (float16)
summary.json       the final numbers; its presence says that the run is finished
figures/
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import filelock
import numpy as np
import torch

from tinylab.checkpoint import write_atomically
from tinylab.device import Placement, device_name
from tinylab.recipe import Recipe, UserError


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
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def recipe(self) -> Recipe:
        """Raises `UserError` if the folder is no run, or was written by another version of the recipe."""
        fields = self._read("recipe.json")
        try:
            return Recipe(
                **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            )
        except TypeError as error:
            raise UserError(f"{self.folder}/recipe.json is not a recipe of this version of tinylab: {error}") from error

    @property
    def identity(self) -> dict:
        return self._read("run.json")

    @property
    def environment(self) -> dict:
        return self._read("environment.json")

    @property
    def summary(self) -> dict:
        return self._read(
            "summary.json", "the run is not finished: `tinylab train` with the same arguments continues it"
        )

    @property
    def history(self) -> list[dict]:
        """One dictionary per finished epoch, as in metrics.jsonl: accuracies in percent, losses in nats, seconds."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """rows int64 (N,) into the data set, labels int64 (N,), logits float16 (N, classes) of the test images."""
        path = self.folder / "predictions.npz"
        if not path.exists():
            raise UserError(
                f"{path} is missing: the run is not finished: `tinylab train` with the same arguments continues it"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def write(self, name: str, value: dict) -> None:
        write_atomically(self.folder / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_history(self, history: list[dict]) -> None:
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and holds it: one writer at a time. Raises `UserError` if that is impossible."""
        lock = filelock.FileLock(self.folder / ".lock", blocking=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process is writing {self.folder}; wait for it or choose another --run") from error
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder}: {error.strerror}") from error
        with lock:
            lock.release()  # entering counted a second time
            yield

    def _read(self, name: str, otherwise: str = "this folder is no run") -> dict:
        path = self.folder / name
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: {otherwise}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} is not what tinylab writes: a JSON object is expected")
        return value


def default_folder(recipe: Recipe, protocol: str, seed: int, limit_classes: int | None = None) -> Path:
    """runs/<recipe>-<protocol>-s<seed>, with the number of classes where it is limited."""
    classes = "" if limit_classes is None else f"-c{limit_classes}"
    return Path("runs") / f"{recipe.name}-{protocol}{classes}-s{seed}"


def enter_run(run: Run, recipe: Recipe, identity: dict, environment: dict) -> list[str]:
    """Makes the locked folder this run's, or finds that it is already; returns lines for the user about what changed.

    Raises `UserError` if the folder belongs to a run that differs in anything that decides the result, naming what.
    """
    folder = run.folder
    recipe_fields = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not (folder / "run.json").exists():
        if any(path.name != ".lock" for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty and no run; choose another --run")
        run.write("recipe.json", recipe_fields)
        run.write("environment.json", environment)
        run.write("run.json", identity)  # last: a folder that has it is complete
        return []
    before = run._read("recipe.json") | run.identity
    now = recipe_fields | identity
    where = {"data_folder"}  # may move; the content hash says whether it is the same data
    differing = [
        key for key in sorted(before.keys() | now.keys()) if key not in where and before.get(key) != now.get(key)
    ]
    if differing:
        changes = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in differing)
        raise UserError(f"{folder} holds another run ({changes}); choose another --run or delete it")
    if run.identity != identity:
        run.write("run.json", identity)
    return _environment_notice(run, environment)


def _environment_notice(run: Run, environment: dict) -> list[str]:
    keys = ("device", "torch", "threads", "platform")
    before = run.environment
    changed = [f"{key} {before.get(key)} -> {environment[key]}" for key in keys if before.get(key) != environment[key]]
    if not changed or run.finished:
        return []
    return [f"the environment has changed ({', '.join(changed)}): the last bits may differ from an uninterrupted run"]


def describe_environment(place: Placement) -> dict:
    """What a number depends on besides the recipe: device, power limit, versions, threads, commit. No paths."""
    packages = ("torchvision", "albumentations", "numpy", "opencv-python-headless", "grad-cam")
    cuda = place.device.type == "cuda"
    return {
        "device": device_name(place.device),
        "power_limit_watts": _power_limit() if cuda else None,
        "precision": place.precision,
        "precision_reason": place.reason,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **{name: _version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _power_limit() -> float | None:
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """The commit of the code that runs, with "+" if source files differ from it; None outside a checkout."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(source)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def relative_to_here(path: Path) -> str:
    """`path` as seen from the working folder where it lies below it, else absolute."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def interactive() -> bool:
    """Whether somebody is watching the output: a terminal, or Colab."""
    return sys.stderr.isatty() or "google.colab" in sys.modules

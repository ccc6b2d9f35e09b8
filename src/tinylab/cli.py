"""The command line: `tinylab COMMAND ...`, also `python -m tinylab`.

A command is a dataclass: its fields are the options (tyro parses them), `run` does the work. What a user can mend is
one line on stderr and exit status 2; Ctrl-C is 130, SIGTERM 143; anything else is a bug and keeps its traceback. Heavy
imports wait until a command runs, so that a bad option is refused at once.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from tinylab.recipe import RECIPES, Recipe, UserError, named

if TYPE_CHECKING:
    import numpy as np

    from tinylab.dataset import Dataset
    from tinylab.model import ResNet18
    from tinylab.record import Run
    from tinylab.split import Split

DATA = Path("data/tiny-imagenet")
RESULTS, README = Path("results"), Path("README.md")
OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What the operating system refuses and the user can mend."""
MOST_SHOWN = 280
"""Characters of an error's line, so that a name of five thousand does not bury what is wrong with it."""
MOST_EXPLAINED = 400
"""Rows of the figure of heat maps: a PNG of more than 65,535 pixels cannot be drawn."""
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RecipeFields = Annotated[Recipe, tyro.conf.arg(name="", help="")]


@dataclass(frozen=True)
class Sample:
    """Write a small made-up data set in the public archive's layout."""

    out: Positional[Path]
    """The zip file to write."""
    seed: int = 0
    """Another seed draws other images of the same ten classes."""

    def run(self) -> None:
        from tinylab.sample import write_sample

        print(write_sample(self.out, seed=self.seed))


@dataclass(frozen=True)
class Prepare:
    """Find or download Tiny ImageNet and decode it once into the data folder."""

    source: str = "auto"
    """auto ($TINY_IMAGENET, the zip or folder below data/, else a download), or a URL, a zip or a folder."""
    data: Path = DATA
    """The data folder to make; one that is complete is only opened."""
    workers: int | None = None
    """Processes that decode; by default one per core."""

    def run(self) -> None:
        from tinylab.dataset import prepare

        dataset = prepare(self.source, self.data, workers=self.workers)
        validation = len(dataset) - dataset.train_count
        print(f"{self.data}: {len(dataset):,} images ({dataset.train_count:,} training, {validation:,} validation)")
        print(f"{len(dataset.wnids)} classes, content sha256 {dataset.content_sha256}")


@dataclass(frozen=True)
class Train:
    """Train by a recipe and test after every epoch; a run that was stopped continues by itself."""

    recipe: RecipeFields
    data: Path = DATA
    """The data folder that `tinylab prepare` made."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run", aliases=("--run-folder",))] = None
    """The run folder; by default runs/<recipe>-<protocol>-s<seed>. (torchrun may take --run for its own: there
    say --run-folder.)"""
    seed: int = 0
    """Decides the first weights, the order of the images and their augmentation."""
    split: Literal["merged", "official", "select"] = "merged"
    """Which images train and which test."""
    limit_classes: int | None = None
    """Only the first so many classes, by sorted wnid."""
    device: DeviceName = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Number format of convolutions and matrix products."""
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False
    """Run the training step under torch.compile: minutes of set-up, then faster steps on a GPU."""
    micro_batch: int | Literal["auto"] | None = None
    """Most images in one forward pass, where memory is short; the optimiser's steps stay the same. auto: halve until it
    fits."""
    workers: int | None = None
    """Processes that run albumentations; they do not change the result."""
    mirror: Path | None = None
    """A folder of this run's own, on another disk (Google Drive), that keeps the newest checkpoints, too."""

    def run(self) -> None:
        from tinylab.dataset import open_dataset
        from tinylab.train import train

        finished = train(
            self.recipe,
            open_dataset(self.data),
            split=self.split,
            folder=self.run_folder,
            seed=self.seed,
            limit_classes=self.limit_classes,
            device=self.device,
            precision=self.precision,
            compiled=self.compiled,
            micro_batch=self.micro_batch,
            workers=self.workers,
            mirror=self.mirror,
        )
        if not _first("RANK"):
            return  # one of several processes, of which the first tells the result
        final = finished.summary
        accuracy = f"{final['test_top1']:.2f} % top-1, {final['test_top5']:.2f} % top-5"
        print(f"{finished.folder}: {accuracy}, {final['train_seconds'] / 60:.1f} minutes of training")


@dataclass(frozen=True)
class Schedule:
    """Print learning rate and momentum of every optimiser step as CSV."""

    recipe: RecipeFields
    images: int = 77_000
    """Training images; 77,000 are those of the merged split."""

    def run(self) -> None:
        if not 1 <= self.images <= 10**9:
            raise UserError(f"images must be from 1 to 1,000,000,000, not {self.images}")
        from tinylab.optim import schedule

        print("step,learning_rate,momentum")
        for row in schedule(self.recipe, self.images):
            print(*row, sep=",")


@dataclass(frozen=True)
class Summary:
    """Print torchsummary's table of the network."""

    classes: int = 200
    """Number of outputs."""
    width: int = 64
    """Channels of the first stage."""

    def run(self) -> None:
        if not (1 <= self.classes <= 100_000 and 1 <= self.width <= 1024):
            raise UserError("classes must be from 1 to 100,000 and width from 1 to 1,024")
        from tinylab.model import summary

        sys.stdout.write(summary(self.classes, self.width))


@dataclass(frozen=True)
class Evaluate:
    """Test a finished run's weights again; the last line of the output is one JSON object."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder."""
    tta: Literal["none", "flip"] = "none"
    """flip: the mean of the logits of each image and its mirror image; report it apart."""
    data: Path | None = None
    """The data folder, if it has moved since training."""
    device: DeviceName = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Number format; with the one of training come the numbers of training."""

    def run(self) -> None:
        finished, dataset, rows = open_finished(self.run_folder, self.data)
        from tinylab.device import choose
        from tinylab.evaluate import compute_logits, score, with_flip
        from tinylab.loader import evaluation_batches
        from tinylab.step import inference

        place = choose(self.device, self.precision)
        forward = inference(trained_model(finished, dataset).to(place.device), finished.recipe, place)
        forward = with_flip(forward) if self.tta == "flip" else forward
        batches = evaluation_batches(dataset, rows.test, place.device)
        result = score(*compute_logits(forward, batches, len(rows.test)))
        print(f"{len(rows.test):,} test images of {finished.folder}, {place}")
        print(json.dumps({"protocol": rows.protocol, "classes": rows.classes, "tta": self.tta, **result.numbers()}))


@dataclass(frozen=True)
class Explain:
    """Draw a finished run: curves, classes, mistakes, and Grad-CAM of the four stages."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder; explain.json is written there."""
    count: int = 10
    """Misclassified test images to show, drawn at random from all of them."""
    method: Literal["gradcam", "gradcam++", "hirescam", "layercam"] = "gradcam"
    """How activations and gradients become a map."""
    data: Path | None = None
    """The data folder, if it has moved since training."""
    figures: Path | None = None
    """Where the figures go; by default the run folder's figures/."""

    def run(self) -> None:
        if not 0 <= self.count <= MOST_EXPLAINED:
            raise UserError(f"count must be from 0 to {MOST_EXPLAINED}, not {self.count}: a row of the figure for each")
        from tinylab.dataset import refuse_inside

        finished, dataset, rows = open_finished(self.run_folder, self.data)
        if self.figures:
            refuse_inside(dataset, self.figures, "figures")
        require_folder(self.figures or finished.figures, "figures")
        from tinylab import plots
        from tinylab.augment import normalise, resize
        from tinylab.explain import explain
        from tinylab.record import note_figures

        recipe, target = finished.recipe, self.figures or finished.figures
        explanation = explain(
            trained_model(finished, dataset),
            images=dataset.images,
            labels=dataset.labels,
            boxes=dataset.boxes,
            rows=rows.test,
            logits=predictions_of(finished, dataset, rows)["logits"],
            wnids=dataset.wnids[: rows.classes],
            names=dataset.names[: rows.classes],
            normalise=lambda images: normalise(resize(images, recipe.test_resolution), recipe),
            count=self.count,
            method=self.method,
        )
        drawn = figures_of_training(finished, dataset, rows)
        shown = (explanation.images, explanation.entries)
        drawn["misclassified"] = plots.misclassified(*shown)
        method = "Grad-CAM" if self.method == "gradcam" else self.method
        drawn["gradcam"] = plots.gradcam_stages(
            explanation.images, explanation.maps, explanation.entries, method=method
        )
        try:
            for name, figure in drawn.items():
                print(plots.save(figure, target / f"{name}.png"))
        except OSError as error:
            raise UserError(f"cannot write figures to {target}: {error.strerror or error}") from error
        finished.write("explain.json", explanation.to_json())
        if self.figures:
            note_figures(finished, self.figures)
        print(f"{explanation.wrong:,} of {explanation.tested:,} test images are wrong; {finished.folder}/explain.json")


@dataclass(frozen=True)
class Verify:
    """Read all of a data folder, an archive or a run, compare it with its hashes, and say what is wrong."""

    path: Positional[Path] = DATA
    """A data folder, a zip or a folder with the archive's files, a run folder, or a mirror's."""

    def run(self) -> None:
        from tinylab.archive import verify_archive

        path, inside = self.path, lambda name: (self.path / name).exists()
        if inside("run.json"):
            from tinylab.record import Run, verify_run

            print(verify_run(Run(path)))
        elif inside("last.ckpt") or inside("previous.ckpt"):
            from tinylab.record import verify_checkpoints

            print(f"{path}: {verify_checkpoints(path)}")
        elif path.is_file() or inside("wnids.txt") or inside("tiny-imagenet-200/wnids.txt"):
            print(verify_archive(path))
        else:
            from tinylab.dataset import open_dataset, verify

            dataset = open_dataset(path)
            verify(dataset)
            known = "the published Tiny ImageNet" if dataset.is_tiny_imagenet else "not the published Tiny ImageNet"
            print(f"{path}: every file is as it was prepared; content sha256 {dataset.content_sha256}, {known}")


@dataclass(frozen=True)
class Publish:
    """Copy a finished run's records (no weights, no paths) to results/ and rewrite the tables."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder."""

    def run(self) -> None:
        from tinylab.record import Run, publish_run

        run = Run(self.run_folder)
        _ = run.identity, run.summary  # refuses what is no finished run
        require_repository()
        for path in publish_run(run, RESULTS, README):
            print(path)


@dataclass(frozen=True)
class Table:
    """Rewrite results/results.csv and the README's generated parts from the records in results/."""

    def run(self) -> None:
        from tinylab.record import rewrite_tables

        require_repository()
        for path in rewrite_tables(RESULTS, README):
            print(path)


COMMANDS = {
    command.__name__.lower(): command
    for command in (Sample, Prepare, Train, Evaluate, Explain, Schedule, Summary, Verify, Publish, Table)
}
WITH_RECIPE = ("train", "schedule")


def require_repository() -> None:
    """Raises `UserError` unless the working folder is a checkout of the repository."""
    if not (RESULTS.is_dir() and README.is_file()):
        raise UserError(f"there is no {RESULTS}/ or no {README} here: run this in the repository's folder")


def open_finished(folder: Path, data: Path | None) -> "tuple[Run, Dataset, Split]":
    """The finished run in `folder`, its data set and its split. Raises `UserError` if they do not belong together."""
    from tinylab.dataset import open_dataset
    from tinylab.record import Run
    from tinylab.split import make_split

    run = Run(folder)
    identity = run.identity
    _ = run.recipe, run.summary  # refuses an unfinished run
    where = identity.get("data_folder", str(DATA))
    if data is None and not isinstance(where, str):
        raise UserError(f"{folder}/run.json does not say where the data lies: name its folder with --data")
    dataset = open_dataset(data or Path(where))
    if dataset.content_sha256 != identity["content_sha256"]:
        raise UserError(f"{folder} was trained on other data than {dataset.folder} holds: name its folder with --data")
    rows = make_split(dataset, identity["protocol"], identity["classes"])
    if rows.sha256 != identity["split_sha256"]:
        raise UserError(f"{folder} was trained on another split than this version of tinylab makes")
    return run, dataset, rows


def trained_model(run: "Run", dataset: "Dataset") -> "ResNet18":
    """The run's network on the CPU, its file checked against the summary, its classes against the data set."""
    from tinylab.model import load_weights

    try:
        found = hashlib.sha256(run.weights.read_bytes()).hexdigest() if run.weights.is_file() else None
    except OSError as error:
        raise UserError(f"{run.weights} cannot be read: {error.strerror or error}") from error
    if found != run.summary["model_sha256"]:
        raise UserError(f"{run.weights} is missing or damaged: it is not the file that the run's summary names")
    model, about = load_weights(run.weights, dataset.wnids[: run.identity["classes"]])
    told, known = run.recipe, (about["recipe"]["width"], about["mean"], about["std"])
    if known != (told.width, list(told.mean), list(told.std)):
        raise UserError(f"{run.weights} is of another network or normalisation than {run.folder}/recipe.json tells")
    return model


def predictions_of(run: "Run", dataset: "Dataset", rows: "Split") -> "dict[str, np.ndarray]":
    """The run's predictions. Raises `UserError` unless they are finite ones of exactly the split's test images."""
    import numpy as np

    found = run.predictions
    expected = {"rows": rows.test, "labels": dataset.labels[rows.test]}
    logits = found.get("logits")
    whole = logits is not None and logits.dtype == np.float16 and logits.shape == (len(rows.test), rows.classes)
    same = all(name in found and np.array_equal(found[name], values) for name, values in expected.items())
    if not (whole and same and np.isfinite(logits).all()):
        raise UserError(f"{run.folder}/predictions.npz does not fit the run: delete {run.folder} and train again")
    return found


def require_folder(folder: Path, what: str) -> None:
    """Raises `UserError` if `folder` is no folder and cannot become one, before anything is computed for it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists() or path == path.parent)
    if not nearest.is_dir():
        raise UserError(f"cannot write {what} to {folder}: {nearest} is no folder")


def figures_of_training(run: "Run", dataset: "Dataset", rows: "Split") -> dict:
    """Figures by file name: sample images, augmentation, schedule, curves, accuracy per class."""
    from tinylab import plots
    from tinylab.evaluate import per_class
    from tinylab.loader import TrainingBatches
    from tinylab.optim import schedule
    from tinylab.record import published_history

    recipe, names = run.recipe, dataset.names[: rows.classes]
    batches = TrainingBatches(dataset, rows.train, recipe, run.identity["seed"])
    first = batches.rows_at(1, 0)[:16]
    images, titles = dataset.images[first], [names[label] for label in dataset.labels[first]]
    _, learning_rates, momenta = zip(*schedule(recipe, len(rows.train)), strict=True)
    correct, total = per_class(run.predictions["logits"], run.predictions["labels"])
    return {
        "samples": plots.image_grid(images, titles, dataset.boxes[first]),
        "augmentation": plots.before_after(images, batches[1, 0][0][:16].numpy(), titles),
        "learning_rate": plots.learning_rate_curve(learning_rates, momenta, recipe.steps_per_epoch(len(rows.train))),
        "curves": plots.accuracy_and_loss(run.history, published_history(), title=run.title),
        "classes": plots.class_accuracy(names, 100 * correct / total.clip(1), total),
    }


def parse(arguments: list[str]) -> object:
    """The command that `arguments` name, options filled in. Raises `UserError` for anything that does not parse."""
    if not all(map(_is_usable, arguments)):
        raise UserError("an argument holds characters that no file name and no number can have")
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'; there are: {', '.join(COMMANDS)}")
    prog, default = f"tinylab {name}", {}
    if name in WITH_RECIPE:
        if {"-h", "--help"} & set(rest[:1]):
            rest = ["published", *rest]  # the options are the same for all
        if not rest or rest[0].startswith("-"):
            raise UserError(f"which recipe? `tinylab {name} RECIPE`; there are: {', '.join(RECIPES)}")
        prog, default = f"{prog} {rest[0]}", {"default": COMMANDS[name](recipe=named(rest[0]))}
        rest = rest[1:]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(COMMANDS[name], prog=prog, args=rest, **default)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise  # --help
        raise UserError(f"{_one_line(complaint.getvalue())} (`{prog} --help` lists the options)") from stop


def _is_usable(text: str) -> bool:
    """Whether the operating system takes `text` as a name: no NUL, nothing that its encoding lacks."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _one_line(framed: str) -> str:
    """What tyro complains of, without its frame and its explanations: the text up to the first rule. Where the terminal
    has ASCII only, so has the frame."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", framed)
    lines = [line.strip("│ ").strip() for line in text.splitlines()[1:]]
    while lines and set(lines[0]) <= set("-+ "):
        del lines[0]
    said = []
    for line in lines:
        if not line or set(line) <= set("─╰╯╭╮-+"):
            break
        said.append(line)
    suggestions = re.findall(r"^(--[a-z0-9-]+)", "\n".join(lines[len(said) :]), re.MULTILINE)
    hint = f"; perhaps {suggestions[0]}?" if suggestions and "nrecognized" in " ".join(said) else ""
    return (" ".join(said) or "the options do not parse") + hint


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what was begun is cleaned up as after Ctrl-C."""

    signal = signal.SIGTERM


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM raises `Terminated`. (Training puts its own handler in place, which saves first.)"""

    def terminate(*_: object) -> None:
        raise Terminated("terminated")

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def usage() -> str:
    """What `tinylab --help` prints."""
    lines = ["usage: tinylab COMMAND [options]      tinylab COMMAND --help tells them", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name + (' RECIPE' if name in WITH_RECIPE else ''):<18}{command.__doc__}")
    return "\n".join([*lines, "", f"recipes: {', '.join(RECIPES)}"])


def _first(rank: str) -> bool:
    """Whether this process is the first by that variable of torchrun's, or is not torchrun's at all."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get(rank, "0") == "0"


def _complain(error: BaseException) -> None:
    """One line on stderr. Of the processes that torchrun starts, one on each machine says what all of them know."""
    only_here = type(error).__name__ == "RankError"  # without importing torch to know the type
    if _first("LOCAL_RANK") or only_here:
        print(f"tinylab: {_shown(str(error)) or 'stopped'}", file=sys.stderr)


def _shown(text: str) -> str:
    """`text` on one line of about `MOST_SHOWN` characters, its middle left out if need be, without those by which a
    name could steer the terminal."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    half = MOST_SHOWN // 2 - 2
    return line if len(line) <= MOST_SHOWN else f"{line[:half]} … {line[-half:]}"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for what a user can mend, 130 or 143 after a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    try:
        with _terminable():
            parse(list(arguments)).run()
            sys.stdout.flush()
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt as stop:
        _complain(stop)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        print(f"tinylab: {_shown(str(error.filename or 'output') + ': ' + str(error.strerror))}", file=sys.stderr)
        return 2
    return 0

"""The command line: `tinylab COMMAND ...`, also `python -m tinylab`.

A command is a dataclass: its fields are the options (tyro parses them), `run` does the work. What a user can mend is
one line on stderr and exit status 2; Ctrl-C is 130, SIGTERM 143; anything else is a bug and keeps its traceback. Heavy
imports wait until a command runs, so that a bad option is refused at once.
"""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, named

if TYPE_CHECKING:
    import numpy as np

    from tinylab.data.dataset import Dataset
    from tinylab.data.split import Split
    from tinylab.explain.analysis import Analysis
    from tinylab.model import ResNet18
    from tinylab.run.folder import Run

DATA = Path("data/tiny-imagenet")
RESULTS, README = Path("results"), Path("README.md")
OF_THE_USER = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
)
"""What the operating system refuses and the user can mend."""
MOST_SHOWN = 280
"""Characters of an error's line, so that a name of five thousand does not bury what is wrong with it."""
MOST_EXPLAINED = 400
"""Rows of the figure of heat maps: a PNG of more than 65,535 pixels cannot be drawn."""
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Stage = Literal["layer1", "layer2", "layer3", "layer4"]
Method = Literal["gradcam", "gradcam++", "hirescam", "layercam", "eigencam"]
RecipeFields = Annotated[Recipe, tyro.conf.arg(name="", help="")]


@dataclass(frozen=True)
class Sample:
    """Write a small made-up data set in the public archive's layout."""

    out: Positional[Path]
    """The zip file to write."""
    seed: int = 0
    """Another seed draws other images of the same ten classes."""

    def run(self) -> None:
        from tinylab.data.synthetic import write_sample

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
        from tinylab.data.dataset import prepare

        dataset = prepare(self.source, self.data, workers=self.workers)
        validation = len(dataset) - dataset.train_count
        print(
            f"{self.data}: {len(dataset):,} images ({dataset.train_count:,} training, {validation:,} validation)"
        )
        print(f"{len(dataset.wnids)} classes, content sha256 {dataset.content_sha256}")


@dataclass(frozen=True)
class Train:
    """Train by a recipe and test; a run that was stopped continues by itself."""

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
    workers: int | None = None
    """Processes that run albumentations; they do not change the result."""
    mirror: Path | None = None
    """A folder of this run's own, on another disk (Google Drive), that keeps the newest checkpoints, too."""
    test_every: int = 1
    """Test after every so many epochs, and after the last one. A test of 33,000 images costs as much as training on
    11,000."""
    track: Literal["none", "tensorboard"] = "none"
    """tensorboard: also write each epoch's numbers to the run folder's tensorboard/ (needs the extra "track")."""

    def run(self) -> None:
        from tinylab.data.dataset import open_dataset
        from tinylab.training.train import train

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
            workers=self.workers,
            mirror=self.mirror,
            test_every=self.test_every,
            track=None if self.track == "none" else self.track,
        )
        if not _first("RANK"):
            return  # one of several processes, of which the first tells the result
        final = finished.summary
        accuracy = f"{final['test_top1']:.2f} % top-1, {final['test_top5']:.2f} % top-5"
        print(
            f"{finished.folder}: {accuracy}, {final['train_seconds'] / 60:.1f} minutes of training"
        )


@dataclass(frozen=True)
class Schedule:
    """Print learning rate and momentum of every optimiser step as CSV."""

    recipe: RecipeFields
    images: int = 77_000
    """Training images; 77,000 are those of the merged split."""

    def run(self) -> None:
        if not 1 <= self.images <= 10**9:
            raise UserError(f"images must be from 1 to 1,000,000,000, not {self.images}")
        from tinylab.training.optim import schedule

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
        from tinylab.run.environment import choose
        from tinylab.training.evaluate import score, test_logits, with_flip

        compute = choose(self.device, self.precision)
        network = trained_model(finished, dataset).to(compute.device)
        view = with_flip if self.tta == "flip" else None
        result = score(
            *test_logits(network, dataset, rows.test, finished.recipe, compute, view=view)
        )
        print(f"{len(rows.test):,} test images of {finished.folder}, {compute}")
        print(
            json.dumps(
                {
                    "protocol": rows.protocol,
                    "classes": rows.classes,
                    "tta": self.tta,
                    **result.numbers(),
                }
            )
        )


@dataclass(frozen=True)
class Explain:
    """Tell what a finished run gets wrong and where it looks: tables, figures, Grad-CAM, box metric."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder; explain.json, classes.csv, confusion.csv, localisation.csv and figures/ are written there."""
    count: int = 10
    """Misclassified test images to show, drawn at random from all of them."""
    method: Method = "gradcam"
    """How activations and gradients become a map."""
    stage: Annotated[Stage, tyro.conf.arg(aliases=("--layer",))] = "layer4"
    """The stage whose maps are compared with the boxes."""
    sample: int = 2000
    """Test images whose maps are compared with the boxes, drawn by a fixed seed; 0: none."""
    all: bool = False
    """Compare the maps of all test images with the boxes."""
    faithfulness: int = 0
    """Test images for ROAD, which asks whether the network needs what the maps point at; about a second each."""
    data: Path | None = None
    """The data folder, if it has moved since training."""
    figures: Path | None = None
    """A folder that gets the figures, too."""
    device: DeviceName = "auto"
    """Where to compute the maps."""

    def run(self) -> None:
        _require_counts(self.count, self.sample, self.faithfulness)
        from tinylab.data.dataset import refuse_inside

        finished, dataset, rows = open_finished(self.run_folder, self.data)
        if self.figures:
            refuse_inside(dataset, self.figures, "figures")
            require_folder(self.figures, "figures")
        require_folder(finished.figures, "figures")
        from tinylab.explain.analysis import analyse_run
        from tinylab.run.environment import choose

        _ = predictions_of(finished, dataset, rows)
        compute = choose(self.device, "fp32")
        maps = self.count or self.sample or self.all or self.faithfulness
        analysis = analyse_run(
            finished,
            dataset,
            rows,
            trained_model(finished, dataset).to(compute.device) if maps else None,
            count=self.count,
            method=self.method,
            stage=self.stage,
            sample=None if self.all else self.sample,
            faithful=self.faithfulness,
            progress=True,
        )
        _write_analysis(finished, analysis, self.figures)


@dataclass(frozen=True)
class Report:
    """Write one HTML file that holds all of a finished run: recipe, curves, tables, galleries, maps."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder. What `tinylab explain` has not yet found out is found out first."""
    out: Path | None = None
    """The file to write; by default the run folder's report.html."""
    data: Path | None = None
    """The data folder, if it has moved since training."""
    device: DeviceName = "auto"
    """Where to compute the maps, if they are missing."""

    def run(self) -> None:
        from tinylab.files import write_atomically
        from tinylab.run.folder import Run

        finished = Run(self.run_folder)
        _ = finished.identity, finished.recipe, finished.summary  # refuses what is no finished run
        out = self.out or finished.folder / "report.html"
        require_folder(out.parent, "the report")
        refuse_data_folder(out)
        refuse_as_file(out, finished)
        explanation = finished.explanation
        if explanation is None:
            Explain(self.run_folder, data=self.data, device=self.device).run()
            explanation = finished.explanation
        from tinylab.share.report import page

        # explain.json may be anybody's: a name with a path in it would put another picture of this disk on the page.
        names = [name for name in explanation["figures"] if re.fullmatch("[a-z_]{1,40}", str(name))]
        pictures = {name: finished.figures / f"{name}.png" for name in names}
        shown = {name: path.read_bytes() for name, path in pictures.items() if path.is_file()}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page(finished, explanation, shown).encode("utf-8", "replace"))
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, everything inside")


@dataclass(frozen=True)
class Predict:
    """Say what is on your own images: the five most probable classes of each."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The folder of a finished run, or a model.safetensors that tinylab wrote."""
    images: Positional[tuple[Path, ...]]
    """JPEG, PNG or WebP files of any size: turned upright, cut to their middle square, scaled to 64 x 64."""
    top: int = 5
    """How many classes to name."""
    json: bool = False
    """One JSON object per image on stdout, nothing else."""
    gradcam: Path | None = None
    """A folder that gets a figure for each image: what spoke for the class that was answered."""
    method: Method = "gradcam"
    """How activations and gradients become that map."""

    def run(self) -> None:
        if not 1 <= self.top <= 1000:
            raise UserError(f"top must be from 1 to 1,000, not {self.top}")
        if not self.images:
            raise UserError("which images? `tinylab predict RUN IMAGE...`")
        if self.gradcam:
            require_folder(self.gradcam, "figures")
            refuse_data_folder(self.gradcam)
        from tinylab.share.predict import load, predict, read_image

        model, about = load(self.run_folder)
        pictures = [
            read_image(path) for path in self.images
        ]  # all before the first answer: one that is bad stops all
        figures = [None] * len(pictures)
        answers = [predict(model, about, picture[None], self.top)[0] for picture in pictures]
        if self.gradcam:
            figures = _explain_answers(self, model, about, pictures, answers)
        for path, answer, figure in zip(self.images, answers, figures, strict=True):
            if self.json:
                print(
                    json.dumps(
                        {"image": str(path), "top": answer}
                        | ({"figure": str(figure)} if figure else {})
                    )
                )
                continue
            print(_shown(str(path)))
            for guess in answer:
                print(
                    f"{100 * guess['probability']:8.2f} %  {guess['wnid']}  {_shown(guess['name'])}"
                )
            if figure:
                print(f"            {figure}")


@dataclass(frozen=True)
class Export:
    """Hand a finished run over: weights, model card and class list in one folder; ONNX if asked."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run")]
    """The run folder."""
    to: Path | None = None
    """The folder that gets model.safetensors, README.md (the model card) and classes.csv; by default RUN/export."""
    onnx: Path | None = None
    """An ONNX file to write, which is then compared with the network in onnxruntime (needs the extra "export")."""

    def run(self) -> None:
        from tinylab.run.folder import Run

        finished = Run(self.run_folder)
        _ = finished.identity, finished.recipe, finished.summary  # refuses what is no finished run
        folder = self.to or finished.folder / "export"
        for path in filter(None, (folder, self.onnx)):
            require_folder(path if path is folder else path.parent, "the model")
            refuse_data_folder(path)
        from tinylab.share.card import refuse_others_files, write_hand_over
        from tinylab.share.predict import export_onnx, load

        refuse_others_files(folder)
        if self.onnx:
            refuse_as_file(self.onnx, finished)
        model, about = load(finished.folder)
        checked = export_onnx(model, about, self.onnx) if self.onnx else None
        for path in write_hand_over(finished, about, folder):
            print(path)
        if checked:
            print(
                f"{self.onnx}: opset {checked['opset']}, logits in onnxruntime differ by at most ",
                end="",
            )
            print(f"{checked['largest_difference']:.1e} from torch's")


@dataclass(frozen=True)
class FindLr:
    """Try rising learning rates for a hundred steps and suggest one; nothing that was trained changes."""

    recipe: RecipeFields
    data: Path = DATA
    """The data folder that `tinylab prepare` made."""
    seed: int = 0
    """Decides the first weights and the images."""
    split: Literal["merged", "official", "select"] = "select"
    """Whose training images to use; none is tested."""
    limit_classes: int | None = None
    """Only the first so many classes, by sorted wnid."""
    steps: int = 100
    """Optimiser steps between the lowest and the highest rate."""
    lowest: float = 1e-5
    """Where to begin."""
    highest: float = 10.0
    """Where to end, unless the loss has risen to four times its lowest before."""
    device: DeviceName = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Number format of convolutions and matrix products."""
    workers: int | None = None
    """Processes that run albumentations; they do not change the result."""
    figure: Path | None = None
    """The picture to draw; by default runs/find-lr-<recipe>-<split>-s<seed>.png."""

    def run(self) -> None:
        if not 0 < self.lowest < self.highest < math.inf:
            raise UserError(
                f"lowest must be above 0 and below highest, not {self.lowest} and {self.highest}"
            )
        if not 10 <= self.steps <= 2000:
            raise UserError(f"steps must be from 10 to 2,000, not {self.steps}")
        out = (
            self.figure
            or Path("runs") / f"find-lr-{self.recipe.name}-{self.split}-s{self.seed}.png"
        )
        require_folder(out.parent, "the picture")
        from tinylab.data.dataset import open_dataset
        from tinylab.figures import plots
        from tinylab.training.lr_finder import find_lr

        refuse_data_folder(out)
        refuse_as_file(out)
        found = find_lr(
            self.recipe,
            open_dataset(self.data),
            split=self.split,
            seed=self.seed,
            limit_classes=self.limit_classes,
            device=self.device,
            precision=self.precision,
            steps=self.steps,
            start=self.lowest,
            stop=self.highest,
            workers=self.workers,
        )
        curve = (found.learning_rates, found.losses, found.smoothed, found.suggestion)
        print(_drawn(plots.learning_rate_test(*curve), out))
        if found.suggestion is None:
            print(f"no suggestion: {found.reason}")
            return
        print(
            f"{found.reason}; to try it: tinylab train {_with_learning_rate(self.recipe, found.suggestion)}"
        )


@dataclass(frozen=True)
class Verify:
    """Read all of a data folder, an archive or a run, compare it with its hashes, and say what is wrong."""

    path: Positional[Path] = DATA
    """A data folder, a zip or a folder with the archive's files, a run folder, or a mirror's."""

    def run(self) -> None:
        from tinylab.data.archive import verify_archive

        path, inside = self.path, lambda name: (self.path / name).exists()
        if inside("run.json"):
            from tinylab.run.folder import Run, verify_run

            print(verify_run(Run(path)))
        elif inside("last.ckpt") or inside("previous.ckpt"):
            from tinylab.run.folder import verify_checkpoints

            print(f"{path}: {verify_checkpoints(path)}")
        elif path.is_file() or inside("wnids.txt") or inside("tiny-imagenet-200/wnids.txt"):
            print(verify_archive(path))
        else:
            from tinylab.data.dataset import open_dataset, verify

            dataset = open_dataset(path)
            verify(dataset)
            known = (
                "the published Tiny ImageNet"
                if dataset.is_tiny_imagenet
                else "not the published Tiny ImageNet"
            )
            print(
                f"{path}: every file is as it was prepared; content sha256 {dataset.content_sha256}, {known}"
            )


COMMANDS = {
    "sample": Sample,
    "prepare": Prepare,
    "train": Train,
    "evaluate": Evaluate,
    "explain": Explain,
    "report": Report,
    "predict": Predict,
    "export": Export,
    "schedule": Schedule,
    "find-lr": FindLr,
    "summary": Summary,
    "verify": Verify,
}
WITH_RECIPE = ("train", "schedule", "find-lr")


def require_repository() -> None:
    """Raises `UserError` unless the working folder is a checkout of the repository."""
    if not (RESULTS.is_dir() and README.is_file()):
        raise UserError(
            f"there is no {RESULTS}/ or no {README} here: run this in the repository's folder"
        )


def open_finished(folder: Path, data: Path | None) -> "tuple[Run, Dataset, Split]":
    """The finished run in `folder`, its data set and its split. Raises `UserError` if they do not belong together."""
    from tinylab.data.dataset import open_dataset
    from tinylab.data.split import make_split
    from tinylab.run.folder import Run

    run = Run(folder)
    identity = run.identity
    _ = run.recipe, run.summary  # refuses an unfinished run
    where = identity.get("data_folder", str(DATA))
    if data is None and not isinstance(where, str):
        raise UserError(
            f"{folder}/run.json does not say where the data lies: name its folder with --data"
        )
    dataset = open_dataset(data or Path(where))
    if dataset.content_sha256 != identity["content_sha256"]:
        raise UserError(
            f"{folder} was trained on other data than {dataset.folder} holds: name its folder with --data"
        )
    rows = make_split(dataset, identity["protocol"], identity["classes"])
    if rows.sha256 != identity["split_sha256"]:
        raise UserError(f"{folder} was trained on another split than this version of tinylab makes")
    return run, dataset, rows


def trained_model(run: "Run", dataset: "Dataset") -> "ResNet18":
    """The run's network on the CPU, checked by `predict.load`, its classes against the data set's."""
    from tinylab.share.predict import load

    model, about = load(run.folder)
    if tuple(about["wnids"]) != dataset.wnids[: len(about["wnids"])]:
        raise UserError(
            f"{run.weights} was trained on other classes, or in another order, than this data set has"
        )
    return model


def predictions_of(run: "Run", dataset: "Dataset", rows: "Split") -> "dict[str, np.ndarray]":
    """The run's predictions. Raises `UserError` unless they are finite ones of exactly the split's test images."""
    import numpy as np

    found = run.predictions
    expected = {"rows": rows.test, "labels": dataset.labels[rows.test]}
    logits = found.get("logits")
    whole = (
        logits is not None
        and logits.dtype == np.float16
        and logits.shape == (len(rows.test), rows.classes)
    )
    same = all(
        name in found and np.array_equal(found[name], values) for name, values in expected.items()
    )
    if not (whole and same and np.isfinite(logits).all()):
        raise UserError(
            f"{run.folder}/predictions.npz does not fit the run: delete {run.folder} and train again"
        )
    return found


def require_folder(folder: Path, what: str) -> None:
    """Raises `UserError` if `folder` is no folder and cannot become one, before anything is computed for it."""
    nearest = next(
        path for path in (folder, *folder.parents) if path.exists() or path == path.parent
    )
    if not nearest.is_dir():
        raise UserError(f"cannot write {what} to {folder}: {nearest} is no folder")


def refuse_as_file(path: Path, run: "Run | None" = None) -> None:
    """Raises `UserError` if `path` is a folder, or a record of the run's, which would be replaced."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if run is None:
        return
    from tinylab.run.folder import CHECKSUMS, EXPLAINED, FINAL_FILES

    if path.resolve() in {
        (run.folder / name).resolve()
        for name in (*FINAL_FILES, *EXPLAINED, CHECKSUMS, "summary.json")
    }:
        raise UserError(f"{path} is a record of the run: choose another name")


def refuse_data_folder(path: Path) -> None:
    """Raises `UserError` if `path` lies in a data folder: nothing else may be written there."""
    for folder in (path, *path.absolute().parents):
        if (folder / "meta.json").exists() and (folder / "images.npy").exists():
            raise UserError(
                f"cannot write to {path}: {folder} is a data folder; choose another place"
            )


def _require_counts(count: int, sample: int, faithfulness: int) -> None:
    if not 0 <= count <= MOST_EXPLAINED:
        raise UserError(
            f"count must be from 0 to {MOST_EXPLAINED}, not {count}: a row of the figure for each"
        )
    for name, number in (("sample", sample), ("faithfulness", faithfulness)):
        if not 0 <= number <= 10**9:
            raise UserError(
                f"{name} must be 0 or more, not {number}: it is a number of test images"
            )


def _write_analysis(run: "Run", analysis: "Analysis", figures: Path | None) -> None:
    """Writes figures, tables and, last, explain.json into the run folder, and the figures into `figures`, too."""
    from tinylab.run.folder import note_figures

    for target in filter(None, (run.figures, figures)):
        for name, figure in analysis.figures.items():
            print(_drawn(figure, target / f"{name}.png"))
    # What an earlier analysis made and this one did not would be taken for this one's.
    for name in ("misclassified", "class_maps", "gradcam", "localisation", "faithfulness"):
        if name not in analysis.figures:
            (run.figures / f"{name}.png").unlink(missing_ok=True)
    if analysis.localisation is None:
        (run.folder / "localisation.csv").unlink(missing_ok=True)
    for path in analysis.write_tables(run.folder):
        print(path)
    run.write("explain.json", analysis.to_json(run))
    if figures:
        note_figures(run, figures)
    if analysis.localisation is not None:
        print(analysis.localisation.in_words())
    seen = analysis.explanation
    print(f"{seen.wrong:,} of {seen.tested:,} test images are wrong; {run.folder}/explain.json")


def _explain_answers(
    asked: Predict,
    model: "ResNet18",
    about: dict,
    pictures: "list[np.ndarray]",
    answers: list[list[dict]],
) -> list[Path]:
    """Draws for each picture what spoke for the answer; returns the figures' paths in the folder that was asked for."""
    import numpy as np

    from tinylab.explain.analysis import explain_answers
    from tinylab.figures import plots

    maps = explain_answers(model, about, np.stack(pictures), answers, asked.method)
    paths: list[Path] = []
    for path, picture, answer, heat in zip(asked.images, pictures, answers, maps, strict=True):
        figure = plots.prediction(picture, answer, heat, title=path.name)
        taken = {other.name.casefold() for other in paths}  # some disks do not tell A from a
        names = (
            f"{path.stem}{f'-{number}' if number > 1 else ''}.png" for number in itertools.count(1)
        )
        paths.append(
            _drawn(
                figure, asked.gradcam / next(name for name in names if name.casefold() not in taken)
            )
        )
    return paths


def _drawn(figure: object, path: Path) -> Path:
    """Saves the figure; raises `UserError` if that fails."""
    from tinylab.figures import plots

    try:
        return plots.save(figure, path)
    except OSError as error:
        raise UserError(
            f"cannot write figures to {path.parent}: {error.strerror or error}"
        ) from error


def _with_learning_rate(recipe: Recipe, learning_rate: float) -> str:
    """The recipe's name and the options that make it `recipe` with that peak; Muon's keeps its proportion."""
    changed = {"max_learning_rate": float(f"{learning_rate:.2g}")}
    if recipe.optimizer == "muon":
        share = learning_rate / recipe.max_learning_rate
        changed["muon_learning_rate"] = float(f"{recipe.muon_learning_rate * share:.2g}")
    usual, words = asdict(named(recipe.name)) if recipe.name in RECIPES else {}, [recipe.name]
    for name, value in (asdict(recipe) | changed).items():
        option = name.replace("_", "-")
        if value == usual.get(name, value) and name not in changed:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        elif isinstance(value, tuple):
            words.append(f"--{option} {' '.join(str(each) for row in value for each in _row(row))}")
        else:
            words.append(f"--{option} {value}")
    return " ".join(words)


def _row(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


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
            raise UserError(
                f"which recipe? `tinylab {name} RECIPE`; there are: {', '.join(RECIPES)}"
            )
        prog, default = f"{prog} {rest[0]}", {"default": COMMANDS[name](recipe=named(rest[0]))}
        rest = rest[1:]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(COMMANDS[name], prog=prog, args=rest, **default)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise  # --help
        raise UserError(
            f"{_one_line(complaint.getvalue())} (`{prog} --help` lists the options)"
        ) from stop


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

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python allows handlers nowhere else
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
    line = " ".join(
        "".join(character if character.isprintable() else " " for character in text).split()
    )
    half = MOST_SHOWN // 2 - 2
    return line if len(line) <= MOST_SHOWN else f"{line[:half]} … {line[-half:]}"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for what a user can mend, 130 or 143 after a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a name that the terminal cannot show is no error
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
        print(
            f"tinylab: {_shown(str(error.filename or 'output') + ': ' + str(error.strerror))}",
            file=sys.stderr,
        )
        return 2
    return 0

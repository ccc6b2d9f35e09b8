"""The command line: `tinylab COMMAND ...`, also `python -m tinylab`.

A command is a dataclass: its fields are the options (tyro parses them), `run` does the work. User
errors are one line on stderr and exit status 2; Ctrl-C is 130, SIGTERM 143; anything else is a bug
and keeps its traceback. Heavy imports wait until a command runs.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from tinylab.exceptions import Stopped, UserError
from tinylab.files import printable
from tinylab.options import describe, refuse_unknown
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, named

DATA = Path("data/tiny-imagenet")
# What the operating system refuses and the user can change.
OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
MOST_EXPLAINED = 400  # rows of the figure of heat maps: a PNG has at most 65,535 pixels
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RecipeFields = Annotated[Recipe, tyro.conf.arg(name="", help="")]
# `pretrained` is the network in weights/.
RunFolder = Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]


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
    """Find or download Tiny ImageNet, or take your own images, and decode them once."""

    source: str = "auto"
    """auto ($TINY_IMAGENET, the zip or folder below data/, else a download), or a URL, a zip, a tar
    or a folder: Tiny ImageNet in any layout, or images in class folders."""
    data: Path = DATA
    """The data folder to make; one that is complete is only opened."""
    workers: int | None = None
    """Threads that decode; by default one per core."""
    to_folders: Path | None = None
    """A folder that gets all images as PNG files, too, as torchvision's ImageFolder reads them."""

    def run(self) -> None:
        from tinylab.data.dataset import prepare, write_folders

        dataset = prepare(self.source, self.data, workers=self.workers)
        validation = len(dataset) - dataset.train_count
        kinds = f"{dataset.train_count:,} training, {validation:,} validation"
        of = f" of {dataset.title}" if dataset.title else ""
        print(f"{self.data}: {len(dataset):,} images{of} ({kinds})")
        print(f"{len(dataset.wnids)} classes, content sha256 {dataset.content_sha256}")
        if self.to_folders:
            write_folders(dataset, self.to_folders)
            print(f"{self.to_folders}: train/ and val/, a folder for each class")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of what trains."""

    recipe: RecipeFields
    data: Path = DATA
    """The data folder that `tinylab prepare` made."""
    seed: int = 0
    """Decides the first weights, the order of the images and their augmentation."""
    limit_classes: int | None = None
    """Only the first so many classes, by sorted wnid."""
    device: DeviceName = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Number format of convolutions and matrix products."""
    workers: int | None = None
    """Processes that run albumentations; they do not change the result."""
    transform: str | None = None
    """FILE:NAME of a transform of one image, in place of the recipe's augmentation."""
    model: str | None = None
    """FILE:NAME of what builds another network for a number of classes."""
    loss: str | None = None
    """FILE:NAME of another loss than cross-entropy, of logits and labels."""
    init: Path | None = None
    """A run or a weights file to start from: all is taken that fits by name and shape."""

    def options(self, *more: str) -> dict:
        """Return the keyword arguments that `train` and `find_lr` have in common, and more."""
        from tinylab.custom import load_custom

        names = ("seed", "limit_classes", "device", "precision", "workers", "init", *more)
        own = {name: load_custom(getattr(self, name)) for name in ("transform", "model", "loss")}
        return {name: getattr(self, name) for name in names} | own


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train by a recipe and test; a run that was stopped continues by itself."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run", aliases=("--run-folder",))] = None
    """The run folder; by default runs/<recipe>-<split>-s<seed>. (torchrun takes --run for
    itself: there use --run-folder.)"""
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False
    """Run the training step under torch.compile: minutes of set-up, then faster steps on a GPU."""
    continue_anyway: bool = False
    """Continue a run whose code has changed since it began; the record keeps both."""
    mirror: Path | None = None
    """A folder of this run's own, on another disk (Google Drive), that gets each checkpoint, too.
    """
    test_every: int = 1
    """Test after every so many epochs, and after the last one. A test of 33,000 images costs as
    much as training on 11,000."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Also give each epoch's numbers, and later the figures of `tinylab explain`, to TensorBoard
    (files in the run folder) or to Weights & Biases (sent, unless WANDB_MODE is offline)."""

    def run(self) -> None:
        from tinylab.data.dataset import open_dataset
        from tinylab.training.train import train

        finished = train(
            self.recipe,
            open_dataset(self.data),
            folder=self.run_folder,
            track=None if self.track == "none" else self.track,
            **self.options("compiled", "mirror", "test_every", "continue_anyway"),
        )
        if not first("RANK"):
            return  # one of several processes, of which the first tells the result
        final = finished.summary
        accuracy = f"{final['test_top1']:.2f} % top-1, {final['test_top5']:.2f} % top-5"
        minutes = final["train_seconds"] / 60
        print(f"{finished.folder}: {accuracy}, {minutes:.1f} minutes of training")


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


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Options of what reads a finished run and its data."""

    run_folder: RunFolder
    """The run folder."""
    data: Path | None = None
    """The data folder, if it has moved since training."""
    device: DeviceName = "auto"
    """Where to compute."""
    model: str | None = None
    """FILE:NAME of what builds the network, if the run had one of its own."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Finished):
    """Test a finished run's weights again; the last line is a JSON object."""

    tta: Literal["none", "flip"] = "none"
    """flip: the mean of the logits of each image and its mirror image; report it apart."""
    precision: Precision = "auto"
    """Number format; by default the one of training, which gives its numbers again."""

    def run(self) -> None:
        from tinylab.share.predict import load, open_finished

        finished, dataset, rows = open_finished(self.run_folder, self.data)
        from tinylab.custom import load_custom
        from tinylab.run.environment import choose
        from tinylab.training.evaluate import score, test_logits, with_flip

        compute, identity = choose(self.device, self.precision), finished.identity
        if self.precision == "auto" and compute.device.type == identity.get("device"):
            with contextlib.suppress(UserError):  # this processor lacks it
                compute = choose(self.device, identity["precision"])
        network = load(finished.folder, load_custom(self.model))[0].to(compute.device)
        view = with_flip if self.tta == "flip" else None
        tested = test_logits(network, dataset, rows.test, finished.recipe, compute, view=view)
        print(f"{len(rows.test):,} test images of {finished.folder}, {compute}")
        how = {"protocol": rows.protocol, "classes": rows.classes, "tta": self.tta}
        print(json.dumps(how | score(*tested).numbers()))


@dataclass(frozen=True, kw_only=True)
class Explain(Finished):
    """Show what a finished run gets wrong: tables, figures, Grad-CAM, boxes."""

    count: int = 10
    """Misclassified test images to show, drawn at random from all of them."""
    stage: Annotated[str | None, tyro.conf.arg(aliases=("--layer",))] = None
    """The layer whose maps are compared with the boxes; by default layer4, or the last convolution
    of a network without it."""
    sample: int = 2000
    """Test images whose maps are compared with the boxes, drawn by a fixed seed; 0: none."""
    all: bool = False
    """Compare the maps of all test images with the boxes."""
    faithfulness: int = 0
    """Test images for ROAD, which asks whether the network needs what the maps point at."""
    figures: Path | None = None
    """A folder that gets the figures, too; the run folder has them in figures/."""

    def run(self) -> None:
        if not 0 <= self.count <= MOST_EXPLAINED:
            raise UserError(f"count must be from 0 to {MOST_EXPLAINED}, not {self.count}")
        if self.sample < 0 or self.faithfulness < 0:
            raise UserError("sample and faithfulness must be 0 or more")
        from tinylab.share.predict import load, open_finished

        finished, dataset, rows = open_finished(self.run_folder, self.data)
        from tinylab.run.folder import require_writable

        for folder in filter(None, (self.figures, finished.figures)):
            require_writable(folder / "curves.png")
        from tinylab.custom import load_custom
        from tinylab.explain.analysis import analyse_run
        from tinylab.run.environment import choose
        from tinylab.training.track import log_figures

        compute, make = choose(self.device, "fp32"), load_custom(self.model)
        predicted = (finished.folder / "predictions.npz").exists()
        maps = self.count or self.sample or self.all or self.faithfulness
        network = None
        if maps or not predicted:
            network = load(finished.folder, make)[0].to(compute.device)
        if not predicted:
            from tinylab.training.evaluate import score, test_logits

            print(f"testing {len(rows.test):,} images: this run's folder lacks the predictions")
            tested = score(*test_logits(network, dataset, rows.test, finished.recipe, compute))
            arrays = {"rows": rows.test, "labels": tested.labels, "logits": tested.logits}
            finished.write_predictions(**arrays)
        sample = None if self.all else self.sample
        how = {"count": self.count, "stage": self.stage, "faithful": self.faithfulness}
        how |= {"sample": sample, "progress": True}
        analysis = analyse_run(finished, dataset, rows, network, **how)
        paths = list(analysis.save(finished, self.figures))
        print(*paths, sep="\n")
        log_figures(finished, [path for path in paths if path.parent == finished.figures])
        print(analysis.in_words())


@dataclass(frozen=True, kw_only=True)
class Report(Finished):
    """Write one HTML file with all of a finished run: recipe, curves, tables, maps."""

    out: Path | None = None
    """The file to write; by default the run folder's report.html."""

    def run(self) -> None:
        from tinylab.files import write_atomically
        from tinylab.run.folder import Run, require_writable

        finished = Run(self.run_folder)
        _ = finished.identity, finished.recipe, finished.summary  # refuses what is no finished run
        out = self.out or finished.folder / "report.html"
        require_writable(out, finished)
        explanation = finished.explanation
        if explanation is None:
            own = {"data": self.data, "device": self.device, "model": self.model}
            Explain(run_folder=self.run_folder, **own).run()
            explanation = finished.explanation
        from tinylab.share.report import page

        write_atomically(out, page(finished, explanation).encode("utf-8", "replace"))
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, everything inside")


@dataclass(frozen=True)
class Predict:
    """Say what is on your own images: the five most probable classes of each."""

    run_folder: RunFolder
    """The folder of a finished run, or a model.safetensors that tinylab wrote."""
    images: Positional[tuple[Path, ...]]
    """JPEG, PNG or WebP files of any size: turned upright, cut to a square, scaled to 64 x 64."""
    test: Path | None = None
    """A folder of pictures instead, Tiny ImageNet's test/ for one; the answers go to --csv."""
    csv: Path | None = None
    """The table to write of --test: file, wnid."""
    top: int = 5
    """How many classes to name."""
    json: bool = False
    """One JSON object per image on stdout, nothing else."""
    gradcam: Path | None = None
    """A folder that gets a figure for each image: Grad-CAM of the predicted class."""
    model: str | None = None
    """FILE:NAME of what builds the network, if the run had one of its own."""

    def run(self) -> None:
        if not 1 <= self.top <= 1000:
            raise UserError(f"top must be from 1 to 1,000, not {self.top}")
        if len({bool(self.images), self.test is None, self.csv is None}) > 1:
            raise UserError("which images? `predict RUN IMAGE...`, or --test FOLDER --csv OUT")
        from tinylab.files import as_csv, write_atomically
        from tinylab.run.folder import require_writable

        for path in filter(None, (self.csv, self.gradcam and self.gradcam / "x.png")):
            require_writable(path)
        from tinylab.custom import load_custom
        from tinylab.data.picture import read_image
        from tinylab.share.predict import draw_answers, load, predict, predict_folder

        model, metadata = load(self.run_folder, load_custom(self.model))
        with warnings.catch_warnings(record=True, action="always") as told:  # a bad one stops all
            pictures = [read_image(path) for path in self.images]
            rows = predict_folder(model, metadata, self.test) if self.test else ()
        for each in told:
            complain(each.message)
        if self.csv:
            write_atomically(self.csv, as_csv([("file", "wnid"), *rows]))
            print(f"{self.csv}: {len(rows):,} pictures")
        answers = [predict(model, metadata, picture[None], self.top)[0] for picture in pictures]
        figures: list[Path | None] = [None] * len(pictures)
        if self.gradcam:
            names = [path.name for path in self.images]
            figures = draw_answers(model, metadata, pictures, answers, names, self.gradcam)
        for path, answer, figure in zip(self.images, answers, figures, strict=True):
            if self.json:
                drawn = {"figure": str(figure)} if figure else {}
                print(json.dumps({"image": str(path), "top": answer} | drawn))
                continue
            print(printable(path))
            for guess in answer:
                share = f"{100 * guess['probability']:8.2f} %"
                both = dict.fromkeys((guess["wnid"], printable(guess["name"])))  # may be the same
                print(f"{share}  {'  '.join(both)}")
            if figure:
                print(f"            {figure}")


@dataclass(frozen=True)
class Export:
    """Write weights, model card and class list into one folder; ONNX if asked."""

    run_folder: RunFolder
    """The run folder."""
    to: Path | None = None
    """The folder that gets model.safetensors, config.json, README.md (the model card) and
    classes.csv; by default RUN/export."""
    onnx: Path | None = None
    """An ONNX file to write, whose outputs are compared with the network's in onnxruntime."""
    model: str | None = None
    """FILE:NAME of what builds the network, if the run had one of its own."""
    hub: str | None = None
    """A repository of the Hugging Face Hub, OWNER/NAME, that gets these files, too."""

    def run(self) -> None:
        from tinylab.custom import load_custom
        from tinylab.run.folder import Run, require_writable

        finished = Run(self.run_folder)
        _ = finished.identity, finished.recipe, finished.summary  # refuses what is no finished run
        folder = self.to or finished.folder / "export"
        for path in filter(None, (folder / "README.md", self.onnx)):
            require_writable(path, finished)
        from tinylab.share.card import push, refuse_others_files, write_hand_over

        refuse_others_files(folder)
        checked = None
        if self.onnx:
            from tinylab.share.onnx import export_onnx
            from tinylab.share.predict import load

            network = load(finished.folder, load_custom(self.model))
            checked = export_onnx(*network, self.onnx)
        for path in write_hand_over(finished, folder):
            print(path)
        if checked:
            difference = f"{checked['largest_difference']:.1e}"
            print(f"{self.onnx}: opset {checked['opset']}, logits differ by at most {difference}")
        if self.hub:
            print(push(folder, self.hub))


@dataclass(frozen=True, kw_only=True)
class FindLr(Training):
    """Try rising learning rates for a hundred steps and suggest one."""

    steps: int = 100
    """Optimiser steps between the lowest and the highest rate."""
    lowest: float = 1e-5
    """Where to begin."""
    highest: float = 10.0
    """Where to end, unless the loss has risen to four times its lowest before."""
    figure: Path | None = None
    """The picture to draw; by default runs/find-lr-<recipe>-<split>-s<seed>.png."""

    def run(self) -> None:
        name = f"find-lr-{self.recipe.name}-{self.recipe.split}-s{self.seed}.png"
        out = self.figure or Path("runs") / name
        from tinylab.run.folder import require_writable

        require_writable(out)
        from tinylab import figures as plots
        from tinylab.data.dataset import open_dataset
        from tinylab.training.lr_finder import find_lr

        rates = {"steps": self.steps, "start": self.lowest, "stop": self.highest}
        found = find_lr(
            self.recipe, open_dataset(self.data), split=self.recipe.split, **rates, **self.options()
        )
        curve = (found.learning_rates, found.losses, found.smoothed, found.suggestion)
        print(plots.save(plots.learning_rate_test(*curve), out))
        if found.suggestion is None:
            print(f"no suggestion: {found.reason}")
            return
        options = f"--max-learning-rate {found.suggestion:.2g}"
        if self.recipe.optimizer == "muon":
            share = found.suggestion / self.recipe.max_learning_rate
            options += f" --muon-learning-rate {self.recipe.muon_learning_rate * share:.2g}"
        print(f"{found.reason}; to try it: tinylab train {self.recipe.name} {options}")


@dataclass(frozen=True)
class Verify:
    """Compare a data folder, an archive or a run with its hashes."""

    path: Positional[Path] = DATA
    """A data folder, an archive or a folder with its files, a run folder, or a mirror's."""

    def run(self) -> None:
        from tinylab.data.archive import verify_archive

        path, inside = self.path, lambda name: (self.path / name).exists()
        if inside("run.json"):
            from tinylab.run.folder import Run
            from tinylab.run.verify import verify_run

            print(verify_run(Run(path)))
        elif inside("last.ckpt") or inside("previous.ckpt"):
            from tinylab.run import checkpoint

            print(f"{path}: {checkpoint.verify(path)}")
        elif not path.exists():
            raise UserError(f"{path} does not exist: name a data folder, an archive or a run")
        elif any(path.glob("*/run.json")):
            raise UserError(f"{path} holds runs: name one of them")
        elif not inside("meta.json"):
            print(verify_archive(path))
        else:
            from tinylab.data.dataset import open_dataset, verify

            dataset = open_dataset(path)
            verify(dataset)
            known = "the published" if dataset.is_tiny_imagenet else "not the published"
            content = f"content sha256 {dataset.content_sha256}, {known} Tiny ImageNet"
            print(f"{path}: every file is as it was prepared; {content}")


COMMANDS = {
    "sample": Sample, "prepare": Prepare, "train": Train, "evaluate": Evaluate,
    "explain": Explain, "report": Report, "predict": Predict, "export": Export,
    "schedule": Schedule, "find-lr": FindLr, "summary": Summary, "verify": Verify,
}  # fmt: skip
WITH_RECIPE = ("train", "schedule", "find-lr")


def recipe_of(name: str) -> Recipe:
    """Return the recipe of that name, or the one in a JSON file."""
    if not name.endswith(".json"):
        return named(name)
    from tinylab.run.folder import read_recipe

    return read_recipe(Path(name))


def parse(arguments: list[str]) -> object:
    """Return the command that the arguments name. tyro prints what does not parse, and exits."""
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'; there are: {', '.join(COMMANDS)}")
    command, prog = COMMANDS[name], f"tinylab {name}"
    if name not in WITH_RECIPE:
        refuse_unknown(rest, command, with_recipe=False)
        asked = tyro.cli(command, prog=prog, args=rest)
        if getattr(asked, "run_folder", None) == Path("pretrained") and command is not Predict:
            from tinylab.share.pretrained import pretrained_run

            asked = replace(asked, run_folder=pretrained_run())
        return asked
    helps = {"-h", "--help", "--help-all"} & set(rest)
    if rest and not rest[0].startswith("-"):
        recipe, prog = recipe_of(rest[0]), f"{prog} {rest[0]}"
    elif helps:
        recipe, prog = named("published"), f"{prog} RECIPE"
    else:
        names = ", ".join(RECIPES)
        raise UserError(f"which recipe? `tinylab {name} RECIPE`; there are: {names}")
    if name == "find-lr":  # settings are chosen on images that no result is tested on
        recipe = replace(recipe, split="select")
    if helps:
        print(describe(command, prog, recipe, everything="--help-all" in helps))
        raise SystemExit(0)
    refuse_unknown(rest[1:], command, with_recipe=True)
    return tyro.cli(command, prog=prog, args=rest[1:], default=command(recipe=recipe))


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Stopped` at SIGTERM while entered. (Training has a handler of its own.)"""

    def stop(number: int, _frame: object) -> None:
        raise Stopped("terminated", number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # only it has handlers
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def usage() -> str:
    """Return what `tinylab --help` prints."""
    lines = ["usage: tinylab COMMAND [options]      tinylab COMMAND --help tells them", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name + (' RECIPE' if name in WITH_RECIPE else ''):<18}{command.__doc__}")
    return "\n".join([*lines, "", f"recipes: {', '.join(RECIPES)}"])


def first(rank: str) -> bool:
    """Return whether this process is torchrun's first by that variable, or not torchrun's."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get(rank, "0") == "0"


def complain(error: object) -> None:
    """Print one line on stderr; of torchrun's processes one on each machine does."""
    if first("LOCAL_RANK"):
        print(f"tinylab: {printable(error, 400) or 'stopped'}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, 2 for user errors, or 130 or 143 after a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in ("stdout", "stderr"):  # a daemon has none; the work goes on
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        # A name that the terminal cannot show is no error.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        with terminable():
            if not arguments or arguments[0] in ("-h", "--help"):
                print(usage())
                status = 0 if arguments else 2
            else:
                parse(list(arguments)).run()
            sys.stdout.flush()
    except UserError as error:
        complain(error)
        return 2
    except SystemExit as stop:  # tyro has printed what it has to say
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        complain(stop)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        complain(f"{error.filename or 'output'}: {error.strerror}")
        return 2
    return status

"""The command line: `tinylab COMMAND ...`, also `python -m tinylab`.

Options are built by tyro from the signatures below and, for `train` and `schedule`, from the recipe's own fields. What a
user can mend is one line on stderr and exit status 2; Ctrl-C is 130, SIGTERM 143; anything else is a bug and keeps its
traceback. Heavy imports wait until a command needs them, so that a bad option is refused at once.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tinylab.recipe import RECIPES, Recipe, UserError, named

DATA = Path("data/tiny-imagenet")


def sample(out: tyro.conf.Positional[Path], /, seed: int = 0) -> None:
    """Write a small made-up data set in the public archive's layout.

    Args:
        out: The zip file to write.
        seed: Another seed draws other images of the same ten classes.
    """
    from tinylab.sample import write_sample

    print(write_sample(out, seed=seed))


def prepare(source: str = "auto", data: Path = DATA, workers: int | None = None) -> None:
    """Find or download Tiny ImageNet and decode it once into the data folder.

    Args:
        source: auto ($TINY_IMAGENET, the zip or folder below data/, else a download), or a URL, a zip or a folder.
        data: The data folder to make; one that is complete is only checked.
        workers: Processes that decode; by default one per core.
    """
    from tinylab.dataset import prepare as prepare_dataset

    dataset = prepare_dataset(source, data, workers=workers)
    print(
        f"{data}: {len(dataset):,} images ({dataset.train_count:,} training, {len(dataset) - dataset.train_count:,} "
        f"validation), {len(dataset.wnids)} classes\ncontent sha256 {dataset.content_sha256}"
    )


@dataclass(frozen=True)
class TrainOptions:
    """Train by a recipe and test after every epoch; a run that was stopped continues by itself."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="", help="")]
    data: Path = DATA
    """The data folder that `tinylab prepare` made."""
    run: Path | None = None
    """The run folder; by default runs/<recipe>-<protocol>-s<seed>."""
    seed: int = 0
    """Decides the first weights, the order of the images and their augmentation."""
    split: Literal["merged", "official", "select"] = "merged"
    """Which images train and which test."""
    limit_classes: int | None = None
    """Only the first so many classes, by sorted wnid."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of convolutions and matrix products."""
    workers: int | None = None
    """Processes that augment; they do not change the result."""


def train(options: TrainOptions) -> None:
    from tinylab.dataset import open_dataset
    from tinylab.train import train as train_run

    run = train_run(
        options.recipe,
        open_dataset(options.data),
        split=options.split,
        folder=options.run,
        seed=options.seed,
        limit_classes=options.limit_classes,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )
    final = run.summary
    print(
        f"{run.folder}: {final['test_top1']:.2f} % top-1, {final['test_top5']:.2f} % top-5 after epoch {final['epochs']}, "
        f"{final['train_seconds'] / 60:.1f} minutes of training"
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Print learning rate and momentum of every optimiser step as CSV."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="", help="")]
    images: int = 77_000
    """Training images; 77,000 are those of the merged split."""


def schedule(options: ScheduleOptions) -> None:
    if options.images < 1:
        raise UserError(f"images must be at least 1, not {options.images}")
    from tinylab.train import schedule as steps

    print("step,learning_rate,momentum")
    for row in steps(options.recipe, options.images):
        print(*row, sep=",")


def summary(classes: int = 200, width: int = 64) -> None:
    """Print torchsummary's table of the network.

    Args:
        classes: Number of outputs.
        width: Channels of the first stage.
    """
    if classes < 1 or width < 1:
        raise UserError("classes and width must be at least 1")
    from tinylab.model import summary as table

    sys.stdout.write(table(classes, width))


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    tta: Literal["none", "flip"] = "none",
    data: Path | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> None:
    """Test a finished run's weights again; the last line of the output is one JSON object.

    Args:
        run: The run folder.
        tta: flip averages the logits of each image and its mirror image; report it apart.
        data: The data folder, if it has moved since training.
        device: Where to compute.
        precision: Number format; the same as in training gives the same numbers.
    """
    from tinylab.device import choose
    from tinylab.evaluate import compute_logits, score, with_flip
    from tinylab.loader import test_batches
    from tinylab.train import inference

    finished, dataset, rows = _open(run, data)
    place = choose(device, precision)
    forward = inference(_model(finished, dataset).to(place.device), finished.recipe, place)
    forward = with_flip(forward) if tta == "flip" else forward
    result = score(*compute_logits(forward, test_batches(dataset, rows.test, place.device)))
    print(f"{len(rows.test):,} test images of {run}, {place}")
    print(json.dumps({"protocol": rows.protocol, "classes": rows.classes, "tta": tta, **result.numbers()}))


def _open(folder: Path, data: Path | None):
    """The run in `folder`, its data set, and the split it was trained on; `UserError` if they do not belong together."""
    from tinylab.dataset import open_dataset
    from tinylab.record import Run
    from tinylab.split import make_split

    run = Run(folder)
    identity = run.identity
    dataset = open_dataset(data or Path(identity["data_folder"]))
    if dataset.content_sha256 != identity["content_sha256"]:
        raise UserError(f"{folder} was trained on other data than {dataset.folder} holds; name its folder with --data")
    rows = make_split(dataset, identity["protocol"], identity["classes"])
    if rows.sha256 != identity["split_sha256"]:
        raise UserError(f"{folder} was trained on another split than this version of tinylab makes")
    return run, dataset, rows


def _model(run, dataset):
    """The finished run's network, its file checked against the summary and its classes against the data set."""
    import hashlib

    from tinylab.model import load_weights

    expected = run.summary["model_sha256"]
    if not run.weights.exists() or hashlib.sha256(run.weights.read_bytes()).hexdigest() != expected:
        raise UserError(f"{run.weights} is missing or damaged: it is not what the summary of the run says")
    return load_weights(run.weights, dataset.wnids[: run.identity["classes"]])[0]


FUNCTIONS = {"sample": sample, "prepare": prepare, "evaluate": evaluate, "summary": summary}
WITH_RECIPE = {"train": (train, TrainOptions), "schedule": (schedule, ScheduleOptions)}


def run_command(arguments: list[str]) -> None:
    """Parses `arguments` and runs the command they name."""
    command, rest = arguments[0], arguments[1:]
    if command in FUNCTIONS:
        tyro.cli(FUNCTIONS[command], prog=f"tinylab {command}", args=rest)
    elif command in WITH_RECIPE:
        function, options = WITH_RECIPE[command]
        if not rest or rest[0].startswith("-"):
            if not set(rest) & {"-h", "--help"}:
                raise UserError(f"which recipe? `tinylab {command} RECIPE`; there are: {', '.join(RECIPES)}")
            rest = ["published", *rest]
        default = options(recipe=named(rest[0]))
        function(tyro.cli(options, prog=f"tinylab {command} {rest[0]}", args=rest[1:], default=default))
    else:
        raise UserError(f"unknown command '{command}'; there are: {', '.join([*FUNCTIONS, *WITH_RECIPE])}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    run_command(list(sys.argv[1:] if arguments is None else arguments))
    return 0

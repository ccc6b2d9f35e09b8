"""How many augmented, normalised images per second does each loader deliver?

What is counted is float32 batches, ready for the network, on the device. The loaders take turns, `--repeat` times, in
this one process; each has the number of worker processes with which it was fastest in a first pass.

    ours, batched          `published` with its augmentation on the device: flip 0.7, reflect-pad to 70 and crop, a hole
                           of 32 x 32 with probability 0.7; reads decoded images from the memory map (GPU: from memory)
    ours, accurate         what `accurate` asks for, on the device: jitter and mixing, too
    ours, albumentations   `published` as it stands: the same augmentation, image by image in worker processes
    ImageFolder            torchvision: decodes JPEG files; the same augmentation by transforms v2, image by image
    timm                   timm's own loader of the same files with its usual augmentation, which is a heavier one:
                           random resized crop, flip, colour jitter; erasing and normalisation batched on the device

Files and memory map are in the page cache (a first pass over them is not counted). The batched loaders go over up to
eight times as many images, so that what they read does not lie in the processor's own caches. The peers' JPEG files are
the archive's own where it lies beside the data set, else they are encoded anew.

    python benchmarks/bench_loader.py --data data/tiny-imagenet
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tinylab.data.archive import Archive
from tinylab.data.augment import normalise
from tinylab.data.dataset import FOLDER, Dataset, available_cores, open_dataset, prepare
from tinylab.data.loader import make_loader
from tinylab.data.split import make_split
from tinylab.data.synthetic import write_sample
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, published
from tinylab.run.environment import Compute, choose, device_name

TARGET = 5.0
"""Batched loading should be at least so many times as fast as ImageFolder, on two cores."""
JPEG_QUALITY = 90
UNSTEADY = 1.5
"""If the fastest round is so many times as fast as the slowest, something else was at work."""

Pass = Callable[[], Iterator[torch.Tensor]]
"""Begins one pass over the images and yields its batches, float32 (B, 3, 64, 64) on the device."""


class Contender(NamedTuple):
    """A loader. `open(workers)` is a context manager that gives its `Pass`; `workers` are the numbers worth a try."""

    open: Callable[[int], contextlib.AbstractContextManager[Pass]]
    workers: tuple[int, ...]


# --- What the other benchmarks use, too -------------------------------------------------------------------------------


def make_parser(description: str, repeat: int | None = None) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have; `repeat` rounds, if there are rounds."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--data",
        type=Path,
        help=f"data set folder (default: {FOLDER}, or made-up images without it)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    if repeat:
        parser.add_argument(
            "--repeat", type=int, default=repeat, help=f"rounds (default: {repeat})"
        )
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; the numbers mean little"
    )
    return parser


def find_data(folder: Path | None, scratch: Path) -> tuple[Dataset, Path | None, str]:
    """The data set to measure on, the archive that it came from if that is known, and a few words that say what it is.

    Without `folder` that is Tiny ImageNet where it is prepared, else made-up images, written below `scratch`.
    Raises `UserError` if there is no data set in `folder`.
    """
    if folder is None and not (FOLDER / "meta.json").exists():
        archive = write_sample(scratch / "sample.zip")
        return (
            prepare(archive, scratch / "sample", progress=False),
            archive,
            "made-up images, in a temporary folder",
        )
    dataset = open_dataset(folder or FOLDER)
    archive = dataset.folder.parent / "tiny-imagenet-200.zip"
    words = (
        "Tiny ImageNet"
        if dataset.is_tiny_imagenet
        else f"{len(dataset):,} images that are not Tiny ImageNet"
    )
    return dataset, archive if archive.is_file() else None, words


def alternate(contenders: dict[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    """One measurement of each contender after the other, `repeat` times, so that noise hits all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, measure in contenders.items():
            gc.collect()  # nobody pays for another's rubbish
            values[name].append(measure())
    return values


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def is_steady(spreads: list[dict[str, float]]) -> bool:
    """Whether the rounds of every contender agree well enough for a comparison; says so if they do not."""
    worst = max(found["max"] / found["min"] for found in spreads)
    if worst > UNSTEADY:
        print(
            f"note: rounds of one and the same differ by a factor of {worst:.1f}: repeat this on an idle machine"
        )
    return worst <= UNSTEADY


def conditions(compute: Compute, data: str) -> dict[str, object]:
    """What a reader has to know about the machine to compare numbers."""
    return {
        "device": device_name(compute.device),
        "precision": compute.precision,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        **{
            name: version(name)
            for name in ("torch", "torchvision", "timm", "grad-cam", "albumentations")
        },
        "data": data,
    }


def print_conditions(found: dict[str, object], repeat: int | None = None) -> None:
    """The same in a line for people."""
    rounds = f"; median of {repeat}" if repeat else ""
    print(
        f"{found['device']}, {found['cores']} cores, torch {found['torch']}; {found['data']}{rounds}"
    )
    if found["load_average"] > 0.5:
        print(
            f"note: others were at work here when this began (load average {found['load_average']})"
        )


# --- The loaders ------------------------------------------------------------------------------------------------------


def our_loader(dataset: Dataset, rows: np.ndarray, recipe: Recipe, compute: Compute) -> Contender:
    """This project's loader of those rows, with what the recipe asks for, and normalisation on the device."""
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(rows)))
    on_device = recipe.augmentation == "batched"

    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Pass]:
        loader = make_loader(
            dataset, rows, recipe, 0, compute.device, None if on_device else workers
        )
        epochs = itertools.cycle(range(1, round(recipe.epochs * (1 - recipe.unmixed_share)) + 1))
        with contextlib.closing(loader):
            yield lambda: (normalise(batch.images, recipe) for batch in loader.epoch(next(epochs)))

    return Contender(opened, (0,) if on_device else worker_numbers())


def torchvision_transform(recipe: Recipe) -> Callable[[Image.Image], torch.Tensor]:
    """The recipe's flip, crop, hole and normalisation for one PIL image; gives float32 (3, 64, 64).

    Of several orders of the transforms this is the fastest here: tensors first, as torchvision's documentation advises.
    """
    from torchvision.transforms import (
        v2,  # here, like the peers below: the other benchmarks import this file
    )

    area = (recipe.hole_size / 64) ** 2
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomHorizontalFlip(recipe.flip_probability),
            v2.Pad((recipe.pad_to - 64) // 2, padding_mode="reflect"),
            v2.RandomCrop(64),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(recipe.mean, recipe.std),
            # Of this one area and shape there is only the square of hole_size; 0 is the mean once normalised.
            v2.RandomErasing(recipe.hole_probability, scale=(area, area), ratio=(1, 1), value=0),
        ]
    )


def image_folder(folder: Path, recipe: Recipe, compute: Compute) -> Contender:
    """torchvision's way, with the recipe's augmentation."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(folder, torchvision_transform(recipe))

    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Pass]:
        loader = DataLoader(
            images,
            batch_size=min(recipe.batch_size, len(images)),
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=compute.device.type == "cuda",
        )
        yield lambda: (batch.to(compute.device, non_blocking=True) for batch, _ in loader)

    return Contender(opened, worker_numbers())


def timm_loader(folder: Path, recipe: Recipe, compute: Compute) -> Contender:
    """timm's loader as its training script makes it, but for the size, flip and erasing of this recipe."""
    from timm.data import create_loader
    from torchvision.datasets import ImageFolder

    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Pass]:
        images = ImageFolder(folder)
        loader = create_loader(
            images,
            input_size=(3, 64, 64),
            batch_size=min(recipe.batch_size, len(images)),
            is_training=True,
            hflip=recipe.flip_probability,
            re_prob=recipe.hole_probability,
            mean=recipe.mean,
            std=recipe.std,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=compute.device.type == "cuda",
            device=compute.device,
        )
        yield lambda: (batch for batch, _ in loader)

    return Contender(opened, worker_numbers())


def worker_numbers() -> tuple[int, ...]:
    """Numbers of worker processes that are worth a try on this machine."""
    cores = available_cores()
    return tuple(sorted({0, 1, 2, cores // 2, cores}))


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, spread evenly over all of them and so over all classes."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def write_image_folder(
    dataset: Dataset, rows: np.ndarray, archive: Path | None, folder: Path
) -> str:
    """Writes the images `rows` as JPEG files, one folder per class; says where the files came from."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Archive(archive)) if archive else None
        origin = f"encoded anew, quality {JPEG_QUALITY}"
        if opened and len(opened.files) == len(dataset) and opened.wnids == dataset.wnids:
            origin = "the archive's own"
        for row in rows.tolist():
            target = folder / dataset.wnids[dataset.labels[row]] / f"{row}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            if origin == "the archive's own":
                target.write_bytes(opened.read(opened.files[row]))
            else:
                Image.fromarray(dataset.images[row]).save(target, quality=JPEG_QUALITY)
        check_image(target, dataset.images[rows[-1]], exact=origin == "the archive's own")
    return origin


def check_image(path: Path, image: np.ndarray, exact: bool) -> None:
    """Raises `UserError` if the file does not show the image: the archive is another one then."""
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        difference = np.abs(np.asarray(opened.convert("RGB")).astype(int) - image).mean()
    if difference > (0 if exact else 20):
        raise UserError(
            "the archive beside the data set is not the one that it was prepared from: move it away"
        )


# --- Measuring --------------------------------------------------------------------------------------------------------


def images_per_second(begin: Pass, compute: Compute) -> float:
    """Of one pass, from the call that begins it until the device has every batch."""
    compute.synchronise()
    started, seen = time.perf_counter(), 0
    for images in begin():
        seen += len(images)
    compute.synchronise()
    return seen / (time.perf_counter() - started)


def fastest_workers(contender: Contender, compute: Compute) -> tuple[int, dict[int, float]]:
    """With how many worker processes it is fastest, and images/s with each number; started workers, second pass."""
    if len(contender.workers) == 1:
        return contender.workers[0], {}
    rates = {}
    for workers in contender.workers:
        with contender.open(workers) as begin:
            images_per_second(begin, compute)
            rates[workers] = round(images_per_second(begin, compute), 1)
    return max(rates, key=rates.get), rates


def measure(contenders: dict[str, Contender], compute: Compute, repeat: int) -> dict[str, dict]:
    """For each loader images/s with its best number of workers, which that is, and what the other numbers gave."""
    chosen = {name: fastest_workers(contender, compute) for name, contender in contenders.items()}
    with contextlib.ExitStack() as stack:
        measurements = {}
        for name, contender in contenders.items():
            begin = stack.enter_context(contender.open(chosen[name][0]))
            images_per_second(begin, compute)  # starts the workers, maps the pages
            measurements[name] = lambda begin=begin: images_per_second(begin, compute)
        rates = alternate(measurements, repeat)
    return {
        name: {
            "images_per_second": spread(rates[name]),
            "workers": chosen[name][0],
            "tried": chosen[name][1],
        }
        for name in contenders
    }


def main() -> None:
    parser = make_parser(__doc__, repeat=5)
    parser.add_argument(
        "--images", type=int, default=4096, help="JPEG files for the peers (default: 4096)"
    )
    arguments = parser.parse_args()
    repeat = 1 if arguments.quick else arguments.repeat
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        try:
            compute = choose(arguments.device)
            dataset, archive, words = find_data(arguments.data, Path(scratch))
            found = conditions(compute, words)
            train = make_split(dataset, "merged").train
            count = min(200 if arguments.quick else arguments.images, len(train))
            few, many = (
                train[np.linspace(0, len(train) - 1, n).astype(int)]
                for n in (count, min(8 * count, len(train)))
            )
            files = write_image_folder(dataset, few, archive, Path(scratch) / "images")
        except UserError as error:
            parser.error(str(error))
        batched = replace(published(), augmentation="batched")
        contenders = {
            "ours, batched": our_loader(dataset, many, batched, compute),
            "ours, accurate": our_loader(dataset, many, accurate(), compute),
            "ours, albumentations": our_loader(dataset, few, published(), compute),
            "ImageFolder": image_folder(Path(scratch) / "images", published(), compute),
            "timm": timm_loader(Path(scratch) / "images", published(), compute),
        }
        if arguments.quick:
            contenders = {
                name: each._replace(workers=each.workers[:1]) for name, each in contenders.items()
            }
        rows = measure(contenders, compute, repeat)
    report(
        rows,
        {
            **found,
            "images": len(few),
            "images_batched": len(many),
            "jpeg_files": files,
            "repeat": repeat,
        },
    )


def report(rows: dict[str, dict], found: dict[str, object]) -> None:
    """Prints the table and the JSON line."""
    medians = {name: row["images_per_second"]["median"] for name, row in rows.items()}
    ratios = {name: round(medians["ours, batched"] / median, 2) for name, median in medians.items()}
    print_conditions(found, found["repeat"])
    print(
        f"  {found['images']:,} JPEG files ({found['jpeg_files']}); batched loaders: {found['images_batched']:,} images"
    )
    print(
        f"  {'':24}{'images/s':>10}  {'lowest':>8}  {'highest':>8}  {'workers':>7}  {'batched is':>10}"
    )
    for name, row in rows.items():
        rate = row["images_per_second"]
        print(
            f"  {name:24}{rate['median']:>10,.0f}  {rate['min']:>8,.0f}  {rate['max']:>8,.0f}  {row['workers']:>7}  "
            f"{ratios[name]:>9.2f}x"
        )
    reached = ratios["ImageFolder"] >= TARGET
    print(
        f"  target: batched at least {TARGET:g} x ImageFolder: {'reached' if reached else 'missed'}"
    )
    result = {
        "benchmark": "loader",
        **found,
        "loaders": rows,
        "ratios": ratios,
        "target": TARGET,
        "reached": reached,
    }
    steady = is_steady([row["images_per_second"] for row in rows.values()])
    print(json.dumps(result | {"steady": steady}))


if __name__ == "__main__":
    main()

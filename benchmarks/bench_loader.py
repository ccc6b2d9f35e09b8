"""How many augmented, normalised images per second does each loader deliver?

What is counted is float32 batches, ready for the network, on the device. The loaders take turns,
`--repeat` times, in this one process; each has the number of worker processes with which it was
fastest in a first pass.

    ours, batched          `published` with its augmentation on the device: flip, reflect-pad and
                           crop, a hole; reads decoded images from the memory map (GPU: from memory)
    ours, albumentations   `published` as it stands: the same, image by image in worker processes
    ImageFolder            torchvision: decodes JPEG files; the same by transforms v2
    timm                   timm's own loader of the same files with its usual augmentation, which is
                           a heavier one: random resized crop, flip, colour jitter, erasing

Files and memory map are in the page cache (a first pass is not counted). The batched loader goes
over up to eight times as many images, so that they do not lie in the processor's own caches. The
peers' files are the archive's own where it lies beside the data set, else encoded anew.

    python benchmarks/bench_loader.py --data data/tiny-imagenet
"""

import contextlib
import itertools
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import conditions, evenly, find_data, make_parser, report, seconds, take_turns
from PIL import Image
from timm.data import create_loader
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tinylab.data.augment import normalise
from tinylab.data.dataset import Dataset, available_cores
from tinylab.data.loader import make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import published
from tinylab.run.environment import Compute, choose

TARGET = 5.0
"""Batched loading should be at least so many times as fast as ImageFolder, on two cores."""
WORKERS = tuple(sorted({0, 1, 2, available_cores() // 2, available_cores()}))
Pass = Callable[[], Iterator[torch.Tensor]]
"""Begins a pass over the images and yields its batches, float32 (B, 3, 64, 64) on the device."""


class Contender(NamedTuple):
    """A loader. open(workers): gives its `Pass`. workers: the numbers worth a try."""

    open: Callable[[int], contextlib.AbstractContextManager[Pass]]
    workers: tuple[int, ...]


def our_loader(dataset: Dataset, rows: np.ndarray, recipe: Recipe, compute: Compute) -> Contender:
    """Return this project's loader of those rows, with what the recipe asks for."""
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(rows)))
    batched = recipe.augmentation == "batched"

    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Pass]:
        workers = None if batched else workers
        loader = make_loader(dataset, rows, recipe, 0, compute.device, workers)
        epochs = itertools.cycle(range(1, recipe.epochs + 1))
        with contextlib.closing(loader):
            yield lambda: (normalise(batch.images, recipe) for batch in loader.epoch(next(epochs)))

    return Contender(opened, (0,) if batched else WORKERS)


def torchvision_transform(recipe: Recipe) -> Callable[[Image.Image], torch.Tensor]:
    """Return the recipe's augmentation of one PIL image; it gives float32 (3, 64, 64).

    Of several orders this is the fastest here: tensors first, as torchvision advises.
    """
    area = (recipe.hole_size / 64) ** 2
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomHorizontalFlip(recipe.flip_probability),
            v2.Pad((recipe.pad_to - 64) // 2, padding_mode="reflect"),
            v2.RandomCrop(64),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(recipe.mean, recipe.std),
            # The only square of this area is hole_size wide; 0 is the mean once normalised.
            v2.RandomErasing(recipe.hole_probability, scale=(area, area), ratio=(1, 1), value=0),
        ]
    )


def peer(make: Callable[..., Iterable], count: int, recipe: Recipe, compute: Compute) -> Contender:
    """Return another loader: what `make` returns, asked for the recipe's batches."""

    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Pass]:
        loader = make(
            batch_size=min(recipe.batch_size, count),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=compute.device.type == "cuda",
        )
        yield lambda: (batch.to(compute.device, non_blocking=True) for batch, _ in loader)

    return Contender(opened, WORKERS)


def image_folder(folder: Path, recipe: Recipe, compute: Compute) -> Contender:
    """Return torchvision's loader, with the recipe's augmentation."""
    images = ImageFolder(folder, torchvision_transform(recipe))
    return peer(partial(DataLoader, images, shuffle=True), len(images), recipe, compute)


def timm_loader(folder: Path, recipe: Recipe, compute: Compute) -> Contender:
    """Return timm's loader as its training script makes it, but for this recipe's numbers."""
    images = ImageFolder(folder)
    numbers = {"hflip": recipe.flip_probability, "re_prob": recipe.hole_probability}
    numbers |= {"mean": recipe.mean, "std": recipe.std, "device": compute.device}

    def make(**options: object) -> Iterable:
        own = ImageFolder(folder)  # it puts its transform there
        return create_loader(own, input_size=(3, 64, 64), is_training=True, **numbers, **options)

    return peer(make, len(images), recipe, compute)


def write_image_folder(dataset: Dataset, rows: np.ndarray, folder: Path) -> str:
    """Write as many JPEG files, one folder per class, and return where they came from."""
    archive = dataset.folder.parent / "tiny-imagenet-200.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if Path(name).match("train/*/images/*")]
            for number, name in enumerate(evenly(np.array(names), len(rows)).tolist()):
                target = folder / Path(name).parts[-3]
                target.mkdir(parents=True, exist_ok=True)
                (target / f"{number}.JPEG").write_bytes(opened.read(name))
        return "the archive's own"
    for row in rows.tolist():
        target = folder / dataset.wnids[dataset.labels[row]] / f"{row}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.images[row]).save(target, quality=90)
    return "encoded anew, quality 90"


def images_per_second(begin: Pass, compute: Compute) -> float:
    """Measure one pass, from the call that begins it until the device has every batch."""
    sizes: list[int] = []
    took = seconds(lambda: sizes.extend(len(images) for images in begin()), compute)
    return sum(sizes) / took


def measure(contenders: dict[str, Contender], compute: Compute, repeat: int) -> tuple[dict, dict]:
    """Return images/s of each loader's rounds, and its best number of workers."""
    best = {}
    for name, contender in contenders.items():
        rates = {}
        for workers in contender.workers if len(contender.workers) > 1 else ():
            with contender.open(workers) as begin:
                images_per_second(begin, compute)  # starts the workers
                rates[workers] = images_per_second(begin, compute)
        best[name] = max(rates, key=rates.get, default=contender.workers[0])
    with contextlib.ExitStack() as stack:
        measurements = {}
        for name, contender in contenders.items():
            begin = stack.enter_context(contender.open(best[name]))
            images_per_second(begin, compute)  # starts the workers, maps the pages
            measurements[name] = lambda begin=begin: images_per_second(begin, compute)
        return take_turns(measurements, repeat), best


def main() -> None:
    parser = make_parser(__doc__, repeat=5)
    parser.add_argument("--images", type=int, default=4096, help="JPEG files (default: 4096)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        files, recipe = Path(scratch) / "images", published()
        try:
            compute = choose(arguments.device)
            dataset, name = find_data(arguments.data, Path(scratch))
            train = make_split(dataset, "merged").train
        except UserError as error:
            parser.error(str(error))
        few = evenly(train, 200 if arguments.quick else arguments.images)
        many = evenly(train, 8 * len(few))
        found = conditions(compute, name, jpeg_files=write_image_folder(dataset, few, files))
        found |= {"images": len(few), "images_batched": len(many), "timm": version("timm")}
        found["repeat"] = 1 if arguments.quick else arguments.repeat
        batched = replace(recipe, augmentation="batched")
        contenders = {
            "ours, batched": our_loader(dataset, many, batched, compute),
            "ours, albumentations": our_loader(dataset, few, recipe, compute),
            "ImageFolder": image_folder(files, recipe, compute),
            "timm": timm_loader(files, recipe, compute),
        }
        if arguments.quick:
            contenders = {name: Contender(each.open, (0,)) for name, each in contenders.items()}
        rates, workers = measure(contenders, compute, found["repeat"])
    report("loader", rates, found, workers=workers, target_against_image_folder=TARGET)


if __name__ == "__main__":
    main()

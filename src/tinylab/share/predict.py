"""A finished run's network, and what it says of pictures."""

import sys
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tinylab import figures as plots
from tinylab.custom import source_text
from tinylab.data.archive import class_order_sha256
from tinylab.data.dataset import FOLDER, Dataset, open_dataset
from tinylab.data.picture import read_image
from tinylab.data.split import Split, make_split
from tinylab.exceptions import UserError
from tinylab.explain.analysis import explain_answers
from tinylab.explain.mistakes import softmax
from tinylab.files import interactive, printable
from tinylab.recipe import SIZE
from tinylab.run.folder import Run
from tinylab.run.weights import file_of, load_weights, normalised

BATCH = 256  # pictures
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif")


def load(path: Path, make: Callable[[int], nn.Module] | None = None) -> tuple[nn.Module, dict]:
    """Return the network of a finished run, in eval mode on the CPU, and its file's metadata.

    path: a run's folder, a model.safetensors, or the folder that `tinylab export` made. The weights
    of a run must be the file that its summary names, and of the classes that it was trained on.
    make: builds the network, if the run had one of its own.
    """
    path = Path(path)
    if path == Path("pretrained"):
        return load_weights(file_of(path))
    if not any((path / name).exists() for name in ("run.json", "recipe.json", "summary.json")):
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.exists():
            problem = "holds no run and no weights" if path.is_dir() else "does not exist"
            advice = "name a finished run's folder, or a model.safetensors"
            raise UserError(f"{printable(path)} {problem}: {advice}")
        return load_weights(file, make=make)
    run = Run(path)
    network, metadata = load_weights(run.weights, run.summary["model_sha256"], make)
    if make and source_text(make) != metadata.get("model"):
        print("note: this is not the source that the run's network was built by", file=sys.stderr)
    order = class_order_sha256(metadata["wnids"])
    # Runs that began before there was such a field are held to their number of classes.
    trained = (run.identity["classes"], run.identity.get("class_order_sha256", order))
    if (len(metadata["wnids"]), order) != trained:
        raise UserError(f"{run.weights} has other classes than {run.folder}/run.json")
    return network, metadata


def predict(model: nn.Module, metadata: dict, images: np.ndarray, top: int = 5) -> list[list[dict]]:
    """Return the `top` most probable classes of each image uint8 (n, 64, 64, 3), best first.

    Each is wnid, name and probability (softmax, not calibrated). In fp32, on the model's device;
    the model is put in eval mode. Equal logits rank by class number.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3) or top < 1:
        raise ValueError(f"images {images.dtype} {images.shape}, top {top}")
    device = next(model.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        inputs = normalised(metadata)(torch.from_numpy(images.copy()).to(device))
        logits = model.eval()(inputs).float().cpu().numpy()
    ranked, shares = np.argsort(-logits, axis=1, kind="stable")[:, :top], softmax(logits)
    wnids, names = metadata["wnids"], metadata["names"]
    return [
        [{"wnid": wnids[i], "name": names[i], "probability": row[i]} for i in order]
        for order, row in zip(ranked.tolist(), shares.tolist(), strict=True)
    ]


def predict_folder(model: nn.Module, metadata: dict, folder: Path) -> list[tuple[str, str]]:
    """Return the name of each picture in a folder, sorted, and the wnid of its likeliest class.

    The pictures may lie in its images/, as those of Tiny ImageNet's test/ do.
    """
    folder = folder / "images" if (folder / "images").is_dir() else folder
    paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{printable(folder)} holds no pictures ({', '.join(SUFFIXES)})")
    found, starts = [], range(0, len(paths), BATCH)
    for first in tqdm(starts, desc="predict", leave=False, disable=not interactive()):
        some = paths[first : first + BATCH]
        answers = predict(model, metadata, np.stack([read_image(path) for path in some]), top=1)
        found += [(path.name, best["wnid"]) for path, (best,) in zip(some, answers, strict=True)]
    return found


def open_finished(folder: Path, data: Path | None) -> tuple[Run, Dataset, Split]:
    """Return the finished run, its data set and its split, which belong together."""
    run = Run(folder)
    identity = run.identity
    _ = run.recipe, run.summary  # refuses an unfinished run
    where = Path(identity.get("data_folder", FOLDER))
    if data is None and not where.exists():
        here = f"its data was in {where}, which is not here"
        raise UserError(f"{folder}: {here}: name the data folder with --data")
    dataset = open_dataset(data or where)
    if dataset.content_sha256 != identity["content_sha256"]:
        where = f"than {dataset.folder} holds: name its folder with --data"
        raise UserError(f"{folder} was trained on other data {where}")
    rows = make_split(dataset, identity["protocol"], identity["classes"])
    if rows.sha256 != identity["split_sha256"]:
        raise UserError(f"{folder} was trained on another split than this version of tinylab makes")
    return run, dataset, rows


def draw_answers(
    model: nn.Module,
    metadata: dict,
    pictures: list[np.ndarray],
    answers: list[list[dict]],
    names: list[str],
    folder: Path,
) -> list[Path]:
    """Draw into `folder`, for each picture, Grad-CAM of its first prediction; return the paths."""
    maps = explain_answers(model, metadata, np.stack(pictures), answers)
    paths: list[Path] = []
    for name, picture, answer, heat in zip(names, pictures, answers, maps, strict=True):
        stem = Path(name).stem
        taken = {path.name.casefold() for path in paths}  # some disks do not tell A from a
        possible = chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in count(2)))
        file = next(each for each in possible if each.casefold() not in taken)
        figure = plots.prediction(picture, answer, heat, title=name)
        paths.append(plots.save(figure, folder / file))
    return paths

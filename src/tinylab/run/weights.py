"""The weights file: safetensors with the class list in its metadata."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from tinylab.data.augment import network_input
from tinylab.data.dataset import file_sha256
from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.model import ResNet18
from tinylab.recipe import SIZE, Recipe
from tinylab.recipes import published
from tinylab.run.folder import REPOSITORY

PRETRAINED = REPOSITORY / "weights" / "accurate-merged-s0" / "model.safetensors"
"""The network of the run in results/ of that name, rounded to float16."""


def weights_file(
    model: nn.Module,
    recipe: Recipe,
    wnids: tuple[str, ...],
    names: tuple[str, ...],
    metrics: dict,
    content_sha256: str,
    source: str | None = None,
) -> bytes:
    """Return a safetensors file that can be used without this project.

    Its metadata holds as JSON the classes in the order of the logits (wnids and names), the
    normalisation, the recipe, the final metrics and the data set's hash. source: of an own network.
    """
    state = model.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    values = {
        "wnids": wnids,
        "names": names,
        "mean": recipe.mean,
        "std": recipe.std,
        "recipe": dataclasses.asdict(recipe),
        "metrics": metrics,
        "content_sha256": content_sha256,
    }
    metadata = {"format": "pt", "architecture": "ResNet-18, 3x3 stem, no max-pool"}
    if source is not None:
        values["model"], metadata["architecture"] = source, "own: see its source, `model`"
    metadata |= {key: json.dumps(value) for key, value in values.items()}
    return safetensors.torch.save(tensors, metadata)


def load_weights(
    path: Path, sha256: str | None = None, make: Callable[[int], nn.Module] | None = None
) -> tuple[nn.Module, dict]:
    """Return the network of a `weights_file`, in eval mode on the CPU, and its metadata, decoded.

    float16 weights are widened. make: builds the network of a run that had one of its own.
    Raise `UserError` as `read_weights` does, and if network and weights do not fit.
    """
    tensors, metadata = read_weights(path, sha256)
    if "model" in metadata and make is None:
        asked = "name it with --model FILE:NAME"
        raise UserError(f"{path} holds weights of a network that is not tinylab's: {asked}")
    classes = len(metadata["wnids"])
    try:
        model = make(classes) if make else ResNet18(classes, metadata["recipe"]["width"])
        model.load_state_dict(tensors)  # widens float16
    except (KeyError, TypeError, RuntimeError) as error:
        reason = printable(error) or type(error).__name__
        problem = "does not fit the network" if make else "does not hold weights that tinylab wrote"
        raise UserError(f"{path} {problem}: {reason}") from error
    return model.eval(), metadata


def read_weights(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a `weights_file` and its metadata, decoded.

    sha256: of the file, if it must be a certain one. Raise `UserError` if the file is missing, is
    something else, or has another hash.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{path} is damaged: it is not the file that the run wrote")
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        keys = ("wnids", "names", "recipe", "mean", "std", "metrics", "content_sha256")
        metadata = {key: json.loads(header[key]) for key in (*keys, *{"model"} & header.keys())}
        counts = (len(metadata["wnids"]), len(metadata["names"]))
        if counts[0] != counts[1]:
            raise ValueError("it has {} classes and {} names".format(*counts))
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it has numbers that are not finite")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is not finished") from error
    except (
        OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = printable(error) or type(error).__name__
        raise UserError(f"{path} does not hold weights that tinylab wrote: {reason}") from error
    return tensors, metadata


def file_of(path: Path) -> Path:
    """Return the weights file of a run's folder, or of `pretrained`; a file is itself.

    Raise `UserError` if it does not exist.
    """
    file = PRETRAINED if path == Path("pretrained") else path
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.exists():
        raise UserError(f"{printable(file)} does not exist: name a finished run or a weights file")
    return file


def read_init(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a run's folder or in a weights file, and the file's sha256."""
    file = file_of(path)
    return read_weights(file)[0], file_sha256(file)


def recipe_of(metadata: dict) -> Recipe:
    """Return a recipe with the mean, std and test resolution of a network; the rest means nothing.

    So what an older version wrote, which had other fields, can be read, too.
    """
    resolution = metadata["recipe"].get("test_resolution", SIZE)
    mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
    return dataclasses.replace(published(), mean=mean, std=std, test_resolution=resolution)


def normalised(metadata: dict) -> Callable[[Tensor], Tensor]:
    """Return what turns images uint8 (n, 64, 64, 3) into the network's input float32 (n, 3, R, R).

    R is the recipe's test resolution, 64 as a rule.
    """
    return network_input(recipe_of(metadata))

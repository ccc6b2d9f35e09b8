"""What a researcher brings along: a transform, a network or a loss of their own.

Each is a Python object, given to `train` or named on the command line as FILE:NAME. A run records
the source text, and continues with the same text only; nothing that is recorded is ever executed.
"""

import importlib.util
import inspect
import random
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinylab.data.augment import Stream, augment, generator
from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE
from tinylab.run.weights import read_init

PROBES = 32  # tries of a transform before the run: one in two draws may do nothing
# From logits fp32 (B, classes) and labels int64 (B,) to a scalar, the mean over the images.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_custom(reference: str | None) -> object | None:
    """Return the object that FILE:NAME names, or None for None.

    Raise `UserError` if there is none, or if the file itself fails.
    """
    if reference is None:
        return None
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or path.suffix != ".py":
        raise UserError(f"'{printable(reference)}' is no FILE:NAME, as in mine.py:resnet34")
    if not path.is_file():
        raise UserError(f"{printable(path)} does not exist")
    if not getattr(sys.modules.get(path.stem), "loaded_by_tinylab", path.stem not in sys.modules):
        raise UserError(f"{printable(path)} has the name of another module: rename it")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    module.loaded_by_tinylab = True
    sys.path.append(str(path.parent.resolve()))  # what lies beside it can be imported
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{printable(path)} fails: {in_short(error)}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{printable(path)} has nothing to call that is named {name}")
    return getattr(module, name)


def in_short(error: BaseException) -> str:
    """Return the error in one line, with the line of code where it was raised."""
    where, text = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {text} (line {where.lineno} of {where.filename})")


def source_text(part: Callable) -> str:
    """Return the text that says what a part does.

    The source of a function or a class, without what it calls; of a configured object, such as a
    composition of transforms, its repr, of a torch module its settings, too.
    """
    described = type(part).__repr__ is not object.__repr__
    if described and not inspect.isroutine(part) and not inspect.isclass(part):
        text = repr(part)
        if isinstance(part, nn.Module):  # a loss's repr lacks them
            plain = {k: v for k, v in vars(part).items() if isinstance(v, int | float | str)}
            text += f"\n{plain} { {k: v.tolist() for k, v in part.state_dict().items()} }"
        return re.sub(r" at 0x[0-9a-f]+", "", text)
    named = part if hasattr(part, "__qualname__") else type(part)
    try:
        return textwrap.dedent(inspect.getsource(named))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class Custom:
    """What replaces a part of the experiment; None: nothing."""

    transform: "CustomTransform | None"
    model: Callable[[int], nn.Module] | None
    loss: Loss | None
    init: dict[str, torch.Tensor] | None  # weights to start from
    identity: dict[str, str]  # what a run records of it

    def seed_step(self, seed: int, epoch: int, step: int, rank: int) -> None:
        """Seed torch's generator, which dropout draws from, so that a stopped run continues."""
        if self.identity:
            draw = generator(seed, Stream.NETWORK, epoch, step).integers(2**62)
            torch.manual_seed(int(draw) + rank)


def customise(
    transform: Callable | None, model: Callable[[int], nn.Module] | None, loss: Loss | None,
    init: Path | None, classes: int, device: torch.device,
) -> Custom:  # fmt: skip
    """Return the arguments of `train` in the form in which they are used.

    transform: of one image, in place of the recipe's augmentation; `CustomTransform` says how it is
    called. model: builds a network for so many classes, from normalised images (B, 3, H, W) to
    logits. loss: in place of the cross-entropy. init: a run's folder or a weights file, of which
    all is taken that fits by name and shape.
    """
    given = {"transform": transform, "model": model, "loss": loss}
    identity = {name: source_text(part) for name, part in given.items() if part is not None}
    if loss is not None:
        logits = torch.zeros(2, classes, device=device, requires_grad=True)
        try:
            labels = torch.zeros(2, dtype=torch.int64, device=device)
            torch.autograd.grad(loss(logits, labels), logits)
        except Exception as error:
            problem = f"the loss cannot be used: {in_short(error)}"
            raise UserError(f"{problem}; it must be a scalar that depends on the logits") from error
    weights = None
    if init is not None:
        weights, identity["init_sha256"] = read_init(init)
    return Custom(CustomTransform(transform) if transform else None, model, loss, weights, identity)


class CustomTransform:
    """A transform of one image, as a loader calls it: from uint8 (64, 64, 3) to the same.

    An albumentations Compose draws from the generator that it is given. Anything else gets a PIL
    image, or an array if it cannot work with that, after python's, numpy's and torch's generators
    were seeded. Raise `UserError` if it fails, or returns no such image.
    """

    def __init__(self, transform: Callable) -> None:
        self.transform, self.convert = transform, Image.fromarray
        sample = np.arange(3 * SIZE**2, dtype=np.uint8).reshape(SIZE, SIZE, 3)
        rngs = [generator(0, Stream.AUGMENT, 0, number) for number in range(2 * PROBES)]
        try:
            try:
                for rng in rngs[:PROBES]:
                    self(sample, rng)
            except Exception:
                self.convert = np.copy
                for rng in rngs[PROBES:]:
                    self(sample, rng)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the transform fails: {in_short(error)}") from error

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the transformed image, with draws from `rng` alone."""
        if hasattr(self.transform, "set_random_state"):
            result = augment(self.transform, image, rng)
        else:
            seed = int(rng.integers(2**32))
            for seeding in (random.seed, np.random.seed, torch.manual_seed):
                seeding(seed)
            result = np.asarray(self.transform(self.convert(image)))
        if (result.dtype, result.shape) != (np.uint8, image.shape):
            kind = f"{result.dtype} {result.shape}"
            raise UserError(f"the transform returns {kind}: uint8 {image.shape} is expected")
        return result


def build_custom(make: Callable[[int], nn.Module], classes: int, seed: int = 0) -> nn.Module:
    """Return the network that `make` builds for so many classes, its weights drawn by `seed`.

    Raise `UserError` if that fails, or if two normalised images do not give (2, classes) logits.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            network = make(classes)
            shape = tuple(network.eval()(torch.zeros(2, 3, SIZE, SIZE)).shape)
        except Exception as error:
            raise UserError(f"the network cannot be used: {in_short(error)}") from error
    if not any(each.requires_grad for each in network.parameters()):
        raise UserError("the network has no parameters to train")
    if shape != (2, classes):
        raise UserError(f"of 2 images the network makes {shape}: (2, {classes}) is expected")
    return network.train()


def gflop_per_image(network: nn.Module) -> float:
    """Return the arithmetic of training on one image of 64 x 64: three times a forward pass."""
    device, training = next(network.parameters()).device, network.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, SIZE, SIZE, device=device))
    network.train(training)
    return 3 * counter.get_total_flops() / 1e9


def fitting(init: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return those weights that the model has with the same name and shape.

    Raise `UserError` if there are none.
    """
    own = {name: value.shape for name, value in model.state_dict().items()}
    fit = {name: value for name, value in init.items() if own.get(name) == value.shape}
    if not any(value.ndim for value in fit.values()):
        raise UserError("nothing of --init fits this network: no name with the same shape")
    return fit


def fit_line(init: dict[str, torch.Tensor], model: nn.Module) -> str:
    """Return what of the weights was taken, and what of the network starts anew."""
    taken, own = fitting(init, model), model.state_dict()
    new = [name for name in own if name not in taken]
    new[3:] = [f"{len(new) - 3} more"] if len(new) > 3 else []
    return f"init: {len(taken)} of {len(own)} tensors; new: {', '.join(new) or 'none'}"

"""Several processes, one run: each trains its share of every batch, and all hold the same weights after every step.

torchrun starts them. Batch norm takes its statistics over the whole batch, so that the run is the one that a single
process would make, up to the order in which numbers are added. With one process nothing here does anything.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinylab.exceptions import UserError

PATIENCE = timedelta(minutes=5)
"""How long a process waits for the others before it gives up: longer than any step, test or save takes, and short
enough that a machine that went silent does not cost the others an hour (PyTorch's own choice is 10 to 30 minutes)."""

Value = TypeVar("Value")


class RankError(UserError):
    """An error of one process that is not the first: only it can tell."""


@dataclass(frozen=True)
class World:
    """All processes of a run. rank: this one's number, from 0. size: how many there are. local_rank: its number on its
    machine. control: the group by which they agree on what to do, on the CPU, so that no GPU is waited for."""

    rank: int
    size: int
    local_rank: int
    control: dist.ProcessGroup | None = None

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder and the log: the first one does."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: of a machine's GPUs, one for each of its processes."""
        return (
            torch.device("cuda", self.local_rank)
            if self.several and device.type == "cuda"
            else device
        )


ALONE = World(0, 1, 0)


# --- Coming together and parting --------------------------------------------------------------------------------------


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, connected while inside, by NCCL on GPUs, else by Gloo; `ALONE` without it.

    Raises `UserError` if the environment is not torchrun's, if the machine has fewer GPUs than processes, if the others
    do not come, or if one of them ends while this one waits for it.
    """
    size = _environment("WORLD_SIZE", default=1)
    if size == 1:
        yield ALONE
        return
    rank, local_rank = _environment("RANK", below=size), _environment("LOCAL_RANK")
    cuda = device.type == "cuda"
    if cuda and _environment("LOCAL_WORLD_SIZE") > torch.cuda.device_count():
        raise UserError(
            f"more processes than GPUs: this machine has {torch.cuda.device_count()}; lower --nproc-per-node"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"several processes need CUDA GPUs or CPUs, not {device.type}; use --device cpu"
        )
    if cuda:
        torch.cuda.set_device(local_rank)  # NCCL takes the current one
    _end_with_launcher()
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        _leave_in_trouble()
        raise UserError(
            f"the {size} processes did not find each other: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield World(rank, size, local_rank, control)
    except BaseException as error:
        _leave_in_trouble()
        if not _lost_another(error):
            raise
        message = (
            "another process of this run has ended, which should have said why: this one ends, too"
        )
        raise UserError(message) from error
    dist.destroy_process_group()


def _environment(name: str, default: int | None = None, below: int | None = None) -> int:
    """A number that torchrun leaves in the environment, from 0, or from 1 if it counts processes."""
    text = os.environ.get(name, "" if default is None else str(default))
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if value < ("SIZE" in name) or (below is not None and value >= below):
        wanted = f"a number below {below}" if below is not None else "a number"
        # Each process tells its own: the one that tells for all of them may be unknown, or fine.
        raise RankError(
            f"the environment variable {name} is '{text}', not {wanted}: start with torchrun, or unset it"
        )
    return value


def _end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the process that started this one is gone: torchrun, killed outright, would
    leave its processes behind. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # gone already
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_in_trouble() -> None:
    """Closes the connections, but does not wait for it any longer than it should take: after an error NCCL may wait for
    work that the other processes will never do."""
    if dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, name="leave", daemon=True)
        thread.start()
        thread.join(timeout=10)


def _lost_another(error: BaseException) -> bool:
    """Whether a collective failed because a process is gone or silent; Gloo has no type for that."""
    signs = ("closed by peer", "reset by peer", "roken pipe", "imed out waiting", "pair closure")
    by_text = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return by_text or isinstance(error, dist.DistError)


# --- Dividing and agreeing --------------------------------------------------------------------------------------------


def share(count: int, world: World) -> range:
    """Which of `count` things in a row this process takes: all processes' ranges follow each other, and their lengths
    differ by one at most, the longer ones first."""
    each, left = divmod(count, world.size)
    first = world.rank * each + min(world.rank, left)
    return range(first, first + each + (world.rank < left))


def highest(world: World, value: int) -> int:
    """The highest value of all processes, in each of them."""
    if not world.several:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=world.control)
    return int(found)


def from_rank_0(world: World, make: Callable[[], Value]) -> Value:
    """What `make()` returns in the first process, in each of them. An error there ends all of them: a `UserError` as
    one, anything else as a `UserError` that says so (and as itself in the first process)."""
    if not world.several:
        return make()
    answer: list = [None, None]
    error = None
    if world.rank == 0:
        try:
            answer[0] = make()
        except BaseException as raised:
            error = raised
            answer[1] = (
                str(raised)
                if isinstance(raised, UserError)
                else f"the first process failed: {raised!r}"
            )
    dist.broadcast_object_list(answer, src=0, group=world.control)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def agree(world: World, error: UserError | None) -> None:
    """Raises in every process if any of them has an error: the error of the first one that has."""
    if not world.several:
        if error is not None:
            raise error
        return
    errors: list[str | None] = [None] * world.size
    dist.all_gather_object(errors, None if error is None else str(error), group=world.control)
    for message in errors:
        if message is not None:
            raise UserError(message)


def any_rank(world: World, flag: torch.Tensor) -> torch.Tensor:
    """Whether `flag`, bool () where the run computes, is true in any process; the host does not wait for GPUs."""
    if not world.several:
        return flag
    found = flag.to(torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def sum_over_ranks(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors of one shape, in each of them, in the same type; added in int64 or float64.
    The tensors live where the run computes."""
    if not world.several:
        return tensor
    total = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def gather_rows(world: World, rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows (n_rank, ...), in the order of their ranks, in each of them; a process may have none.
    The rows live where the run computes."""
    if not world.several:
        return rows
    counts: list[int] = [0] * world.size
    dist.all_gather_object(counts, len(rows), group=world.control)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # the collective wants equal shapes
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


# --- Training together ------------------------------------------------------------------------------------------------


def wrap(model: nn.Module, world: World) -> nn.Module:
    """What to call in training: the model, whose gradients, with several processes, are the mean over them.

    So each has to scale its loss by `world.size` / (images of the whole batch) for a sum over its own images; the
    shares may then differ. Weights start as the first process's, and so do, in each step, the buffers: of
    synchronised batch norm they are the same anyway.
    """
    if not world.several:
        return model
    device_ids = [world.local_rank] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=device_ids)


def synchronise_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """The model with batch-norm layers that take their statistics over all processes' images; parameters, buffers and
    their names stay. In training mode all processes must call it equally often, as each call waits for the others;
    a process without images calls it with none of them."""
    if not world.several:
        return model
    if dist.get_backend() == "nccl":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d  # it differs in what it does, not in what it holds
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, whose numbers may differ, on CPUs; PyTorch's SyncBatchNorm takes
    GPUs only. (N, C, H, W) of any float type -> the same; statistics in the type of the parameters.

    Raises `ValueError` if there is but one value per channel in all of them, as the parent does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance, count = self._statistics(x.detach())
        if count < 2:
            raise ValueError(f"one value per channel has no variance: {tuple(x.shape)}")
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(
                variance * (count / (count - 1)), rate
            )  # unbiased, as the parent's
        return _Normalise.apply(x, self.weight, self.bias, mean, variance, count, self.eps)

    def _statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Mean and biased variance (C,) over all processes' values, and how many values there are per channel."""
        own = torch.zeros(3, x.shape[1], dtype=torch.float64)
        if x.numel():
            # It would move these running statistics, and takes their type for its own.
            unused = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            mean, variance = torch.batch_norm_update_stats(x, *unused, 0.0)
            own = torch.stack(
                [mean.double(), variance.double(), torch.full_like(own[0], x.numel() // x.shape[1])]
            )
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        means, variances, counts = torch.stack(parts).unbind(dim=1)
        weights = counts / counts.sum(dim=0)
        mean = (weights * means).sum(dim=0)
        # Variance within the processes and between them: a mean of squares less a squared mean would lose digits.
        variance = (weights * (variances + (means - mean).square())).sum(dim=0)
        kind = self.running_mean.dtype
        return mean.to(kind), variance.to(kind), int(counts[:, 0].sum())


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance (C,) are those of `count` values per
    channel in all processes. Gradients of weight and bias are this process's part, those of x are complete.

    Derivative: Ioffe and Szegedy, "Batch Normalization", 2015, section 3, its sums taken over all processes.
    """

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        count: int,
        eps: float,
    ) -> torch.Tensor:
        context.save_for_backward(x, weight, mean, variance)
        context.count, context.eps = count, eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple:
        x, weight, mean, variance = context.saved_tensors
        if x.numel():
            # Only the gradients of weight and bias: with fixed statistics they are the two sums that are needed.
            fixed = (x, weight, mean, variance, None, None, False, context.eps, [False, True, True])
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(gradient, *fixed)
        else:
            of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        to_weight, to_bias = sums / context.count
        scale = weight * (variance + context.eps).rsqrt()
        slope = -to_weight * scale * (variance + context.eps).rsqrt()
        scale, slope, mean, to_bias = (
            each[:, None, None] for each in (scale, slope, mean, to_bias)
        )
        of_x = torch.addcmul((gradient - to_bias).mul_(scale), x - mean, slope).to(x.dtype)
        return of_x, of_weight, of_bias, None, None, None, None

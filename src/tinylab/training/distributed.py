"""Several processes, started by torchrun: DistributedDataParallel.

Every process trains its share of each batch; the first one writes. Batch norm is synchronised on
CUDA only. Tested with two processes on a CPU; several GPUs have not been tried.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tinylab.exceptions import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int
    size: int

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process, so that all of them act alike."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of all processes' tensors."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """Return all processes' values, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def copy_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's batch-norm statistics: on CPUs each has its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


ALONE = Ranks(0, 1)


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Connect the processes that torchrun started; it ends them all when one of them fails."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: start as many")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return what training calls: the model, its gradients averaged over the processes."""
    if ranks.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)

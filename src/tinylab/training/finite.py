"""A step whose loss or gradients are not finite leaves no trace in weights, momenta and batch-norm statistics.

All of it is decided where the run computes: on a GPU nothing waits for the answer.
"""

from collections.abc import Iterable

import torch
from torch import nn

MOST_IN_A_ROW = 10
"""So many skipped steps in a row end a run: it has diverged, or its data are no images. (Loss scaling, which finds its
scale by skipping, needs fewer.)"""


class Statistics:
    """The buffers of a network, batch norm's running statistics, as they were when `keep` was called last.

    A forward pass changes them, also that of a step which is then skipped (pytorch/pytorch#115500).
    """

    def __init__(self, model: nn.Module) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._groups = list(by_type.values())
        self.keep()

    def keep(self) -> None:
        self._kept = self.values()

    @torch.no_grad()
    def put_back(self, where: torch.Tensor, values: list[torch.Tensor]) -> None:
        """Makes the buffers what they were if `where`, bool (), is true; `values` are what they are now."""
        for group, kept, now in zip(self._groups, self._kept, values, strict=True):
            parts = torch.where(where, kept, now).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(
                group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)]
            )

    def values(self) -> list[torch.Tensor]:
        """What they are now, one-dimensional tensors, one for each dtype."""
        # One tensor per type: a few large kernels in place of a hundred small ones.
        return [torch.cat([buffer.reshape(-1) for buffer in group]) for group in self._groups]


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether every value in all of the floating-point tensors, which share a device, is finite: bool ()."""
    # The largest absolute value is finite just if all are; unlike a sum of squares it never overflows by itself.
    largest = torch._foreach_norm(
        [each for each in tensors if each.is_floating_point()], float("inf")
    )
    return torch.isfinite(torch.stack(largest)).all()


@torch.no_grad()
def guarded_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: torch.Tensor
) -> None:
    """The optimiser's update of weights and momenta, or none if `bad`, bool (), is true; then loss scaling's update.

    With fused SGD, and with loss scaling on it, the kernel itself decides. Elsewhere the host has to know, and waits.
    """
    if scaler.is_enabled():
        # Its own search for gradients that are not finite must find what is bad for another reason, too.
        poisoned = next(each.grad for group in optimizer.param_groups for each in group["params"])
        poisoned.masked_fill_(bad, float("nan"))
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused") and bad.is_cuda:
        optimizer.found_inf = bad.float()
        optimizer.step()
        del optimizer.found_inf
    else:
        if bool(bad):
            optimizer.zero_grad(set_to_none=True)  # without gradients a step moves nothing
        optimizer.step()

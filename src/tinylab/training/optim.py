"""The optimiser, SGD or Muon, under a one-cycle schedule.

The first group always learns at `max_learning_rate`: logs and `tinylab schedule` show its rate.
"""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from tinylab.exceptions import UserError
from tinylab.recipe import Recipe

# Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
# https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_optimizer(
    model: nn.Module, recipe: Recipe, total_steps: int
) -> tuple[torch.optim.SGD, OneCycleLR]:
    """Return SGD or `Muon` and its schedule (Smith, Topin, "Super-Convergence", 2018)."""
    # ---- parameters by what happens to them, in the model's order ----
    muon = recipe.optimizer == "muon"
    decayed, flat, convolutions = [], [], []
    for each in model.parameters():
        if muon and each.ndim == 4:
            convolutions.append(each)
        elif each.ndim <= 1 and not recipe.decay_1d:  # by name a shortcut's batch norm is missed
            flat.append(each)
        else:
            decayed.append(each)
    groups = [{"params": decayed}, {"params": flat, "weight_decay": 0.0}]
    if muon:
        own = {"lr": recipe.muon_learning_rate, "weight_decay": recipe.muon_weight_decay}
        groups = [group | {"orthogonal": False} for group in groups]
        groups.append({"params": convolutions, "orthogonal": True} | own)

    # ---- optimiser ----
    # Fused, a step on CUDA spares loss scaling a wait. PyTorch's foreach gives a plain loop's bits.
    fused = not muon and next(model.parameters()).is_cuda
    optimizer = (Muon if muon else torch.optim.SGD)(
        [group for group in groups if group["params"]],
        lr=recipe.max_learning_rate, momentum=recipe.max_momentum,  # both until the schedule begins
        nesterov=recipe.nesterov, weight_decay=recipe.weight_decay, foreach=not fused, fused=fused,
    )  # fmt: skip
    for parameter in model.parameters():
        # A fused step that loss scaling skips would leave the first momentum uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    # ---- schedule ----
    one_step = recipe.warmup_share * total_steps == 1  # OneCycleLR would divide by zero
    rise = recipe.warmup_share * (1 + 1e-9 if one_step else 1)
    scheduler = OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps, pct_start=rise,
        anneal_strategy=recipe.anneal, base_momentum=recipe.base_momentum,
        max_momentum=recipe.max_momentum, div_factor=recipe.start_divisor,
        final_div_factor=recipe.final_divisor,
    )  # fmt: skip
    return optimizer, scheduler


def schedule(recipe: Recipe, images: int) -> list[tuple[int, float, float]]:
    """Return (step from 0, learning rate, momentum) of every step of a run on `images` images.

    With Muon, of the parameters that SGD moves. Raise `UserError` if the run has no step.
    """
    total_steps = recipe.epochs * recipe.steps_per_epoch(images)
    if total_steps < 1:
        few = f"{images:,} training images do not fill a batch of {recipe.batch_size:,}"
        raise UserError(f"{few}: lower --batch-size")
    stand_in = nn.ParameterList([nn.Parameter(torch.zeros(1, 1))])  # no part of the schedule
    optimizer, scheduler = make_optimizer(stand_in, recipe, total_steps)
    rows, group = [], optimizer.param_groups[0]
    for step in range(total_steps):
        rows.append((step, group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return rows


class Muon(torch.optim.SGD):
    """SGD that orthogonalises the momentum of the groups marked `orthogonal`: convolution weights.

    Each (out, in, height, width) is one matrix (out, in x height x width). Momentum accumulates as
    in SGD and is then replaced by the nearest matrix whose singular values are all about one, so
    that rare directions move as far as frequent ones. Weight decay is decoupled: weights shrink by
    learning rate x `muon_weight_decay`. For convolutions as in airbench94_muon.py
    (github.com/KellerJordan/cifar10-airbench); PyTorch's own takes matrices only.
    """

    def step(self) -> None:
        """Update all groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self.orthogonal_step(group)

    @torch.no_grad()
    def orthogonal_step(self, group: dict) -> None:
        """Move parameters of one shape together: on a GPU small kernels cost their start."""
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            gradients = [parameter.grad for parameter in parameters]
            moves = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(moves, group["momentum"])
            torch._foreach_add_(moves, gradients)
            if group["nesterov"]:
                moves = torch._foreach_add(gradients, moves, alpha=group["momentum"])
            directions = orthogonalise(torch.stack([move.flatten(1) for move in moves]))
            rows, columns = directions.shape[1:]
            # A tall matrix has fewer singular values than rows: this keeps its entries as large.
            reach = group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction.view_as(parameter), alpha=-reach)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return about U V' of the singular value decomposition U S V' of each matrix.

    matrices: (N, rows, columns); the result has the same shape and dtype. Singular values come out
    between about 0.7 and 1.2, or lower if they were next to nothing; zeros stay zeros.

    Five Newton-Schulz steps with Jordan's quintic polynomial, which is steep at 0 and therefore
    quick, not exact; on X X' (Gram Newton-Schulz), so that the long side of X (4,608 in the last
    stage) takes part in two products, not eleven. In fp32 on every device: of 16 bits the error
    grows twelvefold a step where a singular value is near zero.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / (torch.linalg.matrix_norm(x)[:, None, None] + 1e-7)  # singular values up to 1

    def quintic(gram: torch.Tensor) -> torch.Tensor:  # a I + b G + c G^2: times X Jordan's step
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        return polynomial

    gram = x @ x.mT
    product = polynomial = quintic(gram)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = quintic(gram)
        product = polynomial @ product
    x = product @ x
    return (x.mT if tall else x).to(matrices.dtype)

"""A number that is not finite ends the run in one line, wherever it comes from; what is saved is
finite, and the run continues from there."""

import pytest
import torch

from reliability.harness import assert_same_end, step_module, train_module
from tinylab.exceptions import RecipeFailed
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.training import progress

pytestmark = pytest.mark.promise("non-finite")


def poison(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy whose first number is the value."""
    tensor = tensor.clone()
    tensor[(0,) * tensor.ndim] = value
    return tensor


PLACES = {
    "images": lambda model, value: model.register_forward_pre_hook(
        lambda _, inputs: (poison(inputs[0], value),)
    ),
    "features": lambda model, value: model.layer4[1].conv2.register_forward_hook(
        lambda _module, _inputs, output: poison(output, value)
    ),
    "logits": lambda model, value: model.fc.register_forward_hook(
        lambda _module, _inputs, output: poison(output, value)
    ),
    "gradient": lambda model, value: model.conv1.weight.register_hook(
        lambda gradient: poison(gradient, value)
    ),
    "statistics": lambda model, value: model.layer2[0].bn1.register_forward_hook(
        lambda norm, *_: [norm.running_var.data.fill_(value)].clear()
    ),
}
"""Where the number gets in; the last one leaves loss, gradients and weights finite."""


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_ends_the_run(
    runs, undisturbed, tmp_path, monkeypatch, full, tally, place, value
) -> None:
    """As the very first step and later; each step is saved, or none within an epoch."""
    plan, (reference, _) = runs["sgd"], undisturbed("sgd")
    steps = [(epoch, step) for epoch in (1, 2) for step in range(3)]
    for number, where in enumerate(steps if full else steps[1:5:3]):
        run, seldom = Run(tmp_path / str(where)), number % 2 == 1

        def step(state, *arguments, where=where, **options) -> None:
            hook = PLACES[place](state.model, value) if (state.epoch, state.step) == where else None
            step_module.train_step(state, *arguments, **options)
            if hook:
                hook.remove()

        with monkeypatch.context() as patched:
            patched.setattr(train_module, "train_step", step)
            patched.setattr(train_module, "SAVE_SECONDS", 300 if seldom else 0)
            patched.setattr(progress, "LOOK_SECONDS", 300 if seldom else 0)
            with pytest.raises(RecipeFailed, match="not finite") as error:
                plan(run.folder)
        assert "\n" not in str(error.value)
        saved, _ = checkpoint.load(run.checkpoints)
        if saved is None:
            assert where == (1, 0) or seldom
        else:
            assert (saved["epoch"], saved["step"] + 1) <= (where[0], where[1] + 1)
            tensors = [*saved["model"].values(), *saved["average"].values()]
            assert all(torch.isfinite(each).all() for each in tensors)
        assert_same_end(plan(run.folder), reference)
        tally(injections=1)

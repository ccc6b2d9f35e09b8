"""One optimiser step: what it computes, however the batch is cut, and what leaves no trace."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same

from tinylab.data.augment import normalise
from tinylab.data.loader import Batch
from tinylab.exceptions import RecipeFailed, UserError
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.recipes import accurate
from tinylab.run.environment import Compute, choose
from tinylab.training.average import reestimate_batch_norm
from tinylab.training.distributed import Ranks
from tinylab.training.evaluate import make_forward
from tinylab.training.optim import make_optimizer
from tinylab.training.step import TrainState, new_state, require_batches, train_step
from tinylab.training.warm_up import memory_hint, warm_up

CLASSES = 12


@pytest.fixture
def wide(narrow) -> Recipe:
    """A batched recipe with everything in it, on a narrow network."""
    shape = {"name": "wide", "epochs": 4, "batch_size": 8, "width": 16}
    return replace(accurate(), **shape, max_learning_rate=0.05, ema_decay=0.5)


def made_batch(count: int = 8, seed: int = 0, share: float = 1.0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=rng)
    labels, partners = torch.randint(0, CLASSES, (2, count), generator=rng)
    return Batch(images, labels, None if share == 1 else partners, share)


def state_of(recipe: Recipe, compute: Compute) -> TrainState:
    state = new_state(recipe, CLASSES, seed=0, steps_per_epoch=3, compute=compute)
    state.model.train()
    return state


def test_totals_against_numpy(compute, narrow) -> None:
    state, expected = state_of(narrow, compute), np.zeros(4)
    for count in (9, 4):
        batch = made_batch(count, seed=count)
        labels = batch.labels.numpy()
        with torch.no_grad():
            logits = copy.deepcopy(state.model)(normalise(batch.images, narrow)).double().numpy()
        hits = np.argsort(-logits, axis=1) == labels[:, None]
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(count), labels]
        expected += [losses.sum(), hits[:, 0].sum(), hits[:, :5].sum(), count]
        train_step(state, narrow, compute, batch)
    assert state.totals.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert 0 < expected[1] < expected[2] < 13
    assert (state.step, int(state.skipped)) == (2, 0)


def test_the_network_sees_the_resolution_of_its_epoch_and_of_the_test(compute, wide) -> None:
    recipe = replace(wide, ramp=((16, 0.25), (32, 0.5)), test_resolution=72, ema_decay=None)
    state, seen = state_of(recipe, compute), []
    state.model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for state.epoch in (1, 2, 3, 4):
        train_step(state, recipe, compute, made_batch())
    with torch.no_grad():
        make_forward(state.tested, recipe, compute)(made_batch().images)
    assert seen == [16, 32, 32, 64, 72]
    assert state.tested is state.model


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.3])
def test_a_cut_batch_against_a_plain_loop(compute, wide, micro_batch, share) -> None:
    """Batch norm sees piece by piece; a hit on a mixed image is one on its heavier label."""
    recipe, batch = replace(wide, micro_batch=micro_batch), made_batch(share=share)
    state, plain = state_of(recipe, compute), build_model(recipe, CLASSES, seed=0).train()
    optimizer, _ = make_optimizer(plain, recipe, 12)
    pieces = torch.arange(8).tensor_split(-(-8 // micro_batch))
    assert max(map(len, pieces)) <= micro_batch
    targets = share * F.one_hot(batch.labels, CLASSES)
    if share < 1:
        targets = targets + (1 - share) * F.one_hot(batch.partners, CLASSES)
    total, hits = 0.0, 0
    for rows in pieces:
        logits = plain(normalise(batch.images[rows], recipe))
        smoothed = 0.85 * targets[rows] + 0.15 / CLASSES
        loss = -(smoothed * logits.log_softmax(dim=1)).sum()
        (loss / 8).backward()
        total += loss.item()
        hits += int((logits.argmax(dim=1) == targets[rows].argmax(dim=1)).sum())
    optimizer.step()
    train_step(state, recipe, compute, batch)
    for ours, theirs in zip(state.model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6
    for (name, ours), theirs in zip(state.model.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4), name
    assert torch.allclose(state.model.fc.weight, plain.fc.weight, atol=1e-5)
    assert state.totals[[0, 1, 3]].tolist() == pytest.approx([total, hits, 8], rel=1e-5)
    assert (state.step, state.scheduler.last_epoch, int(state.average.n_averaged)) == (1, 1, 1)


def test_loss_scaling_skips_its_own_steps_and_ends_where_none_is_left(compute, narrow) -> None:
    state = state_of(narrow, compute)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    train_step(state, narrow, compute, made_batch())
    before = copy.deepcopy(state.model)
    state.model.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    train_step(state, narrow, compute, made_batch())
    pairs = zip(before.parameters(), state.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert (state.step, int(state.skipped), state.scaler.get_scale()) == (2, 1, 1.0)
    state.require_finite(weights=True)
    train_step(state, narrow, compute, made_batch())
    with pytest.raises(RecipeFailed, match=r"not finite in epoch 1.*or --precision fp32$"):
        state.require_finite()


def test_every_process_has_a_share_of_every_batch(narrow) -> None:
    recipe = replace(narrow, batch_size=9)
    require_batches(recipe, 28)
    require_batches(replace(recipe, drop_last=True), 28, Ranks(1, 2))
    line = "2 processes, but an epoch's smallest batch has 1 images: choose another batch-size"
    with pytest.raises(UserError, match=line):
        require_batches(recipe, 28, Ranks(0, 2))


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_warm_up_meets_every_shape_and_changes_nothing(compute, wide, optimizer) -> None:
    recipe = replace(wide, ramp=((32, 0.5),), optimizer=optimizer, drop_last=False)
    state, shapes = state_of(recipe, compute), {True: set(), False: set()}
    train_step(state, recipe, compute, made_batch())
    before, generators = copy.deepcopy(state.to_checkpoint()), torch.get_rng_state()
    for network in (state.model, state.tested):

        def note(module, inputs, network=network) -> None:
            shapes[network.training].add((len(inputs[0]), inputs[0].shape[-1]))

        network.conv1.register_forward_pre_hook(note)
    warm_up(state, recipe, compute, (21, 507))
    assert shapes[True] == {(8, 32), (8, 64), (5, 32), (5, 64)}
    assert shapes[False] >= {(32, 64), (27, 64)}  # of 507 images, on a CPU
    assert_same(state.to_checkpoint(), before)
    assert torch.equal(torch.get_rng_state(), generators)


def test_running_out_of_memory_is_told_from_other_errors(compute, wide) -> None:
    advice = "^out of memory on cpu with 8 images at once: a smaller --micro-batch"
    for text in ("CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory"):
        with pytest.raises(RecipeFailed, match=advice), memory_hint(wide, compute):
            raise RuntimeError(text)
    with pytest.raises(RecipeFailed, match=advice), memory_hint(wide, compute):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), memory_hint(wide, compute):
        raise RuntimeError("shapes do not match")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_step_never_waits_for_the_gpu(wide, precision) -> None:
    compute = choose("cuda", precision)
    state, batch = state_of(wide, compute), made_batch()
    batch = batch._replace(images=batch.images.cuda(), labels=batch.labels.cuda())
    for waits in ("default", "error"):  # the first step allocates and chooses algorithms
        torch.cuda.set_sync_debug_mode(waits)
        try:
            train_step(state, wide, compute, batch)
            reestimate_batch_norm(state.tested, [normalise(batch.images, wide)] * 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
